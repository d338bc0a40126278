//! A machine in memory, which can be killed before or after any step. Its disks live on.

mod rollbacks;
mod streams;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use async_trait::async_trait;
use zpod_volume::{Bytes, DiskLayout, Encryption, PoolName, VolumeId, gpt};

use super::*;

/// When a machine is killed.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Kill {
    Never,
    Before(u32),
    After(u32),
}

/// How going back goes wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Amiss {
    /// Later snapshots are destroyed, and then it fails.
    HalfWay,
    /// It is done, and the tool was given up before.
    GivenUpDone,
    /// The tool was given up before anything was done.
    GivenUp,
}

#[derive(Debug, Default, Clone)]
pub(crate) struct SimDisk {
    pub(crate) name: String,
    pub(crate) size: u64,
    /// What was written where, in blocks of 512 bytes.
    pub(crate) blocks: BTreeMap<u64, Vec<u8>>,
    pub(crate) plugged: bool,
    pub(crate) sequence: u64,
    /// Writes to it fail.
    pub(crate) broken: bool,
    /// Pools on it are suspended: a write failed, and nobody resumed them since.
    pub(crate) suspended: bool,
    pub(crate) labels: bool,
    pub(crate) pool: Option<SimPool>,
    /// Of a mirror: which half it is, 1 or 2. The two have one name, and each its own copy of the pool.
    pub(crate) number: u32,
    /// Nothing can be read of it or written to it.
    pub(crate) lost: bool,
    /// GUID of the device that it is to its pool.
    pub(crate) leaf: u64,
    /// It was plugged in so.
    pub(crate) read_only: bool,
    /// It shows the image of that disk, and has none of its own.
    pub(crate) image_of: Option<usize>,
}

#[derive(Debug, Default, Clone)]
pub(crate) struct SimPool {
    pub(crate) name: String,
    pub(crate) guid: u64,
    pub(crate) properties: Properties,
    pub(crate) datasets: BTreeMap<String, Properties>,
    pub(crate) size: u64,
    /// What containers have written.
    pub(crate) data: String,
    group: Option<u32>,
    /// Name and what containers had written.
    pub(crate) snapshots: Vec<(String, String)>,
    /// Counts its changes: the copy with the most is the newest.
    pub(crate) txg: u64,
    /// The devices of a mirror.
    pub(crate) leaves: Vec<u64>,
    /// The transaction group of its label, and whether that says that it was exported.
    labelled: (u64, bool),
    /// What containers have written is in its log only, which waits to be replayed.
    log_waits: bool,
    /// Somebody destroyed it.
    pub(crate) destroyed: bool,
    /// What it is encrypted with, and whether the kernel knows it.
    pub(crate) key: Option<Key>,
    loaded: bool,
}

impl SimPool {
    /// What containers have fsynced is in the log only: the machine was killed before the next transaction group.
    pub(crate) fn log_waits(&mut self) {
        self.log_waits = true;
    }
}

/// What outlives a machine.
pub(crate) type Disks = Arc<Mutex<Vec<SimDisk>>>;

fn new_guid() -> u64 {
    static LAST: AtomicU64 = AtomicU64::new(0);
    LAST.fetch_add(1, Ordering::Relaxed) + 1
}

/// A disk as the node makes it of a copy of another: the table is the volume's own, the rest is the other's.
pub(crate) fn copy(of: &SimDisk, name: &str, id: VolumeId, partition: Bytes, size: Bytes) -> SimDisk {
    let mut copy = SimDisk { name: name.into(), size: size.0, plugged: true, sequence: 1, ..of.clone() };
    let table = gpt::encode(id, partition, size);
    copy.put(0, &table.primary);
    copy.put(table.backup_offset, &table.backup);
    copy
}

/// A half of a mirror's disk as the node makes it.
pub(crate) fn half(name: &str, id: VolumeId, number: u32, partition: Bytes, size: Bytes) -> SimDisk {
    SimDisk { number, ..disk(name, id, partition, size) }
}

/// A disk as the node makes it.
pub(crate) fn disk(name: &str, id: VolumeId, partition: Bytes, size: Bytes) -> SimDisk {
    let mut disk = SimDisk { name: name.into(), size: size.0, plugged: true, sequence: 1, ..SimDisk::default() };
    let table = gpt::encode(id, partition, size);
    disk.put(0, &table.primary);
    disk.put(table.backup_offset, &table.backup);
    disk
}

impl SimDisk {
    fn put(&mut self, offset: u64, bytes: &[u8]) {
        for (index, block) in bytes.chunks(512).enumerate() {
            self.blocks.insert(offset + 512 * index as u64, block.to_vec());
        }
    }

    fn get(&self, offset: u64, length: usize) -> Vec<u8> {
        let labels = self.labels && offset == DiskLayout::PARTITION_START;
        let mut bytes = vec![u8::from(labels); length];
        for (at, block) in self.blocks.range(offset..offset + length as u64) {
            let at = (at - offset) as usize;
            bytes[at..at + block.len()].copy_from_slice(block);
        }
        bytes
    }

    /// What the node leaves on the disk of a block device.
    pub(crate) fn note(&mut self, spec: &zpod_volume::VolumeSpec) {
        self.put(DiskLayout::SPEC_OFFSET, &zpod_volume::note::encode(spec).unwrap());
    }

    /// Damages one byte of a block.
    pub(crate) fn flip(&mut self, offset: u64, byte: usize) {
        self.blocks.get_mut(&offset).unwrap()[byte] ^= 1;
    }

    pub(crate) fn scribble(&mut self, offset: u64) {
        self.put(offset, &[7; 512]);
    }
}

#[derive(Debug, Default)]
struct Kernel {
    steps: Vec<String>,
    dead: bool,
    partitions: BTreeMap<(String, u32), u64>,
    /// Pool to disk and its sequence.
    imported: BTreeMap<String, (usize, u64)>,
    links: BTreeMap<PathBuf, usize>,
    /// GUIDs of pools that are being imported.
    importing: BTreeSet<u64>,
    /// Pools that are imported read-only.
    read_only: BTreeSet<String>,
    mounts: BTreeMap<PathBuf, (String, MountFlags)>,
    lingering: bool,
    /// Halves that are being given what they lack.
    resilvering: BTreeSet<usize>,
    arc: Option<Bytes>,
}

#[derive(Debug)]
pub(crate) struct SimMachine {
    disks: Disks,
    kernel: Mutex<Kernel>,
    kill: Kill,
    /// Steps that fail, by the beginning of their names.
    pub(crate) failing: Mutex<BTreeSet<String>>,
    /// Mount points that somebody holds.
    pub(crate) held: Mutex<BTreeSet<PathBuf>>,
    /// How long an import takes.
    pub(crate) import_time: Mutex<std::time::Duration>,
    /// How long it takes to mount a dataset below a volume's.
    pub(crate) child_time: Mutex<std::time::Duration>,
    /// What time it is.
    pub(crate) clock: Mutex<Timestamp>,
    /// What is free in each file system.
    pub(crate) free: Mutex<u64>,
    /// Bytes that the files of each volume take.
    pub(crate) used: Mutex<u64>,
    /// Bytes of what was destroyed.
    pub(crate) freeing: Mutex<u64>,
    /// Bytes that nothing but snapshots hold.
    pub(crate) held_by_snapshots: Mutex<u64>,
    /// Snapshots that have a hold or a clone.
    pub(crate) pinned: Mutex<BTreeSet<String>>,
    /// Where a receive broke off.
    pub(crate) resume_token: Mutex<Option<String>>,
    /// Bytes that each snapshot refers to.
    pub(crate) referenced: Mutex<u64>,
    /// How going back goes wrong.
    pub(crate) amiss: Mutex<Option<Amiss>>,
    /// Bookmarks that are later than each snapshot.
    pub(crate) bookmarks: Mutex<Vec<String>>,
    /// Datasets below that of each volume.
    children: Mutex<Vec<Child>>,
}

/// Pools that are being imported.
struct Importing<'a>(&'a SimMachine, BTreeSet<u64>);

impl Drop for Importing<'_> {
    fn drop(&mut self) {
        self.0.kernel().importing.retain(|guid| !self.1.contains(guid));
    }
}

impl SimMachine {
    pub(crate) fn new(disks: &Disks, kill: Kill) -> Self {
        Self {
            disks: Arc::clone(disks),
            kernel: Mutex::default(),
            kill,
            failing: Mutex::default(),
            held: Mutex::default(),
            import_time: Mutex::default(),
            child_time: Mutex::default(),
            clock: Mutex::default(),
            free: Mutex::new(60),
            used: Mutex::new(40),
            freeing: Mutex::default(),
            held_by_snapshots: Mutex::new(1 << 40),
            pinned: Mutex::default(),
            resume_token: Mutex::default(),
            referenced: Mutex::default(),
            amiss: Mutex::default(),
            bookmarks: Mutex::default(),
            children: Mutex::default(),
        }
    }

    /// A tenant has made these.
    pub(crate) fn has_children(&self, children: &[Child]) {
        *self.children.lock().unwrap() = children.to_vec();
    }

    fn kernel(&self) -> MutexGuard<'_, Kernel> {
        self.kernel.lock().unwrap()
    }

    /// Every step that was begun.
    pub(crate) fn steps(&self) -> Vec<String> {
        self.kernel().steps.clone()
    }

    pub(crate) fn dead(&self) -> bool {
        self.kernel().dead
    }

    pub(crate) fn mounts(&self) -> Vec<(PathBuf, String, MountFlags)> {
        self.kernel().mounts.iter().map(|(at, (dataset, flags))| (at.clone(), dataset.clone(), *flags)).collect()
    }

    pub(crate) fn imported(&self) -> Vec<String> {
        self.kernel().imported.keys().cloned().collect()
    }

    pub(crate) fn arc(&self) -> Option<Bytes> {
        self.kernel().arc
    }

    /// Adds a disk: a view of another's image, or one of its own.
    pub(crate) fn add(&self, disk: SimDisk) {
        self.disks.lock().unwrap().push(disk);
    }

    pub(crate) fn plug(&self, index: usize, plugged: bool) {
        let disk = &mut self.disks.lock().unwrap()[index];
        disk.plugged = plugged;
        disk.sequence += 10;
    }

    /// Lets the writes of containers fail, or works again. That alone resumes nothing.
    pub(crate) fn break_disk(&self, index: usize, broken: bool) {
        let disk = &mut self.disks.lock().unwrap()[index];
        disk.broken = broken;
        disk.suspended |= broken;
    }

    /// What a container does.
    pub(crate) fn container_writes(&self, pool: &PoolName, data: &str) {
        let (kernel, mut disks) = (self.kernel(), self.disks.lock().unwrap());
        assert!(!kernel.read_only.contains(pool.as_str()), "the pool is read-only");
        let index = working(&kernel, &disks, kernel.imported[pool.as_str()].0).unwrap();
        let on = disks[index].pool.as_mut().unwrap();
        data.clone_into(&mut on.data);
        on.txg += 1;
        mirror(&kernel, &mut disks, index);
    }

    /// From now on the GUID of what is on these disks is taken, though nobody sees the pool yet.
    fn begin_import(&self, devices: &[PathBuf]) -> Result<Importing<'_>, Fault> {
        let (mut kernel, disks) = (self.kernel(), self.disks.lock().unwrap());
        let on = devices.iter().filter_map(|device| disks[image(&disks, kernel.links[device])].pool.as_ref());
        let guids: BTreeSet<_> = on.map(|pool| pool.guid).collect();
        if kernel.importing.iter().any(|guid| guids.contains(guid)) {
            return Err(Fault::new("no such pool available"));
        }
        kernel.importing.extend(&guids);
        Ok(Importing(self, guids))
    }

    /// A step with an effect. Killed before, it has none; killed after, nobody learns of it.
    fn step<T>(
        &self,
        name: impl Into<String>,
        effect: impl FnOnce(&mut Kernel, &mut Vec<SimDisk>) -> Result<T, Fault>,
    ) -> Result<T, Fault> {
        let (mut kernel, mut disks) = (self.kernel(), self.disks.lock().unwrap());
        let killed = || Err(Fault::new("killed"));
        if kernel.dead {
            return killed();
        }
        let name = name.into();
        if self.failing.lock().unwrap().iter().any(|failing| name.starts_with(failing)) {
            return Err(Fault::new(format!("{name} fails")));
        }
        kernel.steps.push(name);
        let number = kernel.steps.len() as u32;
        if matches!(self.kill, Kill::Before(at) if at == number) {
            kernel.dead = true;
            return killed();
        }
        let result = effect(&mut kernel, &mut disks);
        if matches!(self.kill, Kill::After(at) if at == number) {
            kernel.dead = true;
            return killed();
        }
        result
    }

    fn look<T>(&self, look: impl FnOnce(&Kernel, &[SimDisk]) -> Result<T, Fault>) -> Result<T, Fault> {
        let (kernel, disks) = (self.kernel(), self.disks.lock().unwrap());
        if kernel.dead { Err(Fault::new("killed")) } else { look(&kernel, &disks) }
    }

    fn pool_step<T>(
        &self,
        name: String,
        pool: &str,
        effect: impl FnOnce(&mut SimPool, u64) -> Result<T, Fault>,
    ) -> Result<T, Fault> {
        let pool = pool.to_owned();
        let reads = name.starts_with("load key") || name.starts_with("look");
        self.step(name, |kernel, disks| {
            let (index, _) = *kernel.imported.get(&pool).ok_or_else(|| Fault::new("no such pool"))?;
            let index = working(kernel, disks, index)?;
            if kernel.read_only.contains(&pool) && !reads {
                return Err(Fault::new("the pool is read-only"));
            }
            let partition = kernel.partitions[&key(&disks[index])];
            let pool = disks[index].pool.as_mut().unwrap();
            pool.txg += 1;
            let result = effect(pool, partition);
            mirror(kernel, disks, index);
            result
        })
    }

    /// Lets a half of a mirror fail, or work again.
    pub(crate) fn lose(&self, index: usize, lost: bool) {
        self.disks.lock().unwrap()[index].lost = lost;
        let mut kernel = self.kernel();
        if !lost && kernel.imported.values().any(|(_, _)| true) {
            kernel.resilvering.insert(index);
        }
    }

    /// Gives the halves what they lack.
    pub(crate) fn resilver(&self) {
        let (mut kernel, mut disks) = (self.kernel(), self.disks.lock().unwrap());
        let newest = disks.iter().filter_map(|disk| disk.pool.clone()).max_by_key(|pool| pool.txg);
        for index in std::mem::take(&mut kernel.resilvering) {
            disks[index].pool.clone_from(&newest);
        }
    }
}

/// The disk that has the image.
fn image(disks: &[SimDisk], index: usize) -> usize {
    disks[index].image_of.unwrap_or(index)
}

fn index(disks: &[SimDisk], disk: &Disk) -> Result<usize, Fault> {
    let is = |d: &SimDisk| d.plugged && d.name == disk.name && (d.number == 0 || d.number == disk.number);
    let index = disks.iter().position(is).ok_or_else(|| Fault::new("no such disk"))?;
    if disks[index].lost { Err(Fault::new("Input/output error")) } else { Ok(index) }
}

fn key(disk: &SimDisk) -> (String, u32) {
    (disk.name.clone(), disk.number.max(1))
}

/// The half that a pool is read from: one that is there and lacks nothing.
fn working(kernel: &Kernel, disks: &[SimDisk], index: usize) -> Result<usize, Fault> {
    let name = &disks[index].name;
    let works = |at: &usize| {
        let disk = &disks[*at];
        let leaves = |pool: &SimPool| disk.number == 0 || pool.leaves.contains(&disk.leaf);
        disk.name == *name && !disk.lost && !kernel.resilvering.contains(at) && disk.pool.as_ref().is_some_and(leaves)
    };
    [index].into_iter().chain(0..disks.len()).find(works).ok_or_else(|| Fault::new("the pool is suspended"))
}

/// What was done to one half is on the other one too, if that is there.
fn mirror(kernel: &Kernel, disks: &mut [SimDisk], index: usize) {
    let (pool, name, number) =
        (disks[index].pool.clone().unwrap_or_default(), &disks[index].name.clone(), disks[index].number);
    for (at, disk) in disks.iter_mut().enumerate() {
        let other = number > 0 && disk.name == *name && disk.number != number;
        if other && !disk.lost && !kernel.resilvering.contains(&at) && pool.leaves.contains(&disk.leaf) {
            disk.pool = Some(pool.clone());
        }
    }
}

/// Behind a bridge, as Kata plugs disks in: the first one is at `02/01`.
fn place(index: usize, name: &str) -> PathBuf {
    let slot = index + 1;
    format!("/sys/devices/pci0000:00/0000:00:02.0/0000:01:{slot:02x}.0/virtio{slot}/block/{name}").into()
}

fn pool_of(dataset: &str) -> &str {
    dataset.split('/').next().unwrap()
}

#[async_trait]
impl Machine for SimMachine {
    fn now(&self) -> Timestamp {
        *self.clock.lock().unwrap()
    }

    async fn zfs_ready(&self) -> Result<(), Fault> {
        self.look(|_, _| Ok(()))
    }

    fn zfs_version(&self) -> String {
        "simulated".into()
    }

    async fn disks(&self) -> Result<Vec<Disk>, Fault> {
        self.look(|_, disks| {
            let seen = disks.iter().enumerate().filter(|(_, disk)| disk.plugged && disk.number < 2);
            let seen = seen.map(|(index, disk)| Disk {
                start: 0,
                number: 1,
                place: place(index, &disk.name),
                name: disk.name.clone(),
                sequence: disk.sequence,
                read_only: disk.read_only,
                size: Bytes(disks[image(disks, index)].size * u64::from(disk.number + 1)),
                table: match disk.lost {
                    false => gpt::decode(&disks[image(disks, index)].get(0, gpt::PRIMARY_BYTES))
                        .map_err(|error| error.to_string()),
                    true => Err("can't be read".to_owned()),
                },
            });
            Ok(seen.collect())
        })
    }

    async fn read(&self, disk: &Disk, offset: u64, length: usize) -> Result<Vec<u8>, Fault> {
        self.look(|_, disks| Ok(disks[image(disks, index(disks, disk)?)].get(offset, length)))
    }

    async fn write(&self, disk: &Disk, offset: u64, bytes: &[u8]) -> Result<(), Fault> {
        self.step(format!("write {offset}"), |_, disks| {
            let index = index(disks, disk)?;
            if disks[index].read_only {
                return Err(Fault::new("Operation not permitted"));
            }
            let index = image(disks, index);
            disks[index].put(offset, bytes);
            Ok(())
        })
    }

    async fn label(&self, disk: &Disk, _start: u64) -> Result<Option<Label>, Fault> {
        self.look(|_, disks| {
            let pool = disks[image(disks, index(disks, disk)?)].pool.as_ref();
            Ok(pool.map(|pool| Label {
                guid: pool.guid,
                txg: pool.labelled.0,
                exported: pool.labelled.1,
                destroyed: pool.destroyed,
                name: pool.name.clone(),
                devices: 1,
            }))
        })
    }

    async fn partition(&self, disk: &Disk, _start: u64, size: Bytes) -> Result<Step, Fault> {
        self.step("partition", |kernel, disks| {
            if let Some(of) = index(disks, disk).ok().and_then(|at| disks[at].image_of) {
                kernel.partitions.insert(key(&disks[of]), size.0);
            }
            let before = kernel.partitions.insert((disk.name.clone(), disk.number), size.0);
            Ok(if before == Some(size.0) { Step::Unchanged } else { Step::Changed })
        })
    }

    fn path(&self, id: VolumeId, disk: &Disk) -> PathBuf {
        Path::new("/zpod/disks").join(link_name(id, disk))
    }

    async fn link(&self, id: VolumeId, disk: &Disk) -> Result<PathBuf, Fault> {
        self.step("link", |kernel, disks| {
            let path = self.path(id, disk);
            kernel.links.insert(path.clone(), index(disks, disk)?);
            Ok(path)
        })
    }

    async fn health(&self, pool: &PoolName) -> Result<Option<Health>, Fault> {
        self.look(|kernel, disks| {
            Ok(kernel.imported.get(pool.as_str()).map(|(index, sequence)| {
                let shows = |(at, disk): (usize, &SimDisk)| {
                    image(disks, at) == *index && disk.plugged && disk.sequence == *sequence
                };
                let there = disks.iter().enumerate().any(shows);
                let there = there && working(kernel, disks, *index).is_ok();
                if there && !disks[*index].suspended { Health::Online } else { Health::Suspended }
            }))
        })
    }

    async fn pool(&self, pool: &PoolName) -> Result<PoolState, Fault> {
        self.look(|kernel, disks| {
            let index = working(kernel, disks, kernel.imported[pool.as_str()].0)?;
            let on = disks[index].pool.as_ref().unwrap();
            let expandable = kernel.partitions[&key(&disks[index])] > on.size;
            Ok(PoolState { expandable, properties: on.properties.clone() })
        })
    }

    async fn report(&self, pool: &PoolName) -> Result<PoolReport, Fault> {
        self.look(|kernel, disks| {
            let Some((index, _)) = kernel.imported.get(pool.as_str()) else { return Err(Fault::new("not imported")) };
            let of = working(kernel, disks, *index)?;
            let leaves = disks[of].pool.iter().flat_map(|pool| pool.leaves.clone()).map(|guid| {
                let at = disks.iter().position(|disk| disk.leaf == guid);
                let there = at.filter(|at| !disks[*at].lost);
                let path = at
                    .and_then(|at| kernel.links.iter().find(|(_, index)| **index == at).map(|(path, _)| path.clone()));
                Leaf {
                    guid,
                    path: path.unwrap_or_else(|| "/gone".into()),
                    health: if there.is_some() { Health::Online } else { Health::Unavailable },
                    mended: at.is_some_and(|at| kernel.resilvering.contains(&at)),
                }
            });
            let scrub = LastScrub { state: ScrubState::Running, ended: 0, errors: 0, bytes: 0 };
            let resilver = (!kernel.resilvering.is_empty()).then_some(scrub);
            Ok(PoolReport { leaves: leaves.collect(), resilver, ..PoolReport::default() })
        })
    }

    async fn import(
        &self,
        found: &PoolName,
        pool: &PoolName,
        devices: &[PathBuf],
        read_only: bool,
    ) -> Result<(), Fault> {
        let time = *self.import_time.lock().unwrap();
        let _importing = self.begin_import(devices)?;
        tokio::time::sleep(time).await;
        self.step("import", |kernel, disks| {
            let named = |at: &usize| {
                !disks[*at].lost
                    && disks[*at].pool.as_ref().is_some_and(|on| on.name == found.as_str() && !on.destroyed)
            };
            let opened: Vec<_> = devices.iter().map(|device| kernel.links[device]).collect();
            if !read_only && opened.iter().any(|at| disks[*at].read_only) {
                return Err(Fault::new("permission denied"));
            }
            let given: Vec<_> = opened.iter().map(|at| image(disks, *at)).filter(named).collect();
            let guids: BTreeSet<_> = given.iter().filter_map(|at| Some(disks[*at].pool.as_ref()?.guid)).collect();
            if guids.len() > 1 {
                return Err(Fault::new("more than one matching pool"));
            }
            let Some(index) = given.into_iter().max_by_key(|at| disks[*at].pool.as_ref().map(|on| on.txg)) else {
                return Err(Fault::new("no pools available to import"));
            };
            let on = disks[index].pool.clone().unwrap();
            let guid = on.guid;
            // The others are opened by the paths that the pool knows, and given what they lack.
            kernel.resilvering.clear();
            let name = disks[index].name.clone();
            let other = |disk: &SimDisk| disk.number > 0 && disk.name == name && on.leaves.contains(&disk.leaf);
            for (at, disk) in disks.iter().enumerate().filter(|(at, disk)| *at != index && other(disk)) {
                let txg = disk.pool.as_ref().map_or(0, |pool| pool.txg);
                assert!(txg <= on.txg || disk.lost, "imported what is older than what is there");
                if txg < on.txg && !disk.lost {
                    kernel.resilvering.insert(at);
                }
            }
            let same = |other: &usize| disks[*other].pool.as_ref().is_some_and(|on| on.guid == guid);
            if kernel.imported.values().any(|(other, _)| same(other)) {
                return Err(Fault::new("a pool with that GUID is imported already"));
            }
            let appearance = opened.iter().find(|at| image(disks, **at) == index).map_or(0, |at| disks[*at].sequence);
            kernel.imported.insert(pool.to_string(), (index, appearance));
            let on = disks[index].pool.as_mut().unwrap();
            on.loaded = on.key.is_none();
            if read_only {
                assert!(!on.log_waits, "shows a state without what was fsynced");
                assert_eq!(on.name, pool.as_str(), "a name that can't be written");
                kernel.read_only.insert(pool.to_string());
                return Ok(());
            }
            on.name = pool.to_string();
            on.labelled = (on.txg + 1, false);
            let renamed = |(name, properties): (String, Properties)| {
                (format!("{pool}/{}", name.rsplit('/').next().unwrap_or_default()), properties)
            };
            on.datasets = std::mem::take(&mut on.datasets).into_iter().map(renamed).collect();
            on.txg += 1;
            mirror(kernel, disks, index);
            Ok(())
        })
    }

    async fn reguid(&self, pool: &PoolName) -> Result<(), Fault> {
        self.pool_step("reguid".into(), pool.as_str(), |pool, _| {
            pool.guid = new_guid();
            Ok(())
        })
    }

    async fn discard_checkpoint(&self, _pool: &PoolName) -> Result<(), Fault> {
        self.look(|_, _| Err(Fault::new("there is no checkpoint")))
    }

    async fn create_pool(
        &self,
        pool: &PoolName,
        devices: &[PathBuf],
        properties: &[(String, String)],
        force: bool,
    ) -> Result<(), Fault> {
        for device in devices {
            self.step("create: labels", |kernel, disks| {
                let disk = &mut disks[kernel.links[device]];
                if disk.labels && !force {
                    return Err(Fault::new("the device is in use"));
                }
                // Whatever happens: nothing ever formats over data.
                let data = disk.pool.take().map(|pool| pool.data).unwrap_or_default();
                assert_eq!(data, "", "formatted over data");
                disk.labels = true;
                disk.leaf = new_guid();
                Ok(())
            })?;
        }
        self.step("create: pool", |kernel, disks| {
            let at: Vec<_> = devices.iter().map(|device| kernel.links[device]).collect();
            let (name, size) = (pool.to_string(), kernel.partitions[&key(&disks[at[0]])]);
            let properties = properties.iter().cloned().collect();
            let leaves = at.iter().map(|at| disks[*at].leaf).collect();
            let new = SimPool { name: name.clone(), guid: new_guid(), size, properties, leaves, ..SimPool::default() };
            for at in &at {
                disks[*at].pool = Some(new.clone());
            }
            kernel.imported.insert(name, (at[0], disks[at[0]].sequence));
            Ok(())
        })
    }

    async fn create_dataset(
        &self,
        dataset: &str,
        size: Option<Bytes>,
        properties: &[(String, String)],
        encryption: Option<(Encryption, &Key)>,
    ) -> Result<(), Fault> {
        self.pool_step("create dataset".into(), pool_of(dataset), |pool, _| {
            pool.key = encryption.map(|(_, key)| key.clone());
            pool.loaded = true;
            let mut all: Properties = properties.iter().cloned().collect();
            all.insert("type".into(), if size.is_some() { "volume" } else { "filesystem" }.into());
            all.extend(size.map(|size| ("volsize".into(), size.0.to_string())));
            pool.datasets.insert(dataset.into(), all);
            Ok(())
        })
    }

    async fn volume_device(&self, dataset: &str) -> Result<Option<DeviceNumber>, Fault> {
        self.look(|kernel, disks| {
            let index = working(kernel, disks, kernel.imported[pool_of(dataset)].0)?;
            let pool = disks[index].pool.as_ref().unwrap();
            let block = pool.datasets.get(dataset).is_some_and(|properties| properties.contains_key("volsize"));
            Ok(block.then_some(DeviceNumber { major: 230, minor: 16 * index as u32 }))
        })
    }

    async fn flush_volume(&self, _dataset: &str) -> Result<(), Fault> {
        self.step("flush", |_, _| Ok(()))
    }

    async fn dataset(&self, dataset: &str) -> Result<Option<Properties>, Fault> {
        self.look(|kernel, disks| {
            let index = working(kernel, disks, kernel.imported[pool_of(dataset)].0)?;
            let pool = disks[index].pool.as_ref().unwrap();
            let Some(mut found) = pool.datasets.get(dataset).cloned() else { return Ok(None) };
            if let Some(key) = &pool.key {
                let status = if pool.loaded { "available" } else { "unavailable" };
                let more = [("encryption", "aes-256-gcm"), ("keyformat", key.format().as_str()), ("keystatus", status)];
                found.extend(more.map(|(key, value)| (key.to_owned(), value.to_owned())));
            }
            Ok(Some(found))
        })
    }

    async fn noted(&self, pool: &PoolName, property: &str) -> Result<String, Fault> {
        self.look(|kernel, disks| {
            let index = working(kernel, disks, kernel.imported[pool.as_str()].0)?;
            Ok(disks[index].pool.as_ref().unwrap().properties.get(property).cloned().unwrap_or_default())
        })
    }

    async fn note(&self, pool: &PoolName, property: &str, note: &str) -> Result<(), Fault> {
        self.pool_step(format!("note {property}"), pool.as_str(), |pool, _| {
            pool.properties.insert(property.into(), note.into());
            Ok(())
        })
    }

    async fn load_key(&self, dataset: &str, key: &Key, only_look: bool) -> Result<bool, Fault> {
        self.pool_step(if only_look { "look at key" } else { "load key" }.into(), pool_of(dataset), |pool, _| {
            let fits = pool.key.as_ref() == Some(key);
            pool.loaded |= fits && !only_look;
            Ok(fits)
        })
    }

    async fn change_key(&self, dataset: &str, key: &Key) -> Result<(), Fault> {
        self.pool_step("change key".into(), pool_of(dataset), |pool, _| {
            assert!(pool.loaded, "its key is not loaded");
            pool.key = Some(key.clone());
            Ok(())
        })
    }

    async fn set_dataset(&self, dataset: &str, properties: &[(String, String)]) -> Result<(), Fault> {
        self.pool_step(format!("set {properties:?}"), pool_of(dataset), |pool, _| {
            let kept = properties.iter().any(|(key, value)| key == "refreservation" && value != "none");
            if kept && pool.snapshots.iter().any(|(name, _)| name.starts_with("zpod-mark")) {
                return Err(Fault::new("out of space: the snapshot has it"));
            }
            pool.datasets.get_mut(dataset).unwrap().extend(properties.iter().cloned());
            Ok(())
        })
    }

    async fn allow(&self, dataset: &str, grantee: Grantee, allowed: bool) -> Result<(), Fault> {
        let word = if allowed { "allow" } else { "unallow" };
        self.pool_step(format!("{word} {grantee:?}"), pool_of(dataset), |_, _| Ok(()))
    }

    async fn container_zfs(&self) -> Result<ContainerZfs, Fault> {
        Ok(ContainerZfs { device: DeviceNumber { major: 10, minor: 249 }, tools: "/zpod/container".into() })
    }

    async fn set_pool(&self, pool: &PoolName, key: &str, value: &str) -> Result<(), Fault> {
        self.pool_step(format!("set pool {key}"), pool.as_str(), |pool, _| {
            pool.properties.insert(key.into(), value.into());
            Ok(())
        })
    }

    async fn properties(&self, pool: &PoolName, dataset: &str) -> Result<(Properties, Properties), Fault> {
        let found = self.dataset(dataset).await?.ok_or_else(|| Fault::new("no such dataset"))?;
        Ok((found, self.pool(pool).await?.properties))
    }

    async fn snapshots(&self, dataset: &str) -> Result<Vec<String>, Fault> {
        self.look(|kernel, disks| {
            let (index, _) = *kernel.imported.get(pool_of(dataset)).ok_or_else(|| Fault::new("no such pool"))?;
            Ok(disks[index].pool.as_ref().unwrap().snapshots.iter().map(|(name, _)| name.clone()).collect())
        })
    }

    async fn snapshot(&self, dataset: &str, name: &str) -> Result<(), Fault> {
        self.pool_step("snapshot".into(), pool_of(dataset), |pool, _| {
            if pool.snapshots.iter().any(|(there, _)| there == name) {
                return Err(Fault::new("dataset already exists"));
            }
            // The worst case: all of the pool is kept, and filled.
            if pool.datasets[dataset].get("refreservation").is_some_and(|kept| kept != "none") {
                return Err(Fault::new("out of space"));
            }
            pool.snapshots.push((name.to_owned(), pool.data.clone()));
            Ok(())
        })
    }

    async fn freeing(&self, _pool: &PoolName) -> Result<u64, Fault> {
        self.look(|_, _| Ok(*self.freeing.lock().unwrap()))
    }

    async fn reclaimable(&self, _dataset: &str, _names: &[&str]) -> Result<u64, Fault> {
        self.look(|_, _| Ok(*self.held_by_snapshots.lock().unwrap()))
    }

    async fn destroy_snapshot(&self, dataset: &str, name: &str) -> Result<(), Fault> {
        if self.pinned.lock().unwrap().contains(name) {
            return Err(Fault { busy: true, ..Fault::new("dataset is busy") });
        }
        self.pool_step("destroy snapshot".into(), pool_of(dataset), |pool, _| {
            let before = pool.snapshots.len();
            pool.snapshots.retain(|(there, _)| there != name);
            if pool.snapshots.len() < before { Ok(()) } else { Err(Fault::new("could not find any snapshots")) }
        })
    }

    async fn detach(&self, pool: &PoolName, leaf: u64) -> Result<(), Fault> {
        self.pool_step("detach".into(), pool.as_str(), |pool, _| {
            assert!(pool.leaves.len() > 1, "the last one");
            pool.leaves.retain(|other| *other != leaf);
            Ok(())
        })
    }

    async fn attach(&self, pool: &PoolName, of: &Path, new: &Path, force: bool) -> Result<(), Fault> {
        self.step("attach: label", |kernel, disks| {
            let disk = &mut disks[kernel.links[new]];
            if disk.labels && !force {
                return Err(Fault::new("the device is in use"));
            }
            disk.labels = true;
            disk.leaf = new_guid();
            disk.pool = None;
            Ok(())
        })?;
        self.step("attach", |kernel, disks| {
            assert_eq!(kernel.imported[pool.as_str()].0, kernel.links[of]);
            let at = kernel.links[new];
            let leaf = disks[at].leaf;
            let on = disks[kernel.links[of]].pool.as_mut().unwrap();
            on.leaves.push(leaf);
            on.txg += 1;
            kernel.resilvering.insert(at);
            Ok(())
        })
    }

    async fn expand(&self, pool: &PoolName, _devices: &[PathBuf]) -> Result<(), Fault> {
        self.pool_step("expand".into(), pool.as_str(), |pool, partition| {
            pool.size = partition;
            Ok(())
        })
    }

    async fn resume(&self, pool: &PoolName, _suspended: bool) -> Result<(), Fault> {
        self.step("resume", |kernel, disks| {
            let (index, _) = kernel.imported[pool.as_str()];
            let disk = &mut disks[index];
            if disk.broken {
                return Err(Fault::new("cannot clear errors: I/O error"));
            }
            disk.suspended = false;
            let views = (0..disks.len()).filter(|at| image(disks, *at) == index && disks[*at].plugged);
            let sequence = views.map(|at| disks[at].sequence).max().unwrap_or(0);
            kernel.imported.insert(pool.to_string(), (index, sequence));
            Ok(())
        })
    }

    async fn sync(&self, pool: &PoolName) -> Result<(), Fault> {
        assert!(!self.kernel().read_only.contains(pool.as_str()), "waits for ever");
        self.pool_step("sync".into(), pool.as_str(), |_, _| Ok(()))
    }

    async fn export(&self, pool: &PoolName) -> Result<(), Fault> {
        self.step("export", |kernel, disks| {
            let mounted = kernel.mounts.values().any(|(dataset, _)| pool_of(dataset) == pool.as_str());
            if mounted || kernel.lingering {
                return Err(Fault { busy: true, ..Fault::new("pool is busy") });
            }
            let read_only = kernel.read_only.remove(pool.as_str());
            let (index, _) = kernel.imported.remove(pool.as_str()).ok_or_else(|| Fault::new("no such pool"))?;
            if let Some(on) = disks[index].pool.as_mut().filter(|_| !read_only) {
                on.labelled = (on.txg, true);
            }
            Ok(())
        })
    }

    async fn scrub(&self, _pool: &PoolName, _action: Scrub) -> Result<(), Fault> {
        self.step("scrub", |_, _| Ok(()))
    }

    async fn mount(&self, dataset: &str, target: &Path, flags: MountFlags) -> Result<Step, Fault> {
        self.step(format!("mount {}", target.display()), |kernel, disks| {
            let (index, _) = *kernel.imported.get(pool_of(dataset)).ok_or_else(|| Fault::new("not imported"))?;
            if !disks[index].pool.as_ref().unwrap().datasets.contains_key(dataset) {
                return Err(Fault::new("no such dataset"));
            }
            assert!(disks[index].pool.as_ref().unwrap().loaded, "mounted without its key");
            if !kernel.read_only.contains(pool_of(dataset)) {
                disks[index].pool.as_mut().unwrap().log_waits = false;
            } else if !flags.read_only {
                return Err(Fault::new("Read-only file system"));
            }
            let before = kernel.mounts.insert(target.into(), (dataset.into(), flags));
            Ok(if before.is_some() { Step::Unchanged } else { Step::Changed })
        })
    }

    async fn mount_for_container(&self, base: &Path, target: &Path, flags: MountFlags) -> Result<Step, Fault> {
        let dataset = self.kernel().mounts.get(base).map(|(dataset, _)| dataset.clone());
        self.mount(&dataset.ok_or_else(|| Fault::new("nothing is mounted there"))?, target, flags).await
    }

    async fn children(&self, _dataset: &str) -> Result<Vec<Child>, Fault> {
        let found = self.children.lock().unwrap().clone();
        self.step("list children", |_, _| Ok(found))
    }

    async fn mount_child(&self, dataset: &str, base: &Path, place: &Path, flags: MountFlags) -> Result<Step, Fault> {
        let time = *self.child_time.lock().unwrap();
        tokio::time::sleep(time).await;
        self.step(format!("mount child {}", place.display()), |kernel, _| {
            assert!(kernel.mounts.contains_key(base), "its volume is not mounted");
            if dataset.ends_with("broken") {
                return Err(Fault::new("Permission denied"));
            }
            kernel.mounts.insert(base.join(place), (dataset.into(), flags));
            Ok(Step::Changed)
        })
    }

    async fn unmount(&self, target: &Path, lazy: bool) -> Result<Step, Fault> {
        let held = self.held.lock().unwrap().contains(target);
        self.step(format!("unmount {}", target.display()), |kernel, _| {
            if held && !lazy {
                return Err(Fault { busy: true, ..Fault::new("target is busy") });
            }
            kernel.lingering |= held;
            kernel.mounts.retain(|at, _| at == target || !at.starts_with(target));
            Ok(if kernel.mounts.remove(target).is_some() { Step::Changed } else { Step::Unchanged })
        })
    }

    async fn usage(&self, _target: &Path) -> Result<Usage, Fault> {
        let available_bytes = *self.free.lock().unwrap();
        let used_bytes = *self.used.lock().unwrap();
        Ok(Usage { total_bytes: used_bytes + available_bytes, available_bytes, used_bytes, ..Usage::default() })
    }

    async fn own(&self, target: &Path, group: u32) -> Result<Step, Fault> {
        let dataset = self.kernel().mounts[target].0.clone();
        self.pool_step(format!("own {group}"), pool_of(&dataset), |pool, _| {
            Ok(if pool.group.replace(group) == Some(group) { Step::Unchanged } else { Step::Changed })
        })
    }

    async fn limit_arc(&self, limit: Option<Bytes>) -> Result<(), Fault> {
        self.kernel().arc = limit;
        Ok(())
    }
}
