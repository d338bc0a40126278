//! Records of what was never made, and that nobody asks for any more.
//!
//! # Design
//! Who asks for a volume repeats that until there is an answer, and the controller removes a record together with its no.
//! One is left where either ended in between. The leader deletes it without asking for the end of any data: only its node
//! knows whether there is a device, and lets the record go where there is none. One that came back from a backup without
//! its status looks the same, and its data is kept.

use k8s_openapi::api::core::v1::PersistentVolumeClaim;
use k8s_openapi::jiff::Timestamp;
use kube::api::{ApiResource, DynamicObject, GroupVersionKind, ListParams};
use kube::{Api, Client, ResourceExt as _};
use zpod_kubernetes::crd::{Phase, ZfsSnapshot, ZfsVolume};
use zpod_kubernetes::{Kept, KubeCatalog, READY};

use super::answers::condition;
use super::reasons::COPYING;

/// So long whoever asked may come back.
const GRACE_SECONDS: i64 = 900;
/// Objects the API server is asked for at once.
const PAGE: u32 = 500;

/// As external-snapshotter names what it asks for, and what it keeps the answer in.
const SNAPSHOT_PREFIX: &str = "snapshot-";
const CONTENT_PREFIX: &str = "snapcontent-";

type Error = Box<dyn std::error::Error + Send + Sync>;

/// Deletes the record of a volume without a PersistentVolume that was never made, where its claim is gone. Whether it did.
pub(super) async fn discard_volume(
    catalog: &KubeCatalog<ZfsVolume>,
    client: &Client,
    object: &ZfsVolume,
) -> Result<bool, Error> {
    if !is_unmade_volume(object) || !is_unwanted(client, object).await? {
        return Ok(false);
    }
    let name = object.name_any();
    tracing::info!(volume = name, "never made, and its claim is gone: its record is removed");
    Ok(catalog.discard(object).await?)
}

/// No node has made it, and none is at it.
fn is_unmade_volume(object: &ZfsVolume) -> bool {
    let copied = condition(object, READY).is_some_and(|said| said.reason == COPYING);
    object.metadata.deletion_timestamp.is_none() && !copied && object.is_unmade()
}

/// Whether nobody can come back for it. One that no claim is known of is kept, unless its node has refused it.
async fn is_unwanted(client: &Client, object: &ZfsVolume) -> Result<bool, kube::Error> {
    let Some(claim) = &object.spec.claim else {
        return Ok(object.status.as_ref().is_some_and(|status| status.phase == Some(Phase::Refused)));
    };
    let claims: Api<PersistentVolumeClaim> = Api::namespaced(client.clone(), &claim.namespace);
    let found = claims.get_metadata_opt(&claim.name).await?;
    Ok(found.is_none_or(|found| !claim.uid.is_empty() && found.metadata.uid.as_ref() != Some(&claim.uid)))
}

/// Deletes the records of snapshots that were never taken and whose VolumeSnapshotContent is gone. How many there were.
pub(super) async fn discard_snapshots(client: &Client) -> Result<usize, Error> {
    let gvk = GroupVersionKind::gvk("snapshot.storage.k8s.io", "v1", "VolumeSnapshotContent");
    let contents: Api<DynamicObject> = Api::all_with(client.clone(), &ApiResource::from_gvk(&gvk));
    match contents.list_metadata(&ListParams::default().limit(1)).await {
        Ok(_) => {}
        // No such kind here, or no right to it: then nobody can be asked.
        Err(kube::Error::Api(status)) if matches!(status.code, 403 | 404) => return Ok(0),
        Err(error) => return Err(error.into()),
    }
    let (catalog, now) = (KubeCatalog::<ZfsSnapshot>::of_cluster(client.clone()), Timestamp::now());
    let (mut token, mut count) = (None::<String>, 0);
    loop {
        let (objects, next) = catalog.page(token.as_deref(), PAGE).await?;
        for object in objects.iter().filter(|object| is_unmade_snapshot(object, now)) {
            let Some(uid) = object.spec.snapshot_name.strip_prefix(SNAPSHOT_PREFIX) else { continue };
            if contents.get_metadata_opt(&format!("{CONTENT_PREFIX}{uid}")).await?.is_none() {
                tracing::info!(
                    snapshot = object.name_any(),
                    "never taken, and its VolumeSnapshot is gone: its record is removed"
                );
                count += usize::from(catalog.discard(object).await?);
            }
        }
        token = next;
        if token.is_none() {
            return Ok(count);
        }
    }
}

/// No node has taken it. What groups have left is looked after with their group.
fn is_unmade_snapshot(object: &ZfsSnapshot, now: Timestamp) -> bool {
    object.metadata.deletion_timestamp.is_none()
        && object.spec.group.is_none()
        && object.is_unmade()
        && is_old(object, now)
}

/// Whether it is older than whoever made it may take to come back for it.
pub(super) fn is_old<K: Kept>(object: &K, now: Timestamp) -> bool {
    object.creation_timestamp().is_some_and(|created| now.as_second() - created.0.as_second() > GRACE_SECONDS)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::fake::Answers;
    use hyper::Method;
    use serde_json::{Value, json};
    use zpod_storage::catalog::{Catalog as _, CatalogError, Phase as RecordPhase, Volume};
    use zpod_volume::{SnapshotId, VolumeId};

    const CLAIM: &str = "/api/v1/namespaces/prod/persistentvolumeclaims/data";
    const VOLUMES: &str = "/apis/zpod.storage/v1alpha1/zfsvolumes";
    const SNAPSHOTS: &str = "/apis/zpod.storage/v1alpha1/zfssnapshots";
    const CONTENTS: &str = "/apis/snapshot.storage.k8s.io/v1/volumesnapshotcontents";

    fn volume(status: Value) -> Value {
        json!({
            "apiVersion": "zpod.storage/v1alpha1", "kind": "ZfsVolume",
            "metadata": {"name": VolumeId::from_name("pvc-1").to_string(), "uid": "u", "resourceVersion": "7",
                         "finalizers": ["zpod.storage/device"], "creationTimestamp": "2026-01-01T00:00:00Z"},
            "spec": {"volumeName": "pvc-1", "nodeName": "n1", "capacity": "1Gi",
                     "parameters": {"backing": "file", "provisioning": "thin", "headroom": "8x", "quota": "refquota"},
                     "claim": {"namespace": "prod", "name": "data", "uid": "c-1"}},
            "status": status,
        })
    }

    fn claim(uid: &str) -> Value {
        json!({"apiVersion": "v1", "kind": "PersistentVolumeClaim",
               "metadata": {"name": "data", "namespace": "prod", "uid": uid}})
    }

    /// Whether it is discarded, and what was asked of the API server.
    async fn discarded(object: Value, claim: Option<Value>) -> bool {
        let parsed: ZfsVolume = serde_json::from_value(object.clone()).unwrap();
        let api = Answers::default().with(&format!("{VOLUMES}/{}", parsed.name_any()), object);
        let api = claim.into_iter().fold(api, |api, claim| api.with(CLAIM, claim));
        let catalog = KubeCatalog::of_cluster(api.client());
        let discarded = discard_volume(&catalog, &api.client(), &parsed).await.unwrap();
        let writes = api.writes();
        assert_eq!(writes.len(), usize::from(discarded));
        if let Some(asked) = writes.first() {
            // Only as it was looked at, and without a word on its data.
            assert_eq!(asked.method, Method::DELETE);
            assert_eq!(asked.body["preconditions"], json!({"uid": "u", "resourceVersion": "7"}));
        }
        discarded
    }

    #[tokio::test]
    async fn a_volume_that_was_never_made_goes_when_its_claim_is_gone() {
        let refused = json!({"phase": "Refused"});
        for status in [json!(null), json!({}), refused.clone()] {
            assert!(discarded(volume(status.clone()), None).await, "{status}");
            assert!(
                discarded(volume(status.clone()), Some(claim("c-2"))).await,
                "another claim of that name: {status}"
            );
            assert!(!discarded(volume(status.clone()), Some(claim("c-1"))).await, "{status}");
        }
        let mut of_nobody = volume(refused);
        of_nobody["spec"].as_object_mut().unwrap().remove("claim");
        assert!(discarded(of_nobody.clone(), None).await);
        of_nobody["status"] = json!(null);
        assert!(!discarded(of_nobody, None).await, "who asked for it may come back");
    }

    #[tokio::test]
    async fn what_was_made_or_is_being_made_stays() {
        let copying = json!([{"type": "Ready", "status": "False", "reason": "Copying", "message": "", "lastTransitionTime":
            "2026-01-01T00:00:00Z"}]);
        for status in [json!({"phase": "Ready"}), json!({"phase": "Deleting"}), json!({"conditions": copying})] {
            assert!(!discarded(volume(status.clone()), None).await, "{status}");
        }
        let mut adopted = volume(json!(null));
        adopted["spec"]["adopt"] = json!({"phase": "Ready"});
        assert!(!discarded(adopted, None).await);
        let mut leaving = volume(json!(null));
        leaving["metadata"]["deletionTimestamp"] = json!("2026-01-02T00:00:00Z");
        assert!(!discarded(leaving, None).await);
    }

    /// Its node is making it while somebody gives it up: what comes of that is not recorded, and so the node keeps none of it.
    #[tokio::test]
    async fn what_was_given_up_before_it_was_made_gets_no_record_any_more() {
        let mut leaving = volume(json!(null));
        leaving["metadata"]["deletionTimestamp"] = json!("2026-01-02T00:00:00Z");
        let mut to_be_destroyed = leaving.clone();
        to_be_destroyed["spec"]["destroy"] = json!(true);
        let mut made = leaving.clone();
        made["status"] = json!({"phase": "Ready", "capacity": "1Gi"});
        for (object, recorded) in [(leaving, false), (to_be_destroyed, true), (made, true)] {
            let parsed: ZfsVolume = serde_json::from_value(object.clone()).unwrap();
            let api = Answers::default().with(&format!("{VOLUMES}/{}", parsed.name_any()), object);
            let catalog = KubeCatalog::<ZfsVolume>::of_node(api.client(), "n1");
            let record = parsed.record().unwrap();
            let update = catalog.update(Volume { phase: RecordPhase::Ready, initialized: true, ..record }).await;
            assert_eq!(matches!(update, Err(CatalogError::NotFound(_))), !recorded, "{update:?}");
            assert_eq!(api.writes().len(), usize::from(recorded));
        }
    }

    fn snapshot(name: &str, created: &str, status: Value) -> Value {
        json!({
            "apiVersion": "zpod.storage/v1alpha1", "kind": "ZfsSnapshot",
            "metadata": {"name": SnapshotId::from_name(name).to_string(), "uid": "u", "resourceVersion": "7",
                         "creationTimestamp": created},
            "spec": {"snapshotName": name, "volume": VolumeId::from_name("pvc-1").to_string(), "nodeName": "n1"},
            "status": status,
        })
    }

    fn list(kind: &str, items: &[Value]) -> Value {
        json!({"apiVersion": "v1", "kind": kind, "metadata": {"resourceVersion": "1"}, "items": items})
    }

    #[tokio::test]
    async fn a_snapshot_that_was_never_taken_goes_when_its_content_is_gone() {
        let (old, now) = ("2026-01-01T00:00:00Z", Timestamp::now().to_string());
        let objects = [
            snapshot("snapshot-left", old, json!(null)),
            snapshot("snapshot-wanted", old, json!(null)),
            snapshot("snapshot-new", &now, json!(null)),
            snapshot("snapshot-ready", old, json!({"phase": "Ready"})),
            snapshot("by-hand", old, json!({"phase": "Refused"})),
        ];
        let kept = json!({"apiVersion": "snapshot.storage.k8s.io/v1", "kind": "VolumeSnapshotContent",
                          "metadata": {"name": "snapcontent-wanted"}});
        let path = |object: &Value| format!("{SNAPSHOTS}/{}", object["metadata"]["name"].as_str().unwrap());
        let api = objects.iter().fold(Answers::default(), |api, object| api.with(&path(object), object.clone()));
        let api = api.with(SNAPSHOTS, list("ZfsSnapshotList", &objects));
        assert_eq!(discard_snapshots(&api.client()).await.unwrap(), 0, "without the snapshot API nobody can be asked");
        let api = api.with(CONTENTS, list("VolumeSnapshotContentList", std::slice::from_ref(&kept)));
        let api = api.with(&format!("{CONTENTS}/snapcontent-wanted"), kept);
        assert_eq!(discard_snapshots(&api.client()).await.unwrap(), 1);
        let gone: Vec<_> = api.writes().into_iter().map(|asked| asked.path).collect();
        assert_eq!(gone, [path(&objects[0])]);
    }
}
