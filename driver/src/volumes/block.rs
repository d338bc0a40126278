//! Block devices: what a pod gets with `volumeMode: Block`.
//!
//! # Design
//! Kata passes nothing along with a device but the device, so the spec is a note on its disk ([`zpod_volume::note`]), left
//! there under the proof that nobody has it. A loop device of the image is mounted at the target path: kubelet wants a
//! block device there, puts a loop device of its own on top, and hands it to the runtime. There is no entry for Kata.
//!
//! # Limitations
//! The note is as old as its publication: what changes while the pod lives reaches the running guest over the control
//! channel, which remembers it, and the note with the next pod. Host caches between kubelet's device and ours are the kernel's affair.

use std::path::{Path, PathBuf};

use uuid::Uuid;
use zpod_storage::backing::{BackingError, Exclusive, Outcome};
use zpod_storage::catalog::{Publication, Volume};
use zpod_storage::crash;
use zpod_volume::{VolumeId, VolumeMode, note};

use super::VolumeError;
use super::context::blocking;
use super::publish::NodeVolumes;
use super::spec::{discard, volume_spec};
use crate::kata::{KataError, LoopDevice, TargetPath, is_same_place};

/// Whether a volume is what its publication asks for.
pub(super) fn check_mode(volume: &Volume, wanted: VolumeMode) -> Result<(), VolumeError> {
    if volume.mode == wanted {
        return Ok(());
    }
    let word = |mode: VolumeMode| if mode.is_filesystem() { "Filesystem" } else { "Block" };
    let reason = format!(
        "volume {} was made with volumeMode: {}, and is asked for as {}: it stays what it was made as; use {} in pod and \
         claim, or make a new volume",
        volume.id,
        word(volume.mode),
        word(wanted),
        if volume.mode.is_filesystem() { "volumeMounts" } else { "volumeDevices" },
    );
    Err(VolumeError::invalid("volume_capability", reason))
}

impl NodeVolumes {
    /// Leaves the guest its note, under the proof that nobody has the device.
    pub(super) async fn leave_note(
        &self,
        volume: &Volume,
        publication: &Publication,
        token: Uuid,
        proof: Box<dyn Exclusive>,
    ) -> Result<Box<dyn Exclusive>, VolumeError> {
        let id = volume.id;
        let note = note::encode(&volume_spec(volume, publication, token)).map_err(|error| {
            VolumeError::invalid("parameters", format!("volume {id}: {error}; set fewer ZFS properties"))
        })?;
        crash::point("publish: note");
        let write = move |backing: &dyn zpod_storage::backing::Backing| {
            backing.write_note(id, &note, proof.as_ref())?;
            Ok(proof)
        };
        let proof = self.context.with_backing(write).await?;
        crash::point("publish: note written");
        Ok(proof)
    }

    /// The loop device and its node at the target path, whatever is there of them already.
    pub(super) async fn install_device(&self, volume: &Volume, target: &TargetPath) -> Result<Outcome, VolumeError> {
        let id = volume.id;
        let image = self.context.with_backing(move |backing| backing.device(id)).await?;
        let (target, discards) = (target.clone(), discard(volume));
        blocking(move || {
            let (device, attached) = LoopDevice::attach(&image, discards)?;
            crash::point("publish: loop device attached");
            let mounted = target.mount_device(&device)?;
            crash::point("publish: device mounted");
            Ok(if mounted == Outcome::Unchanged { attached } else { mounted })
        })
        .await
    }

    /// Detaches the loop device of a volume, if it has one. Kubelet's, on top of it, may keep it until kubelet is done.
    pub(super) async fn detach_device(&self, id: VolumeId) -> Result<Outcome, VolumeError> {
        let Some(image) = self.image(id).await? else { return Ok(Outcome::Unchanged) };
        blocking(move || Ok(LoopDevice::detach(&image)?)).await
    }

    /// Detaches the loop device of a volume, if it has one and nobody has it open. It stays as it was otherwise.
    pub(super) async fn detach_unused_device(&self, id: VolumeId) -> Result<(), VolumeError> {
        let Some(image) = self.image(id).await? else { return Ok(()) };
        let Some(used) = blocking(move || Ok(LoopDevice::detach_unused(&image)?)).await? else { return Ok(()) };
        let (device, detail) = (used.path().to_owned(), "perhaps as kubelet's own loop device on top of it".into());
        Err(self.context.backing_error(BackingError::InUse { id, device, detail }))
    }

    /// The image of a volume; none where it is gone, and with it all that it was attached to.
    async fn image(&self, id: VolumeId) -> Result<Option<PathBuf>, VolumeError> {
        match self.context.with_backing(move |backing| backing.device(id)).await {
            Err(VolumeError::Backing { source: BackingError::Missing { .. }, .. }) => Ok(None),
            image => image.map(Some),
        }
    }
}

/// Clears a target path of which it is not known what was published there.
pub(super) fn remove_target(target: &TargetPath, mode: Option<VolumeMode>) -> Result<Outcome, KataError> {
    let directory = std::fs::symlink_metadata(target.as_path()).is_ok_and(|found| found.is_dir());
    match mode {
        Some(VolumeMode::Block) => target.remove_device(),
        None if !directory => target.remove_device(),
        Some(VolumeMode::Filesystem) | None => target.remove_placeholder(),
    }
}

/// Whether kubelet means the volume at `target` when it says `path`. For a block device it asks by a path of its own,
/// `.../volumeDevices/<volume>/dev/<pod>`, which has but the pod's UID in common with `.../publish/<volume>/<pod>`.
pub(super) fn is_meant(target: &Path, path: &Path, block: bool) -> bool {
    let of_block = || path.parent().is_some_and(|dir| dir.ends_with("dev")) && path.file_name() == target.file_name();
    is_same_place(target, path) || block && of_block()
}

#[cfg(test)]
mod tests {
    use super::*;
    use zpod_volume::{Bytes, VolumeParameters};

    #[test]
    fn a_volume_is_published_as_what_it_was_made() {
        let files = Volume::wanted("a", Bytes::gib(1), VolumeParameters::default(), "n");
        let block = Volume { mode: VolumeMode::Block, ..files.clone() };
        assert!(check_mode(&files, VolumeMode::Filesystem).is_ok() && check_mode(&block, VolumeMode::Block).is_ok());
        let error = check_mode(&block, VolumeMode::Filesystem).unwrap_err().to_string();
        assert!(error.contains("made with volumeMode: Block") && error.contains("volumeDevices"), "{error}");
    }

    #[test]
    fn kubelets_path_for_the_statistics_of_a_device_is_known() {
        let plugins = Path::new("/var/lib/kubelet/plugins/kubernetes.io/csi/volumeDevices");
        let (target, asked) = (plugins.join("publish/pv-1/uid-1"), plugins.join("pv-1/dev/uid-1"));
        assert!(is_meant(&target, &target, false) && is_meant(&target, &asked, true));
        assert!(!is_meant(&target, &asked, false));
        assert!(!is_meant(&target, &plugins.join("pv-1/dev/uid-2"), true));
        assert!(!is_meant(&target, &plugins.join("pv-1/else/uid-1"), true));
    }
}
