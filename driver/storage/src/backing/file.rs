//! Volumes as sparse raw files in a directory: `<dir>/<volume id>.img`.
//!
//! # Design
//! A file comes into being under a temporary name and gets its own by a rename that replaces nothing, once it is whole
//! and durable: an image that exists is complete. What a volume was promised is an extended attribute of its image.
//! It is host-only (a guest sees the file's bytes, never its attributes), it is there before the image has its name, is
//! replaced atomically, and goes when the image goes: there is no second file to lose step with the first. An image
//! without it, say one that was copied without attributes, is refused with a remedy, and counts as promised in full
//! length until then.
//!
//! One process has the directory at a time (a lock on it), so that the accounting ([`ledger`](super::ledger)) is exact
//! without looking at the disk: creating or removing a volume costs the same among 10,000 as alone.
//!
//! That nobody has an image open is known from the kernel by a write lease, see [`Fencing`].
//!
//! # Limitations
//! * A guest can write anywhere on its disk, past its partition too; room is then lost to the others. An XFS project
//!   quota would bound that.
//! * btrfs: an image is made NOCOW, or its promise could not be kept (overwriting would take new space).
//! * Blocks shared by reflink would be counted once for each file. Nothing shares blocks yet.
//! * NFS is no place for a backing directory: it grants no leases.

mod abilities;
mod fcntl;
mod image;
mod proof;

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::ops::Deref;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use rustix::fs::{FileType, OFlags, Stat};
use zpod_volume::{Bytes, DiskLayout, Provisioning, VolumeId};

pub use self::abilities::{Abilities, Fencing};
use self::proof::{Held, Proof, TakeError};
use super::ledger::Ledger;
use super::{Backing, BackingError, Capacity, DeviceSpec, Exclusive, Outcome};
use crate::crash;
use crate::directory::{self, Directory};

/// What `stat` counts blocks in, whatever the file system's own blocks are.
const STAT_BLOCK: u64 = 512;

/// A refusal is given only on a measurement not older than this.
const REFUSAL_AGE: Duration = Duration::from_secs(1);
/// And a figure of the room there is only on one not older than this.
const FIGURE_AGE: Duration = Duration::from_secs(5);

/// Image files in a directory.
#[derive(Debug)]
pub struct FileBacking {
    directory: Directory,
    abilities: Abilities,
    ledger: Mutex<Ledger>,
    /// When the ledger was last measured. Held while measuring, so that one does it for all.
    measured: Mutex<Instant>,
    /// Images that the callers have proofs for.
    held: Mutex<HashMap<VolumeId, Weak<Held>>>,
}

impl FileBacking {
    /// Opens a directory that exists, for this process alone. `overprovision` is how many times the space may be
    /// promised: 1 keeps every promise, less keeps some space back.
    ///
    /// # Errors
    /// When the directory is not there (it is not made: the mount that should be there may be missing), another process
    /// has it, or its file system lacks something.
    pub fn open(dir: impl AsRef<Path>, overprovision: f64) -> Result<Self, BackingError> {
        let dir = dir.as_ref();
        let fail = |what, source| BackingError::Io { what, path: dir.to_owned(), source };
        if !(overprovision > 0.0 && overprovision <= 1000.0) {
            let why = format!("an over-commit ratio of {overprovision} is not allowed; more than 0, up to 1000 is");
            return Err(fail("open", io::Error::new(io::ErrorKind::InvalidInput, why)));
        }
        let directory = Directory::open(dir).map_err(|error| fail("open the backing directory", error))?;
        if !directory::lock(&directory).map_err(|error| fail("lock the backing directory", error))? {
            let why = "another zpod process has it; only one may run on it";
            return Err(fail("lock the backing directory", io::Error::new(io::ErrorKind::ResourceBusy, why)));
        }
        let abilities = Abilities::probe(&directory).map_err(|error| fail("try out the file system of", error))?;
        let backing = Self {
            directory,
            abilities,
            ledger: Mutex::new(Ledger::new(overprovision)),
            measured: Mutex::new(Instant::now()),
            held: Mutex::default(),
        };
        let volumes = backing.adopt_all().map_err(|error| fail("read the backing directory", error))?;
        backing.measure(Duration::ZERO)?;
        tracing::info!(directory = %dir.display(), volumes, %abilities, "backing directory opened");
        Ok(backing)
    }

    /// What the directory's file system can do.
    pub fn abilities(&self) -> Abilities {
        self.abilities
    }

    /// Takes in the images there are and removes what crashes left.
    fn adopt_all(&self) -> io::Result<usize> {
        let mut volumes = 0;
        let mut leftovers = Vec::new();
        self.directory.each_name(|name| {
            if directory::is_temporary(name) {
                leftovers.push(name.to_owned());
            } else if let Some(id) = id_of(name)
                && let Some(stat) = self.directory.stat(name)?
            {
                volumes += 1;
                self.adopt(id, name, &stat);
            }
            Ok(())
        })?;
        for name in leftovers {
            tracing::info!(file = name, "removing what a creation left that was cut short");
            self.directory.remove(&name)?;
        }
        Ok(volumes)
    }

    fn adopt(&self, id: VolumeId, name: &str, stat: &Stat) {
        let promise = self.directory.open_file(name, OFlags::RDONLY).and_then(|file| self.promise(&file));
        let length = stat.st_size.unsigned_abs();
        let partition = promise.unwrap_or_else(|error| {
            tracing::error!(volume = %id, %error, "taking the whole disk for promised");
            Bytes(length)
        });
        self.ledger().adopt(id, partition, stat.st_blocks.unsigned_abs() * STAT_BLOCK);
    }

    fn promise(&self, file: &File) -> io::Result<Bytes> {
        image::promise(file, self.abilities.attribute)
    }

    fn ledger(&self) -> MutexGuard<'_, Ledger> {
        // What the lock guards is whole at every point where a thread could have panicked.
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn held(&self, id: VolumeId) -> Option<Arc<Held>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner).get(&id).and_then(Weak::upgrade)
    }

    fn free(&self) -> Result<u64, BackingError> {
        let stat = rustix::fs::fstatvfs(&self.directory).map_err(|error| self.fail("measure", error.into()))?;
        Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
    }

    /// Measures what volumes have taken, unless that was done less than `age` ago.
    fn measure(&self, age: Duration) -> Result<(), BackingError> {
        let mut measured = self.measured.lock().unwrap_or_else(PoisonError::into_inner);
        if !age.is_zero() && measured.elapsed() < age {
            return Ok(());
        }
        let promises = self.ledger().promises();
        let before = self.free()?;
        let taken = promises.iter().map(|(id, _)| self.taken(*id)).collect::<Result<Vec<_>, _>>()?;
        let after = self.free()?;
        self.ledger().measured(before.min(after), &promises, &taken);
        *measured = Instant::now();
        Ok(())
    }

    fn taken(&self, id: VolumeId) -> Result<u64, BackingError> {
        let stat = self.directory.stat(&name_of(id)).map_err(|error| self.fail_on(id, "look at", error))?;
        Ok(stat.map_or(0, |stat| stat.st_blocks.unsigned_abs() * STAT_BLOCK))
    }

    fn reserve(&self, spec: &DeviceSpec) -> Result<(), BackingError> {
        let wanted = spec.layout.partition;
        for fresh in [false, true] {
            if fresh {
                self.measure(REFUSAL_AGE)?;
            }
            let free = self.free()?;
            let refused = self.ledger().reserve(spec.id, wanted, free);
            match refused {
                Ok(()) => return Ok(()),
                Err(available) if fresh => return Err(self.no_room(wanted, available)),
                Err(_) => {}
            }
        }
        Ok(())
    }

    fn no_room(&self, wanted: Bytes, available: Bytes) -> BackingError {
        BackingError::NoRoom { location: self.directory.path().display().to_string(), wanted, available }
    }

    fn fail(&self, what: &'static str, source: io::Error) -> BackingError {
        BackingError::Io { what, path: self.directory.path().to_owned(), source }
    }

    fn fail_on(&self, id: VolumeId, what: &'static str, source: io::Error) -> BackingError {
        BackingError::Io { what, path: self.directory.join(&name_of(id)), source }
    }

    /// As [`Self::fail_on`], but for calls that take space.
    fn fail_taking(&self, spec: &DeviceSpec, what: &'static str, source: io::Error) -> BackingError {
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                let free = self.free().unwrap_or_default();
                let available = self.ledger().capacity(free).available;
                self.no_room(spec.layout.partition, available.min(Bytes(free)))
            }
            _ => self.fail_on(spec.id, what, source),
        }
    }

    fn mismatch(&self, id: VolumeId, found: Bytes, wanted: Bytes) -> BackingError {
        BackingError::Mismatch { id, device: self.directory.join(&name_of(id)), found, wanted }
    }

    fn missing(&self, id: VolumeId) -> BackingError {
        BackingError::Missing { id, device: self.directory.join(&name_of(id)) }
    }

    fn in_use(&self, id: VolumeId, detail: impl Into<String>) -> BackingError {
        BackingError::InUse { id, device: self.directory.join(&name_of(id)), detail: detail.into() }
    }

    /// A layout that no disk can have is refused before anything is done.
    fn check(&self, spec: &DeviceSpec) -> Result<(), BackingError> {
        let largest = DiskLayout::largest_partition(spec.layout.disk);
        if spec.layout.partition > largest || spec.layout.partition.0 == 0 {
            return Err(self.mismatch(spec.id, largest, spec.layout.partition));
        }
        Ok(())
    }

    /// The image, through the proof where the caller has one: another description would break its lease.
    fn image(&self, id: VolumeId, flags: OFlags) -> Result<Image, BackingError> {
        if let Some(held) = self.held(id) {
            return Ok(Image::Held(held));
        }
        let file = self.directory.open_file(&name_of(id), flags).map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => self.missing(id),
            // Opened without waiting, against somebody's lease.
            io::ErrorKind::WouldBlock => self.in_use(id, "a lease is held on it"),
            _ => self.fail_on(id, "open", error),
        })?;
        let metadata = file.metadata().map_err(|error| self.fail_on(id, "look at", error))?;
        if !metadata.is_file() {
            return Err(self.fail_on(id, "open", io::Error::other("it is not a regular file")));
        }
        Ok(Image::Opened(file))
    }

    fn length(&self, id: VolumeId, file: &File) -> Result<u64, BackingError> {
        file.metadata().map(|metadata| metadata.len()).map_err(|error| self.fail_on(id, "look at", error))
    }

    /// Makes the image under its temporary name and gives it its own.
    fn make(&self, spec: &DeviceSpec, temporary: &str) -> Result<u64, BackingError> {
        let fail = |what| move |error| self.fail_taking(spec, what, error);
        let file = self.directory.fresh_file(temporary).map_err(fail("create"))?;
        crash::point("create: temporary file made");
        if self.abilities.nocow {
            image::disable_cow(&file).map_err(fail("disable copy-on-write of"))?;
        }
        image::fill(&file, spec, self.abilities.attribute).map_err(fail("create"))?;
        let taken = file.metadata().map_err(fail("look at"))?.blocks() * STAT_BLOCK;
        crash::point("create: image durable");
        self.directory.rename_new(temporary, &name_of(spec.id)).map_err(fail("name"))?;
        Ok(taken)
    }

    /// Whether an image that exists is the one asked for.
    fn compare(&self, spec: &DeviceSpec, length: u64) -> Result<(), BackingError> {
        let (promised, DiskLayout { partition, disk, .. }) = (self.promised(spec.id)?, spec.layout);
        if length != disk.0 {
            return Err(self.mismatch(spec.id, Bytes(length), disk));
        }
        if promised != partition {
            return Err(self.mismatch(spec.id, promised, partition));
        }
        Ok(())
    }

    /// What an image was promised, by its own attribute.
    fn promised(&self, id: VolumeId) -> Result<Bytes, BackingError> {
        let image = self.image(id, OFlags::RDONLY)?;
        let promised = self.promise(&image).map_err(|error| self.fail_on(id, "use", error))?;
        // An image put there, or given its attribute, behind our back.
        if self.ledger().partition(id) != Some(promised) {
            let taken = self.taken(id)?;
            self.ledger().adopt(id, promised, taken);
        }
        Ok(promised)
    }

    fn enlarge(&self, spec: &DeviceSpec, image: &File, length: u64, promised: Bytes) -> Result<(), BackingError> {
        let fail = |what| move |error| self.fail_taking(spec, what, error);
        let DiskLayout { partition, disk, .. } = spec.layout;
        if disk.0 > length {
            image::lengthen(image, length, disk.0).map_err(fail("lengthen"))?;
            crash::point("grow: lengthened");
        }
        if spec.provisioning == Provisioning::Thick {
            image::allocate(image, partition).map_err(fail("take the space of"))?;
            crash::point("grow: space taken");
        }
        if partition > promised {
            image::set_promise(image, self.abilities.attribute, partition).map_err(fail("promise"))?;
            crash::point("grow: promise recorded");
        }
        rustix::fs::fsync(image).map_err(|error| fail("sync")(error.into()))
    }
}

impl Backing for FileBacking {
    fn create(&self, spec: &DeviceSpec) -> Result<Outcome, BackingError> {
        self.check(spec)?;
        let stat = self.directory.stat(&name_of(spec.id)).map_err(|error| self.fail_on(spec.id, "look at", error))?;
        if let Some(stat) = stat {
            self.compare(spec, stat.st_size.unsigned_abs())?;
            // Whoever made it may have been killed before its name was durable.
            self.directory.sync().map_err(|error| self.fail("sync", error))?;
            return Ok(Outcome::Unchanged);
        }
        self.ledger().release(spec.id);
        self.reserve(spec)?;
        crash::point("create: room promised");
        let temporary = directory::temporary_name(spec.id);
        match self.make(spec, &temporary) {
            Ok(taken) => self.ledger().took(spec.id, taken),
            Err(error) => {
                if let Err(error) = self.directory.remove(&temporary) {
                    tracing::warn!(volume = %spec.id, %error, "a temporary file stays until the next start");
                }
                self.ledger().release(spec.id);
                return Err(error);
            }
        }
        crash::point("create: named");
        // Where this fails the image stays, and so does its promise: the next try finds it.
        self.directory.sync().map_err(|error| self.fail("sync", error))?;
        crash::point("create: name durable");
        Ok(Outcome::Changed)
    }

    fn destroy(&self, id: VolumeId) -> Result<Outcome, BackingError> {
        let proof = match self.exclusive(id) {
            Ok(proof) => proof,
            Err(BackingError::Missing { .. }) => {
                self.ledger().release(id);
                // Whoever removed it may have been killed before that was durable.
                self.directory.sync().map_err(|error| self.fail("sync", error))?;
                return Ok(Outcome::Unchanged);
            }
            Err(error) => return Err(error),
        };
        crash::point("destroy: exclusive");
        self.directory.remove(&name_of(id)).map_err(|error| self.fail_on(id, "remove", error))?;
        crash::point("destroy: removed");
        // The space comes back with the last descriptor, and so must not be promised before.
        drop(proof);
        self.ledger().release(id);
        self.directory.sync().map_err(|error| self.fail("sync", error))?;
        crash::point("destroy: removal durable");
        Ok(Outcome::Changed)
    }

    fn grow(&self, spec: &DeviceSpec) -> Result<Outcome, BackingError> {
        self.check(spec)?;
        let promised = self.promised(spec.id)?;
        let image = self.image(spec.id, OFlags::RDWR)?;
        let length = self.length(spec.id, &image)?;
        if spec.layout.partition <= promised && spec.layout.disk.0 <= length {
            return Ok(Outcome::Unchanged);
        }
        self.reserve(spec)?;
        crash::point("grow: room promised");
        if let Err(error) = self.enlarge(spec, &image, length, promised) {
            // The attribute decides: it may have been written before the failure.
            let now = self.promise(&image).unwrap_or(spec.layout.partition);
            self.ledger().restore(spec.id, Some(now));
            return Err(error);
        }
        let taken = self.taken(spec.id)?;
        self.ledger().took(spec.id, taken);
        crash::point("grow: durable");
        Ok(Outcome::Changed)
    }

    fn exclusive(&self, id: VolumeId) -> Result<Box<dyn Exclusive>, BackingError> {
        let held = match self.image(id, OFlags::RDWR)? {
            Image::Held(held) => held,
            Image::Opened(file) => {
                let held = Held::take(file, self.abilities.fencing).map_err(|error| match error {
                    TakeError::InUse(detail) => self.in_use(id, detail),
                    TakeError::Io(error) => self.fail_on(id, "take a lease on", error),
                })?;
                let held = Arc::new(held);
                let mut all = self.held.lock().unwrap_or_else(PoisonError::into_inner);
                all.retain(|_, held| held.strong_count() > 0);
                all.insert(id, Arc::downgrade(&held));
                held
            }
        };
        if !held.holds().map_err(|error| self.fail_on(id, "look at the lease of", error))? {
            return Err(self.in_use(id, "somebody is opening it at this moment"));
        }
        Ok(Box::new(Proof(held)))
    }

    fn write_table(&self, spec: &DeviceSpec, _proof: &dyn Exclusive) -> Result<(), BackingError> {
        self.check(spec)?;
        let id = spec.id;
        // Not any proof will do: it must be this image's, from here, and still hold.
        let held = self.held(id).ok_or_else(|| self.in_use(id, "the proof of exclusive use is another volume's"))?;
        if !held.holds().map_err(|error| self.fail_on(id, "look at the lease of", error))? {
            return Err(self.in_use(id, "somebody is opening it at this moment"));
        }
        let (promised, length) = (self.promised(id)?, self.length(id, &held.file)?);
        if spec.layout.partition > promised {
            return Err(self.mismatch(id, promised, spec.layout.partition));
        }
        if spec.layout.disk.0 > length {
            return Err(self.mismatch(id, Bytes(length), spec.layout.disk));
        }
        image::write_tables(&held.file, id, spec.layout.partition, Bytes(length))
            .map_err(|error| self.fail_taking(spec, "write the partition table of", error))?;
        crash::point("table: durable");
        Ok(())
    }

    /// The guest's journal before the partition does not count: it says that a guest meant to make a pool, which is no
    /// reason not to make one. `zpool create` writes labels into the partition's first 512 KiB before anything else
    /// can be in the pool, so a pool there is never missed.
    fn ever_written(&self, spec: &DeviceSpec) -> Result<bool, BackingError> {
        let image = self.image(spec.id, OFlags::RDONLY)?;
        let end = DiskLayout::PARTITION_START.saturating_add(spec.layout.partition.0);
        let length = self.length(spec.id, &image)?;
        if length < end {
            return Err(self.mismatch(spec.id, Bytes(length), spec.layout.disk));
        }
        image::has_data(&image, DiskLayout::PARTITION_START, end)
            .map_err(|error| self.fail_on(spec.id, "look for data in", error))
    }

    fn device(&self, id: VolumeId) -> Result<PathBuf, BackingError> {
        let name = name_of(id);
        let path = self.directory.join(&name);
        let ours = self.directory.stat(&name).map_err(|error| self.fail_on(id, "look at", error))?;
        let found = std::fs::symlink_metadata(&path).ok();
        // The path is for another process: it must lead to the image that is meant, whatever is mounted there by now.
        match (ours, found) {
            (Some(ours), Some(found))
                if (ours.st_dev, ours.st_ino) == (found.dev(), found.ino())
                    && FileType::from_raw_mode(ours.st_mode) == FileType::RegularFile =>
            {
                Ok(path)
            }
            _ => Err(self.missing(id)),
        }
    }

    fn allocated(&self, id: VolumeId) -> Result<Bytes, BackingError> {
        let stat = self.directory.stat(&name_of(id)).map_err(|error| self.fail_on(id, "look at", error))?;
        let stat = stat.ok_or_else(|| self.missing(id))?;
        Ok(Bytes(stat.st_blocks.unsigned_abs() * STAT_BLOCK))
    }

    fn capacity(&self) -> Result<Capacity, BackingError> {
        self.measure(FIGURE_AGE)?;
        let free = self.free()?;
        Ok(self.ledger().capacity(free))
    }

    fn location(&self) -> &Path {
        self.directory.path()
    }
}

/// An image, however it came to be open.
enum Image {
    Held(Arc<Held>),
    Opened(File),
}

impl Deref for Image {
    type Target = File;

    fn deref(&self) -> &File {
        match self {
            Self::Held(held) => &held.file,
            Self::Opened(file) => file,
        }
    }
}

fn name_of(id: VolumeId) -> String {
    format!("{id}.img")
}

fn id_of(name: &str) -> Option<VolumeId> {
    name.strip_suffix(".img")?.parse().ok()
}

#[cfg(test)]
mod tests;
