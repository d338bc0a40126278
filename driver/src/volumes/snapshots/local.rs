use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use zpod_storage::backing::Outcome;
use zpod_storage::catalog::{Created, Snapshot, SnapshotPhase};
use zpod_storage::crash;
use zpod_volume::{GroupId, Mark, SnapshotId, VolumeId};

use super::{GroupRequest, SnapshotPage, SnapshotRequest, Snapshots, groups, steps};
use crate::volumes::context::to_the_end;
use crate::volumes::copies::{Progress, Target};
use crate::volumes::{Context, VolumeError};

/// How long a call waits for a full copy before it says how far that is.
pub(in crate::volumes) const PATIENCE: Duration = Duration::from_secs(5);
/// Records are looked through this many at a time.
const SCAN: usize = 256;

/// Takes and removes snapshots of the volumes of this node.
#[derive(Debug, Clone)]
pub struct Snapshotter {
    context: Arc<Context>,
}

impl Snapshotter {
    /// A snapshotter of this node.
    pub fn new(context: Arc<Context>) -> Self {
        Self { context }
    }

    /// Marks the instant of a recorded snapshot: the first half of taking one with its group. What is marked already is
    /// the answer too.
    ///
    /// # Errors
    /// When it can't be marked; then there is no mark.
    pub async fn mark(&self, id: SnapshotId) -> Result<Snapshot, VolumeError> {
        let context = self.context.clone();
        to_the_end(async move {
            let volume = context.find_snapshot(id).await?.volume;
            let _lock = context.lock(volume).await;
            let snapshot = context.find_snapshot(id).await?;
            match snapshot.phase {
                SnapshotPhase::Wanted => steps::mark(&context, snapshot, SnapshotPhase::Marked).await,
                SnapshotPhase::Deleting => Err(steps::deleting(id)),
                _ => Ok(snapshot),
            }
        })
        .await
    }

    /// Makes the copy of a recorded snapshot: all of it where it was taken alone, the second half where its group has been
    /// marked. A full copy goes on by itself: then the record says [`SnapshotPhase::Copying`] and [`Self::progress`] how far
    /// it is.
    ///
    /// # Errors
    /// When it can't be made. [`Self::destroy`] then removes what there is of it.
    pub async fn copy(&self, id: SnapshotId) -> Result<Snapshot, VolumeError> {
        let context = self.context.clone();
        to_the_end(async move { copy(&context, id).await }).await
    }

    /// Removes the record of a snapshot that was never begun. Whether there is no such record now.
    ///
    /// # Errors
    /// When it can't be looked at, or its record can't be removed.
    pub async fn discard_unmade(&self, id: SnapshotId) -> Result<bool, VolumeError> {
        let context = self.context.clone();
        to_the_end(async move {
            let Some(found) = context.snapshots.get(id).await? else { return Ok(true) };
            let _lock = context.lock(found.volume).await;
            let Some(found) = context.snapshots.get(id).await? else { return Ok(true) };
            let begun = found.phase != SnapshotPhase::Wanted || context.copies.is_known(Target::Snapshot(id));
            if begun || steps::is_there(&context, id).await? {
                return Ok(false);
            }
            // Of an attempt that failed late.
            steps::unmark(&context, found.volume, &Mark::for_snapshot(id)).await;
            context.marks().remove(&id);
            context.snapshots.remove(id).await?;
            Ok(true)
        })
        .await
    }

    /// That the copy of a snapshot is here.
    ///
    /// # Errors
    /// When it is not, or can't be looked for.
    pub async fn find_copy(&self, id: SnapshotId) -> Result<(), VolumeError> {
        self.context.with_backing(move |backing| backing.snapshot_allocated(id).map(drop)).await
    }

    /// How far a full copy is, while one is being made.
    pub fn progress(&self, id: SnapshotId) -> Option<Progress> {
        self.context.copies.progress(Target::Snapshot(id))
    }

    /// Clears away what snapshots have left that were cut short, where nobody but this process takes any: one whose copy
    /// is whole becomes the snapshot it was to be, all else goes.
    pub async fn collect(&self) {
        let context = self.context.clone();
        if let Err(error) = to_the_end(async move { collect(&context).await }).await {
            tracing::warn!("snapshots that were cut short are left as they are: {error}");
        }
    }

    /// Removes a snapshot and its record, whatever there is of it; those of groups too.
    ///
    /// # Errors
    /// While it is being copied, or when its copy can't be removed.
    pub async fn destroy(&self, id: SnapshotId) -> Result<Outcome, VolumeError> {
        let context = self.context.clone();
        to_the_end(async move { destroy(&context, id).await }).await
    }
}

#[async_trait]
impl Snapshots for Snapshotter {
    async fn create(&self, request: SnapshotRequest) -> Result<Snapshot, VolumeError> {
        let context = self.context.clone();
        to_the_end(async move { create(&context, request).await }).await
    }

    async fn delete(&self, id: SnapshotId) -> Result<Outcome, VolumeError> {
        let context = self.context.clone();
        to_the_end(async move {
            let Some(snapshot) = context.snapshots.get(id).await? else { return Ok(Outcome::Unchanged) };
            match snapshot.group {
                Some(group) => Err(VolumeError::InGroup { id, group: group.id }),
                None => destroy(&context, id).await,
            }
        })
        .await
    }

    async fn get(&self, id: SnapshotId) -> Result<Snapshot, VolumeError> {
        let snapshot = self.context.find_snapshot(id).await?;
        if is_shown(&snapshot) { Ok(snapshot) } else { Err(self.context.snapshot_not_found(&id.to_string())) }
    }

    async fn list(
        &self,
        of: Option<VolumeId>,
        from: Option<String>,
        limit: usize,
    ) -> Result<SnapshotPage, VolumeError> {
        let parse = |token: String| token.parse().map_err(|_| VolumeError::Token(token.chars().take(64).collect()));
        let (mut from, mut page) = (from.map(parse).transpose()?, SnapshotPage::default());
        loop {
            let scanned = self.context.snapshots.list(from, SCAN).await?;
            for snapshot in scanned.records {
                if !is_shown(&snapshot) || of.is_some_and(|volume| volume != snapshot.volume) {
                    continue;
                }
                if page.snapshots.len() == limit {
                    return Ok(SnapshotPage { next: Some(snapshot.id.to_string()), ..page });
                }
                page.snapshots.push(snapshot);
            }
            match scanned.next {
                Some(next) => from = Some(next),
                None => return Ok(page),
            }
        }
    }

    async fn create_group(&self, request: GroupRequest) -> Result<Vec<Snapshot>, VolumeError> {
        let context = self.context.clone();
        to_the_end(async move { groups::create(&context, request).await }).await
    }

    async fn group(&self, id: GroupId) -> Result<Vec<Snapshot>, VolumeError> {
        let members = groups::members(&self.context, id).await?;
        let whole = members.iter().all(is_shown);
        if members.is_empty() || !whole {
            return Err(VolumeError::GroupNotFound { id: id.to_string() });
        }
        Ok(members)
    }

    async fn delete_group(&self, id: GroupId) -> Result<Outcome, VolumeError> {
        let context = self.context.clone();
        to_the_end(async move { groups::delete(&context, id).await }).await
    }
}

/// Whether it has contents, or is getting them.
fn is_shown(snapshot: &Snapshot) -> bool {
    matches!(snapshot.phase, SnapshotPhase::Copying | SnapshotPhase::Ready)
}

async fn create(context: &Arc<Context>, request: SnapshotRequest) -> Result<Snapshot, VolumeError> {
    let id = SnapshotId::from_name(&request.name);
    discard_other(context, &request).await?;
    {
        let _lock = context.lock(request.volume).await;
        let snapshot = record(context, &request).await?;
        if snapshot.phase == SnapshotPhase::Ready {
            return Ok(snapshot);
        }
        crash::point("snapshot: recorded");
        take_or_undo(context, snapshot).await?;
    }
    context.copies.wait(Target::Snapshot(id), PATIENCE).await;
    let _lock = context.lock(request.volume).await;
    let snapshot = context.find_snapshot(id).await?;
    take_or_undo(context, snapshot).await
}

/// Takes a snapshot. What was refused, or failed while it was copied in full, leaves nothing: nobody may come back for it.
async fn take_or_undo(context: &Arc<Context>, snapshot: Snapshot) -> Result<Snapshot, VolumeError> {
    let id = snapshot.id;
    let taken = steps::take(context, snapshot).await;
    if taken.is_err()
        && let Err(left) = steps::undo(context, id).await
    {
        tracing::warn!(snapshot = %id, "what was made of it could not be removed: {left}");
    }
    taken
}

/// The record of a snapshot that is wanted, as it was found or as it is now made.
async fn record(context: &Context, request: &SnapshotRequest) -> Result<Snapshot, VolumeError> {
    let id = SnapshotId::from_name(&request.name);
    if let Some(found) = context.snapshots.get(id).await? {
        let found = same(found, request)?;
        if found.phase != SnapshotPhase::Deleting {
            return Ok(found);
        }
        // Its removal was cut short, perhaps that of an attempt at it that failed: nobody else may come to end that.
        steps::undo(context, id).await?;
    }
    let volume = context.ready(request.volume).await?;
    crash::point("snapshot: begin");
    let wanted = Snapshot {
        id,
        name: request.name.clone(),
        volume: volume.id,
        node: volume.node,
        group: None,
        phase: SnapshotPhase::Wanted,
        allow_copy: request.allow_copy || volume.parameters.allow_copy,
        contents: None,
        revision: 0,
    };
    match context.snapshots.create(wanted).await? {
        Created::Created(snapshot) => Ok(snapshot),
        Created::Existed(snapshot) => same(snapshot, request),
    }
}

async fn collect(context: &Arc<Context>) -> Result<(), VolumeError> {
    let mut from = None;
    loop {
        let page = context.snapshots.list(from, SCAN).await?;
        // A group is all or nothing: what is left of one waits for the group to be asked for, or deleted, again.
        let left = |snapshot: &Snapshot| match snapshot.phase {
            SnapshotPhase::Ready => false,
            SnapshotPhase::Deleting => true,
            _ => snapshot.group.is_none(),
        };
        for found in page.records.into_iter().filter(left) {
            let (id, _lock) = (found.id, context.lock(found.volume).await);
            let ended = match context.snapshots.get(id).await? {
                Some(snapshot) => end(context, snapshot).await,
                None => continue,
            };
            match ended {
                Ok(()) => tracing::info!(snapshot = %id, "a snapshot that was cut short is over"),
                Err(error) => tracing::warn!(snapshot = %id, "a snapshot that was cut short is left as it is: {error}"),
            }
        }
        match page.next {
            Some(next) => from = Some(next),
            None => return Ok(()),
        }
    }
}

/// Removes what a failed snapshot of another volume has left under that name: nothing was taken, and its name is free.
async fn discard_other(context: &Arc<Context>, request: &SnapshotRequest) -> Result<(), VolumeError> {
    let id = SnapshotId::from_name(&request.name);
    let Some(found) = context.snapshots.get(id).await?.filter(|found| found.volume != request.volume) else {
        return Ok(());
    };
    let _lock = context.lock(found.volume).await;
    let Some(found) = context.snapshots.get(id).await? else { return Ok(()) };
    let begun = match found.phase {
        SnapshotPhase::Wanted | SnapshotPhase::Copying if found.name == request.name && found.group.is_none() => {
            context.copies.is_known(Target::Snapshot(id)) || steps::is_there(context, id).await?
        }
        _ => true,
    };
    if begun { Ok(()) } else { steps::undo(context, id).await.map(drop) }
}

/// Ends a snapshot that nobody is at work on, one way or the other. Under the lock of its volume.
async fn end(context: &Arc<Context>, snapshot: Snapshot) -> Result<(), VolumeError> {
    let id = snapshot.id;
    if snapshot.phase == SnapshotPhase::Ready || context.copies.is_known(Target::Snapshot(id)) {
        return Ok(());
    }
    if snapshot.phase == SnapshotPhase::Copying && steps::is_there(context, id).await? {
        return steps::take(context, snapshot).await.map(drop);
    }
    steps::undo(context, id).await.map(drop)
}

/// Whether what exists under a name is what was asked for.
fn same(found: Snapshot, request: &SnapshotRequest) -> Result<Snapshot, VolumeError> {
    let difference = if found.name != request.name {
        format!("its name is {:?}", found.name)
    } else if found.volume != request.volume {
        format!("it is of volume {}", found.volume)
    } else if found.group.is_some() {
        "it was taken with a group".to_owned()
    } else {
        return Ok(found);
    };
    Err(VolumeError::SnapshotExists { name: request.name.clone(), id: found.id, difference })
}

async fn copy(context: &Arc<Context>, id: SnapshotId) -> Result<Snapshot, VolumeError> {
    let volume = context.find_snapshot(id).await?.volume;
    let _lock = context.lock(volume).await;
    let snapshot = context.find_snapshot(id).await?;
    steps::take(context, snapshot).await
}

async fn destroy(context: &Context, id: SnapshotId) -> Result<Outcome, VolumeError> {
    let Some(snapshot) = context.snapshots.get(id).await? else { return Ok(Outcome::Unchanged) };
    let _lock = context.lock(snapshot.volume).await;
    steps::undo(context, id).await
}
