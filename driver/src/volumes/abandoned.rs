//! Publications that nobody came to unpublish, such as after an error that kubelet took as final though the volume was
//! published.
//!
//! # Design
//! Taken back is what nobody can use any more, for certain: the API server does not know the pod by its UID, no guest speaks
//! of the volume, kubelet has nothing of it, and the kernel says that nobody has the device.
//!
//! **kubelet has nothing** of a file system whose target path is gone with the pod's directory. The target path of a block
//! device is elsewhere, and nobody but this driver clears it. kubelet makes a file of its own for the pod, mounts the device
//! on that from the target path, and puts a loop device on top, in this order (`MapBlockVolume` of Kubernetes 1.37). So the
//! target path is cleared, and then there must be neither that file nor the pod's directory: what is not there now can't
//! come any more. A node of the device that stayed somewhere would lead to another volume, once that has its number.
//!
//! **Nobody has the device** when the kernel grants the lease on its image, for which a loop device of it has to go first.
//! One that somebody has open, such as a virtual machine or kubelet's own loop device on top, stays as it was.
//!
//! # Limitations
//! Where there is nobody to ask for pods, nothing is certain, and nothing is taken back: Kata finds its entry by the name of
//! the target path, whether or not that is there. Publications of an earlier boot of the host are over by themselves.

use std::path::{Path, PathBuf};
use std::time::Duration;

use zpod_storage::backing::{BackingError, Outcome};
use zpod_storage::catalog::{PodRef, Volume};
use zpod_volume::{VolumeId, VolumeMode};

use super::context::{blocking, to_the_end};
use super::publish::{Closing, NodeVolumes};
use super::withdraw::remove;
use super::{Look, VolumeError};
use crate::kata::Removal;

/// How often is looked for publications whose pods are gone.
const LOOK_EVERY: Duration = Duration::from_secs(600);
/// Where kubelet has the target paths of block devices, below its own directory.
const DEVICES: &str = "plugins/kubernetes.io/csi/volumeDevices/publish";

impl NodeVolumes {
    /// Takes back publications whose pods are gone. For ever.
    pub async fn keep_withdrawing_abandoned(self) {
        loop {
            tokio::time::sleep(LOOK_EVERY).await;
            self.withdraw_abandoned().await;
        }
    }

    /// One look at all.
    pub async fn withdraw_abandoned(&self) {
        self.withdraw_where(|_| true).await;
    }

    /// The same for those volumes alone.
    pub(super) async fn withdraw_where(&self, wanted: impl Fn(VolumeId) -> bool + Send) {
        let looks = self.context.published.looks().into_iter();
        for look in looks.filter(|look| wanted(look.volume.id)) {
            let id = look.volume.id;
            match self.withdraw_if_abandoned(look).await {
                Ok(Outcome::Changed) => {
                    tracing::warn!(volume = %id, "its pod is gone, and nobody unpublished it: the publication was taken back");
                }
                Ok(Outcome::Unchanged) => {}
                // It keeps no other from being looked at.
                Err(error) => {
                    tracing::info!(volume = %id, "whether its pod is gone is not known, or it stays published: {error}")
                }
            }
        }
    }

    async fn withdraw_if_abandoned(&self, look: Look) -> Result<Outcome, VolumeError> {
        let (id, target) = (look.volume.id, &look.volume.target);
        let Some(pod) = look.volume.pod.clone().filter(|_| look.heard.is_none()) else { return Ok(Outcome::Unchanged) };
        let mode = if self.context.published.is_block(id) { VolumeMode::Block } else { VolumeMode::Filesystem };
        if !Left::of(mode, target, &pod).is_nothing().await? || !self.pods.is_gone(id, &pod).await? {
            return Ok(Outcome::Unchanged);
        }
        let node = self.clone();
        to_the_end(async move { node.withdraw_unused(id, &pod).await }).await
    }

    async fn withdraw_unused(&self, id: VolumeId, pod: &PodRef) -> Result<Outcome, VolumeError> {
        let _lock = self.context.lock(id).await;
        // Inline volumes end with their pods: `end_abandoned`.
        let Some(volume) = self.context.catalog.get(id).await?.filter(|volume| !volume.ephemeral) else {
            return Ok(Outcome::Unchanged);
        };
        let Some(publication) = self.context.publication(&volume).filter(|known| known.pod.as_ref() == Some(pod))
        else {
            return Ok(Outcome::Unchanged);
        };
        let target = publication.target_path.clone();
        let left = Left::of(volume.mode, &target, pod);
        if !left.is_nothing().await? {
            return Ok(Outcome::Unchanged);
        }
        if volume.mode == VolumeMode::Block {
            let (direct, target) = (self.direct.clone(), target.clone());
            blocking(move || remove(&direct, &target, Some(VolumeMode::Block))).await?;
            if !left.is_nothing().await? {
                return Ok(Outcome::Unchanged);
            }
        }
        self.prove_unused(&volume).await?;
        self.withdraw(Some(volume), id, &target, true).await
    }

    /// Proves that nobody has a volume's device. What this node has made of its images for a guest goes before.
    async fn prove_unused(&self, volume: &Volume) -> Result<(), VolumeError> {
        let closing = Closing::begin();
        loop {
            if let Some(answer) = closing.over(self.let_go(volume).await).await {
                answer?;
                break;
            }
        }
        match self.prove_exclusive(volume).await {
            // What is not there nobody has.
            Ok(_) | Err(VolumeError::Backing { source: BackingError::Missing { .. }, .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }

    async fn let_go(&self, volume: &Volume) -> Result<(), VolumeError> {
        self.context.part(volume, Removal::Now).await?;
        if volume.mode == VolumeMode::Block { self.detach_unused_device(volume.id).await } else { Ok(()) }
    }
}

/// What kubelet has of a publication until it is done with it.
#[derive(Debug, Clone)]
enum Left {
    /// The target path of a file system, in the pod's directory.
    Mount(PathBuf),
    /// Of a block device its own file for the pod, and the pod's directory in that of all pods.
    Device { mapped: PathBuf, pods: PathBuf, uid: String },
    /// It is not known where.
    Unknown,
}

impl Left {
    fn of(mode: VolumeMode, target: &Path, pod: &PodRef) -> Self {
        match mode {
            VolumeMode::Filesystem => Self::Mount(target.to_owned()),
            VolumeMode::Block => Self::of_device(target, &pod.uid).unwrap_or(Self::Unknown),
        }
    }

    /// Of a target path `ROOT/plugins/kubernetes.io/csi/volumeDevices/publish/VOLUME/UID`.
    fn of_device(target: &Path, uid: &str) -> Option<Self> {
        let volume = target.parent()?;
        let publish = volume.parent()?;
        if !publish.ends_with(DEVICES) || uid.is_empty() || target.file_name()? != uid {
            return None;
        }
        let mapped = publish.parent()?.join(volume.file_name()?).join("dev").join(uid);
        let pods = publish.ancestors().nth(Path::new(DEVICES).components().count())?.join("pods");
        Some(Self::Device { mapped, pods, uid: uid.to_owned() })
    }

    /// Whether nothing is left, for certain.
    async fn is_nothing(&self) -> Result<bool, VolumeError> {
        let left = self.clone();
        blocking(move || {
            Ok(match left {
                Self::Mount(target) => is_gone(&target),
                // A directory of all pods that is not there is one that can't be seen from here.
                Self::Device { mapped, pods, uid } => pods.is_dir() && is_gone(&pods.join(uid)) && is_gone(&mapped),
                Self::Unknown => false,
            })
        })
        .await
    }
}

/// Whether there is nothing at a path.
fn is_gone(path: &Path) -> bool {
    std::fs::symlink_metadata(path).is_err_and(|error| error.kind() == std::io::ErrorKind::NotFound)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn kubelet_is_done_with_a_device_when_file_and_directory_of_the_pod_are_gone_from_places_that_are_known() {
        let root = tempfile::tempdir().unwrap();
        let pod = PodRef { namespace: "ns".into(), name: "pod".into(), uid: "uid-1".into() };
        let path = |name: &str| root.path().join(name);
        let done = async |target: &str| Left::of(VolumeMode::Block, &path(target), &pod).is_nothing().await.unwrap();
        let target = "plugins/kubernetes.io/csi/volumeDevices/publish/pv-1/uid-1";
        assert!(!done(target).await, "kubelet's directory can't be seen");
        std::fs::create_dir(path("pods")).unwrap();
        assert!(done(target).await);
        for other in ["pods/uid-1", "publish/pv-1/uid-1", "plugins/kubernetes.io/csi/volumeDevices/publish/pv-1/uid-2"]
        {
            assert!(!done(other).await, "{other} is no target path of this pod's device");
        }
        for left in ["pods/uid-1", "plugins/kubernetes.io/csi/volumeDevices/pv-1/dev/uid-1"] {
            std::fs::create_dir_all(path(left)).unwrap();
            assert!(!done(target).await, "{left}");
            std::fs::remove_dir(path(left)).unwrap();
        }
        assert!(done(target).await);
    }
}
