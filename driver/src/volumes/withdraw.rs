//! Taking publications back: by NodeUnpublishVolume, and where NodePublishVolume failed half way.
//!
//! # Design
//! **A publication that failed leaves nothing, or says that it does.** kubelet takes most errors as final: it then calls no
//! NodeUnpublishVolume, for nothing is published. So what was done is taken back, and where that fails too, or it is not
//! known whether the record was written, the answer is [`VolumeError::StillPublished`], which kubelet does not take so.
//! Its entry goes first: without it no virtual machine finds the device. The record goes last. The same answer gets a call
//! that fails where an earlier one has published: kubelet may have given that one up before it ended, and a final error
//! behind it lets kubelet forget the volume (`markVolumeErrorState` of Kubernetes 1.37).
//!
//! **Paths are compared as what they are**, since kubelet's directory may be reached by more than one name: by device and
//! inode of the directory. Recorded is the name, with symbolic links resolved, by which Kata looks for the entry.

use std::path::{Path, PathBuf};

use zpod_storage::backing::Outcome;
use zpod_storage::catalog::{Publication, Volume};
use zpod_storage::crash;
use zpod_volume::{VolumeId, VolumeMode};

use super::VolumeError;
use super::block::remove_target;
use super::context::blocking;
use super::publish::NodeVolumes;
use crate::kata::{DirectVolumes, KataError, Removal, TargetPath, is_same_place};

/// Where a volume is published, seen from a target path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Place {
    /// There.
    Same,
    /// There, and Kata looks for it by another name.
    SameByAnotherName,
    /// Somewhere else.
    Other,
}

impl NodeVolumes {
    pub(super) async fn place(&self, publication: &Publication, target: &TargetPath) -> Result<Place, VolumeError> {
        let (theirs, target) = (publication.target_path.clone(), target.clone());
        blocking(move || {
            // Records of earlier versions have the name as it was given.
            let named = TargetPath::resolve(&theirs).is_ok_and(|theirs| theirs == target);
            Ok(match named {
                true => Place::Same,
                false if target.is_at(&theirs) => Place::SameByAnotherName,
                false => Place::Other,
            })
        })
        .await
    }

    /// Another volume at the same place.
    pub(super) async fn other_at(&self, id: VolumeId, target: &Path) -> Result<Option<VolumeId>, VolumeError> {
        let (all, target) = (self.context.published.targets(), target.to_owned());
        let others = all.into_iter().filter(move |(other, _)| *other != id);
        blocking(move || {
            let mut others = others.filter(|(_, theirs)| is_same_place(&target, theirs));
            Ok(others.next().map(|(other, _)| other))
        })
        .await
    }

    async fn is_at(&self, theirs: Option<PathBuf>, target: &Path) -> Result<bool, VolumeError> {
        let Some(theirs) = theirs else { return Ok(false) };
        let target = target.to_owned();
        blocking(move || Ok(is_same_place(&theirs, &target))).await
    }

    /// Whether that is also the end of the volume.
    pub(super) async fn unpublish_now(&self, id: VolumeId, target: &Path) -> Result<(Outcome, bool), VolumeError> {
        let _lock = self.context.lock(id).await;
        let volume = self.context.catalog.get(id).await?;
        if volume.is_none() {
            self.inline.give_back(id);
        }
        let recorded = volume.as_ref().and_then(|volume| volume.publication.as_ref());
        let here = self.is_at(recorded.map(|publication| publication.target_path.clone()), target).await?;
        let ends = volume
            .as_ref()
            .is_some_and(|volume| volume.ephemeral && (here || self.context.publication(volume).is_none()));
        if !here && self.other_at(id, target).await?.is_some() {
            // Another volume's path: this one is not published there, which is what was asked for.
            return Ok((Outcome::Unchanged, ends));
        }
        crash::point("unpublish: begin");
        Ok((self.withdraw(volume, id, target, here).await?, ends))
    }

    /// Removes entry, placeholder and record of a publication, in that order. `here`: it is recorded at this place.
    pub(super) async fn withdraw(
        &self,
        volume: Option<Volume>,
        id: VolumeId,
        target: &Path,
        here: bool,
    ) -> Result<Outcome, VolumeError> {
        let mode = volume.as_ref().map(|volume| volume.mode);
        let recorded = volume.as_ref().filter(|_| here).and_then(|volume| volume.publication.as_ref());
        // By the name that Kata knows first; by the one that was given there is at most the same directory.
        let recorded = recorded.map(|publication| publication.target_path.clone()).filter(|path| path != target);
        let (direct, names) = (self.direct.clone(), [recorded, Some(target.to_owned())]);
        let mut outcome = blocking(move || {
            let mut outcome = Outcome::Unchanged;
            for name in names.iter().flatten() {
                if remove(&direct, name, mode)? == Outcome::Changed {
                    outcome = Outcome::Changed;
                }
            }
            Ok(outcome)
        })
        .await?;
        crash::point("unpublish: target gone");
        let free = volume.as_ref().filter(|volume| here || volume.publication.is_none());
        if mode == Some(VolumeMode::Block) && free.is_some() && self.detach_device(id).await? == Outcome::Changed {
            outcome = Outcome::Changed;
        }
        if let Some(volume) = free
            && self.context.part(volume, Removal::WhenUnused).await? == Outcome::Changed
        {
            outcome = Outcome::Changed;
        }
        if let Some(volume) = volume.filter(|_| here) {
            self.context.catalog.update(Volume { publication: None, ..volume }).await?;
            outcome = Outcome::Changed;
        }
        crash::point("unpublish: recorded");
        let all = self.context.published.targets();
        let known = all.into_iter().find(|(other, _)| *other == id).map(|(_, theirs)| theirs);
        if here || self.is_at(known, target).await? {
            self.forget(id);
        }
        Ok(outcome)
    }

    fn forget(&self, id: VolumeId) {
        self.keys.forget(id);
        self.context.published.remove(id);
        self.observer.withdrawn(id);
    }

    pub(super) fn still_published(&self, id: VolumeId, source: VolumeError) -> VolumeError {
        VolumeError::StillPublished { id, node: self.context.node.clone(), source: Box::new(source) }
    }

    /// The error of a call to publish, which says so where the volume is published at this place all the same.
    pub async fn failed_to_publish(&self, id: VolumeId, target: &Path, error: VolumeError) -> VolumeError {
        // What is published otherwise has a code of its own in CSI.
        if matches!(error, VolumeError::StillPublished { .. } | VolumeError::PublishedOtherwise { .. }) {
            return error;
        }
        // Another call may be at it, which kubelet has given up.
        let _lock = self.context.lock(id).await;
        let published = match self.context.published.observed(id) {
            Some((volume, _)) => Some(volume.target.clone()),
            None => match self.context.catalog.get(id).await {
                Ok(volume) => {
                    let publication = volume.as_ref().and_then(|volume| self.context.publication(volume));
                    publication.map(|publication| publication.target_path.clone())
                }
                Err(_) => return self.still_published(id, error),
            },
        };
        match self.is_at(published, target).await {
            Ok(false) => error,
            Ok(true) | Err(_) => self.still_published(id, error),
        }
    }

    /// The error of a publication that was not recorded, or of which that is not known.
    pub(super) async fn not_recorded(&self, id: VolumeId, target: &TargetPath, error: VolumeError) -> VolumeError {
        let record = match &error {
            // The catalog may have written it, and failed behind that.
            VolumeError::Catalog(_) => self.context.catalog.get(id).await,
            _ => Ok(None),
        };
        match record {
            Ok(Some(volume)) if self.context.publication(&volume).is_some() => {
                self.not_installed(volume, target, error).await
            }
            Ok(_) => {
                self.keys.forget(id);
                self.context.published.remove(id);
                error
            }
            Err(_) => {
                self.keys.forget(id);
                self.context.published.remove(id);
                self.still_published(id, error)
            }
        }
    }

    /// The error of a publication that failed behind its record, which is taken back.
    pub(super) async fn not_installed(&self, volume: Volume, target: &TargetPath, error: VolumeError) -> VolumeError {
        let id = volume.id;
        tracing::warn!(volume = %id, "publication is taken back: {error}");
        match self.take_back(volume, target).await {
            Ok(()) => error,
            Err(also) => {
                tracing::warn!(volume = %id, "publication could not be taken back: {also}");
                self.still_published(id, error)
            }
        }
    }

    /// Takes back a publication that failed half way. No pod was told of it, and nobody may come to unpublish it: it
    /// must not keep other pods out, also when something foreign at the target path is why it failed.
    async fn take_back(&self, volume: Volume, target: &TargetPath) -> Result<(), VolumeError> {
        let (direct, target, id, mode) = (self.direct.clone(), target.clone(), volume.id, volume.mode);
        blocking(move || {
            // Without the entry no virtual machine finds the device, whatever is left of the rest.
            direct.remove(&target)?;
            if let Err(error) = remove_target(&target, Some(mode)) {
                tracing::warn!(volume = %id, "target path is left as it is: {error}");
            }
            Ok(())
        })
        .await?;
        if mode == VolumeMode::Block {
            self.detach_device(id).await?;
        }
        self.context.part(&volume, Removal::WhenUnused).await?;
        crash::point("publish: taken back");
        self.context.catalog.update(Volume { publication: None, ..volume }).await?;
        self.forget(id);
        Ok(())
    }
}

/// Removes entry and placeholder, or node, at a target path.
pub(super) fn remove(direct: &DirectVolumes, target: &Path, mode: Option<VolumeMode>) -> Result<Outcome, VolumeError> {
    let target = match TargetPath::resolve(target) {
        Ok(target) => target,
        // A parent that is gone has taken the target with it; the entry can only have had this name.
        Err(KataError::Io { source, .. }) if source.kind() == std::io::ErrorKind::NotFound => {
            return Ok(direct.remove(&TargetPath::unresolved(target))?);
        }
        // Longer than any path that could ever be published.
        Err(KataError::Target { .. }) if target.is_absolute() => return Ok(Outcome::Unchanged),
        Err(error) => return Err(error.into()),
    };
    let removed = direct.remove(&target)?;
    crash::point("unpublish: direct volume removed");
    let unmounted = remove_target(&target, mode)?;
    Ok(if removed == Outcome::Unchanged { unmounted } else { removed })
}
