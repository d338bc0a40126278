use std::collections::BTreeMap;
use std::time::Duration;

use k8s_openapi::jiff::Timestamp;
use kube::{Client, ResourceExt as _};
use tokio::sync::watch;
use zpod_kubernetes::KubeCatalog;
use zpod_kubernetes::crd::{SnapshotPhase, ZfsSnapshot};
use zpod_storage::catalog::CatalogError;

/// How often groups are looked at.
const LOOK_EVERY: Duration = Duration::from_secs(60);
/// So long the call that began a group is believed to be repeated: csi-snapshotter waits 5 minutes at most in between.
const GRACE_SECONDS: i64 = 600;

/// Rolls back groups of snapshots whose taking was begun and never finished, because the controller died and the call was
/// not repeated: a group is there as a whole or not at all.
#[derive(Debug, Clone, Copy, Default)]
pub struct Groups;

impl Groups {
    /// Looks for them while this process leads.
    pub async fn watch(self, client: Client, mut leads: watch::Receiver<bool>) {
        let catalog = KubeCatalog::<ZfsSnapshot>::of_cluster(client);
        while leads.wait_for(|leads| *leads).await.is_ok() {
            if let Err(error) = look(&catalog).await {
                tracing::info!("groups of snapshots could not be looked at: {error}");
            }
            let _ = tokio::time::timeout(LOOK_EVERY, leads.wait_for(|leads| !*leads)).await;
        }
    }
}

async fn look(catalog: &KubeCatalog<ZfsSnapshot>) -> Result<(), CatalogError> {
    let mut groups: BTreeMap<String, Vec<ZfsSnapshot>> = BTreeMap::new();
    for object in catalog.in_group(None).await? {
        let id = object.spec.group.as_ref().map(|group| group.id.clone()).unwrap_or_default();
        groups.entry(id).or_default().push(object);
    }
    let now = Timestamp::now();
    for (id, members) in groups.iter().filter(|(_, members)| is_left_behind(members, now)) {
        tracing::warn!(
            group = id,
            "a group snapshot is not whole, and nobody goes on with it: what there is of it is removed"
        );
        for member in members {
            catalog.destroy(member).await?;
        }
    }
    Ok(())
}

/// Whether a group was begun and not finished, or its removal was, and nobody has been at it for a while.
fn is_left_behind(members: &[ZfsSnapshot], now: Timestamp) -> bool {
    let size = members.iter().filter_map(|member| Some(member.spec.group.as_ref()?.size)).max().unwrap_or_default();
    let copied = |member: &&ZfsSnapshot| {
        let phase = member.status.as_ref().and_then(|status| status.phase);
        matches!(phase, Some(SnapshotPhase::Copying | SnapshotPhase::Ready))
    };
    let whole =
        members.len() == usize::try_from(size).unwrap_or_default() && members.iter().all(|member| copied(&member));
    let ending = members.iter().any(|member| member.spec.destroy);
    let since = members.iter().filter_map(|member| {
        let ended = member.metadata.deletion_timestamp.as_ref().map(|time| time.0);
        ended.max(member.creation_timestamp().map(|time| time.0))
    });
    let old = since.max().is_some_and(|since| now.as_second() - since.as_second() > GRACE_SECONDS);
    let left = members.iter().any(|member| member.metadata.deletion_timestamp.is_none());
    (!whole || ending) && old && left
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
    use zpod_kubernetes::crd::ZfsSnapshotStatus;

    fn member(phase: Option<SnapshotPhase>, age: i64) -> ZfsSnapshot {
        let spec = serde_json::from_value(serde_json::json!({
            "snapshotName": "s", "volume": "v", "nodeName": "n", "group": {"id": "g", "name": "g", "size": 2},
        }));
        let mut object = ZfsSnapshot::new("x", spec.unwrap());
        object.status = Some(ZfsSnapshotStatus { phase, ..Default::default() });
        object.metadata.creation_timestamp = Some(Time(Timestamp::from_second(1_000_000 - age).unwrap()));
        object
    }

    #[test]
    fn only_a_group_that_is_not_whole_for_long_is_left_behind() {
        let (ready, marked) = (Some(SnapshotPhase::Ready), Some(SnapshotPhase::Marked));
        let now = Timestamp::from_second(1_000_000).unwrap();
        let old =
            |phases: &[Option<SnapshotPhase>]| phases.iter().map(|phase| member(*phase, 3600)).collect::<Vec<_>>();
        assert!(!is_left_behind(&old(&[ready, ready]), now));
        assert!(!is_left_behind(&old(&[ready, Some(SnapshotPhase::Copying)]), now), "a full copy takes its time");
        assert!(is_left_behind(&old(&[ready]), now), "one of two");
        assert!(is_left_behind(&old(&[ready, marked]), now));
        assert!(!is_left_behind(&[member(ready, 3600), member(None, 30)], now), "somebody is at it");
        let mut ending = old(&[ready, ready]);
        ending[0].spec.destroy = true;
        assert!(is_left_behind(&ending, now), "its removal was begun");
    }
}
