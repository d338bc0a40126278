//! Snapshots of several volumes, all or none.
//!
//! # Design
//! Every member is an object of its own. The nodes have the guests mark the instant and say `Marked`; when all have, the
//! controller sets `spec.copy` on all of them, and the nodes make the copies. When all are made or being made it sets
//! `spec.complete` on all and answers: from then on no node's word about its member can make it roll the group back. A
//! group is its members: a controller that dies anywhere leaves nothing but objects, from which the repeated call goes on,
//! or which [`super::super::Groups`] rolls back when none comes.

use std::collections::BTreeSet;

use futures_util::future::join_all;
use zpod_kubernetes::READY;
use zpod_kubernetes::crd::{SnapshotPhase, ZfsSnapshot};
use zpod_storage::catalog::Snapshot;
use zpod_storage::crash;
use zpod_volume::{GroupId, SnapshotId, VolumeId};

use super::{ClusterSnapshotter, is_leaving, phase, said_now, usable};
use crate::cluster::answers::{ANY_NODE, refusal};
use crate::cluster::groups::is_complete;
use crate::volumes::{GroupRequest, VolumeError, member_name, wanted_member};

impl ClusterSnapshotter {
    pub(super) async fn take_group(&self, request: &GroupRequest) -> Result<Vec<Snapshot>, VolumeError> {
        let id = GroupId::from_name(&request.name);
        let found = self.snapshots.in_group(Some(id)).await?;
        // Of a complete group every member was there. What a node says of its own since is no reason to end the others.
        let ending = |object: &ZfsSnapshot| object.spec.destroy && is_leaving(object);
        let given_up = |object: &ZfsSnapshot| is_leaving(object) || phase(object) == Some(SnapshotPhase::Refused);
        let over = if is_complete(&found) { found.iter().any(ending) } else { found.iter().any(given_up) };
        if over {
            // An earlier call could not have them all, and its roll-back was cut short; or its removal was.
            self.end_all(&found).await?;
            return Err(VolumeError::CutShort(format!("group snapshot {} was begun and given up", request.name)));
        }
        let members = self.ask_all(id, request, &found).await?;
        let taken = self.take_all(request, &members).await;
        if let Err(error) = &taken
            && !matches!(error, VolumeError::NodeSilent { .. } | VolumeError::Catalog(_))
        {
            // All or none. What can't be removed now, the repeated call removes, or the leader.
            crash::point("cluster group: roll back");
            let objects = self.snapshots.in_group(Some(id)).await?;
            if !is_complete(&objects)
                && let Err(error) = self.end_all(&objects).await
            {
                tracing::warn!(group = %id, "not all of a group that failed could be removed yet: {error}");
            }
        }
        taken
    }

    /// Asks for every member that is not asked for yet. Nothing is asked for before all volumes are known to be there.
    async fn ask_all(
        &self,
        id: GroupId,
        request: &GroupRequest,
        found: &[ZfsSnapshot],
    ) -> Result<Vec<Snapshot>, VolumeError> {
        let mut members = found.iter().map(usable).collect::<Result<Vec<_>, _>>()?;
        let volumes: BTreeSet<_> = request.volumes.iter().copied().collect();
        let other = members.iter().find(|member| {
            let group = member.group.as_ref();
            !volumes.contains(&member.volume) || group.is_some_and(|group| group.size != request.volumes.len())
        });
        if let Some(other) = other {
            let difference = format!("it is of other volumes, one of them {}", other.volume);
            return Err(VolumeError::GroupExists { name: request.name.clone(), id, difference });
        }
        let mut missing = Vec::new();
        if is_complete(found)
            && let Some(lost) = volumes.iter().find(|volume| members.iter().all(|member| member.volume != **volume))
        {
            // Taken now it would show another instant than the others.
            let id = SnapshotId::from_name(&member_name(&request.name, *lost)).to_string();
            return Err(VolumeError::SnapshotNotFound { id, node: ANY_NODE.into() });
        }
        for volume in volumes.iter().filter(|volume| members.iter().all(|member| member.volume != **volume)) {
            let failed = |source| self.failed(request, *volume, source);
            missing.push(wanted_member(request, &self.source(*volume).await.map_err(failed)?));
        }
        for wanted in missing {
            members.push(self.ask(wanted).await?);
        }
        Ok(members)
    }

    fn failed(&self, request: &GroupRequest, volume: VolumeId, source: VolumeError) -> VolumeError {
        VolumeError::GroupMember { name: request.name.clone(), volume, source: Box::new(source) }
    }

    async fn take_all(&self, request: &GroupRequest, members: &[Snapshot]) -> Result<Vec<Snapshot>, VolumeError> {
        let marked = self.all(request, members, "marked", is_marked).await?;
        crash::point("cluster group: marked");
        for object in &marked {
            self.snapshots.want_copy(object).await?;
            crash::point("cluster group: copy asked for");
        }
        let taken = self.all(request, members, "taken", super::is_taken).await?;
        crash::point("cluster group: taken");
        for object in &taken {
            self.snapshots.want_complete(object).await?;
            crash::point("cluster group: complete");
        }
        taken.iter().map(usable).collect()
    }

    /// Waits for all, and gives their objects if none has failed.
    async fn all(
        &self,
        request: &GroupRequest,
        members: &[Snapshot],
        what: &'static str,
        answered: fn(&ZfsSnapshot) -> bool,
    ) -> Result<Vec<ZfsSnapshot>, VolumeError> {
        let answers = join_all(members.iter().map(|member| self.answer(member, what, answered))).await;
        let mut objects = Vec::with_capacity(members.len());
        let mut silent = None;
        for (member, answer) in members.iter().zip(answers) {
            match answer {
                Ok(object)
                    if is_leaving(&object)
                        || phase(&object) == Some(SnapshotPhase::Refused)
                        || said_now(&object, READY) =>
                {
                    return Err(self.failed(request, member.volume, refusal(&object, READY, &member.node)));
                }
                Ok(object) => objects.push(object),
                Err(error) => silent = Some(error),
            }
        }
        silent.map_or(Ok(objects), Err)
    }

    /// Has all destroyed and waits until they are gone; tries all, whatever becomes of one.
    pub(super) async fn end_all(&self, objects: &[ZfsSnapshot]) -> Result<(), VolumeError> {
        let ended = join_all(objects.iter().map(|object| self.end(object))).await;
        ended.into_iter().collect()
    }
}

fn is_marked(object: &ZfsSnapshot) -> bool {
    phase(object).is_some() || said_now(object, READY)
}
