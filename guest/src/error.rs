//! Why a volume can't be used, said so that a person can act on it.

use std::time::Duration;

use tonic::Code;
use zpod_volume::{Bytes, Mark, VolumeId};

use crate::lost::Seen;
use crate::machine::{Fault, Health};

/// Why a volume can't be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum VolumeError {
    /// Its disk did not come.
    #[error(
        "volume {id}: no disk with this GUID appeared within {} s; disks seen: {disks}; check that the node attached the \
         right device", waited.as_secs()
    )]
    NoDisk {
        /// The volume.
        id: VolumeId,
        /// How long was waited.
        waited: Duration,
        /// What was there instead.
        disks: String,
    },
    /// Its disk is there more than once.
    #[error(
        "volume {id}: more than one disk has this GUID, they don't show one and the same image, and using the wrong one \
         could lose data; disks seen: {disks}; delete the pod, and if that does not help see whether its backing device \
         was copied"
    )]
    ManyDisks {
        /// The volume.
        id: VolumeId,
        /// What is there.
        disks: String,
    },
    /// Its disk is read-only, and what is asked needs more.
    #[error("volume {id}: its disk {disk} is plugged in read-only, and {reason}; nothing was changed")]
    ReadOnly {
        /// The volume.
        id: VolumeId,
        /// Its disk.
        disk: String,
        /// What can't be done so, and what to do.
        reason: &'static str,
    },
    /// Its partition table is not as a node plugin writes it.
    #[error("volume {id}: the partition table of disk {disk} is not one of zpod's: {reason}; nothing was changed")]
    Table {
        /// The volume.
        id: VolumeId,
        /// Its disk.
        disk: String,
        /// What is wrong.
        reason: String,
    },
    /// There is no pool where one must be.
    #[error(
        "volume {id}: disk {disk} (GUID {id}) is blank, but the volume is recorded as in use since before: its backing device \
         is another one, or somebody in its pod wiped the labels of its pool (zpool labelclear); nothing was formatted; put \
         the right device back, or restore the volume from a snapshot or a backup"
    )]
    Blank {
        /// The volume.
        id: VolumeId,
        /// Its disk.
        disk: String,
    },
    /// The pool was being made when the machine stopped, and the node says that none may be made.
    #[error(
        "volume {id}: making its pool on disk {disk} was cut short before any container started, and the node does not \
         allow to make it again; nothing was formatted; the pool can't be imported: {cause}"
    )]
    HalfMade {
        /// The volume.
        id: VolumeId,
        /// Its disk.
        disk: String,
        /// Why it can't be imported.
        cause: Fault,
    },
    /// There is something on the disk, and ZFS can't import it.
    #[error(
        "volume {id}: the pool {pool} on disk {disk} can't be imported{seen}; nothing was changed on the disk, and nothing is \
         made over it; {}; ZFS says: {cause}", seen.remedy()
    )]
    Import {
        /// The volume.
        id: VolumeId,
        /// Its pool.
        pool: String,
        /// Its disk.
        disk: String,
        /// What its label says.
        seen: Box<Seen>,
        /// What ZFS said.
        cause: Fault,
    },
    /// The disk is not what the node says it is a copy of.
    #[error(
        "volume {id}: disk {disk} is to be a copy of volume {origin}'s, but its journal is neither that volume's nor this \
         one's; nothing was changed; check that the backing device is the right one"
    )]
    NotItsCopy {
        /// The volume.
        id: VolumeId,
        /// Its disk.
        disk: String,
        /// What it is to be a copy of.
        origin: VolumeId,
    },
    /// The instant to go back to is not there.
    #[error(
        "volume {id}: the copy of volume {origin} that it was made from does not have the instant it is to show ({mark}); \
         nothing was rolled back; delete this volume, and the snapshot it was made from, and take a new one"
    )]
    NoMark {
        /// The volume.
        id: VolumeId,
        /// What it is a copy of.
        origin: VolumeId,
        /// The ZFS snapshot that is missing.
        mark: Mark,
    },
    /// What is on the disk is of another kind than the node says.
    #[error(
        "volume {id}: its dataset has {property}={found}, and the node says it has {property}={wanted}; nothing was \
         changed; a volume keeps what it, or the one it was made from, was made with: check its StorageClass"
    )]
    Differs {
        /// The volume.
        id: VolumeId,
        /// Which property.
        property: &'static str,
        /// What the node says.
        wanted: String,
        /// What is there.
        found: String,
    },
    /// It is encrypted, and the node has provided no key.
    #[error(
        "volume {id}: it is encrypted, and its node has provided no key within {:.0} s; name a Secret with encryptionKey in \
         its StorageClass (csi.storage.k8s.io/node-publish-secret-name and -namespace), and see that it exists; the \
         container is tried again until the key is there", waited.as_secs_f64()
    )]
    NoKey {
        /// The volume.
        id: VolumeId,
        /// How long was waited.
        waited: Duration,
    },
    /// The key does not fit.
    #[error(
        "volume {id}: the key that its node has provided is not its key{}; nothing was changed; put the right one in its \
         Secret as encryptionKey; to change the key, put the one before in as previousEncryptionKey",
        if *.previous { ", and neither is the one before" } else { "" }
    )]
    WrongKey {
        /// The volume.
        id: VolumeId,
        /// The key before it did not fit either.
        previous: bool,
    },
    /// A key for a volume that has none.
    #[error("volume {id}: it is not encrypted and has no key; a volume is encrypted from its creation on, or never")]
    NotEncrypted {
        /// The volume.
        id: VolumeId,
    },
    /// Somebody speaks of another publication.
    #[error("volume {id}: it was published with another token; ask with that of the publication that runs")]
    OtherToken {
        /// The volume.
        id: VolumeId,
    },
    /// There is too much in it, or too little room beside it, for what is asked.
    #[error("volume {id}: {reason}")]
    NoRoom {
        /// The volume.
        id: VolumeId,
        /// What there is, and what to do.
        reason: String,
    },
    /// The pool has no dataset.
    #[error(
        "volume {id}: the pool has no dataset {dataset}; nothing was made in its place; somebody destroyed it or \
         gave it another name: restore the volume from a snapshot or a backup, or see docs/pod-zfs.md"
    )]
    NoDataset {
        /// The volume.
        id: VolumeId,
        /// The dataset.
        dataset: String,
    },
    /// The pool is left over from a disk that is gone, and won't come back to life.
    #[error(
        "volume {id}: its pool is {health} in this virtual machine since its disk was taken away, and does not resume on \
         the disk that came back ({cause}); delete the pod: the data is safe, and a new virtual machine imports it"
    )]
    Stuck {
        /// The volume.
        id: VolumeId,
        /// How the pool is.
        health: Health,
        /// What ZFS said.
        cause: String,
    },
    /// A step failed.
    #[error(
        "volume {id}: {step}: {cause}; it is safe to try again, and if it stays so delete the pod: another virtual machine \
         begins anew"
    )]
    Failed {
        /// The volume.
        id: VolumeId,
        /// What was tried.
        step: &'static str,
        /// What came of it.
        cause: Fault,
    },
    /// The caller's time was up.
    #[error(
        "volume {id}: not ready yet after {:.1} s: {progress}; the work goes on and a retry will find it further",
        waited.as_secs_f64()
    )]
    Overrun {
        /// The volume.
        id: VolumeId,
        /// How long the caller waited.
        waited: Duration,
        /// How far it is.
        progress: String,
    },
    /// A request that asks for something impossible.
    #[error("volume {id}: {reason}")]
    Invalid {
        /// The volume.
        id: VolumeId,
        /// What is wrong.
        reason: String,
    },
    /// A request that the volume, as it is now, is not ready for.
    #[error("volume {id}: {reason}")]
    Refused {
        /// The volume.
        id: VolumeId,
        /// Why, and what to do.
        reason: String,
    },
    /// No such volume here.
    #[error("volume {id} is not in use in this guest")]
    NotHere {
        /// The volume.
        id: VolumeId,
    },
    /// The disk is too small for what is asked.
    #[error(
        "volume {id}: a partition of {wanted} does not fit on its disk of {disk}, which holds one of {largest}; the \
         volume grows when its pod is next started"
    )]
    TooLarge {
        /// The volume.
        id: VolumeId,
        /// What was asked.
        wanted: Bytes,
        /// What the disk holds.
        largest: Bytes,
        /// Size of the disk.
        disk: Bytes,
    },
}

impl VolumeError {
    /// A step failed.
    pub fn failed(id: VolumeId, step: &'static str, cause: Fault) -> Self {
        Self::Failed { id, step, cause }
    }

    /// Whether it stays so until somebody changes something outside this guest.
    pub(crate) const fn is_for_good(&self) -> bool {
        matches!(
            self,
            Self::NoMark { .. }
                | Self::Differs { .. }
                | Self::NoDataset { .. }
                | Self::NoKey { .. }
                | Self::WrongKey { .. }
        )
    }

    /// The code under which it is reported.
    pub fn code(&self) -> Code {
        match self {
            Self::NoDisk { .. } | Self::NotHere { .. } => Code::NotFound,
            Self::ManyDisks { .. }
            | Self::ReadOnly { .. }
            | Self::Table { .. }
            | Self::Blank { .. }
            | Self::HalfMade { .. }
            | Self::Import { .. }
            | Self::NotItsCopy { .. }
            | Self::NoKey { .. }
            | Self::NotEncrypted { .. }
            | Self::OtherToken { .. }
            | Self::NoRoom { .. }
            | Self::NoMark { .. }
            | Self::Differs { .. }
            | Self::Refused { .. }
            | Self::Stuck { .. } => Code::FailedPrecondition,
            Self::NoDataset { .. } => Code::DataLoss,
            Self::WrongKey { .. } => Code::PermissionDenied,
            Self::Failed { .. } => Code::Internal,
            Self::Overrun { .. } => Code::DeadlineExceeded,
            Self::Invalid { .. } => Code::InvalidArgument,
            Self::TooLarge { .. } => Code::OutOfRange,
        }
    }
}

impl From<VolumeError> for tonic::Status {
    fn from(error: VolumeError) -> Self {
        Self::new(error.code(), error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_person_can_do_is_said() {
        let id = VolumeId::from_name("a");
        for (error, want) in [
            (VolumeError::ManyDisks { id, disks: "vda, vdb".into() }, "delete the pod"),
            (VolumeError::NoDataset { id, dataset: "p/data".into() }, "from a snapshot or a backup"),
            (VolumeError::failed(id, "mounting it", Fault::new("no")), "it is safe to try again"),
        ] {
            assert!(error.to_string().contains(want), "{error}");
        }
    }
}
