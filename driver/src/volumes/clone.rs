//! Volumes that begin with the contents of a snapshot or of another volume.

use std::sync::Arc;

use futures_util::future::BoxFuture;
use zpod_storage::backing::{BackingError, CopySource, Copying, Exclusive};
use zpod_storage::catalog::{Phase, SnapshotPhase, Source, Volume};
use zpod_storage::crash;
use zpod_volume::{Bytes, Encryption, Mark, Origin, VolumeId, VolumeMode};

use super::context::device_spec;
use super::copies::Target;
use super::provision::Provisioner;
use super::snapshots::steps::{SHARING, mark_volume, unmark};
use super::{CapacityRange, Context, CreateRequest, VolumeError};

/// What is asked of a volume that is made from something.
#[derive(Debug, Clone)]
pub(crate) struct Bounds {
    /// The least it can hold.
    pub(crate) capacity: Bytes,
    /// The node it has to be on.
    pub(crate) node: String,
    /// How it has to be encrypted.
    pub(crate) encryption: Option<Encryption>,
    /// What it has to be.
    pub(crate) mode: VolumeMode,
}

impl Bounds {
    /// The size for a request: what is required, or that of the source.
    ///
    /// # Errors
    /// [`VolumeError::OutOfRange`] where that is smaller than the source, [`VolumeError::Invalid`] where encryption or
    /// mode differ.
    pub(crate) fn choose(&self, request: &CreateRequest, source: Source) -> Result<Bytes, VolumeError> {
        let required = request.range.required.unwrap_or(self.capacity);
        if required < self.capacity || request.range.limit.is_some_and(|limit| limit < self.capacity) {
            let asked = request.range.limit.map_or(required, |limit| limit.min(required));
            let reason =
                format!("{asked} was asked for, and {source} holds {}: a copy is as large or larger", self.capacity);
            return Err(VolumeError::OutOfRange { reason });
        }
        let differs = |what: &str, theirs: &str, ours: &str| {
            let reason =
                format!("{what} of {source} is {theirs}, and that asked for is {ours}; they have to be the same");
            Err(VolumeError::invalid("volume_content_source", reason))
        };
        if self.mode != request.mode {
            let word = |mode| if mode == VolumeMode::Block { "Block" } else { "Filesystem" };
            return differs("volumeMode", word(self.mode), word(request.mode));
        }
        if self.encryption != request.parameters.encryption {
            let word = |encryption: Option<Encryption>| encryption.map_or("off", Encryption::as_str);
            return differs("encryption", word(self.encryption), word(request.parameters.encryption));
        }
        CapacityRange { required: Some(required), ..request.range }.choose(request.mode)
    }
}

/// What is asked of a volume made from this source, if that is there and can be copied.
pub(super) async fn bounds(context: &Context, source: Source) -> Result<Bounds, VolumeError> {
    match source {
        Source::Snapshot(id) => {
            let snapshot = context.find_snapshot(id).await?;
            match (snapshot.phase, snapshot.contents) {
                (SnapshotPhase::Ready, Some(contents)) => Ok(Bounds {
                    capacity: contents.capacity,
                    node: snapshot.node,
                    encryption: contents.encryption,
                    mode: contents.mode,
                }),
                _ => {
                    let remedy = "wait until it is ready to use";
                    Err(VolumeError::SnapshotNotReady { id, state: "not there yet, or not any more", remedy })
                }
            }
        }
        Source::Volume(id) => {
            let volume = context.find(id).await?;
            if volume.phase != Phase::Ready {
                let remedy = "wait until it is there";
                return Err(VolumeError::NotReady { id, state: "not finished, or being deleted", remedy });
            }
            Ok(Bounds {
                capacity: volume.capacity,
                encryption: volume.parameters.encryption,
                mode: volume.mode,
                node: volume.node,
            })
        }
    }
}

/// The volume whose lock keeps a source as it is. None for a snapshot that is gone: the copy may have been made before.
pub(super) async fn keeper(context: &Context, source: Source) -> Result<Option<VolumeId>, VolumeError> {
    match source {
        Source::Snapshot(id) => Ok(context.snapshots.get(id).await?.map(|snapshot| snapshot.volume)),
        Source::Volume(id) => Ok(Some(id)),
    }
}

/// What a device is copied from, as it is now.
struct Prepared {
    source: CopySource,
    partition: Bytes,
    origin: Origin,
    proof: Option<Box<dyn Exclusive>>,
}

/// Makes the device of a recorded volume from its source. Under the locks of both. Gives the record with its origin.
pub(super) async fn fill(context: &Arc<Context>, volume: Volume, source: Source) -> Result<Volume, VolumeError> {
    let (id, target) = (volume.id, Target::Volume(volume.id));
    if let Some(error) = under_way(context, id, source) {
        return Err(error);
    }
    if let Some(source) = context.copies.take_failure(target) {
        return Err(context.backing_error(source));
    }
    if has_device(context, id).await? {
        // Whole: a device gets its name last. Its origin was recorded before it was made.
        return finish(context, volume, source).await;
    }
    let prepared = prepare(context, &volume, source).await?;
    crash::point("copy: marked");
    let volume = context.catalog.update(Volume { origin: Some(prepared.origin.of_new_copy(id)), ..volume }).await?;
    crash::point("copy: origin recorded");
    let spec = device_spec(&volume);
    let (from, partition, proof) = (prepared.source, prepared.partition, prepared.proof);
    if context.with_backing(|backing| backing.shares_blocks()).await? {
        let made = context
            .with_backing(move |backing| {
                let made = backing.create_from(&spec, from, partition, &SHARING);
                drop(proof);
                made
            })
            .await;
        if made.is_err() {
            unmark_source(context, source, id).await;
        }
        made?;
        crash::point("copy: device made");
        return finish(context, volume, source).await;
    }
    let (backing, provisioner) = (context.backing.clone(), Provisioner::new(Arc::clone(context)));
    let work = move |how: &Copying<'_>| {
        let made = backing.create_from(&spec, from, partition, how).map(drop);
        drop(proof);
        made
    };
    context.copies.begin(target, from, work, finish_later(provisioner, id));
    Err(under_way(context, id, source).unwrap_or_else(|| copying(context, id, source, Default::default())))
}

fn finish_later(provisioner: Provisioner, id: VolumeId) -> BoxFuture<'static, ()> {
    Box::pin(async move {
        if let Err(error) = provisioner.finish(id).await {
            tracing::warn!(volume = %id, "full copy is made, but not recorded: {error}");
        }
    })
}

/// The error that says how far a full copy is, while it is being made.
pub(super) fn under_way(context: &Context, id: VolumeId, source: Source) -> Option<VolumeError> {
    context.copies.progress(Target::Volume(id)).map(|progress| copying(context, id, source, progress))
}

fn copying(context: &Context, id: VolumeId, source: Source, progress: super::Progress) -> VolumeError {
    VolumeError::Copying {
        what: format!("volume {id}"),
        from: source.to_string(),
        node: context.node.clone(),
        progress,
    }
}

pub(super) async fn has_device(context: &Context, id: VolumeId) -> Result<bool, VolumeError> {
    match context.with_backing(move |backing| backing.device(id)).await {
        Err(VolumeError::Backing { source: BackingError::Missing { .. }, .. }) => Ok(false),
        found => found.map(|_| true),
    }
}

async fn prepare(context: &Context, volume: &Volume, source: Source) -> Result<Prepared, VolumeError> {
    let allow_copy = volume.parameters.allow_copy;
    match source {
        Source::Snapshot(id) => {
            let snapshot = context.find_snapshot(id).await?;
            if snapshot.node != context.node {
                return Err(elsewhere(volume, source, snapshot.node));
            }
            let shares = context.with_backing(|backing| backing.shares_blocks()).await?;
            if !shares && !allow_copy && !snapshot.allow_copy {
                let location = context.location().display().to_string();
                return Err(context.backing_error(BackingError::CannotShare { location }));
            }
            let contents = snapshot.contents.filter(|_| snapshot.phase == SnapshotPhase::Ready).ok_or_else(|| {
                let remedy = "wait until it is ready to use";
                VolumeError::SnapshotNotReady { id, state: "not there yet, or not any more", remedy }
            })?;
            let (source, partition) = (CopySource::Snapshot(id), contents.partition);
            Ok(Prepared { source, partition, origin: contents.origin, proof: None })
        }
        Source::Volume(from) => {
            let original = context.find(from).await?;
            if original.node != context.node {
                return Err(elsewhere(volume, source, original.node));
            }
            let original = context.ready(from).await?;
            let (mark, partition) = (Mark::for_clone(volume.id), original.layout().partition);
            let allow_copy = allow_copy || original.parameters.allow_copy;
            let marked = mark_volume(context, &original, &mark, allow_copy).await?;
            let proof = match marked {
                Some(_) => None,
                None => Some(context.with_backing(move |backing| backing.exclusive(from)).await?),
            };
            let restored = || VolumeError::JustRestored { id: from, node: context.node.clone() };
            let origin = original.origin_of_copy(marked.is_some().then_some(mark)).ok_or_else(restored)?;
            Ok(Prepared { source: CopySource::Device(from), partition, origin, proof })
        }
    }
}

fn elsewhere(volume: &Volume, source: Source, home: String) -> VolumeError {
    VolumeError::SourceElsewhere { name: volume.name.clone(), source_name: source.to_string(), home }
}

async fn finish(context: &Context, volume: Volume, source: Source) -> Result<Volume, VolumeError> {
    unmark_source(context, source, volume.id).await;
    crash::point("copy: unmarked");
    // A record that lost what it knew (restored from a backup, say): whose contents they were is in the source.
    let origin = match (volume.origin.clone(), source) {
        (Some(origin), _) => Some(origin),
        (None, Source::Snapshot(id)) => {
            let snapshot = context.snapshots.get(id).await?;
            snapshot.and_then(|snapshot| snapshot.contents).map(|contents| contents.origin)
        }
        (None, Source::Volume(id)) => Some(Origin { volume: id, mark: None, initialized: true, copy: None }),
    };
    Ok(Volume { origin, ..volume })
}

/// Takes the mark away that was made in the source for this volume.
pub(super) async fn unmark_source(context: &Context, source: Source, id: VolumeId) {
    if let Source::Volume(from) = source {
        unmark(context, from, &Mark::for_clone(id)).await;
    }
}
