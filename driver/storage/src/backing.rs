//! Device providers: they make, keep and destroy the block device behind a volume.
//!
//! # Design
//! A provider never looks at what a guest wrote. It writes partition tables and never reads one, and it asks the file
//! system *whether* the pool's region holds anything, never *what* (DESIGN: the host never reads a tenant's bytes).
//! Only [`Backing::destroy`] removes or shortens anything.

#[cfg(test)]
mod conformance;
pub mod file;
mod kept;
pub mod late;
mod ledger;
pub mod mirrored;
mod overhead;
pub mod sim;

use std::fmt;
use std::path::{Path, PathBuf};

use zpod_volume::{Bytes, DiskLayout, Half, Provisioning, SnapshotId, VolumeId};

impl fmt::Debug for Copying<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Copying").field("full", &self.full).finish_non_exhaustive()
    }
}

/// What a provider is asked to make.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceSpec {
    /// The volume.
    pub id: VolumeId,
    /// Sizes of partition and disk.
    pub layout: DiskLayout,
    /// Thin or thick.
    pub provisioning: Provisioning,
}

/// What a step changed. A step that finds its work done says so and changes nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It was done now.
    Changed,
    /// It had been done before.
    Unchanged,
}

/// Room for volumes on a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Capacity {
    /// What the volumes of this node may take together, over-commit included.
    pub total: Bytes,
    /// What can still be promised: space for partitions.
    pub available: Bytes,
    /// The largest partition one volume can get.
    pub largest: Bytes,
}

/// What a device is made from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CopySource {
    /// Another device. The caller has seen to it that it is whole.
    Device(VolumeId),
    /// A snapshot.
    Snapshot(SnapshotId),
}

/// How a copy is made.
pub struct Copying<'a> {
    /// A full copy may be made where blocks can't be shared.
    pub full: bool,
    /// Told of a full copy's progress: bytes done, bytes in all. `false` stops it; it can be repeated.
    pub progress: &'a (dyn Fn(Bytes, Bytes) -> bool + Sync),
}

/// A proof that nobody else has the device open, for as long as it lives.
///
/// The provider holds a lease or lock of the kernel in it where it can.
pub trait Exclusive: Send + fmt::Debug {}

/// A device provider on one node. Calls may block: run them off the async threads. Every call is idempotent and can be
/// killed at any point and repeated. Calls for one volume don't overlap (the node holds a lock per volume).
pub trait Backing: Send + Sync + fmt::Debug {
    /// Makes the device: disk and partition table. Refuses to over-commit.
    ///
    /// # Errors
    /// [`BackingError::NoRoom`], [`BackingError::Mismatch`] where a device of that id and other sizes exists.
    fn create(&self, spec: &DeviceSpec) -> Result<Outcome, BackingError>;

    /// Removes the device. The only call that does.
    ///
    /// # Errors
    /// [`BackingError::InUse`] while anybody has it open.
    fn destroy(&self, id: VolumeId) -> Result<Outcome, BackingError>;

    /// Promises room for a larger partition, and makes the disk larger where the new one asks for it. Never shrinks;
    /// the table is written by [`Backing::write_table`]. May be called while a guest runs.
    ///
    /// # Errors
    /// [`BackingError::NoRoom`].
    fn grow(&self, spec: &DeviceSpec) -> Result<Outcome, BackingError>;

    /// Proves that nobody has the device open.
    ///
    /// # Errors
    /// [`BackingError::InUse`] otherwise.
    fn exclusive(&self, id: VolumeId) -> Result<Box<dyn Exclusive>, BackingError>;

    /// Writes the partition table for this layout, blind. Only with a proof that no guest runs on it.
    fn write_table(&self, spec: &DeviceSpec, proof: &dyn Exclusive) -> Result<(), BackingError>;

    /// Whether the pool's region has ever been written to. Reads no data. An answer of `true` forbids to make a pool.
    fn ever_written(&self, spec: &DeviceSpec) -> Result<bool, BackingError>;

    /// Whether copies share blocks with what they are of: made at once, and taking no space until one of them changes.
    ///
    /// # Errors
    /// [`BackingError::Restricted`] while that is not known.
    fn shares_blocks(&self) -> Result<bool, BackingError>;

    /// The largest disk there can be, whatever room there is.
    ///
    /// # Errors
    /// [`BackingError::Restricted`] while that is not known.
    fn largest_disk(&self) -> Result<Bytes, BackingError>;

    /// Whether the place of the devices answers. Costs the same whatever is there.
    ///
    /// # Errors
    /// When it does not.
    fn look(&self) -> Result<(), BackingError>;

    /// Keeps a copy of a device's partition table and partition, as they are at this instant. The caller has seen to it
    /// that they are whole: nobody has the device open, or its guest has marked the instant and written everything out.
    /// Full copies are made only of devices that nobody has open.
    ///
    /// # Errors
    /// [`BackingError::CannotShare`], [`BackingError::NoRoom`].
    fn snapshot(&self, id: SnapshotId, source: &DeviceSpec, how: &Copying<'_>) -> Result<Outcome, BackingError>;

    /// Removes what [`Backing::snapshot`] has kept. Nothing else changes, whatever was made from it.
    fn destroy_snapshot(&self, id: SnapshotId) -> Result<Outcome, BackingError>;

    /// Space that a snapshot takes on the host, shared blocks included.
    ///
    /// # Errors
    /// [`BackingError::SnapshotMissing`].
    fn snapshot_allocated(&self, id: SnapshotId) -> Result<Bytes, BackingError>;

    /// Makes a device as [`Backing::create`] does, its partition beginning with the contents of `source`, whose partition
    /// has `partition` bytes and is not larger. Its own partition table is written, blind.
    ///
    /// # Errors
    /// As [`Backing::create`] and [`Backing::snapshot`].
    fn create_from(
        &self,
        spec: &DeviceSpec,
        source: CopySource,
        partition: Bytes,
        how: &Copying<'_>,
    ) -> Result<Outcome, BackingError>;

    /// Leaves the guest a note in the region that [`DiskLayout::SPEC_OFFSET`] is kept for. Only with a proof that no guest
    /// runs on the device.
    fn write_note(&self, id: VolumeId, note: &[u8], proof: &dyn Exclusive) -> Result<(), BackingError>;

    /// What the shim is given: a block device or a regular file.
    fn device(&self, id: VolumeId) -> Result<PathBuf, BackingError>;

    /// Space the device takes on the host now.
    fn allocated(&self, id: VolumeId) -> Result<Bytes, BackingError>;

    /// How much more the device takes than its promise and the metadata for it: the sign of a guest that writes past its
    /// partition, into the room of others. Always zero where the provider bounds that.
    ///
    /// # Errors
    /// [`BackingError::Missing`].
    fn excess(&self, id: VolumeId) -> Result<Bytes, BackingError>;

    /// Room on this node.
    fn capacity(&self) -> Result<Capacity, BackingError>;

    /// For a person: where the devices are.
    fn location(&self) -> &Path;
}

/// Why a provider refused or failed.
#[derive(Debug, thiserror::Error)]
pub enum BackingError {
    /// The promise would exceed what the node has.
    #[error(
        "no room at {location} for {wanted}: {available} can still be promised; free space, pick another node, or raise \
         the over-commit ratio (--overprovision)"
    )]
    NoRoom {
        /// Directory or pool.
        location: String,
        /// What was asked for.
        wanted: Bytes,
        /// What is left.
        available: Bytes,
    },
    /// No file there can be so long.
    #[error(
        "capacity: the volume's disk would have {wanted}, and the file system of {location} holds no file longer than \
         {largest}: ask for less, or put the backing directory on XFS or btrfs"
    )]
    TooLarge {
        /// Directory.
        location: String,
        /// What was asked for.
        wanted: Bytes,
        /// What there can be.
        largest: Bytes,
    },
    /// Nothing new can be made there now. What there is can be used, unpublished and removed.
    #[error(
        "nothing new can be made at {location} now ({reason}): delete volumes or snapshots there, free space otherwise, or \
         see why the file system is read-only; it goes on by itself then"
    )]
    Restricted {
        /// Directory.
        location: String,
        /// Why.
        reason: String,
    },
    /// The place of the devices, or of one half of every mirror, can't be used.
    #[error(
        "the directory of devices {path} can't be used: {reason}; mount the disk that belongs there (nothing is made in its \
         place), it is used as soon as it is there"
    )]
    Gone {
        /// The directory.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// One half of a mirror could not be made, and the other one is there.
    #[error(
        "volume {id}: the {half} of its mirror can't be made, while the other one is there; it is made when this is \
             repeated: {source}"
    )]
    HalfMade {
        /// The volume.
        id: VolumeId,
        /// Which half.
        half: Half,
        /// Why.
        source: Box<BackingError>,
    },
    /// Somebody has the device open.
    #[error(
        "volume {id}: {device} is open in another process ({detail}); a virtual machine may still run on it: wait until \
         its pod is gone"
    )]
    InUse {
        /// The volume.
        id: VolumeId,
        /// Its device.
        device: PathBuf,
        /// What was found.
        detail: String,
    },
    /// There is no device.
    #[error("volume {id}: its device {device} does not exist; the backing directory may not be mounted")]
    Missing {
        /// The volume.
        id: VolumeId,
        /// Where it should be.
        device: PathBuf,
    },
    /// There is a device, of another shape.
    #[error(
        "volume {id}: its device {device} has {found} where {wanted} was expected; nothing was changed; put back the file \
         that belongs there, or see whether another directory is mounted"
    )]
    Mismatch {
        /// The volume.
        id: VolumeId,
        /// Its device.
        device: PathBuf,
        /// The size found.
        found: Bytes,
        /// The size expected.
        wanted: Bytes,
    },
    /// The file system can't share blocks, and a full copy is not allowed.
    #[error(
        "the file system of {location} can't share blocks between files, so that this would be a full copy: put the \
         backing directory on XFS or btrfs, or allow full copies (StorageClass or VolumeSnapshotClass parameter \
         allowCopy: \"true\")"
    )]
    CannotShare {
        /// Directory or pool.
        location: String,
    },
    /// There is no copy kept of that name.
    #[error("snapshot {id}: its copy {file} does not exist; the backing directory may not be mounted")]
    SnapshotMissing {
        /// The snapshot.
        id: SnapshotId,
        /// Where it should be.
        file: PathBuf,
    },
    /// The caller has stopped a copy.
    #[error("the copy was stopped; it is made again when it is asked for again")]
    Stopped,
    /// The operating system refused.
    #[error("{what} {path}: {source}; look at the file system there and at the kernel's log of the node")]
    Io {
        /// What was tried, such as `create`.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        source: std::io::Error,
    },
}

/// What a kernel says of a disk that died: XFS answers `EIO` and `EUCLEAN` once it has shut down, and `ENODATA` for what
/// the medium has lost.
const DEAD: [i32; 6] = [libc::EIO, libc::ENXIO, libc::ENODEV, libc::EUCLEAN, libc::ENODATA, libc::EROFS];

impl BackingError {
    /// Whether there is no room now for what was asked for: nothing was made.
    pub fn is_no_room(&self) -> bool {
        matches!(self, Self::NoRoom { .. } | Self::Restricted { .. })
    }

    /// Whether the device is not there, or its disk is dead: asking again, as things are, won't help.
    pub fn is_lost(&self) -> bool {
        match self {
            Self::Missing { .. } | Self::Gone { .. } => true,
            Self::Io { source, .. } => source.raw_os_error().is_some_and(|error| DEAD.contains(&error)),
            _ => false,
        }
    }
}
