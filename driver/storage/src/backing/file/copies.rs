//! Copies of images: what snapshots keep, and devices made from them or from each other.
//!
//! # Design
//! A copy comes into being as an image does: under a temporary name, renamed once it is whole and durable. Where files
//! can share blocks (FICLONERANGE) it is made at once, in time that follows the number of extents and not their size;
//! elsewhere it is a full copy, if that is allowed, of an image that is leased meanwhile.
//!
//! Before the copy exists there is room promised for it, its source says that it shares, and the copy says how much.
//! So whatever is cut short, nothing that shares blocks counts for more than there is.
//!
//! A copy has what is before the end of its source's partition: never what a guest wrote behind it.

use std::os::unix::fs::MetadataExt;
use std::{fs::File, io};

use zpod_volume::{Bytes, DiskLayout, SnapshotId};

use super::sharing::KeptFile;
use super::{FileBacking, STAT_BLOCK, contents, extents, image};
use crate::backing::kept::Kept;
use crate::backing::ledger::Promise;
use crate::backing::{Backing as _, BackingError, Copying, DeviceSpec, Exclusive, Outcome};
use crate::crash;

/// What a copy is made from, open.
pub(super) struct Source {
    kept: Kept,
    file: KeptFile,
    /// Up to here it is copied.
    end: u64,
    /// Whether the copy shares its blocks.
    pub(super) shares: bool,
    /// For a full copy of a device.
    _proof: Option<Box<dyn Exclusive>>,
}

/// Why a full copy has ended.
enum Ended {
    Stopped,
    Opened,
    Io(io::Error),
}

impl From<io::Error> for Ended {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl FileBacking {
    /// Opens what is to be copied. `partition` is how much of it.
    pub(super) fn source(&self, kept: Kept, partition: Bytes, how: &Copying<'_>) -> Result<Source, BackingError> {
        let shares = self.tried()?.abilities.reflink;
        if !shares && !how.full {
            return Err(BackingError::CannotShare { location: self.directory.path().display().to_string() });
        }
        let proof = match kept {
            Kept::Volume(id) if !shares => Some(self.exclusive(id)?),
            _ => None,
        };
        let file = self.kept_file(kept)?;
        let end = DiskLayout::PARTITION_START.saturating_add(partition.0);
        let length = file.metadata().map_err(|error| self.fail_on(kept, "look at", error))?.len();
        if length < end {
            return Err(self.too_short(kept, length, end));
        }
        Ok(Source { kept, file, end, shares, _proof: proof })
    }

    fn too_short(&self, kept: Kept, length: u64, end: u64) -> BackingError {
        let why = format!("it has {} where {} were expected; nothing was changed", Bytes(length), Bytes(end));
        self.fail_on(kept, "copy", io::Error::new(io::ErrorKind::InvalidData, why))
    }

    /// What the source has: the most that a copy of it can share.
    fn held_by(&self, source: &Source) -> Result<u64, BackingError> {
        let metadata = source.file.metadata().map_err(|error| self.fail_on(source.kept, "look at", error))?;
        Ok(metadata.blocks() * STAT_BLOCK)
    }

    /// Promises room for a copy, and what its source needs from then on.
    pub(super) fn reserve_copy(
        &self,
        kept: Kept,
        source: &Source,
        wanted: impl Fn(u64) -> Promise,
    ) -> Result<(), BackingError> {
        let held = self.held_by(source)?;
        // Its guest has written since that was measured, and what it has will be counted as room by itself.
        self.ledger().took(source.kept, held);
        let promise = wanted(held);
        let borrowed = if source.shares { held } else { 0 };
        let needed = self.ledger().needed_to_copy(kept, promise, source.kept);
        self.reserve_by(Bytes(needed), |ledger, free| ledger.reserve_copy(kept, promise, source.kept, borrowed, free))?;
        crash::point("copy: room promised");
        if source.shares {
            self.lend(source.kept, &source.file).map_err(|error| self.fail_on(source.kept, "share", error))?;
        }
        Ok(())
    }

    /// Fills an empty file with what the source has, and records in it how much the two share.
    pub(super) fn copy(&self, kept: Kept, source: &Source, to: &File, how: &Copying<'_>) -> Result<(), BackingError> {
        let fail = |what| move |error| self.fail_wanting(kept, Bytes(source.end), what, error);
        if source.shares {
            extents::share(&source.file, to, source.end).map_err(|error| match error.raw_os_error() {
                Some(libc::EOPNOTSUPP | libc::EXDEV) => {
                    BackingError::CannotShare { location: self.directory.path().display().to_string() }
                }
                _ => fail("copy")(error),
            })?;
            crash::point("copy: blocks shared");
            let shared = to.metadata().map_err(fail("look at"))?.blocks() * STAT_BLOCK;
            image::set_shared(to, self.names(to).shared, shared).map_err(fail("record what is shared in"))?;
            crash::point("copy: what is shared recorded");
            return Ok(());
        }
        let ended = contents::copy(&source.file, to, source.end, |done, total| {
            if !(how.progress)(Bytes(done), Bytes(total)) {
                return Err(Ended::Stopped);
            }
            if self.holds(source.kept)? { Ok(()) } else { Err(Ended::Opened) }
        });
        crash::point("copy: copied in full");
        match (ended, source.kept) {
            (Ok(()), _) => Ok(()),
            (Err(Ended::Opened), Kept::Volume(id)) => Err(self.in_use(id, "somebody opened it while it was copied")),
            (Err(Ended::Opened | Ended::Stopped), _) => Err(BackingError::Stopped),
            (Err(Ended::Io(error)), _) => Err(fail("copy to")(error)),
        }
    }

    /// Whether a device that is copied in full is still nobody else's.
    fn holds(&self, kept: Kept) -> io::Result<bool> {
        match kept {
            Kept::Volume(id) => self.held(id).map_or(Ok(false), |held| held.holds()),
            Kept::Snapshot(_) => Ok(true),
        }
    }

    pub(super) fn keep(&self, id: SnapshotId, source: &DeviceSpec, how: &Copying<'_>) -> Result<Outcome, BackingError> {
        self.check(source)?;
        let (kept, partition) = (Kept::from(id), source.layout.partition);
        let stat = self.directory.stat(&kept.name()).map_err(|error| self.fail_on(kept, "look at", error))?;
        if let Some(stat) = stat {
            let (length, end) = (stat.st_size.unsigned_abs(), DiskLayout::PARTITION_START + partition.0);
            if length != end {
                return Err(self.too_short(kept, length, end));
            }
            // Whoever made it may have been killed before its name was durable.
            self.directory.sync().map_err(|error| self.fail("sync", error))?;
            return Ok(Outcome::Unchanged);
        }
        self.ledger().release(kept);
        let source = self.source(source.id.into(), partition, how)?;
        let shares = source.shares;
        self.reserve_copy(kept, &source, |bytes| Promise::Copy { bytes, shares })?;
        let temporary = kept.temporary_name();
        match self.make_copy(kept, &source, &temporary, how) {
            Ok(taken) => self.ledger().took(kept, taken),
            Err(error) => {
                if let Err(error) = self.directory.remove(&temporary) {
                    tracing::warn!(%kept, %error, "a temporary file stays until the next start");
                }
                self.ledger().release(kept);
                return Err(error);
            }
        }
        crash::point("snapshot: named");
        // Where this fails the copy stays, and so does its promise: the next try finds it.
        self.directory.sync().map_err(|error| self.fail("sync", error))?;
        crash::point("snapshot: name durable");
        Ok(Outcome::Changed)
    }

    fn make_copy(&self, kept: Kept, source: &Source, temporary: &str, how: &Copying<'_>) -> Result<u64, BackingError> {
        let fail = |what| move |error| self.fail_wanting(kept, Bytes(source.end), what, error);
        let abilities = self.tried()?.abilities;
        let file = self.directory.fresh_file(temporary).map_err(fail("create"))?;
        crash::point("snapshot: temporary file made");
        if abilities.nocow {
            image::disable_cow(&file).map_err(fail("disable copy-on-write of"))?;
        }
        self.copy(kept, source, &file, how)?;
        file.set_len(source.end).map_err(fail("set the length of"))?;
        if !source.shares {
            image::set_shared(&file, abilities.names.shared, 0).map_err(fail("record what is shared in"))?;
        }
        rustix::fs::fsync(&file).map_err(|error| fail("sync")(error.into()))?;
        crash::point("snapshot: durable");
        // Its guest may have written more, up to that instant, than there was when room was promised.
        let taken = file.metadata().map_err(fail("look at"))?.blocks() * STAT_BLOCK;
        let borrowed = if source.shares { taken } else { 0 };
        let promise = Promise::Copy { bytes: taken, shares: source.shares };
        self.reserve_by(Bytes(taken), |ledger, free| ledger.reserve_copy(kept, promise, source.kept, borrowed, free))?;
        self.directory.rename_new(temporary, &kept.name()).map_err(fail("name"))?;
        Ok(taken)
    }

    pub(super) fn discard(&self, id: SnapshotId) -> Result<Outcome, BackingError> {
        let kept = Kept::from(id);
        let taken = self.snapshot_allocated(id).unwrap_or_default();
        let removed = self.directory.remove(&kept.name()).map_err(|error| self.fail_on(kept, "remove", error))?;
        crash::point("discard: removed");
        self.freed.note(taken.0);
        self.ledger().release(kept);
        // Also where there was none: whoever removed it may have been killed before that was durable.
        self.directory.sync().map_err(|error| self.fail("sync", error))?;
        crash::point("discard: removal durable");
        Ok(if removed { Outcome::Changed } else { Outcome::Unchanged })
    }
}
