//! What the rest of this program needs of the machine it runs on: disks, ZFS, mounts.
//!
//! # Design
//! The trait cuts at single steps, each of which the kernel does or doesn't do: whoever simulates it can stop between
//! any two. Every call is bounded in time.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use async_trait::async_trait;
use jiff::Timestamp;
use zpod_volume::{Bytes, Encryption, Half, PoolName, SECTOR, VolumeId, gpt};

use crate::key::Key;

mod linux;
pub mod rollbacks;
#[cfg(test)]
pub(crate) mod simulated;
pub mod streams;

pub use linux::{LinuxMachine, ZfsLoaded};

/// A disk as the kernel shows it, or a half of one that is laid out as a disk of its own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disk {
    /// Its name, such as `vda`.
    pub name: String,
    /// The kernel's number for this appearance of it (`diskseq`): another one when it was unplugged and plugged again.
    pub sequence: u64,
    /// Its size.
    pub size: Bytes,
    /// Its directory in sysfs: where it is on which bus.
    pub place: PathBuf,
    /// What its partition table says, or why it says nothing.
    pub table: Result<gpt::Header, String>,
    /// Where it begins on the kernel's disk, in bytes: offsets on it count from there.
    pub start: u64,
    /// The number of its partition.
    pub number: u32,
    /// It can't be written to.
    pub read_only: bool,
}

/// What ZFS's label on a partition says of its pool.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Label {
    /// GUID of the pool.
    pub guid: u64,
    /// The transaction group that it was written in.
    pub txg: u64,
    /// Nobody has had the pool since it was exported.
    pub exported: bool,
    /// Somebody destroyed the pool.
    pub destroyed: bool,
    /// Its name, with nothing in it but what names of pools may have.
    pub name: String,
    /// How many devices it lies on; a mirror counts once.
    pub devices: u64,
}

impl Disk {
    /// A half of it. Its table has not been read yet.
    pub fn half(&self, half: Half) -> Self {
        let size = Bytes(self.size.0 / 2).round_down(SECTOR);
        let (start, number) = match half {
            Half::First => (0, 1),
            Half::Second => (size.0, 2),
        };
        Self { size, start, number, table: Err("not read yet".to_owned()), ..self.clone() }
    }
}

/// Numbers of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceNumber {
    /// Which driver.
    pub major: u32,
    /// Which of its devices.
    pub minor: u32,
}

/// The property of a pool's own dataset in which is noted to whom rights over it were given.
pub const DELEGATED: &str = "storage.zpod:delegated";
/// The one in which is noted which rollback was the last, and what came of it.
pub const ROLLED_BACK: &str = "storage.zpod:rolled-back";

/// Whom rights over a dataset are given to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Grantee {
    /// User 0, in a container without CAP_SYS_ADMIN.
    Root,
    /// Whoever is in this group.
    Group(u32),
}

/// What a container has that may use ZFS.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ContainerZfs {
    /// ZFS's device.
    pub device: DeviceNumber,
    /// The directory with the tools.
    pub tools: PathBuf,
}

/// A file system below a volume's dataset.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Child {
    /// Its name.
    pub dataset: String,
    /// Who made it wants it mounted (`canmount=on`).
    pub mountable: bool,
}

/// Whether a step had to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// It was done now.
    Changed,
    /// It had been done before.
    Unchanged,
}

/// Health of an imported pool, from good to bad.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Health {
    /// All is well.
    Online,
    /// It works, with errors.
    Degraded,
    /// Its device is not to be used.
    Faulted,
    /// Its device is not there.
    Unavailable,
    /// It has stopped all input and output.
    Suspended,
}

impl Health {
    /// Reads ZFS's word for it.
    pub fn parse(word: &str) -> Self {
        match word.trim() {
            "ONLINE" => Self::Online,
            "DEGRADED" => Self::Degraded,
            "SUSPENDED" => Self::Suspended,
            "FAULTED" | "OFFLINE" => Self::Faulted,
            _ => Self::Unavailable,
        }
    }
}

impl fmt::Display for Health {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Online => "ONLINE",
            Self::Degraded => "DEGRADED",
            Self::Faulted => "FAULTED",
            Self::Unavailable => "UNAVAIL",
            Self::Suspended => "SUSPENDED",
        })
    }
}

/// What an imported pool says of itself.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PoolState {
    /// Whether its device has become larger than the pool.
    pub expandable: bool,
    /// Its properties, by name.
    pub properties: BTreeMap<String, String>,
}

/// How a pool fares.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PoolReport {
    /// What ZFS says is wrong and what to do; empty when all is well.
    pub message: String,
    /// Reads that failed.
    pub read_errors: u64,
    /// Writes that failed.
    pub write_errors: u64,
    /// Blocks that were not what was written.
    pub checksum_errors: u64,
    /// Files or objects with permanent damage.
    pub data_errors: u64,
    /// The scrub that runs, or the last one.
    pub scrub: Option<LastScrub>,
    /// Space allocated in the pool, in bytes.
    pub allocated: u64,
    /// Its devices.
    pub leaves: Vec<Leaf>,
    /// The resilver that runs, or the last scan if that was one.
    pub resilver: Option<LastScrub>,
}

impl PoolReport {
    /// A device is being given what it lacks.
    pub fn resilvering(&self) -> bool {
        self.resilver.is_some_and(|resilver| matches!(resilver.state, ScrubState::Running | ScrubState::Paused))
    }

    /// A scrub is running.
    pub fn scrubbing(&self) -> bool {
        self.scrub.is_some_and(|scrub| scrub.state == ScrubState::Running)
    }
}

/// A device of a pool.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Leaf {
    /// Its GUID: the one name of a device that is gone.
    pub guid: u64,
    /// The path by which the pool knows it, or knew it.
    pub path: PathBuf,
    /// How it is.
    pub health: Health,
    /// The scan that runs, or the last one, has written to it what it lacked.
    pub mended: bool,
}

/// A scrub or a resilver, and what came of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LastScrub {
    /// How far it is.
    pub state: ScrubState,
    /// When it ended, in seconds since 1970; 0 until then.
    pub ended: u64,
    /// Errors that it found.
    pub errors: u64,
    /// Bytes that it has examined.
    pub bytes: u64,
}

/// How far a scrub is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ScrubState {
    /// It runs.
    Running,
    /// It waits to be resumed.
    Paused,
    /// It has seen everything.
    Finished,
    /// It was stopped.
    Canceled,
}

/// Properties of a dataset, by name, sizes as plain numbers of bytes.
pub type Properties = BTreeMap<String, String>;

/// Flags of a mount.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, PartialOrd, Ord)]
pub struct MountFlags {
    /// Nothing can be written through it.
    pub read_only: bool,
    /// No programs are run from it.
    pub noexec: bool,
    /// Set-user-id bits are ignored.
    pub nosuid: bool,
    /// Device nodes are ignored.
    pub nodev: bool,
    /// Access times are not kept.
    pub noatime: bool,
}

/// A file system as df(1) sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Usage {
    /// Bytes in all.
    pub total_bytes: u64,
    /// Bytes that can still be written.
    pub available_bytes: u64,
    /// Bytes in use.
    pub used_bytes: u64,
    /// Inodes in all.
    pub total_inodes: u64,
    /// Inodes that can still be made.
    pub available_inodes: u64,
    /// Inodes in use.
    pub used_inodes: u64,
}

/// Why a step failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text}")]
pub struct Fault {
    /// For a person: what was tried and what came of it.
    pub text: String,
    /// Somebody still uses it: it may work later.
    pub busy: bool,
    /// It was not waited for any longer: the kernel may still do it.
    pub given_up: bool,
}

impl Fault {
    /// A failure.
    pub fn new(text: impl Into<String>) -> Self {
        Self { text: text.into(), busy: false, given_up: false }
    }
}

/// The machine.
#[async_trait]
pub trait Machine: streams::Streams + rollbacks::Rollbacks + Send + Sync + 'static {
    /// What time it is.
    fn now(&self) -> Timestamp;

    /// Returns once ZFS can be used.
    async fn zfs_ready(&self) -> Result<(), Fault>;

    /// Version of the ZFS module; empty until it is loaded.
    fn zfs_version(&self) -> String;

    /// Every whole disk there is, those without a table too.
    async fn disks(&self) -> Result<Vec<Disk>, Fault>;

    /// Reads from a disk, past any cache.
    async fn read(&self, disk: &Disk, offset: u64, length: usize) -> Result<Vec<u8>, Fault>;

    /// Writes to a disk; durable when it returns.
    async fn write(&self, disk: &Disk, offset: u64, bytes: &[u8]) -> Result<(), Fault>;

    /// What the label at the beginning of a disk's partition says; `None` where there is none.
    async fn label(&self, disk: &Disk, start: u64) -> Result<Option<Label>, Fault>;

    /// Tells the kernel of a disk's partition: made where there is none, resized where it differs.
    async fn partition(&self, disk: &Disk, start: u64, size: Bytes) -> Result<Step, Fault>;

    /// The volume's own path for the partition of this disk, wherever it leads.
    fn path(&self, id: VolumeId, disk: &Disk) -> PathBuf;

    /// Lets the volume's own path lead to the partition of this disk, and gives the path. Pools know their device
    /// by it, so that one whose disk comes back under another name can be resumed.
    async fn link(&self, id: VolumeId, disk: &Disk) -> Result<PathBuf, Fault>;

    /// Health of a pool; `None` when it is not imported. Cheap: no program is run.
    async fn health(&self, pool: &PoolName) -> Result<Option<Health>, Fault>;

    /// What a pool says of itself.
    async fn pool(&self, pool: &PoolName) -> Result<PoolState, Fault>;

    /// How a pool fares.
    async fn report(&self, pool: &PoolName) -> Result<PoolReport, Fault>;

    /// Imports the pool that has the name `found` on these devices, as `pool`, mounting nothing. With `read_only` nothing is
    /// written to them, and no log is replayed: [`crate::export`].
    async fn import(
        &self,
        found: &PoolName,
        pool: &PoolName,
        devices: &[PathBuf],
        read_only: bool,
    ) -> Result<(), Fault>;

    /// Gives an imported pool a new GUID, at random.
    async fn reguid(&self, pool: &PoolName) -> Result<(), Fault>;

    /// Gives up the state of a pool that its owner kept for a way back (`zpool checkpoint`). An error where there is none.
    async fn discard_checkpoint(&self, pool: &PoolName) -> Result<(), Fault>;

    /// Makes a pool on one device, or a mirror of more. With `force` whatever they hold is overwritten.
    async fn create_pool(
        &self,
        pool: &PoolName,
        devices: &[PathBuf],
        properties: &[(String, String)],
        force: bool,
    ) -> Result<(), Fault>;

    /// Makes the pool's dataset: a file system, or a sparse block device of a size. With a key its contents are
    /// encrypted, and the key is loaded.
    async fn create_dataset(
        &self,
        dataset: &str,
        size: Option<Bytes>,
        properties: &[(String, String)],
        encryption: Option<(Encryption, &Key)>,
    ) -> Result<(), Fault>;

    /// Loads the key of a dataset, or looks only whether it would fit. False where it does not.
    async fn load_key(&self, dataset: &str, key: &Key, only_look: bool) -> Result<bool, Fault>;

    /// Gives a dataset whose key is loaded another one.
    async fn change_key(&self, dataset: &str, key: &Key) -> Result<(), Fault>;

    /// The block device of a dataset; `None` while there is none. ZFS makes it some time after the dataset or its import.
    async fn volume_device(&self, dataset: &str) -> Result<Option<DeviceNumber>, Fault>;

    /// Writes out what the kernel's cache holds of a block device; nothing where there is no such device.
    async fn flush_volume(&self, dataset: &str) -> Result<(), Fault>;

    /// Properties of the pool's dataset; `None` when there is none.
    async fn dataset(&self, dataset: &str) -> Result<Option<Properties>, Fault>;

    /// What is noted in a property of the pool's own dataset; nothing where it has none.
    async fn noted(&self, pool: &PoolName, property: &str) -> Result<String, Fault>;

    /// Notes something there.
    async fn note(&self, pool: &PoolName, property: &str, note: &str) -> Result<(), Fault>;

    /// Sets properties of a dataset.
    async fn set_dataset(&self, dataset: &str, properties: &[(String, String)]) -> Result<(), Fault>;

    /// Gives somebody rights over a dataset and all below it, or takes them away. The set of rights is always the same one.
    async fn allow(&self, dataset: &str, grantee: Grantee, allowed: bool) -> Result<(), Fault>;

    /// What containers have that may use ZFS.
    async fn container_zfs(&self) -> Result<ContainerZfs, Fault>;

    /// Sets a property of a pool.
    async fn set_pool(&self, pool: &PoolName, key: &str, value: &str) -> Result<(), Fault>;

    /// Every property of a dataset and of its pool that can be told, for people.
    async fn properties(&self, pool: &PoolName, dataset: &str) -> Result<(Properties, Properties), Fault>;

    /// The snapshots of a dataset: what stands behind the `@`, sorted by name.
    async fn snapshots(&self, dataset: &str) -> Result<Vec<String>, Fault>;

    /// Takes a snapshot of a dataset; it is on the disk when this returns.
    async fn snapshot(&self, dataset: &str, name: &str) -> Result<(), Fault>;

    /// Bytes of what was destroyed that the pool has not freed yet.
    async fn freeing(&self, pool: &PoolName) -> Result<u64, Fault>;

    /// Bytes that would be free if these snapshots were destroyed together.
    async fn reclaimable(&self, dataset: &str, names: &[&str]) -> Result<u64, Fault>;

    /// Destroys a snapshot.
    async fn destroy_snapshot(&self, dataset: &str, name: &str) -> Result<(), Fault>;

    /// Lets a pool use all of its devices.
    async fn expand(&self, pool: &PoolName, devices: &[PathBuf]) -> Result<(), Fault>;

    /// Takes a device out of a mirror. ZFS refuses where the others don't have everything.
    async fn detach(&self, pool: &PoolName, leaf: u64) -> Result<(), Fault>;

    /// Makes `new` a mirror of the pool's device `of`, and begins to give it what that has. With `force` whatever it holds
    /// is overwritten.
    async fn attach(&self, pool: &PoolName, of: &Path, new: &Path, force: bool) -> Result<(), Fault>;

    /// Opens the pool's devices anew, and resumes the pool where it was suspended.
    async fn resume(&self, pool: &PoolName, suspended: bool) -> Result<(), Fault>;

    /// Writes out all that a pool holds in memory.
    async fn sync(&self, pool: &PoolName) -> Result<(), Fault>;

    /// Exports a pool.
    async fn export(&self, pool: &PoolName) -> Result<(), Fault>;

    /// Starts, pauses or stops a scrub.
    async fn scrub(&self, pool: &PoolName, action: Scrub) -> Result<(), Fault>;

    /// Mounts a dataset at a place of ours, making the mount point where there is none. One mount of it at one place.
    async fn mount(&self, dataset: &str, target: &Path, flags: MountFlags) -> Result<Step, Fault>;

    /// Mounts what is mounted at a place of ours for a container too; making the mount point, and once, as above.
    async fn mount_for_container(&self, base: &Path, target: &Path, flags: MountFlags) -> Result<Step, Fault>;

    /// The file systems below a dataset, each behind the one it is in.
    async fn children(&self, dataset: &str) -> Result<Vec<Child>, Fault>;

    /// Mounts one of them at a place below a mount point of its volume. It goes with that.
    async fn mount_child(&self, dataset: &str, base: &Path, place: &Path, flags: MountFlags) -> Result<Step, Fault>;

    /// Unmounts. With `lazy` it goes out of sight at once and ends with its last user.
    async fn unmount(&self, target: &Path, lazy: bool) -> Result<Step, Fault>;

    /// Usage of what is mounted there.
    async fn usage(&self, target: &Path) -> Result<Usage, Fault>;

    /// Gives what is mounted there to a group, unless its root already is the group's.
    async fn own(&self, target: &Path, group: u32) -> Result<Step, Fault>;

    /// Bounds the ARC; `None` for the default.
    async fn limit_arc(&self, limit: Option<Bytes>) -> Result<(), Fault>;
}

/// The last part of the path by which a pool knows a volume's disk.
fn link_name(id: VolumeId, disk: &Disk) -> String {
    match disk.number {
        0 | 1 => id.to_string(),
        number => format!("{id}-{number}"),
    }
}

/// What is done to a scrub.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scrub {
    /// Started, or resumed.
    Start,
    /// Paused.
    Pause,
    /// Stopped.
    Stop,
}
