//! The steps of a snapshot's life. Each under the lock of its volume, which nothing publishes or changes meanwhile.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use tokio::time::Instant;
use zpod_storage::backing::{Backing, BackingError, CopySource, Copying, Outcome};
use zpod_storage::catalog::{Contents, Publication, Snapshot, SnapshotPhase, Volume};
use zpod_storage::crash;
use zpod_volume::{DiskLayout, Mark, SnapshotId, VolumeId};

use crate::volumes::context::device_spec;
use crate::volumes::copies::Target;
use crate::volumes::mirror::check_copied;
use crate::volumes::published::Heard;
use crate::volumes::{Context, VolumeError};

/// Shares blocks, or does nothing.
pub(in crate::volumes) const SHARING: Copying<'static> = Copying { full: false, progress: &|_, _| true };

/// What a guest has for the mark of one copy. That is all of the time that it can keep its volume locked for a snapshot,
/// besides the copying.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MarkBounds {
    /// For the mark, the removal of an older one included. Everything the pool holds in memory is written out: as much as
    /// its disk takes in three transaction groups.
    pub mark: Duration,
    /// For its removal.
    pub unmark: Duration,
}

impl Default for MarkBounds {
    fn default() -> Self {
        Self { mark: Duration::from_secs(30), unmark: Duration::from_secs(5) }
    }
}

pub(super) fn deleting(id: SnapshotId) -> VolumeError {
    let remedy = "let DeleteSnapshot be repeated until it succeeds";
    VolumeError::SnapshotNotReady { id, state: "being deleted", remedy }
}

/// Takes a snapshot, from wherever it has come to.
pub(super) async fn take(context: &Arc<Context>, snapshot: Snapshot) -> Result<Snapshot, VolumeError> {
    let (id, target) = (snapshot.id, Target::Snapshot(snapshot.id));
    match snapshot.phase {
        SnapshotPhase::Ready => return Ok(snapshot),
        SnapshotPhase::Deleting => return Err(deleting(id)),
        SnapshotPhase::Wanted | SnapshotPhase::Marked | SnapshotPhase::Copying => {}
    }
    if context.copies.progress(target).is_some() {
        return Ok(snapshot);
    }
    if let Some(source) = context.copies.take_failure(target) {
        return Err(context.backing_error(source));
    }
    let snapshot = match snapshot.phase {
        SnapshotPhase::Wanted if snapshot.group.is_some() => {
            let remedy = "the guests of all its group have to mark the instant first";
            return Err(VolumeError::SnapshotNotReady { id, state: "not marked yet", remedy });
        }
        SnapshotPhase::Wanted => mark(context, snapshot, SnapshotPhase::Copying).await?,
        SnapshotPhase::Copying if is_there(context, id).await? => return finish(context, snapshot).await,
        // Of an attempt that was cut short before its copy was made. Whether the mark is still there is not known, and a
        // later instant is as good; but not for a group, whose instant is one.
        SnapshotPhase::Copying if snapshot.group.is_none() => mark(context, snapshot, SnapshotPhase::Copying).await?,
        SnapshotPhase::Copying => return Err(lost(context, &snapshot)),
        _ => begin_copy(context, snapshot).await?,
    };
    copy(context, snapshot).await
}

/// Marks the instant that a copy is to show, and records what the copy will have in it.
pub(super) async fn mark(context: &Context, snapshot: Snapshot, phase: SnapshotPhase) -> Result<Snapshot, VolumeError> {
    let (id, mark) = (snapshot.id, Mark::for_snapshot(snapshot.id));
    if snapshot.phase == SnapshotPhase::Wanted && is_there(context, id).await? {
        // Its record came back without what was known of it. What is on the disk is of another instant than would be said.
        let remedy = "if its ZfsSnapshot came back from a backup, `kubectl zpod adopt --from` that backup restores it";
        return Err(VolumeError::SnapshotNotReady {
            id,
            state: "on the disk already, and its record does not know it",
            remedy,
        });
    }
    let volume = context.ready(snapshot.volume).await?;
    let marked = mark_volume(context, &volume, &mark, snapshot.allow_copy).await?;
    crash::point("snapshot: marked");
    let token = context.publication(&volume).map(|publication| publication.token_digest);
    let contents = contents(context, &volume, marked.is_some().then_some(mark))?;
    context.marks().insert(id, token);
    let marked = context.snapshots.update(Snapshot { phase, contents: Some(contents), ..snapshot }).await?;
    crash::point("snapshot: contents recorded");
    Ok(marked)
}

/// Has the guest of a volume mark this instant, or proves that nobody runs on it. Gives the guest.
pub(in crate::volumes) async fn mark_volume(
    context: &Context,
    volume: &Volume,
    mark: &Mark,
    allow_copy: bool,
) -> Result<Option<Heard>, VolumeError> {
    let id = volume.id;
    check_copied(volume)?;
    let shares = context.with_backing(|backing| backing.shares_blocks()).await?;
    if !shares && !allow_copy {
        let location = context.location().display().to_string();
        return Err(context.backing_error(BackingError::CannotShare { location }));
    }
    let Some(publication) = context.publication(volume) else {
        context.with_backing(move |backing| backing.exclusive(id).map(drop)).await?;
        return Ok(None);
    };
    if !shares {
        return Err(VolumeError::NoCopyWhileRunning { id, holder: holder(publication), node: context.node.clone() });
    }
    let silent = || VolumeError::GuestSilent { id, node: context.node.clone() };
    let heard = context.published.heard(id).ok_or_else(silent)?;
    if volume.origin_of_copy(Some(mark.clone())).is_none() {
        return Err(VolumeError::JustRestored { id, node: context.node.clone() });
    }
    let guest = |source| VolumeError::Guest { id, source };
    // A mark of an attempt that was cut short would show an instant that nobody asks for any more.
    let (begun, bound) = (Instant::now(), context.mark_bounds.mark);
    heard.guest.unmark(id, mark, bound).await.map_err(guest)?;
    crash::point("mark: guest");
    heard.guest.mark(id, mark, bound.saturating_sub(begun.elapsed())).await.map_err(guest)?;
    Ok(Some(heard))
}

fn holder(publication: &Publication) -> String {
    publication.pod.as_ref().map_or_else(|| "a pod".to_owned(), |pod| format!("pod {pod}"))
}

/// What is known of a mark that is to be removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::volumes) enum Unmarked {
    /// Its guest has removed it, or nobody can say.
    Done,
    /// Its guest had none: somebody in the pod has destroyed it.
    WasGone,
}

/// Takes a mark away again, if a guest can be heard. Where none can, the next one does it when it starts.
pub(in crate::volumes) async fn unmark(context: &Context, volume: VolumeId, mark: &Mark) -> Unmarked {
    let Some(heard) = context.published.heard(volume) else { return Unmarked::Done };
    match heard.guest.unmark(volume, mark, context.mark_bounds.unmark).await {
        Ok(Some(false)) => Unmarked::WasGone,
        Ok(_) => Unmarked::Done,
        Err(error) => {
            tracing::info!(%volume, %mark, "mark is left to the next start of its pod: {error}");
            Unmarked::Done
        }
    }
}

fn contents(context: &Context, volume: &Volume, mark: Option<Mark>) -> Result<Contents, VolumeError> {
    let restored = || VolumeError::JustRestored { id: volume.id, node: context.node.clone() };
    Ok(Contents {
        taken: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs()),
        capacity: volume.capacity,
        partition: volume.layout().partition,
        origin: volume.origin_of_copy(mark).ok_or_else(restored)?,
        encryption: volume.parameters.encryption,
        mode: volume.mode,
    })
}

/// Goes from a mark to the copy: only if the guest that marked is the one that runs.
async fn begin_copy(context: &Context, snapshot: Snapshot) -> Result<Snapshot, VolumeError> {
    let volume = context.ready(snapshot.volume).await?;
    let token = context.publication(&volume).map(|publication| publication.token_digest);
    if context.marks().get(&snapshot.id) != Some(&token) {
        return Err(lost(context, &snapshot));
    }
    let copying = context.snapshots.update(Snapshot { phase: SnapshotPhase::Copying, ..snapshot }).await?;
    crash::point("snapshot: copy begins");
    Ok(copying)
}

fn lost(context: &Context, snapshot: &Snapshot) -> VolumeError {
    VolumeError::MarkLost { id: snapshot.id, volume: snapshot.volume, node: context.node.clone() }
}

/// Makes the copy, or has a full one begun.
async fn copy(context: &Arc<Context>, snapshot: Snapshot) -> Result<Snapshot, VolumeError> {
    let (id, volume) = (snapshot.id, context.ready(snapshot.volume).await?);
    let (source, spec) = (volume.id, device_spec(&volume));
    // The partition as it was marked: that of the volume may have grown since.
    let partition = snapshot.contents.as_ref().map_or(spec.layout.partition, |contents| contents.partition);
    let spec = zpod_storage::backing::DeviceSpec { layout: DiskLayout { partition, ..spec.layout }, ..spec };
    let proof = match context.publication(&volume) {
        // Its guest has marked the instant, or this would not have been reached.
        Some(_) => None,
        None => Some(context.with_backing(move |backing| backing.exclusive(source)).await?),
    };
    if context.with_backing(|backing| backing.shares_blocks()).await? {
        context
            .with_backing(move |backing| {
                let copied = backing.snapshot(id, &spec, &SHARING);
                drop(proof);
                copied
            })
            .await?;
        crash::point("snapshot: copied");
        return finish_copied(context, snapshot).await;
    }
    let (backing, after) = (context.backing.clone(), Arc::clone(context));
    let work = move |how: &Copying<'_>| {
        let copied = backing.snapshot(id, &spec, how).map(drop);
        drop(proof);
        copied
    };
    context.copies.begin(Target::Snapshot(id), CopySource::Device(source), work, async move {
        let _lock = after.lock(source).await;
        if let Ok(Some(snapshot)) = after.snapshots.get(id).await
            && snapshot.phase == SnapshotPhase::Copying
            && let Err(error) = finish(&after, snapshot).await
        {
            tracing::warn!(snapshot = %id, "full copy is made, but not recorded: {error}");
        }
    });
    Ok(snapshot)
}

pub(super) async fn is_there(context: &Context, id: SnapshotId) -> Result<bool, VolumeError> {
    match context.with_backing(move |backing| backing.snapshot_allocated(id)).await {
        Err(VolumeError::Backing { source: BackingError::SnapshotMissing { .. }, .. }) => Ok(false),
        found => found.map(|_| true),
    }
}

/// Records that the copy is there that was just made. It is worth nothing without its mark: no guest would start a volume
/// that is made from it. So the copy goes where the mark was gone, which only somebody in the pod can have done.
async fn finish_copied(context: &Context, snapshot: Snapshot) -> Result<Snapshot, VolumeError> {
    let id = snapshot.id;
    if remove_mark(context, &snapshot).await == Unmarked::WasGone {
        context.with_backing(move |backing: &dyn Backing| backing.destroy_snapshot(id)).await?;
        context.marks().remove(&id);
        return Err(lost(context, &snapshot));
    }
    record(context, snapshot).await
}

/// Records that a copy is there of which it is not known when it was made: its mark may be gone since.
async fn finish(context: &Context, snapshot: Snapshot) -> Result<Snapshot, VolumeError> {
    remove_mark(context, &snapshot).await;
    record(context, snapshot).await
}

async fn remove_mark(context: &Context, snapshot: &Snapshot) -> Unmarked {
    let mark = Mark::for_snapshot(snapshot.id);
    if snapshot.contents.as_ref().is_some_and(|contents| contents.origin.mark.as_ref() == Some(&mark)) {
        return unmark(context, snapshot.volume, &mark).await;
    }
    Unmarked::Done
}

async fn record(context: &Context, snapshot: Snapshot) -> Result<Snapshot, VolumeError> {
    let id = snapshot.id;
    context.marks().remove(&id);
    crash::point("snapshot: unmarked");
    let ready = context.snapshots.update(Snapshot { phase: SnapshotPhase::Ready, ..snapshot }).await?;
    crash::point("snapshot: done");
    tracing::debug!(snapshot = %id, volume = %ready.volume, "snapshot taken");
    Ok(ready)
}

/// Removes whatever there is of a snapshot, and its record.
pub(super) async fn undo(context: &Context, id: SnapshotId) -> Result<Outcome, VolumeError> {
    let Some(snapshot) = context.snapshots.get(id).await? else { return Ok(Outcome::Unchanged) };
    context.check_not_read(CopySource::Snapshot(id))?;
    context.copies.stop(Target::Snapshot(id)).await;
    crash::point("snapshot delete: begin");
    if matches!(snapshot.phase, SnapshotPhase::Wanted | SnapshotPhase::Marked | SnapshotPhase::Copying) {
        unmark(context, snapshot.volume, &Mark::for_snapshot(id)).await;
        context.marks().remove(&id);
        crash::point("snapshot delete: unmarked");
    }
    if snapshot.phase != SnapshotPhase::Deleting {
        context.snapshots.update(Snapshot { phase: SnapshotPhase::Deleting, ..snapshot }).await?;
    }
    crash::point("snapshot delete: recorded");
    context.with_backing(move |backing: &dyn Backing| backing.destroy_snapshot(id)).await?;
    crash::point("snapshot delete: copy removed");
    context.snapshots.remove(id).await?;
    crash::point("snapshot delete: done");
    tracing::debug!(snapshot = %id, "snapshot deleted");
    Ok(Outcome::Changed)
}
