//! Volumes as sparse raw files in a directory: `<dir>/<volume id>.img`, and their snapshots: `<dir>/<snapshot id>.snap`.
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
//! A file system that is full or read-only keeps nobody from unpublishing and destroying: see [`trial`]. What takes time
//! that tenants decide on is done beside the calls: see [`sharing`] and [`FileBacking::keep_up`].
//!
//! # Limitations
//! * A guest can write anywhere on its disk, past its partition too. On XFS mounted with `prjquota` each image has a
//!   limit that stops that ([`projects`]; [`Abilities::quota`] says whether it holds). Elsewhere room is lost to the
//!   others: it is measured, logged, and shown by [`Backing::excess`](super::Backing::excess).
//! * btrfs: an image is made NOCOW, or its promise could not be kept (overwriting would take new space).
//!   What shares blocks may take new space, as anywhere, and that is accounted for. But btrfs keeps an extent, of up to
//!   128 MiB, as long as a part of it is in use: a volume that has rewritten most of what it shared can take more than
//!   its promise once the copy is gone. That is seen as room that is lost, and promised to nobody.
//! * NFS is no place for a backing directory: it grants no leases.

mod abilities;
mod calls;
mod contents;
mod copies;
mod extents;
mod fcntl;
mod image;
mod openings;
mod projects;
mod proof;
mod quotactl;
mod room;
mod sharing;
mod trial;
mod upkeep;

use std::fs::File;
use std::io;
use std::ops::Deref;
use std::path::Path;
use std::sync::atomic::AtomicUsize;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::fs::{OFlags, Stat};
use zpod_volume::{Bytes, DiskLayout, VolumeId};

use self::abilities::Names;
pub(crate) use self::abilities::is_nocow;
pub use self::abilities::{Abilities, Fencing};
pub(crate) use self::image::disable_cow;
use self::openings::Openings;
use self::projects::Projects;
use self::proof::{Held, Proven};
use self::sharing::Sharing;
use self::trial::Trial;
use self::upkeep::Freed;
use super::kept::Kept;
use super::ledger::{Ledger, Promise};
use super::overhead::Overhead;
use super::{BackingError, DeviceSpec};
use crate::directory::{self, Directory};

/// What `stat` counts blocks in, whatever the file system's own blocks are.
const STAT_BLOCK: u64 = 512;

/// A refusal is given only on figures not older than this.
const REFUSAL_AGE: Duration = Duration::from_secs(1);
/// And a figure of the room there is only on one not older than this.
const FIGURE_AGE: Duration = Duration::from_secs(5);
/// So long may it seem that there is less room than there is, after copies and what they were made from have changed.
const LOOK_AGE: Duration = Duration::from_secs(60);

/// Image files in a directory.
#[derive(Debug)]
pub struct FileBacking {
    directory: Directory,
    /// What the file system was found to be able to do.
    trial: Trial,
    /// What the file system may take to keep track of a volume, whether or not that is kept for it.
    overhead: Overhead,
    ledger: Mutex<Ledger>,
    /// When the ledger was last measured. Held while measuring, so that one does it for all.
    measured: Mutex<Instant>,
    /// Who shares what. Held for a step of looking, and by nobody but who looks.
    sharing: Mutex<Sharing>,
    /// Which images are open for a look, or about to be leased.
    openings: Openings,
    /// What was removed, and may still count.
    freed: Arc<Freed>,
    /// How many calls that are to be refused look for room.
    looking_for_room: AtomicUsize,
    /// Images that the callers have proofs for.
    held: Arc<Proven>,
}

impl FileBacking {
    /// Opens a directory that exists, for this process alone. `overprovision` is how many times the space may be
    /// promised: 1 keeps every promise, less keeps some space back.
    ///
    /// # Errors
    /// When the directory is not there (it is not made: the mount that should be there may be missing), another process
    /// has it, or its file system lacks something. One that is full or read-only is opened all the same.
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
        let block = rustix::fs::fstatvfs(&directory).map_err(|error| fail("measure", error.into()))?.f_frsize;
        let backing = Self {
            directory,
            trial: Trial::default(),
            overhead: Overhead::in_blocks_of(block),
            ledger: Mutex::new(Ledger::new(overprovision, Overhead::NONE)),
            measured: Mutex::new(Instant::now()),
            sharing: Mutex::default(),
            openings: Openings::default(),
            freed: Arc::default(),
            looking_for_room: AtomicUsize::new(0),
            held: Arc::default(),
        };
        backing.try_at_start().map_err(|error| fail("try out the file system of", error))?;
        let volumes = backing.adopt_all().map_err(|error| fail("read the backing directory", error))?;
        backing.measure(Duration::ZERO)?;
        if let Some(abilities) = backing.abilities() {
            tracing::info!(directory = %dir.display(), volumes, %abilities, "backing directory opened");
        }
        Ok(backing)
    }

    /// Takes in what there is and removes what crashes left.
    fn adopt_all(&self) -> io::Result<usize> {
        let mut volumes = 0;
        let mut leftovers = Vec::new();
        self.directory.each_name(|name| {
            if directory::is_temporary(name) {
                leftovers.push(name.to_owned());
            } else if let Some(kept) = Kept::of_name(name)
                && let Some(stat) = self.directory.stat(name)?
            {
                match kept {
                    Kept::Volume(id) => {
                        volumes += 1;
                        self.adopt(id, name, &stat);
                    }
                    Kept::Snapshot(_) => self.adopt_copy(kept, name, &stat),
                }
            }
            Ok(())
        })?;
        for name in leftovers {
            tracing::info!(file = name, "removing what a creation left that was cut short");
            let lifted = self.projects().map_or(Ok(()), |projects| projects.lift_leftover(&self.directory, &name));
            if let Err(error) = lifted.and_then(|()| self.directory.remove(&name)) {
                tracing::warn!(file = name, %error, "it stays until the next start");
            }
        }
        Ok(volumes)
    }

    fn adopt(&self, id: VolumeId, name: &str, stat: &Stat) {
        let file = self.directory.open_file(name, OFlags::RDONLY);
        let promise = match &file {
            Ok(file) => self.promise(file),
            Err(error) => Err(io::Error::new(error.kind(), error.to_string())),
        };
        let partition = promise.unwrap_or_else(|error| {
            tracing::error!(volume = %id, %error, "taking the whole disk for promised");
            Bytes(stat.st_size.unsigned_abs())
        });
        let Ok(file) = file else {
            let promise = Promise::Partition { size: partition, shares: false };
            return self.ledger().adopt(id, promise, stat.st_blocks.unsigned_abs() * STAT_BLOCK, 0);
        };
        if let Err(error) = self.adopt_image(id, &file, partition, stat.st_blocks.unsigned_abs() * STAT_BLOCK) {
            tracing::error!(volume = %id, %error, "its space is not limited");
        }
    }

    /// Takes in an image that was promised a partition of that size.
    fn adopt_image(&self, id: VolumeId, image: &File, partition: Bytes, taken: u64) -> io::Result<()> {
        let shared = image::shared(image, self.names(image).shared).unwrap_or_else(|error| {
            tracing::error!(volume = %id, %error, "taking all of it for shared with others");
            Some(taken)
        });
        let promise = Promise::Partition { size: partition, shares: shared.is_some() };
        self.ledger().adopt(id, promise, taken, shared.unwrap_or_default().min(taken));
        self.bound(id, image, partition)
    }

    /// Takes in the copy of a snapshot. One that does not say what it shares may share everything.
    fn adopt_copy(&self, kept: Kept, name: &str, stat: &Stat) {
        let taken = stat.st_blocks.unsigned_abs() * STAT_BLOCK;
        let file = self.directory.open_file(name, OFlags::RDONLY);
        let shared = file.and_then(|file| image::shared(&file, self.names(&file).shared)).unwrap_or_else(|error| {
            tracing::error!(%kept, %error, "taking all of it for shared with others");
            None
        });
        let shares = self.abilities().is_none_or(|abilities| abilities.reflink);
        let borrowed = if shares { shared.unwrap_or(taken).min(taken) } else { 0 };
        self.ledger().adopt(kept, Promise::Copy { bytes: taken, shares }, taken, borrowed);
    }

    /// Limits an image to what is kept for a partition of that size, where the file system can.
    fn bound(&self, id: VolumeId, image: &File, partition: Bytes) -> io::Result<()> {
        let limit = {
            let ledger = self.ledger();
            ledger.promise(partition, ledger.shares(id))
        };
        match self.projects() {
            Some(projects) => projects.bound(&self.directory, id, image, limit),
            None => projects::raise_leftover(&self.directory, image, limit.saturating_add(self.overhead.of(partition))),
        }
    }

    /// Lifts the limit of an image that is to go.
    fn unbound(&self, id: VolumeId) -> io::Result<()> {
        self.projects().map_or(Ok(()), |projects| projects.lift(&self.directory, id))
    }

    /// Takes back what was promised to an image that is gone, and its project.
    fn forget(&self, id: VolumeId) {
        if let Some(projects) = self.projects() {
            projects.release(id);
        }
        self.ledger().release(id);
    }

    /// What was taken beyond what is kept and the metadata for it. A block that is rewritten and was shared counts twice
    /// until the new one is written out: as much as there is in memory of a guest's writes.
    fn beyond(&self, reserved: u64, shares: bool, taken: u64) -> Bytes {
        let rewriting = if shares { reserved } else { 0 };
        let kept = reserved.saturating_add(rewriting).saturating_add(self.overhead.of(Bytes(reserved)));
        Bytes(taken.saturating_sub(kept))
    }

    fn promise(&self, file: &File) -> io::Result<Bytes> {
        image::promise(file, self.names(file).partition)
    }

    /// The attributes of an image.
    fn names(&self, file: &File) -> Names {
        self.abilities().map_or_else(|| Names::of(file), |abilities| abilities.names)
    }

    /// Where the file system keeps limits, if it does.
    fn projects(&self) -> Option<&Projects> {
        self.trial.found.get()?.projects.as_ref()
    }

    fn ledger(&self) -> MutexGuard<'_, Ledger> {
        // What the lock guards is whole at every point where a thread could have panicked.
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn held(&self, id: VolumeId) -> Option<Arc<Held>> {
        self.held.get(id)
    }

    fn fail(&self, what: &'static str, source: io::Error) -> BackingError {
        BackingError::Io { what, path: self.directory.path().to_owned(), source }
    }

    fn fail_on(&self, kept: impl Into<Kept>, what: &'static str, source: io::Error) -> BackingError {
        BackingError::Io { what, path: self.directory.join(&name_of(kept)), source }
    }

    /// As [`Self::fail_on`], but for calls that take space.
    fn fail_taking(&self, spec: &DeviceSpec, what: &'static str, source: io::Error) -> BackingError {
        self.fail_wanting(spec.id, spec.layout.partition, what, source)
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

fn name_of(kept: impl Into<Kept>) -> String {
    kept.into().name()
}

#[cfg(test)]
mod tests;
