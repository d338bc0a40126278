//! Volumes whose pool is a mirror of two devices of this node, and what is done when one of them is lost.
//!
//! # Design
//! A guest gets one device, which is made of the two images for the time of a publication ([`Halves`]). A half whose image
//! is gone, or whose disk is dead, is replaced by a new image where its directory works; the guest then gives that what
//! the other half has.
//!
//! Which half has the newest data is the rule that everything here serves: [`Volume::behind`] names the half that may lack
//! some of it. It is recorded before a pod can start without that half, or with a new one in its place, and as soon as a
//! guest says that it has lost one. A publication that would have that half alone is refused, however long the other one
//! stays away: the pool would silently go back in time. Only a guest that runs on both takes it back.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use zpod_storage::backing::mirrored::Mirrored;
use zpod_storage::backing::{Backing, BackingError, Outcome};
use zpod_storage::catalog::Volume;
use zpod_storage::crash;
use zpod_volume::{Half, VolumeId, VolumeMode};

use super::context::{blocking, device_spec};
use super::publish::{Closing, NodeVolumes};
use super::spec::discard;
use super::{Context, CreateRequest, VolumeError};
use crate::kata::{Halves, KataError, MapperError, Removal};

/// Why a node can have no mirrors that was given no second directory.
pub const NO_MIRRORS: &str = "it has one directory for volumes; give zpod a second one, on another disk (--mirror-dir, node.mirrorDir of the chart)";

/// What a node has for volumes with two devices.
#[derive(Debug, Clone)]
pub struct Mirrors {
    /// Both directories.
    pub backing: Arc<Mirrored>,
    /// What makes one device of two.
    pub halves: Arc<dyn Halves>,
}

/// Whether a volume can be made that asks for a mirror.
///
/// # Errors
/// [`VolumeError::Invalid`] for what no mirror can be.
pub(crate) fn check_vdevs(request: &CreateRequest) -> Result<(), VolumeError> {
    if request.parameters.vdevs.is_single() {
        return Ok(());
    }
    if request.mode == VolumeMode::Block {
        let reason = "vdevs: mirror-2 is for file systems; a block device has one device under it: use vdevs: single";
        return Err(VolumeError::invalid("parameters", reason));
    }
    if request.inline.is_some() {
        let reason = "vdevs: mirror-2 is for volumes that outlive their pods; leave it out of an inline volume";
        return Err(VolumeError::invalid("volume_context", reason));
    }
    if request.source.is_some() {
        let reason = "vdevs: mirror-2 is for new volumes; what is made from a snapshot or a volume has one device: use \
                      vdevs: single, and kubectl zpod send and receive to fill a mirror";
        return Err(VolumeError::invalid("parameters", reason));
    }
    Ok(())
}

/// Whether a volume can be copied.
///
/// # Errors
/// [`VolumeError::Invalid`] for a mirror.
pub(super) fn check_copied(volume: &Volume) -> Result<(), VolumeError> {
    if !volume.is_mirrored() {
        return Ok(());
    }
    let reason = format!(
        "volume {} is a mirror of two devices (vdevs: mirror-2), of which no snapshots or clones are made: both would have \
         to show one instant; use kubectl zpod send",
        volume.id
    );
    Err(VolumeError::invalid("source", reason))
}

impl Context {
    /// For a person: where mirrors are, where there can be any.
    pub(crate) fn mirror_location(&self) -> Option<PathBuf> {
        self.mirrors.as_ref().ok().map(|mirrors| mirrors.backing.location().to_owned())
    }

    /// Whether nothing of a volume's device was ever made, as far as can be seen. Not so while that can't be seen.
    pub(super) async fn is_unmade(&self, volume: &Volume) -> Result<bool, VolumeError> {
        let (id, missing) = (volume.id, |found: Result<PathBuf, BackingError>| match found {
            Err(BackingError::Missing { .. }) => Ok(true),
            found => found.map(|_| false),
        });
        match &self.mirrors {
            Ok(mirrors) if volume.is_mirrored() => {
                let backing = mirrors.backing.clone();
                let looked = blocking(move || Ok(Half::BOTH.map(|half| missing(backing.image(id, half))))).await?;
                let [first, second] = looked.map(|half| half.map_err(|source| self.backing_error(source)));
                Ok(first? && second?)
            }
            _ => self.with_backing(move |backing| missing(backing.device(id))).await,
        }
    }

    /// What there is for volumes with two devices.
    pub(super) fn mirrors(&self) -> Result<&Mirrors, VolumeError> {
        self.mirrors
            .as_ref()
            .map_err(|reason| VolumeError::NoMirrors { node: self.node.clone(), reason: reason.clone() })
    }

    /// Runs a call of the provider of a volume's device, or of both its devices, where it may block.
    pub(super) async fn with_device<T: Send + 'static>(
        &self,
        volume: &Volume,
        call: impl FnOnce(&dyn Backing) -> Result<T, BackingError> + Send + 'static,
    ) -> Result<T, VolumeError> {
        self.with_devices(volume.is_mirrored(), call).await
    }

    /// The same, where no more is known of the volume.
    pub(super) async fn with_devices<T: Send + 'static>(
        &self,
        mirrored: bool,
        call: impl FnOnce(&dyn Backing) -> Result<T, BackingError> + Send + 'static,
    ) -> Result<T, VolumeError> {
        if !mirrored {
            return self.with_backing(call).await;
        }
        let backing = self.mirrors()?.backing.clone();
        blocking(move || Ok(call(backing.as_ref()))).await?.map_err(|source| self.backing_error(source))
    }

    /// What the shim is given for a volume, whether or not it is there yet.
    pub(super) async fn device_of(&self, volume: &Volume) -> Result<PathBuf, VolumeError> {
        let id = volume.id;
        if volume.is_mirrored() {
            return Ok(self.mirrors()?.halves.path(id));
        }
        self.with_backing(move |backing| backing.device(id)).await
    }

    /// The images of a mirror. None for one that is gone.
    async fn images(&self, id: VolumeId) -> Result<[Option<PathBuf>; 2], VolumeError> {
        let backing = self.mirrors()?.backing.clone();
        blocking(move || Ok(Half::BOTH.map(|half| backing.image(id, half).ok()))).await
    }

    /// Removes the device that a mirror's guest had, if there is one.
    pub(super) async fn part(&self, volume: &Volume, when: Removal) -> Result<Outcome, VolumeError> {
        if !volume.is_mirrored() {
            return Ok(Outcome::Unchanged);
        }
        let (id, images, halves) = (volume.id, self.images(volume.id).await?, self.mirrors()?.halves.clone());
        let parted = blocking(move || Ok(halves.part(id, paths(&images), when)?)).await;
        parted.map_err(|error| match error {
            VolumeError::Kata(KataError::Mapper(MapperError::InUse(device))) => {
                let detail = "a virtual machine has it".to_owned();
                self.backing_error(BackingError::InUse { id, device, detail })
            }
            error => error,
        })
    }
}

impl NodeVolumes {
    /// Sees to it that a mirror has two halves, or that it is recorded which one is lost. What an earlier publication left
    /// is gone then. Before the proof that nobody has the volume.
    pub(super) async fn prepare_halves(&self, volume: Volume) -> Result<Volume, VolumeError> {
        if !volume.is_mirrored() {
            return Ok(volume);
        }
        let (context, id, closing) = (&self.context, volume.id, Closing::begin());
        let lost = loop {
            if let Some(found) = closing.over(self.look_for_halves(&volume).await).await {
                break found?;
            }
        };
        let Some(lost) = lost else { return Ok(volume) };
        tracing::error!(volume = %id, "the {lost} of its mirror is lost");
        let (backing, spec) = (context.mirrors()?.backing.clone(), device_spec(&volume));
        // A volume that no guest was ever given can have nothing that one of its halves lacks.
        let known = volume.initialized || volume.written || volume.behind.is_some();
        let look = move || Ok(backing.half_ever_written(&spec, lost.other()));
        let used = known || blocking(look).await?.map_err(|source| context.backing_error(source))?;
        let volume = match volume.behind {
            Some(_) => volume,
            None if !used => volume,
            None => context.catalog.update(Volume { behind: Some(lost), ..volume }).await?,
        };
        crash::point("mirror: loss recorded");
        let (backing, spec) = (context.mirrors()?.backing.clone(), device_spec(&volume));
        match blocking(move || Ok(backing.replace(&spec, lost))).await? {
            Ok(_) => tracing::warn!(volume = %id, "a new image takes the place of the {lost} of its mirror"),
            Err(error) => {
                tracing::error!(volume = %id, "the {lost} of its mirror can't be replaced, and the volume has one \
                copy of its data until it is: {error}")
            }
        }
        crash::point("mirror: half replaced");
        Ok(volume)
    }

    /// Lets go of the halves, and looks which one is lost, if one is.
    async fn look_for_halves(&self, volume: &Volume) -> Result<Option<Half>, VolumeError> {
        let (context, id) = (&self.context, volume.id);
        context.part(volume, Removal::Now).await?;
        crash::point("mirror: parted");
        let backing = context.mirrors()?.backing.clone();
        let [first, second] = blocking(move || Ok(Half::BOTH.map(|half| backing.half(id, half)))).await?;
        lost(first, second, volume.behind).map_err(|error| match error {
            Lost::Backing(source) => context.backing_error(source),
            Lost::Newest(half) => VolumeError::HalfLost { id, half, node: context.node.clone() },
        })
    }

    /// The device of a mirror's two images, for a publication that is recorded.
    pub(super) async fn join_halves(&self, volume: &Volume) -> Result<Outcome, VolumeError> {
        if !volume.is_mirrored() {
            return Ok(Outcome::Unchanged);
        }
        let (context, id) = (&self.context, volume.id);
        let (images, halves) = (context.images(id).await?, context.mirrors()?.halves.clone());
        // What has been lost since it was looked at is not recorded: no guest may go on without it.
        if let Some(half) = Half::BOTH.into_iter().find(|half| images[half.index()].is_none())
            && volume.behind != Some(half)
        {
            return Err(match volume.behind {
                Some(_) => VolumeError::HalfLost { id, half, node: context.node.clone() },
                None => context.backing_error(BackingError::Missing { id, device: halves.path(id) }),
            });
        }
        let (disk, discard) = (volume.layout().disk, discard(volume));
        let joined = blocking(move || Ok(halves.join(id, paths(&images), disk, discard)?)).await?;
        crash::point("mirror: joined");
        Ok(joined)
    }
}

fn paths(images: &[Option<PathBuf>; 2]) -> [Option<&Path>; 2] {
    images.each_ref().map(Option::as_deref)
}

/// Why no half can be used, or the only one that is there can't.
#[derive(Debug)]
enum Lost {
    Backing(BackingError),
    /// This half is lost, and it alone has everything.
    Newest(Half),
}

/// Which half is lost, if one is. `behind` is never the only one that is left.
fn lost<T>(
    first: Result<T, BackingError>,
    second: Result<T, BackingError>,
    behind: Option<Half>,
) -> Result<Option<Half>, Lost> {
    let lost = match (first, second) {
        (Ok(_), Ok(_)) => return Ok(None),
        (Ok(_), Err(error)) if error.is_lost() => Half::Second,
        (Err(error), Ok(_)) if error.is_lost() => Half::First,
        (Err(error), Err(other)) => return Err(Lost::Backing(if error.is_lost() { other } else { error })),
        (Ok(_), Err(error)) | (Err(error), Ok(_)) => return Err(Lost::Backing(error)),
    };
    if behind == Some(lost.other()) { Err(Lost::Newest(lost)) } else { Ok(Some(lost)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_half_that_lacks_something_is_never_the_only_one() {
        let gone = || Err(BackingError::Missing { id: VolumeId::from_name("a"), device: "/gone".into() });
        let busy =
            || Err(BackingError::InUse { id: VolumeId::from_name("a"), device: "/busy".into(), detail: String::new() });
        for behind in [None, Some(Half::First), Some(Half::Second)] {
            assert!(matches!(lost(Ok(()), Ok(()), behind), Ok(None)));
            assert!(matches!(lost::<()>(gone(), gone(), behind), Err(Lost::Backing(BackingError::Missing { .. }))));
            for other in [Ok(()), gone()] {
                assert!(matches!(lost(other, busy(), behind), Err(Lost::Backing(BackingError::InUse { .. }))));
            }
            for half in Half::BOTH {
                let found = match half {
                    Half::First => lost(gone(), Ok(()), behind),
                    Half::Second => lost(Ok(()), gone(), behind),
                };
                match found {
                    Ok(found) => assert!(found == Some(half) && behind != Some(half.other())),
                    Err(Lost::Newest(newest)) => assert!(newest == half && behind == Some(half.other())),
                    Err(Lost::Backing(error)) => panic!("{error}"),
                }
            }
        }
    }
}
