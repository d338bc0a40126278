use std::cmp::Reverse;
use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use serde::Serialize;
use zpod_kubernetes::crd::{Mode, Phase, RollbackStatus, SourceRef, ZfsSnapshot, ZfsVolume, ZfsVolumeStatus};
use zpod_kubernetes::{HEALTHY, Quantity, READY};

use crate::options::Sort;

/// A volume.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct VolumeView {
    /// The id: the name of its ZfsVolume.
    pub(crate) volume: String,
    /// Of its claim; empty where it has none.
    pub(crate) namespace: String,
    pub(crate) claim: String,
    pub(crate) node: String,
    /// The pod that uses it; empty where none does.
    pub(crate) pod: String,
    /// `Ready`, `Refused`, `Deleting`, or `Pending` before its node has looked.
    pub(crate) phase: String,
    /// `Filesystem` or `Block`.
    pub(crate) mode: String,
    pub(crate) capacity_bytes: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) used_bytes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) available_bytes: Option<u64>,
    /// With snapshots and metadata.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) allocated_bytes: Option<u64>,
    /// Such as `1.43x`.
    pub(crate) compress_ratio: String,
    /// As `ZfsVolume.status.pool.health`; empty before a guest has said anything.
    pub(crate) health: String,
    /// What is wrong, and what to do; empty when all is well.
    pub(crate) message: String,
    pub(crate) pool: String,
    pub(crate) dataset: String,
    pub(crate) errors: Errors,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) last_scrub: Option<ScrubView>,
    /// The last rollback that was asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) rollback: Option<RollbackView>,
    /// How many snapshots there are of it.
    pub(crate) snapshots: usize,
    /// What it was made from.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) source: Option<SourceRef>,
    /// What a VolumeAttributesClass or `props set` asks for.
    pub(crate) attributes: BTreeMap<String, String>,
}

/// What went wrong, counted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Errors {
    pub(crate) read: i64,
    pub(crate) write: i64,
    pub(crate) checksum: i64,
    /// Files or objects with permanent damage.
    pub(crate) data: i64,
}

/// A scrub.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct ScrubView {
    /// `Finished`, `Scanning`, `Paused` or `Canceled`.
    pub(crate) state: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) end_time: Option<Time>,
    pub(crate) errors: i64,
}

/// A rollback to a snapshot in the pool.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct RollbackView {
    pub(crate) id: String,
    pub(crate) snapshot: String,
    /// `Pending`, `RolledBack` or `Refused`.
    pub(crate) state: String,
    pub(crate) requested_at: Time,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) end_time: Option<Time>,
    /// Why it was refused.
    pub(crate) message: String,
}

impl RollbackView {
    fn new(rollback: RollbackStatus) -> Self {
        Self {
            id: rollback.id.to_string(),
            state: format!("{:?}", rollback.state),
            snapshot: rollback.snapshot,
            requested_at: rollback.requested_at,
            end_time: rollback.end_time,
            message: rollback.message,
        }
    }
}

impl Errors {
    pub(crate) fn total(self) -> i64 {
        let all = [self.read, self.write, self.checksum, self.data];
        all.into_iter().fold(0, i64::saturating_add)
    }
}

impl VolumeView {
    pub(crate) fn new(object: &ZfsVolume, snapshots: &[ZfsSnapshot]) -> Self {
        let none = ZfsVolumeStatus::default();
        let (spec, status) = (&object.spec, object.status.as_ref().unwrap_or(&none));
        let id = object.metadata.name.clone().unwrap_or_default();
        let pool = status.pool.clone().unwrap_or_default();
        let claim = spec.claim.clone().unwrap_or_default();
        let bytes = |quantity: Option<Quantity>| quantity.map(|quantity| quantity.0.0);
        let pod = status.publication.as_ref().and_then(|publication| publication.pod.as_ref());
        let phase = if object.metadata.deletion_timestamp.is_some() {
            "Deleting"
        } else {
            match status.phase {
                None => "Pending",
                Some(Phase::Ready) => "Ready",
                Some(Phase::Refused) => "Refused",
                Some(Phase::Deleting) => "Deleting",
            }
        };
        Self {
            namespace: claim.namespace,
            claim: claim.name,
            node: spec.node_name.clone(),
            pod: pod.map(|pod| pod.name.clone()).unwrap_or_default(),
            phase: phase.into(),
            mode: if spec.mode == Some(Mode::Block) { "Block" } else { "Filesystem" }.into(),
            capacity_bytes: status.capacity.unwrap_or(spec.capacity).0.0,
            used_bytes: bytes(pool.used),
            available_bytes: bytes(pool.available),
            allocated_bytes: bytes(pool.allocated),
            compress_ratio: pool.compress_ratio,
            health: pool.health,
            message: message(status, &pool.message),
            dataset: if pool.name.is_empty() { String::new() } else { format!("{}/data", pool.name) },
            pool: pool.name,
            errors: Errors {
                read: pool.read_errors,
                write: pool.write_errors,
                checksum: pool.checksum_errors,
                data: pool.data_errors,
            },
            last_scrub: pool.last_scrub.map(|scrub| ScrubView {
                state: scrub.state,
                end_time: scrub.end_time,
                errors: scrub.errors,
            }),
            rollback: status.rollback.clone().map(RollbackView::new),
            snapshots: snapshots.iter().filter(|snapshot| snapshot.spec.volume == id).count(),
            source: spec.source.clone(),
            attributes: spec.attributes.clone(),
            volume: id,
        }
    }

    /// What it is known by: its claim, or its id.
    pub(crate) fn name(&self) -> &str {
        if self.claim.is_empty() { &self.volume } else { &self.claim }
    }

    /// One word for how it is: the pool's health, or how far the device has come.
    pub(crate) fn state(&self) -> &str {
        if self.phase == "Ready" && !self.health.is_empty() { &self.health } else { &self.phase }
    }

    /// What is wrong, and whether it goes back to a snapshot at its next start.
    pub(crate) fn said(&self) -> String {
        let pending = self.rollback.as_ref().filter(|rollback| rollback.state == "Pending");
        let pending = pending.map(|rollback| format!("goes back to snapshot {} at its next start", rollback.snapshot));
        let all = [Some(self.message.clone()).filter(|message| !message.is_empty()), pending];
        all.into_iter().flatten().collect::<Vec<_>>().join("; ")
    }

    /// Used over capacity, in percent.
    pub(crate) fn percent(&self) -> Option<f64> {
        let used = self.used_bytes.filter(|_| self.capacity_bytes > 0)?;
        Some(used as f64 * 100.0 / self.capacity_bytes as f64)
    }

    fn ratio(&self) -> f64 {
        self.compress_ratio.trim_end_matches('x').parse().unwrap_or(1.0)
    }
}

/// Of all that is said of a volume, what is wrong.
fn message(status: &ZfsVolumeStatus, pool: &str) -> String {
    let wrong = status.conditions.iter().filter(|condition| condition.status == "False");
    // Of the pool, its own words say it already.
    let wrong = wrong.filter(|condition| condition.type_ != HEALTHY || pool.is_empty());
    // What its node looked for and did not find.
    let missing = |reason: &str| reason == "Missing";
    let wrong = wrong.filter(|condition| {
        condition.type_ != READY || status.phase != Some(Phase::Ready) || missing(&condition.reason)
    });
    let said = wrong.map(|condition| condition.message.as_str());
    let all: Vec<&str> = std::iter::once(pool).chain(said).filter(|text| !text.is_empty()).collect();
    all.join("; ")
}

/// Puts what is asked for first.
pub(crate) fn sort(volumes: &mut [VolumeView], by: Sort) {
    // Bytes and percents as whole numbers, so that they have an order.
    let full = |volume: &VolumeView| (volume.percent().unwrap_or(0.0) * 1000.0) as u64;
    let name = |volume: &VolumeView| (volume.namespace.clone(), volume.name().to_owned());
    match by {
        Sort::Errors => volumes.sort_by_cached_key(|v| {
            let sick = !v.message.is_empty() || !matches!(v.health.as_str(), "" | "Online" | "Exported");
            (Reverse(v.errors.total()), Reverse(sick), Reverse(full(v)), name(v))
        }),
        Sort::Full => volumes.sort_by_cached_key(|v| (Reverse(full(v)), name(v))),
        Sort::Used => volumes.sort_by_cached_key(|v| (Reverse(v.used_bytes.unwrap_or(0)), name(v))),
        Sort::Ratio => volumes.sort_by_cached_key(|v| (Reverse((v.ratio() * 100.0) as u64), name(v))),
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use serde_json::{Value, json};

    pub(crate) fn object(id: &str, claim: &str, status: Value) -> ZfsVolume {
        serde_json::from_value(json!({
            "apiVersion": "zpod.storage/v1alpha1", "kind": "ZfsVolume",
            "metadata": {"name": id},
            "spec": {
                "volumeName": format!("pvc-{id}"), "nodeName": "n1", "capacity": "10Gi",
                "parameters": {"backing": "file", "provisioning": "thin", "headroom": "8x", "quota": "refquota"},
                "claim": {"namespace": "prod", "name": claim},
            },
            "status": status,
        }))
        .unwrap()
    }

    pub(crate) fn online(used: &str) -> Value {
        json!({
            "phase": "Ready", "capacity": "10Gi",
            "publication": {"targetPath": "/t", "token": "00000000-0000-0000-0000-000000000001", "bootId": "b",
                            "pod": {"namespace": "prod", "name": "db-0"}},
            "pool": {"name": "zpod-0123456789ab", "health": "Online", "used": used, "compressRatio": "1.43x"},
        })
    }

    #[test]
    fn a_rollback_that_is_to_come_is_said_and_is_no_sickness() {
        let mut status = online("1Gi");
        status["rollback"] = json!({"id": "00000000-0000-0000-0000-000000000001", "snapshot": "before",
                                    "requestedAt": "2026-11-30T12:00:00Z", "state": "Pending"});
        let view = VolumeView::new(&object("a", "data", status.clone()), &[]);
        assert_eq!(
            (view.said().as_str(), view.message.as_str()),
            ("goes back to snapshot before at its next start", "")
        );
        assert_eq!(serde_json::to_value(&view).unwrap()["rollback"]["state"], "Pending");
        status["rollback"]["state"] = json!("RolledBack");
        assert_eq!(VolumeView::new(&object("a", "data", status), &[]).said(), "");
    }

    #[test]
    fn a_running_volume_shows_all_that_its_object_says() {
        let view = VolumeView::new(&object("a", "data", online("1Gi")), &[]);
        assert_eq!((view.name(), view.state(), view.pod.as_str()), ("data", "Online", "db-0"));
        assert_eq!(view.used_bytes, Some(1 << 30));
        assert_eq!(view.percent(), Some(10.0));
        assert_eq!(view.dataset, "zpod-0123456789ab/data");
        assert_eq!(view.message, "");
        let json = serde_json::to_value(&view).unwrap();
        assert_eq!(json["compressRatio"], "1.43x");
        assert_eq!(json["capacityBytes"], 10u64 << 30);
        assert!(json.get("lastScrub").is_none());
    }

    #[test]
    fn what_is_wrong_is_said_once() {
        let condition = |type_: &str, message: &str| {
            json!({"type": type_, "status": "False", "reason": "R", "message": message,
                   "lastTransitionTime": "2026-01-01T00:00:00Z"})
        };
        let mut status = online("1Gi");
        status["pool"]["message"] = json!("the pool is degraded");
        status["conditions"] = json!([condition("Healthy", "the pool is degraded"), condition("Expanded", "no room")]);
        let view = VolumeView::new(&object("a", "data", status), &[]);
        assert_eq!(view.message, "the pool is degraded; no room");
        // The node's own word, where no guest says anything.
        let mut status = online("1Gi");
        status["pool"]["health"] = json!("Unknown");
        status["conditions"] = json!([condition("Healthy", "its disk is not plugged in")]);
        let view = VolumeView::new(&object("a", "data", status), &[]);
        assert_eq!((view.state(), view.message.as_str()), ("Unknown", "its disk is not plugged in"));
        let status = json!({"phase": "Refused", "conditions": [condition("Ready", "no room on n1")]});
        let view = VolumeView::new(&object("a", "data", status), &[]);
        assert_eq!((view.state(), view.message.as_str()), ("Refused", "no room on n1"));
    }

    #[test]
    fn errors_come_first_then_the_sick_then_the_full() {
        let mut sick = online("1Gi");
        sick["pool"]["health"] = json!("Degraded");
        let mut broken = online("1Mi");
        broken["pool"]["checksumErrors"] = json!(3);
        let objects = [
            object("a", "quiet", online("1Gi")),
            object("b", "full", online("9Gi")),
            object("c", "sick", sick),
            object("d", "broken", broken),
        ];
        let mut views: Vec<_> = objects.iter().map(|object| VolumeView::new(object, &[])).collect();
        sort(&mut views, Sort::Errors);
        let order: Vec<_> = views.iter().map(VolumeView::name).collect();
        assert_eq!(order, ["broken", "sick", "full", "quiet"]);
        sort(&mut views, Sort::Used);
        assert_eq!(views[0].name(), "full");
    }
}
