//! Groups of snapshots: all guests have marked, each an instant of its own, before the first copy is made, and all or none
//! are kept.

use std::collections::BTreeSet;
use std::sync::Arc;

use futures_util::future::join_all;
use zpod_storage::backing::Outcome;
use zpod_storage::catalog::{Created, GroupMember, Snapshot, SnapshotPhase, Volume};
use zpod_storage::crash;
use zpod_volume::{GroupId, SnapshotId, VolumeId};

use super::local::PATIENCE;
use super::{GroupRequest, steps};
use crate::volumes::copies::Target;
use crate::volumes::{Context, VolumeError};

/// Records are looked through this many at a time.
const SCAN: usize = 256;

/// The name of a group's snapshot of one volume. Its id follows from it.
pub(crate) fn member_name(group: &str, volume: VolumeId) -> String {
    format!("{group}/{volume}")
}

/// The record of a group's snapshot of one volume, of which there is nothing yet.
pub(crate) fn wanted_member(request: &GroupRequest, volume: &Volume) -> Snapshot {
    let name = member_name(&request.name, volume.id);
    Snapshot {
        id: SnapshotId::from_name(&name),
        name,
        volume: volume.id,
        node: volume.node.clone(),
        group: Some(GroupMember {
            id: GroupId::from_name(&request.name),
            name: request.name.clone(),
            size: request.volumes.len(),
        }),
        phase: SnapshotPhase::Wanted,
        allow_copy: request.allow_copy || volume.parameters.allow_copy,
        contents: None,
        revision: 0,
    }
}

/// The snapshots of a group, whatever there is of them.
pub(super) async fn members(context: &Context, id: GroupId) -> Result<Vec<Snapshot>, VolumeError> {
    let (mut from, mut members) = (None, Vec::new());
    loop {
        let page = context.snapshots.list(from, SCAN).await?;
        let ours = |snapshot: &Snapshot| snapshot.group.as_ref().is_some_and(|group| group.id == id);
        members.extend(page.records.into_iter().filter(ours));
        match page.next {
            Some(next) => from = Some(next),
            None => return Ok(members),
        }
    }
}

pub(super) async fn create(context: &Arc<Context>, request: GroupRequest) -> Result<Vec<Snapshot>, VolumeError> {
    let id = GroupId::from_name(&request.name);
    let volumes: BTreeSet<_> = request.volumes.iter().copied().collect();
    {
        let _locks = context.lock_all(volumes.iter().copied()).await;
        let found = members(context, id).await?;
        check_same(&found, &request, &volumes)?;
        let under_way = found.len() == volumes.len() && all_copied(context, &found).await?;
        let taken = if under_way {
            take_all(context, found).await
        } else {
            // Of an attempt, or a removal, that was cut short: its instant is over.
            undo_all(context, found).await?;
            make(context, &request, &volumes).await
        };
        if let Err((volume, source)) = taken {
            if let Err(left) = undo_all(context, members(context, id).await?).await {
                tracing::warn!(group = request.name, "what was made of it could not be removed: {left}");
            }
            return Err(VolumeError::GroupMember { name: request.name, volume, source: Box::new(source) });
        }
    }
    let members = members(context, id).await?;
    for member in &members {
        context.copies.wait(Target::Snapshot(member.id), PATIENCE).await;
    }
    self::members(context, id).await
}

/// Whether what exists under a name is what was asked for.
fn check_same(found: &[Snapshot], request: &GroupRequest, volumes: &BTreeSet<VolumeId>) -> Result<(), VolumeError> {
    let other = found.iter().find(|snapshot| {
        let group = snapshot.group.as_ref();
        !volumes.contains(&snapshot.volume) || group.is_some_and(|group| group.size != volumes.len())
    });
    match other {
        None => Ok(()),
        Some(_) => {
            let of: Vec<_> = found.iter().map(|snapshot| snapshot.volume.to_string()).collect();
            let difference = format!("it is of other volumes ({})", of.join(", "));
            Err(VolumeError::GroupExists {
                name: request.name.clone(),
                id: GroupId::from_name(&request.name),
                difference,
            })
        }
    }
}

/// Whether every copy is there or being made.
async fn all_copied(context: &Context, found: &[Snapshot]) -> Result<bool, VolumeError> {
    for snapshot in found {
        let copied = match snapshot.phase {
            SnapshotPhase::Ready => true,
            SnapshotPhase::Copying => {
                let target = Target::Snapshot(snapshot.id);
                context.copies.is_known(target) || steps::is_there(context, snapshot.id).await?
            }
            _ => false,
        };
        if !copied {
            return Ok(false);
        }
    }
    Ok(true)
}

/// What failed, and of which volume.
type Failed = (VolumeId, VolumeError);

async fn make(context: &Arc<Context>, request: &GroupRequest, volumes: &BTreeSet<VolumeId>) -> Result<(), Failed> {
    let mut wanted = Vec::with_capacity(volumes.len());
    for id in volumes {
        let volume = context.ready(*id).await.map_err(|error| (*id, error))?;
        wanted.push(wanted_member(request, &volume));
    }
    crash::point("group: begin");
    let mut recorded = Vec::with_capacity(wanted.len());
    for snapshot in wanted {
        let volume = snapshot.volume;
        match context.snapshots.create(snapshot).await.map_err(|error| (volume, error.into()))? {
            Created::Created(snapshot) => recorded.push(snapshot),
            Created::Existed(Snapshot { id, name, .. }) => {
                let difference = "it is none of this group".to_owned();
                return Err((volume, VolumeError::SnapshotExists { name, id, difference }));
            }
        }
        crash::point("group: recorded");
    }
    let marking = recorded.into_iter().map(|snapshot| async {
        let volume = snapshot.volume;
        steps::mark(context, snapshot, SnapshotPhase::Marked).await.map_err(|error| (volume, error))
    });
    // All are waited for, whatever becomes of one: what failed can be undone only when nobody is at work any more.
    let marked = join_all(marking).await.into_iter().collect::<Result<Vec<_>, _>>()?;
    crash::point("group: marked");
    take_all(context, marked).await
}

async fn take_all(context: &Arc<Context>, snapshots: Vec<Snapshot>) -> Result<(), Failed> {
    for snapshot in snapshots {
        let volume = snapshot.volume;
        steps::take(context, snapshot).await.map_err(|error| (volume, error))?;
        crash::point("group: copied");
    }
    Ok(())
}

async fn undo_all(context: &Context, snapshots: Vec<Snapshot>) -> Result<(), VolumeError> {
    let mut result = Ok(());
    for snapshot in snapshots {
        // The others are removed, whatever becomes of one.
        result = result.and(steps::undo(context, snapshot.id).await.map(drop));
    }
    result
}

pub(super) async fn delete(context: &Context, id: GroupId) -> Result<Outcome, VolumeError> {
    let found = members(context, id).await?;
    if found.is_empty() {
        return Ok(Outcome::Unchanged);
    }
    let _locks = context.lock_all(found.iter().map(|snapshot| snapshot.volume)).await;
    undo_all(context, found).await?;
    Ok(Outcome::Changed)
}
