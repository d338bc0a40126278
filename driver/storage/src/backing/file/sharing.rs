//! Who shares which blocks, found by looking.
//!
//! # Design
//! Each copy says how much it may share ([`Ledger`](crate::backing::ledger::Ledger)), an upper limit that needs no
//! looking. It makes the room seem smaller than it is once source and copy have gone different ways. The truth is in the
//! file system's maps: it is looked up before anything is refused, and now and then for the figure of the room there is.
//! That costs as much as there are extents, so it is never done more than a small part of the time.
//!
//! All that shares is gone through, and each block is counted with the first that has it.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::ops::Deref;
use std::sync::PoisonError;
use std::time::{Duration, Instant};

use rustix::fs::OFlags;

use super::extents::{self, Shared};
use super::{FileBacking, Image, image};
use crate::backing::BackingError;
use crate::backing::kept::Kept;

/// Looking takes one part of the time in so many at most.
const SHARE_OF_TIME: u32 = 20;
/// Ranges that are held in memory at a time: about 64 MiB. Where there are more, the upper limits have to do.
const MOST_RANGES: usize = 1 << 20;

/// When was last looked, and how long that took.
#[derive(Debug, Default)]
pub(super) struct Looked(Option<(Instant, Duration)>);

impl Looked {
    fn is_due(&self, age: Duration) -> bool {
        self.0.is_none_or(|(at, took)| at.elapsed() >= age.max(took * SHARE_OF_TIME))
    }
}

impl FileBacking {
    /// Looks who shares what, unless nobody does, or that was done a short while ago; says whether it did.
    pub(super) fn look_who_shares(&self, age: Duration) -> Result<bool, BackingError> {
        let mut looked = self.looked.lock().unwrap_or_else(PoisonError::into_inner);
        if !self.ledger().borrows() || !looked.is_due(age) {
            return Ok(false);
        }
        let started = Instant::now();
        let mut sharers = self.ledger().promises();
        sharers.retain(|promised| promised.whole && promised.shares);
        sharers.sort_by_key(|promised| promised.kept);
        let mut ranges = Ranges::default();
        let mut found = Vec::with_capacity(sharers.len());
        let mut done = true;
        for promised in sharers {
            match self.borrowed(promised.kept, &mut ranges) {
                Ok(borrowed) => found.push((promised, borrowed)),
                // Its blocks are its own, or those of what is looked at as well.
                Err(BackingError::Missing { .. } | BackingError::SnapshotMissing { .. }) => {}
                // All or nothing: what is left out would seem to share nothing.
                Err(error) => {
                    tracing::info!(kept = %promised.kept, %error, "who shares what was not found out");
                    done = false;
                    break;
                }
            }
            if ranges.count() > MOST_RANGES {
                tracing::warn!(
                    "blocks are shared in too many pieces to count them; the room that is told is too small"
                );
                done = false;
                break;
            }
        }
        if done {
            self.ledger().refined(&found);
        }
        *looked = Looked(Some((Instant::now(), started.elapsed())));
        if done {
            self.measure(Duration::ZERO)?;
        }
        Ok(done)
    }

    /// How much of a file others share that come before it.
    fn borrowed(&self, kept: Kept, ranges: &mut Ranges) -> Result<u64, BackingError> {
        // Whoever wants a lease on it waits as long.
        let _opening = self.opening.lock().unwrap_or_else(PoisonError::into_inner);
        let file = self.kept_file(kept)?;
        let mut borrowed = 0;
        extents::each_shared(&file, |Shared { at, length }| {
            borrowed += at.map_or(length, |at| ranges.insert(at, length));
            ranges.count() <= MOST_RANGES
        })
        .map_err(|error| self.fail_on(kept, "look for shared blocks in", error))?;
        Ok(borrowed)
    }

    pub(super) fn kept_file(&self, kept: Kept) -> Result<KeptFile, BackingError> {
        match kept {
            Kept::Volume(id) => self.image(id, OFlags::RDONLY).map(KeptFile::Image),
            Kept::Snapshot(id) => match self.directory.open_file(&kept.name(), OFlags::RDONLY) {
                Ok(file) => Ok(KeptFile::Copy(file)),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    Err(BackingError::SnapshotMissing { id, file: self.directory.join(&kept.name()) })
                }
                Err(error) => Err(self.fail_on(kept, "open", error)),
            },
        }
    }

    /// Records in a file that others may share its blocks from now on, and gives it the room that this needs; the ledger
    /// has it already. Before there is a copy: one that is there and not accounted for would be promised twice.
    pub(super) fn lend(&self, kept: Kept, file: &File) -> io::Result<()> {
        let Kept::Volume(id) = kept else { return Ok(()) };
        if image::shared(file, self.abilities.shared)?.is_none() {
            image::set_shared(file, self.abilities.shared, 0)?;
            rustix::fs::fsync(file)?;
            crate::crash::point("share: recorded");
        }
        let partition = self.promise(file)?;
        self.bound(id, file, partition)
    }
}

/// The open file of a device or of a copy.
pub(super) enum KeptFile {
    Image(Image),
    Copy(File),
}

impl Deref for KeptFile {
    type Target = File;

    fn deref(&self) -> &File {
        match self {
            Self::Image(image) => image,
            Self::Copy(file) => file,
        }
    }
}

/// A set of places on a disk.
#[derive(Debug, Default)]
struct Ranges(BTreeMap<u64, u64>);

impl Ranges {
    fn count(&self) -> usize {
        self.0.len()
    }

    /// Adds a range; says how much of it was there already.
    fn insert(&mut self, at: u64, length: u64) -> u64 {
        let (mut start, mut end) = (at, at.saturating_add(length));
        let mut known = 0;
        // All that overlap it or touch it, from the last one backwards.
        while let Some((&from, &to)) = self.0.range(..=end).next_back().filter(|(_, to)| **to >= start) {
            known += to.min(at.saturating_add(length)).saturating_sub(from.max(at));
            (start, end) = (start.min(from), end.max(to));
            self.0.remove(&from);
        }
        self.0.insert(start, end);
        known
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_range_knows_what_was_there(inserts in proptest::collection::vec((0u64..60, 1u64..20), 0..30)) {
            let (mut ranges, mut model) = (Ranges::default(), std::collections::BTreeSet::new());
            for (at, length) in inserts {
                let known = (at..at + length).filter(|place| !model.insert(*place)).count() as u64;
                prop_assert_eq!(ranges.insert(at, length), known);
                prop_assert_eq!(ranges.0.iter().map(|(from, to)| to - from).sum::<u64>(), model.len() as u64);
            }
        }
    }

    #[test]
    fn looking_takes_a_small_part_of_the_time() {
        let ago = |at: u64, took: u64| {
            let at = Instant::now().checked_sub(Duration::from_secs(at)).unwrap();
            Looked(Some((at, Duration::from_secs(took))))
        };
        assert!(Looked::default().is_due(Duration::from_secs(60)));
        assert!(ago(70, 1).is_due(Duration::from_secs(60)));
        assert!(!ago(50, 1).is_due(Duration::from_secs(60)));
        assert!(!ago(70, 10).is_due(Duration::from_secs(60)));
    }
}
