use std::collections::BTreeMap;
use std::time::Duration;

use k8s_openapi::jiff::Timestamp;
use kube::{Client, ResourceExt as _};
use tokio::sync::watch;
use zpod_kubernetes::crd::{SnapshotPhase, ZfsSnapshot};
use zpod_kubernetes::{Kept as _, KubeCatalog};
use zpod_storage::catalog::CatalogError;

/// How often groups are looked at.
const LOOK_EVERY: Duration = Duration::from_secs(60);
/// So long the call that began a group is believed to be repeated: csi-snapshotter waits 5 minutes at most in between.
const GRACE_SECONDS: i64 = 600;

/// Rolls back groups of snapshots whose taking was begun and never finished, because the controller died and the call was
/// not repeated: a group is there as a whole or not at all.
///
/// # Design
/// What this destroys is on many nodes, and none of them is believed of more than its own member. A group is found by
/// `spec.group`, and that it is complete is the controller's word in `spec.complete`: both can't be written by nodes, and a
/// complete group is never rolled back, whatever its members say.
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
    for (id, members) in &groups {
        match state(members, now) {
            State::Left => {}
            State::Whole => {
                tracing::info!(group = id, "a group snapshot has all its members: it is complete");
                for member in members {
                    catalog.want_complete(member).await?;
                }
            }
            State::LeftBehind => {
                tracing::warn!(
                    group = id,
                    "a group snapshot is not whole, and nobody goes on with it: what there is of it is removed"
                );
                for member in members {
                    catalog.destroy(member).await?;
                }
            }
        }
    }
    Ok(())
}

/// What is to be done with a group.
#[derive(Debug, PartialEq, Eq)]
enum State {
    /// Nothing: it is complete, or somebody is at it.
    Left,
    /// It has all its members, and the call that took it did not live to say so. Those of before `spec.complete` too.
    Whole,
    /// It was begun and not finished, or its removal was, and nobody has been at it for a while.
    LeftBehind,
}

fn state(members: &[ZfsSnapshot], now: Timestamp) -> State {
    let ending = members.iter().any(|member| member.spec.destroy);
    if !ending && is_complete(members) {
        return if members.iter().all(|member| member.spec.complete) { State::Left } else { State::Whole };
    }
    let size = members.iter().filter_map(|member| Some(member.spec.group.as_ref()?.size)).max().unwrap_or_default();
    let copied = |member: &ZfsSnapshot| {
        let phase = member.own_status().phase;
        member.metadata.deletion_timestamp.is_none()
            && matches!(phase, Some(SnapshotPhase::Copying | SnapshotPhase::Ready))
    };
    if !ending && members.len() == usize::try_from(size).unwrap_or_default() && members.iter().all(copied) {
        return State::Whole;
    }
    let since = members.iter().filter_map(|member| {
        let ended = member.metadata.deletion_timestamp.as_ref().map(|time| time.0);
        ended.max(member.creation_timestamp().map(|time| time.0))
    });
    let old = since.max().is_some_and(|since| now.as_second() - since.as_second() > GRACE_SECONDS);
    let left = members.iter().any(|member| member.metadata.deletion_timestamp.is_none());
    if old && left { State::LeftBehind } else { State::Left }
}

/// Whether a group was answered for as a whole: the controller's word on one member is enough, for it is given when all
/// are there.
pub(super) fn is_complete(members: &[ZfsSnapshot]) -> bool {
    members.iter().any(|member| member.spec.complete)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::fake::{Answers, Asked};
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
    use zpod_kubernetes::crd::ZfsSnapshotStatus;
    use zpod_volume::SnapshotId;

    fn member(phase: Option<SnapshotPhase>, age: i64) -> ZfsSnapshot {
        let spec = serde_json::from_value(serde_json::json!({
            "snapshotName": "s", "volume": "v", "nodeName": "n", "group": {"id": "g", "name": "g", "size": 2},
        }));
        let mut object = ZfsSnapshot::new("x", spec.unwrap());
        object.status = Some(ZfsSnapshotStatus { phase, ..Default::default() });
        object.metadata.creation_timestamp = Some(Time(Timestamp::from_second(1_000_000 - age).unwrap()));
        object
    }

    fn is_left_behind(members: &[ZfsSnapshot], now: Timestamp) -> bool {
        state(members, now) == State::LeftBehind
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
        ending[1].spec.complete = true;
        assert!(is_left_behind(&ending, now), "its removal was begun");
    }

    #[test]
    fn a_complete_group_is_never_rolled_back_whatever_a_node_says_of_its_member() {
        let (ready, marked) = (Some(SnapshotPhase::Ready), Some(SnapshotPhase::Marked));
        let now = Timestamp::from_second(1_000_000).unwrap();
        let complete = |phase| {
            let mut object = member(phase, 3600);
            object.spec.complete = true;
            object
        };
        for said in [marked, None, Some(SnapshotPhase::Refused), Some(SnapshotPhase::Deleting)] {
            assert_eq!(state(&[complete(ready), complete(said)], now), State::Left, "{said:?}");
            // The controller ended before it had said so of all.
            assert_eq!(state(&[complete(ready), member(said, 3600)], now), State::Whole, "{said:?}");
        }
        assert_eq!(state(&[complete(ready)], now), State::Left, "the other has let its object go");
        // Made anew after somebody had deleted them by hand, and not taken over by its node yet.
        let anew = |phase| {
            let mut object = member(None, 3600);
            object.spec.adopt = Some(Box::new(ZfsSnapshotStatus { phase, ..Default::default() }));
            object
        };
        assert_eq!(state(&[member(ready, 3600), anew(ready)], now), State::Whole);
        // Of before there was such a word.
        assert_eq!(state(&[member(ready, 3600), member(ready, 3600)], now), State::Whole);
    }

    const KIND: &str = "/apis/zpod.storage/v1alpha1/zfssnapshots";

    /// What the leader writes when it finds these.
    async fn written(members: Vec<ZfsSnapshot>) -> Vec<Asked> {
        let members: Vec<_> = members
            .into_iter()
            .enumerate()
            .map(|(number, mut member)| {
                member.metadata.name = Some(SnapshotId::from_name(&number.to_string()).to_string());
                member.metadata.uid = Some(number.to_string());
                member
            })
            .collect();
        let list = serde_json::json!({
            "apiVersion": "zpod.storage/v1alpha1", "kind": "ZfsSnapshotList", "metadata": {"resourceVersion": "1"},
            "items": members,
        });
        let mut api = Answers::default().with(KIND, list);
        for member in &members {
            api = api.with(&format!("{KIND}/{}", member.name_any()), serde_json::to_value(member).unwrap());
        }
        look(&KubeCatalog::of_cluster(api.client())).await.unwrap();
        api.writes()
    }

    #[tokio::test]
    async fn the_leader_touches_neither_a_complete_group_nor_a_snapshot_that_a_label_calls_a_member() {
        let mut complete = vec![member(Some(SnapshotPhase::Ready), 3600), member(Some(SnapshotPhase::Marked), 3600)];
        complete.iter_mut().for_each(|member| member.spec.complete = true);
        let mut alone = member(Some(SnapshotPhase::Ready), 3600);
        alone.spec.group = None;
        alone.metadata.labels = Some([("zpod.storage/group".to_owned(), "of-nobody".to_owned())].into());
        complete.push(alone);
        assert_eq!(written(complete).await, []);
    }

    #[tokio::test]
    async fn the_leader_says_of_a_whole_group_that_it_is_complete_and_destroys_one_that_is_left_behind() {
        let (ready, marked) = (Some(SnapshotPhase::Ready), Some(SnapshotPhase::Marked));
        let writes = written(vec![member(ready, 3600), member(ready, 3600)]).await;
        let specs = |writes: &[Asked], key: &str| writes.iter().filter(|write| write.body["spec"][key] == true).count();
        assert_eq!((writes.len(), specs(&writes, "complete")), (2, 2), "{writes:?}");
        let writes = written(vec![member(ready, 3600), member(marked, 3600)]).await;
        assert_eq!((writes.len(), specs(&writes, "destroy")), (4, 2), "{writes:?}");
    }
}
