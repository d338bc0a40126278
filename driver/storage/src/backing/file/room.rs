//! The room there is, and promises of it.

use std::io;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use rustix::fs::StatVfsMountFlags;
use zpod_volume::{Bytes, DiskLayout};

use super::{FileBacking, REFUSAL_AGE, STAT_BLOCK};
use crate::backing::kept::Kept;
use crate::backing::ledger::{Ledger, Promised};
use crate::backing::{BackingError, Capacity, DeviceSpec};

/// `XFS_SUPER_MAGIC` of linux/magic.h.
const XFS: u32 = 0x5846_5342;

/// How long a call that is to be refused waits for the file system to free what was removed.
const SYNC_PATIENCE: Duration = Duration::from_secs(4);
/// What was removed longer ago is free.
const FREEING: Duration = Duration::from_secs(60);
/// How often, and how long each time, what is freed in the background is waited for.
const WAITS: usize = 10;
const WAIT: Duration = Duration::from_millis(100);
/// So many calls that are to be refused may wait at a time; the others go by the figures there are.
const MOST_LOOKING: usize = 4;

/// What is done before a call is refused for lack of room, in this order.
#[derive(Debug, Clone, Copy)]
enum Effort {
    None,
    Measure,
    /// Has the file system free what was removed.
    Sync,
    /// Looks who shares what.
    Look,
    /// Waits for what is freed in the background.
    Wait,
}

/// A call that may have to look for room.
struct Looking<'a>(&'a AtomicUsize);

impl<'a> Looking<'a> {
    fn begin(count: &'a AtomicUsize) -> Self {
        count.fetch_add(1, Ordering::SeqCst);
        Self(count)
    }
}

impl Drop for Looking<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Why nothing new can be made now, however much space there is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Lack {
    Inodes,
    Writing,
}

impl FileBacking {
    /// What can be made here now.
    pub(super) fn room(&self) -> Result<Capacity, BackingError> {
        self.measure(super::FIGURE_AGE)?;
        let free = self.free()?;
        let capacity = self.ledger().capacity(free);
        match self.tried() {
            Ok(tried) if self.lacks().is_none() => {
                let largest = DiskLayout::largest_partition(tried.abilities.largest_file);
                Ok(Capacity { largest: capacity.largest.min(largest), ..capacity })
            }
            _ => Ok(Capacity { available: Bytes(0), largest: Bytes(0), ..capacity }),
        }
    }

    /// A layout that no file can have is refused before anything is done.
    pub(super) fn check_fits(&self, spec: &DeviceSpec) -> Result<(), BackingError> {
        let wanted = spec.layout.disk;
        if wanted > self.tried()?.abilities.largest_file { Err(self.too_large(wanted)) } else { Ok(()) }
    }

    fn too_large(&self, wanted: Bytes) -> BackingError {
        let largest = self.abilities().map(|abilities| abilities.largest_file).unwrap_or_default();
        BackingError::TooLarge { location: self.directory.path().display().to_string(), wanted, largest }
    }

    fn lacks(&self) -> Option<Lack> {
        let stat = rustix::fs::fstatvfs(&self.directory).ok()?;
        if stat.f_flag.contains(StatVfsMountFlags::RDONLY) {
            return Some(Lack::Writing);
        }
        // btrfs counts no inodes.
        (stat.f_files > 0 && stat.f_favail == 0).then_some(Lack::Inodes)
    }

    pub(super) fn free(&self) -> Result<u64, BackingError> {
        let stat = rustix::fs::fstatvfs(&self.directory).map_err(|error| self.fail("measure", error.into()))?;
        Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
    }

    /// Measures what volumes have taken, unless that was done less than `age` ago.
    pub(super) fn measure(&self, age: Duration) -> Result<(), BackingError> {
        let mut measured = self.measured.lock().unwrap_or_else(PoisonError::into_inner);
        if !age.is_zero() && measured.elapsed() < age {
            return Ok(());
        }
        let promises = self.ledger().promises();
        let before = self.free()?;
        let taken = promises.iter().map(|promised| self.taken(promised.kept)).collect::<Result<Vec<_>, _>>()?;
        let after = self.free()?;
        self.ledger().measured(before.min(after), &promises, &taken);
        for (Promised { kept, reserved, shares, .. }, taken) in promises.iter().zip(&taken) {
            let excess = self.beyond(*reserved, *shares, *taken);
            if let Kept::Volume(volume) = kept
                && excess.0 > 0
            {
                let (taken, promised) = (Bytes(*taken), Bytes(*reserved));
                tracing::warn!(%volume, %taken, %promised, %excess, "its guest has written past its partition, into \
                    the room of other volumes; stop its pod, and put images on XFS mounted with prjquota to prevent it");
            }
        }
        *measured = Instant::now();
        Ok(())
    }

    /// What it has taken by now, be it under its temporary name.
    pub(super) fn taken(&self, kept: impl Into<Kept>) -> Result<u64, BackingError> {
        let kept = kept.into();
        for name in [kept.name(), kept.temporary_name()] {
            let stat = self.directory.stat(&name).map_err(|error| self.fail_on(kept, "look at", error))?;
            if let Some(stat) = stat {
                return Ok(stat.st_blocks.unsigned_abs() * STAT_BLOCK);
            }
        }
        Ok(0)
    }

    pub(super) fn reserve(&self, spec: &DeviceSpec) -> Result<(), BackingError> {
        let wanted = spec.layout.partition;
        self.reserve_by(wanted, |ledger, free| ledger.reserve(spec.id, wanted, free))
    }

    /// Promises room. Nothing is refused on old figures.
    pub(super) fn reserve_by(
        &self,
        wanted: Bytes,
        mut promise: impl FnMut(&mut Ledger, u64) -> Result<(), Bytes>,
    ) -> Result<(), BackingError> {
        let mut available = Bytes(0);
        // Nobody else waits for what follows but who would be refused.
        let _looking = Looking::begin(&self.looking_for_room);
        for effort in [Effort::None, Effort::Measure, Effort::Sync, Effort::Look, Effort::Wait] {
            let tries = if matches!(effort, Effort::Wait) { WAITS } else { 1 };
            for _ in 0..tries {
                if !self.look_for_room(effort)? {
                    break;
                }
                let free = self.free()?;
                match promise(&mut self.ledger(), free) {
                    Ok(()) => return Ok(()),
                    Err(least) => available = least,
                }
            }
        }
        Err(self.no_room(wanted, available))
    }

    /// Does one thing that may show more room than was seen; says whether it did.
    fn look_for_room(&self, effort: Effort) -> Result<bool, BackingError> {
        let few = || self.looking_for_room.load(Ordering::SeqCst) <= MOST_LOOKING;
        let looked = match effort {
            Effort::None => return Ok(true),
            Effort::Measure => {
                self.measure(REFUSAL_AGE)?;
                return Ok(true);
            }
            Effort::Sync => few() && self.freed.is_pending() && self.freed.sync(&self.directory, SYNC_PATIENCE),
            Effort::Look => few() && self.look_now(),
            Effort::Wait => {
                let worth = few() && self.freed.within(FREEING) && self.frees_later();
                if worth {
                    std::thread::sleep(WAIT);
                }
                worth
            }
        };
        if looked {
            self.measure(Duration::ZERO)?;
        }
        Ok(looked)
    }

    /// Whether the file system frees removed files in the background, and no sync waits for it: XFS (`xfs_inodegc`).
    fn frees_later(&self) -> bool {
        rustix::fs::fstatfs(&self.directory).is_ok_and(|stat| u32::try_from(stat.f_type) == Ok(XFS))
    }

    pub(super) fn no_room(&self, wanted: Bytes, available: Bytes) -> BackingError {
        BackingError::NoRoom { location: self.directory.path().display().to_string(), wanted, available }
    }

    /// As `fail_on`, but for calls that take space.
    pub(super) fn fail_wanting(
        &self,
        kept: impl Into<Kept>,
        wanted: Bytes,
        what: &'static str,
        source: io::Error,
    ) -> BackingError {
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                let free = self.free().unwrap_or_default();
                if self.lacks().is_some_and(|lack| lack == Lack::Inodes) {
                    return self.restricted(format!("{source}: no inode is free there, however much space is"));
                }
                let available = self.ledger().capacity(free).available;
                self.no_room(wanted, available.min(Bytes(free)))
            }
            io::ErrorKind::FileTooLarge => self.too_large(wanted),
            io::ErrorKind::ReadOnlyFilesystem => self.restricted(source.to_string()),
            _ => self.fail_on(kept, what, source),
        }
    }
}
