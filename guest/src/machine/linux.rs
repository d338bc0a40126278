//! The machine as it is.

mod rollbacks;
mod streams;

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt as _, symlink};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use jiff::Timestamp;
use tokio::sync::watch;
use zpod_volume::{Bytes, Encryption, PoolName, SECTOR, VolumeId, gpt};

use super::{
    Child, ContainerZfs, DeviceNumber, Disk, Fault, Grantee, Health, Label, Machine, MountFlags, PoolReport, PoolState,
    Properties, Scrub, Step, Usage,
};
use crate::key::Key;
use crate::launcher;
use crate::sys::{PartitionChange, change_partition, dataset_of};
use crate::zfs::{Tools, label};
use crate::{children, mounts, ownership};

/// How long a call of the kernel is waited for: unmounting waits for writing out.
const DEADLINE: Duration = Duration::from_secs(30);
/// How long files may be given to a group.
const OWN_DEADLINE: Duration = Duration::from_secs(600);
/// Names of block devices that are no disks of the virtual machine. A pool inside a volume could hold block devices
/// (`zd`) with any table in them.
const NOT_DISKS: [&str; 11] = ["loop", "ram", "zram", "zd", "dm-", "md", "sr", "fd", "nbd", "mtd", "drbd"];

const BLOCK: &str = "/sys/class/block";
/// The numbers of ZFS's device, whatever /dev has at that moment.
const ZFS_DEVICE: &str = "/sys/class/misc/zfs/dev";
const ARC_MAX: &str = "/sys/module/zfs/parameters/zfs_arc_max";
/// OpenZFS ignores a smaller one (`zfs_arc_max` in zfs(4)).
const ARC_FLOOR: u64 = 64 << 20;

/// Whether the ZFS modules are loaded: `None` until that is known.
pub type ZfsLoaded = watch::Receiver<Option<Result<(), String>>>;

/// The machine as it is.
#[derive(Debug)]
pub struct LinuxMachine {
    root: PathBuf,
    tools: Tools,
    links: PathBuf,
    zfs: ZfsLoaded,
    /// Mount points that were made here, to be removed with their mounts.
    made: Arc<Mutex<BTreeSet<PathBuf>>>,
}

impl LinuxMachine {
    /// The machine, with our files below `root` (`/zpod`).
    pub fn new(root: &Path, zfs: ZfsLoaded) -> Self {
        let (root, tools, links) = (root.to_owned(), Tools::below(root), root.join("disks"));
        Self { root, tools, links, zfs, made: Arc::default() }
    }

    /// Mounts something, making the mount point where there is none.
    async fn mount_at(
        &self,
        what: String,
        target: &Path,
        mount: impl FnOnce(&Path) -> io::Result<Step> + Send + 'static,
    ) -> Result<Step, Fault> {
        let (target, made) = (target.to_owned(), Arc::clone(&self.made));
        blocking(what, DEADLINE, move || {
            if !target.is_dir() {
                fs::create_dir_all(&target)?;
                made.lock().unwrap_or_else(PoisonError::into_inner).insert(target.clone());
            }
            mount(&target)
        })
        .await
    }
}

/// Runs what may block, for at most so long. What does not end holds a thread; there are many, and the machine is lost
/// by then.
async fn blocking<T: Send + 'static>(
    what: impl Into<String> + Send,
    deadline: Duration,
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> Result<T, Fault> {
    let what = what.into();
    match tokio::time::timeout(deadline, tokio::task::spawn_blocking(work)).await {
        Ok(Ok(Ok(value))) => Ok(value),
        Ok(Ok(Err(error))) => {
            let busy = error.kind() == io::ErrorKind::ResourceBusy;
            Err(Fault { busy, ..Fault::new(format!("{what}: {error}")) })
        }
        Ok(Err(_)) => Err(Fault::new(format!("{what}: cut off"))),
        Err(_) => Err(Fault::new(format!("{what}: not done after {} s", deadline.as_secs()))),
    }
}

fn sys_number(path: &Path) -> Option<u64> {
    fs::read_to_string(path).ok()?.trim().parse().ok()
}

fn device(name: &str) -> PathBuf {
    Path::new("/dev").join(name)
}

/// The name of a disk's partition: `vda1`, `nvme0n1p1`.
fn partition_name(disk: &str, number: u32) -> String {
    let separator = if disk.ends_with(|last: char| last.is_ascii_digit()) { "p" } else { "" };
    format!("{disk}{separator}{number}")
}

/// Opens a disk for reading what is on it, and not what was there when it was last looked at: ZFS writes to the
/// partition, past the cache of the whole disk.
fn open_uncached(name: &str) -> io::Result<File> {
    let file = File::open(device(name))?;
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed)?;
    Ok(file)
}

fn table(name: &str) -> Result<gpt::Header, String> {
    let mut bytes = vec![0; gpt::PRIMARY_BYTES];
    let read = open_uncached(name).and_then(|file| file.read_exact_at(&mut bytes, 0));
    read.map_err(|error| format!("can't be read: {error}"))?;
    gpt::decode(&bytes).map_err(|error| error.to_string())
}

fn scan() -> io::Result<Vec<Disk>> {
    let mut disks = Vec::new();
    for entry in fs::read_dir(BLOCK)? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        let directory = Path::new(BLOCK).join(&name);
        let virtual_ = NOT_DISKS.iter().any(|prefix| name.starts_with(prefix));
        let size = sys_number(&directory.join("size")).unwrap_or(0).saturating_mul(SECTOR);
        if virtual_ || directory.join("partition").exists() || size == 0 {
            continue;
        }
        let sequence = sys_number(&directory.join("diskseq")).unwrap_or(0);
        let read_only = sys_number(&directory.join("ro")).is_some_and(|ro| ro != 0);
        let place = fs::canonicalize(&directory).unwrap_or_default();
        disks.push(Disk {
            table: table(&name),
            name,
            sequence,
            size: Bytes(size),
            place,
            start: 0,
            number: 1,
            read_only,
        });
    }
    disks.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(disks)
}

/// The node of a dataset's block device. ZFS names its devices by number only (`zd16`); which dataset has which, the
/// driver tells (`BLKZNAME`). The links of udev's are not here.
fn volume_node(dataset: &str) -> io::Result<Option<(PathBuf, DeviceNumber)>> {
    for entry in fs::read_dir(BLOCK)? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        let directory = Path::new(BLOCK).join(&name);
        if !name.starts_with("zd") || directory.join("partition").exists() {
            continue;
        }
        // One that comes or goes just now is looked at the next time.
        let (Ok(file), Ok(numbers)) = (File::open(device(&name)), fs::read_to_string(directory.join("dev"))) else {
            continue;
        };
        if dataset_of(&file).is_ok_and(|owner| owner == dataset) {
            return Ok(device_number(&numbers).map(|numbers| (device(&name), numbers)));
        }
    }
    Ok(None)
}

/// Reads numbers as sysfs writes them: `230:16`.
fn device_number(text: &str) -> Option<DeviceNumber> {
    let (major, minor) = text.trim().split_once(':')?;
    Some(DeviceNumber { major: major.parse().ok()?, minor: minor.parse().ok()? })
}

fn tell_partition(disk: &str, number: u32, start: u64, size: Bytes) -> io::Result<Step> {
    let known = Path::new(BLOCK).join(partition_name(disk, number));
    let sectors = |name| sys_number(&known.join(name)).and_then(|sectors| sectors.checked_mul(SECTOR));
    let change = match (sectors("start"), sectors("size")) {
        (Some(at), Some(now)) if at == start && now == size.0 => return Ok(Step::Unchanged),
        (Some(at), Some(_)) if at == start => PartitionChange::Resize,
        (None, _) => PartitionChange::Add,
        (Some(at), _) => {
            return Err(io::Error::other(format!("the kernel has its partition at {at}, the table at {start}")));
        }
    };
    change_partition(&File::open(device(disk))?, change, number, start, size)?;
    Ok(Step::Changed)
}

fn quarter_of_memory() -> io::Result<u64> {
    let text = fs::read_to_string("/proc/meminfo")?;
    let total = text.lines().find_map(|line| line.strip_prefix("MemTotal:")?.split_whitespace().next()?.parse().ok());
    let kib: u64 = total.ok_or_else(|| io::Error::other("/proc/meminfo has no MemTotal"))?;
    Ok((kib << 10) / 4)
}

#[async_trait]
impl Machine for LinuxMachine {
    fn now(&self) -> Timestamp {
        Timestamp::now()
    }

    async fn zfs_ready(&self) -> Result<(), Fault> {
        let mut zfs = self.zfs.clone();
        match zfs.wait_for(Option::is_some).await.map(|loaded| loaded.clone()) {
            Ok(Some(Ok(()))) => Ok(()),
            Ok(Some(Err(text))) => Err(Fault::new(text)),
            Ok(None) | Err(_) => Err(Fault::new("loading the ZFS modules was cut off")),
        }
    }

    fn zfs_version(&self) -> String {
        fs::read_to_string("/sys/module/zfs/version").unwrap_or_default().trim().to_owned()
    }

    async fn disks(&self) -> Result<Vec<Disk>, Fault> {
        blocking("listing the disks", DEADLINE, scan).await
    }

    async fn read(&self, disk: &Disk, offset: u64, length: usize) -> Result<Vec<u8>, Fault> {
        let (name, offset) = (disk.name.clone(), disk.start.saturating_add(offset));
        blocking(format!("reading disk {name}"), DEADLINE, move || {
            let mut bytes = vec![0; length];
            open_uncached(&name)?.read_exact_at(&mut bytes, offset)?;
            Ok(bytes)
        })
        .await
    }

    async fn write(&self, disk: &Disk, offset: u64, bytes: &[u8]) -> Result<(), Fault> {
        let (name, bytes, offset) = (disk.name.clone(), bytes.to_vec(), disk.start.saturating_add(offset));
        let sequence = disk.sequence;
        blocking(format!("writing disk {name}"), DEADLINE, move || {
            let file = OpenOptions::new().write(true).open(device(&name))?;
            // A name goes to the next disk that comes. The one that has it now is the one that was opened, or an earlier one.
            if sys_number(&Path::new(BLOCK).join(&name).join("diskseq")).unwrap_or(0) != sequence {
                return Err(io::Error::other("another disk has its name now"));
            }
            file.write_all_at(&bytes, offset)?;
            file.sync_all()
        })
        .await
    }

    async fn label(&self, disk: &Disk, start: u64) -> Result<Option<Label>, Fault> {
        let bytes = self.read(disk, start.saturating_add(label::OFFSET), label::BYTES).await?;
        Ok(label::decode(&bytes))
    }

    async fn partition(&self, disk: &Disk, start: u64, size: Bytes) -> Result<Step, Fault> {
        let (name, number, start) = (disk.name.clone(), disk.number, disk.start.saturating_add(start));
        let what = format!("partition {number} of {name}");
        blocking(what, DEADLINE, move || tell_partition(&name, number, start, size)).await
    }

    fn path(&self, id: VolumeId, disk: &Disk) -> PathBuf {
        self.links.join(super::link_name(id, disk))
    }

    async fn link(&self, id: VolumeId, disk: &Disk) -> Result<PathBuf, Fault> {
        let (links, target) = (self.links.clone(), device(&partition_name(&disk.name, disk.number)));
        let link = self.path(id, disk);
        blocking("naming the disk", DEADLINE, move || {
            fs::create_dir_all(&links)?;
            let new = link.with_extension("new");
            if fs::read_link(&link).is_ok_and(|now| now == target) {
                return Ok(link);
            }
            let _ = fs::remove_file(&new);
            symlink(&target, &new)?;
            fs::rename(&new, &link)?;
            Ok(link)
        })
        .await
    }

    async fn health(&self, pool: &PoolName) -> Result<Option<Health>, Fault> {
        // A kstat: memory, never a disk.
        match fs::read_to_string(format!("/proc/spl/kstat/zfs/{pool}/state")) {
            Ok(word) => Ok(Some(Health::parse(&word))),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(Fault::new(format!("reading the state of pool {pool}: {error}"))),
        }
    }

    async fn pool(&self, pool: &PoolName) -> Result<PoolState, Fault> {
        self.tools.pool(pool).await
    }

    async fn report(&self, pool: &PoolName) -> Result<PoolReport, Fault> {
        self.tools.report(pool).await
    }

    async fn import(
        &self,
        found: &PoolName,
        pool: &PoolName,
        devices: &[PathBuf],
        read_only: bool,
    ) -> Result<(), Fault> {
        self.tools.import(found, pool, devices, read_only).await
    }

    async fn reguid(&self, pool: &PoolName) -> Result<(), Fault> {
        self.tools.reguid(pool).await
    }

    async fn discard_checkpoint(&self, pool: &PoolName) -> Result<(), Fault> {
        self.tools.discard_checkpoint(pool).await
    }

    async fn create_pool(
        &self,
        pool: &PoolName,
        devices: &[PathBuf],
        properties: &[(String, String)],
        force: bool,
    ) -> Result<(), Fault> {
        self.tools.create_pool(pool, devices, properties, force).await
    }

    async fn create_dataset(
        &self,
        dataset: &str,
        size: Option<Bytes>,
        properties: &[(String, String)],
        encryption: Option<(Encryption, &Key)>,
    ) -> Result<(), Fault> {
        self.tools.create_dataset(dataset, size, properties, encryption).await
    }

    async fn load_key(&self, dataset: &str, key: &Key, only_look: bool) -> Result<bool, Fault> {
        self.tools.load_key(dataset, key, only_look).await
    }

    async fn change_key(&self, dataset: &str, key: &Key) -> Result<(), Fault> {
        self.tools.change_key(dataset, key).await
    }

    async fn volume_device(&self, dataset: &str) -> Result<Option<DeviceNumber>, Fault> {
        let dataset = dataset.to_owned();
        blocking(format!("block device of {dataset}"), DEADLINE, move || {
            Ok(volume_node(&dataset)?.map(|(_, numbers)| numbers))
        })
        .await
    }

    async fn flush_volume(&self, dataset: &str) -> Result<(), Fault> {
        let dataset = dataset.to_owned();
        blocking(format!("writing out the block device of {dataset}"), DEADLINE, move || match volume_node(&dataset)? {
            Some((node, _)) => File::open(node)?.sync_all(),
            None => Ok(()),
        })
        .await
    }

    async fn dataset(&self, dataset: &str) -> Result<Option<Properties>, Fault> {
        self.tools.dataset(dataset).await
    }

    async fn noted(&self, pool: &PoolName, property: &str) -> Result<String, Fault> {
        self.tools.noted(pool, property).await
    }

    async fn note(&self, pool: &PoolName, property: &str, note: &str) -> Result<(), Fault> {
        self.tools.set_dataset(pool.as_str(), &[(property.to_owned(), note.to_owned())]).await
    }

    async fn set_dataset(&self, dataset: &str, properties: &[(String, String)]) -> Result<(), Fault> {
        self.tools.set_dataset(dataset, properties).await
    }

    async fn allow(&self, dataset: &str, grantee: Grantee, allowed: bool) -> Result<(), Fault> {
        self.tools.allow(dataset, grantee, allowed).await
    }

    async fn container_zfs(&self) -> Result<ContainerZfs, Fault> {
        let root = self.root.clone();
        blocking("getting ZFS's device and tools ready for containers", DEADLINE, move || {
            let numbers = fs::read_to_string(ZFS_DEVICE)?;
            let device = device_number(&numbers).ok_or_else(|| io::Error::other(format!("{ZFS_DEVICE}: {numbers}")))?;
            Ok(ContainerZfs { device, tools: launcher::assemble(&root)? })
        })
        .await
    }

    async fn set_pool(&self, pool: &PoolName, key: &str, value: &str) -> Result<(), Fault> {
        self.tools.set_pool(pool, key, value).await
    }

    async fn properties(&self, pool: &PoolName, dataset: &str) -> Result<(Properties, Properties), Fault> {
        self.tools.properties(pool, dataset).await
    }

    async fn snapshots(&self, dataset: &str) -> Result<Vec<String>, Fault> {
        self.tools.snapshots(dataset).await
    }

    async fn snapshot(&self, dataset: &str, name: &str) -> Result<(), Fault> {
        self.tools.snapshot(dataset, name).await
    }

    async fn freeing(&self, pool: &PoolName) -> Result<u64, Fault> {
        self.tools.freeing(pool).await
    }

    async fn reclaimable(&self, dataset: &str, names: &[&str]) -> Result<u64, Fault> {
        self.tools.reclaimable(dataset, names).await
    }

    async fn destroy_snapshot(&self, dataset: &str, name: &str) -> Result<(), Fault> {
        self.tools.destroy_snapshot(dataset, name).await
    }

    async fn expand(&self, pool: &PoolName, devices: &[PathBuf]) -> Result<(), Fault> {
        self.tools.expand(pool, devices).await
    }

    async fn detach(&self, pool: &PoolName, leaf: u64) -> Result<(), Fault> {
        self.tools.detach(pool, leaf).await
    }

    async fn attach(&self, pool: &PoolName, of: &Path, new: &Path, force: bool) -> Result<(), Fault> {
        self.tools.attach(pool, of, new, force).await
    }

    async fn resume(&self, pool: &PoolName, suspended: bool) -> Result<(), Fault> {
        self.tools.resume(pool, suspended).await
    }

    async fn sync(&self, pool: &PoolName) -> Result<(), Fault> {
        self.tools.sync(pool).await
    }

    async fn export(&self, pool: &PoolName) -> Result<(), Fault> {
        self.tools.export(pool).await
    }

    async fn scrub(&self, pool: &PoolName, action: Scrub) -> Result<(), Fault> {
        self.tools.scrub(pool, action).await
    }

    async fn mount(&self, dataset: &str, target: &Path, flags: MountFlags) -> Result<Step, Fault> {
        let (dataset, what) = (dataset.to_owned(), format!("mounting {dataset} at {}", target.display()));
        self.mount_at(what, target, move |target| mounts::mount(&dataset, target, flags)).await
    }

    async fn mount_for_container(&self, base: &Path, target: &Path, flags: MountFlags) -> Result<Step, Fault> {
        let (base, what) = (base.to_owned(), format!("mounting {} at {}", base.display(), target.display()));
        self.mount_at(what, target, move |target| mounts::mount_for_container(&base, target, flags)).await
    }

    async fn children(&self, dataset: &str) -> Result<Vec<Child>, Fault> {
        self.tools.children(dataset).await
    }

    async fn mount_child(&self, dataset: &str, base: &Path, place: &Path, flags: MountFlags) -> Result<Step, Fault> {
        let what = format!("mounting it at {}", place.display());
        let (dataset, base, place) = (dataset.to_owned(), base.to_owned(), place.to_owned());
        blocking(what, DEADLINE, move || children::mount(&dataset, &base, &place, flags)).await
    }

    async fn unmount(&self, target: &Path, lazy: bool) -> Result<Step, Fault> {
        let (target, made) = (target.to_owned(), Arc::clone(&self.made));
        blocking(format!("unmounting {}", target.display()), DEADLINE, move || {
            // Children go with it, and none of them is looked for by a path that leads through a tenant's files.
            let lazy = lazy || mounts::has_children(&target)?;
            let step = mounts::unmount(&target, lazy)?;
            if made.lock().unwrap_or_else(PoisonError::into_inner).remove(&target) {
                // The directory was ours; whoever has put something in it keeps it.
                let _ = fs::remove_dir(&target);
            }
            Ok(step)
        })
        .await
    }

    async fn usage(&self, target: &Path) -> Result<Usage, Fault> {
        let target = target.to_owned();
        blocking(format!("usage of {}", target.display()), Duration::from_secs(5), move || {
            let stat = rustix::fs::statvfs(&target)?;
            let bytes = |blocks: u64| blocks.saturating_mul(stat.f_frsize);
            Ok(Usage {
                total_bytes: bytes(stat.f_blocks),
                available_bytes: bytes(stat.f_bavail),
                used_bytes: bytes(stat.f_blocks.saturating_sub(stat.f_bfree)),
                total_inodes: stat.f_files,
                available_inodes: stat.f_ffree,
                used_inodes: stat.f_files.saturating_sub(stat.f_ffree),
            })
        })
        .await
    }

    async fn own(&self, target: &Path, group: u32) -> Result<Step, Fault> {
        let target = target.to_owned();
        let end = Instant::now() + OWN_DEADLINE;
        let what = format!("giving {} to group {group}", target.display());
        blocking(what, OWN_DEADLINE + DEADLINE, move || Ok(ownership::own(&target, group, end)?)).await
    }

    async fn limit_arc(&self, limit: Option<Bytes>) -> Result<(), Fault> {
        blocking("bounding the ARC", DEADLINE, move || {
            let bytes = match limit {
                Some(limit) => limit.0,
                None => quarter_of_memory()?.max(ARC_FLOOR),
            };
            fs::write(ARC_MAX, bytes.to_string())
        })
        .await
    }
}
