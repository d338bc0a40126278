//! Who shares which blocks, found by looking.
//!
//! # Design
//! Each copy says how much it may share ([`Ledger`](crate::backing::ledger::Ledger)), an upper limit that needs no
//! looking. It makes the room seem smaller than it is once source and copy have gone different ways. The truth is in the
//! file system's maps. To read them costs as much as there are extents, which tenants decide on, so no call does it: the
//! upkeep goes through all that shares, in steps of [`BATCH`](extents::BATCH) extents, in a small part of the time, and
//! calls use the figures of the last round. A step has one image open, and nobody but who wants a lease on that image
//! waits for it. Only a call that is to be refused for lack of room goes on with the round by itself, for a second.
//!
//! Each block is counted with the oldest file that has it. A copy is younger than what it was made from, so that its
//! figure only ever gets smaller: it is written into the file's attribute, where the next start finds it, and whichever
//! of these writes is lost, nothing is counted twice.
//!
//! **What is left out.** A file with more than [`MOST_EXTENTS`] is left as it is, and so many ranges as would take too
//! much memory are not kept. All that comes later in that round can share with what was left out, and counts as
//! another's all that the file system calls shared, or what it counted before if that is less: never too little.

use std::collections::BTreeMap;
use std::fs::File;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::io;
use std::ops::Deref;
use std::sync::{MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::fs::OFlags;

use super::extents::{self, Shared};
use super::{FileBacking, Image, LOOK_AGE, REFUSAL_AGE, image};
use crate::backing::BackingError;
use crate::backing::kept::Kept;
use crate::backing::ledger::Promised;

/// Looking takes one part of the time in so many at most.
const SHARE_OF_TIME: u32 = 20;
/// The upkeep looks for so long, and then leaves it for as many times that.
const PIECE: Duration = Duration::from_millis(2);
/// A call that is to be refused looks for so long.
const PATIENCE: Duration = Duration::from_secs(1);
/// More extents of one file are not looked at.
const MOST_EXTENTS: usize = 1 << 18;
/// Ranges that are held in memory at a time: about 15 MiB.
const MOST_RANGES: usize = 1 << 19;

/// What is known of who shares what.
#[derive(Debug, Default)]
pub(super) struct Sharing {
    round: Option<Round>,
    last: Option<Last>,
}

#[cfg(test)]
impl Sharing {
    /// Whether no round is under way.
    pub(super) fn is_over(&self) -> bool {
        self.round.is_none()
    }

    /// As if the last round had taken no time, so that the next may begin.
    pub(super) fn rest(&mut self) {
        if let Some(last) = &mut self.last {
            last.took = Duration::ZERO;
        }
    }

    /// As if there had been none.
    pub(super) fn forget(&mut self) {
        self.last = None;
    }
}

/// The last round.
#[derive(Debug)]
struct Last {
    ended: Instant,
    took: Duration,
    /// What it looked at: where that is the same, so is what there is to find.
    seen: u64,
}

impl Last {
    fn is_over(&self, age: Duration) -> bool {
        self.ended.elapsed() >= age.max(self.took * SHARE_OF_TIME)
    }
}

/// A look at all that shares, as far as it has come.
#[derive(Debug, Default)]
struct Round {
    /// The oldest last.
    left: Vec<Promised>,
    seen: u64,
    took: Duration,
    ranges: Ranges,
    /// Something that was to be looked at was not.
    blind: bool,
    /// Of the file that is looked at now.
    now: Now,
    found: Vec<(Promised, u64)>,
}

#[derive(Debug, Default)]
struct Now {
    next: u64,
    extents: usize,
    /// What others have, too.
    shared: u64,
    /// What others have that are older.
    known: u64,
}

impl Round {
    /// Takes in a piece of the map of a file; says whether it was the last that is looked at.
    fn take(&mut self, part: extents::Part, promised: Promised) -> bool {
        for Shared { at, length } in part.shared {
            self.now.shared += length;
            match at {
                Some(at) if self.ranges.count() < MOST_RANGES => self.now.known += self.ranges.insert(at, length),
                Some(_) => self.blind = true,
                None => self.now.known += length,
            }
        }
        self.now.extents += part.extents;
        if part.next.is_some() && self.now.extents >= MOST_EXTENTS {
            let extents = self.now.extents;
            tracing::info!(kept = %promised.kept, extents, "its blocks lie in too many pieces to see who shares them: \
                there may seem to be less room than there is");
            self.blind = true;
            return true;
        }
        let Some(next) = part.next else {
            let most = promised.borrowed().min(self.now.shared);
            self.found.push((promised, if self.blind { most } else { self.now.known }));
            return true;
        };
        self.now.next = next;
        false
    }
}

impl FileBacking {
    /// Looks on, if it is time to; says how long to leave it then.
    pub(super) fn look_on(&self) -> Option<Duration> {
        let (mut sharing, begun) = (self.sharing(), Instant::now());
        while self.step(&mut sharing, LOOK_AGE) {
            if begun.elapsed() >= PIECE {
                return Some(begun.elapsed() * (SHARE_OF_TIME - 1));
            }
        }
        None
    }

    /// Looks for a moment, for who is to be refused; says whether there is anything new.
    pub(super) fn look_now(&self) -> bool {
        let begun = Instant::now();
        let mut looked = false;
        while begun.elapsed() < PATIENCE {
            // Let go after each step: the upkeep may be at the same.
            let mut sharing = self.sharing();
            if !self.step(&mut sharing, REFUSAL_AGE) {
                return looked;
            }
            looked = true;
        }
        looked
    }

    fn sharing(&self) -> MutexGuard<'_, Sharing> {
        self.sharing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One step of a round, which begins if the last one is old enough and anything has changed since. Says whether there
    /// was anything to do.
    pub(super) fn step(&self, sharing: &mut Sharing, age: Duration) -> bool {
        let begun = Instant::now();
        let mut round = match sharing.round.take() {
            Some(round) => round,
            None if sharing.last.as_ref().is_some_and(|last| !last.is_over(age)) => return false,
            None if !self.ledger().borrows() => return false,
            None => {
                let round = self.begin_round();
                if let Some(last) = sharing.last.as_mut().filter(|last| last.seen == round.seen) {
                    last.ended = Instant::now();
                    return false;
                }
                round
            }
        };
        if let Some(promised) = round.left.last().copied() {
            let over = match self.look_at(promised.kept, round.now.next) {
                Ok(part) => round.take(part, promised),
                // Its blocks are its own, or those of what is looked at as well.
                Err(BackingError::Missing { .. } | BackingError::SnapshotMissing { .. }) => true,
                Err(error) => {
                    tracing::info!(kept = %promised.kept, %error, "who shares its blocks was not found out");
                    round.blind = true;
                    true
                }
            };
            if over {
                round.left.pop();
                round.now = Now::default();
            }
        }
        round.took += begun.elapsed();
        if round.left.is_empty() {
            self.end_round(&round);
            sharing.last = Some(Last { ended: Instant::now(), took: round.took, seen: round.seen });
        } else {
            sharing.round = Some(round);
        }
        true
    }

    /// All that shares, and what it looks like now.
    fn begin_round(&self) -> Round {
        let mut sharers = self.ledger().promises();
        sharers.retain(|promised| promised.whole && promised.shares);
        let mut aged: Vec<_> = sharers
            .into_iter()
            .filter_map(|promised| {
                let stat = self.directory.stat_more(&promised.kept.name()).ok()??;
                let made = (stat.stx_btime.tv_sec, stat.stx_btime.tv_nsec, promised.kept);
                let changed = (stat.stx_ino, stat.stx_mtime.tv_sec, stat.stx_mtime.tv_nsec, stat.stx_blocks);
                Some((made, changed, promised))
            })
            .collect();
        aged.sort_by_key(|(made, ..)| std::cmp::Reverse(*made));
        let mut hasher = DefaultHasher::new();
        for (made, changed, _) in &aged {
            (made, changed).hash(&mut hasher);
        }
        let left = aged.into_iter().map(|(.., promised)| promised).collect();
        Round { left, seen: hasher.finish(), ..Round::default() }
    }

    fn look_at(&self, kept: Kept, start: u64) -> Result<extents::Part, BackingError> {
        // Whoever wants a lease on it waits as long.
        let _opening = self.openings.enter(kept);
        let file = self.kept_file(kept)?;
        extents::part(&file, start).map_err(|error| self.fail_on(kept, "look for shared blocks in", error))
    }

    /// Takes the figures over, and keeps them in the files: first those that have become larger, which is seldom, since
    /// what is counted nowhere would be promised twice.
    fn end_round(&self, round: &Round) {
        self.ledger().refined(&round.found);
        let changed = |larger: bool| {
            let differs = move |(promised, found): &&(Promised, u64)| {
                if larger { *found > promised.borrowed() } else { *found < promised.borrowed() }
            };
            round.found.iter().filter(differs)
        };
        let keep = || {
            changed(true).try_for_each(|(promised, found)| self.keep_shared(promised, *found, true))?;
            changed(false).try_for_each(|(promised, found)| self.keep_shared(promised, *found, false))?;
            self.measure(Duration::ZERO)
        };
        if let Err(error) = keep() {
            tracing::info!(%error, "who shares what is not kept for the next start");
        }
    }

    fn keep_shared(&self, promised: &Promised, bytes: u64, durable: bool) -> Result<(), BackingError> {
        let kept = promised.kept;
        let _opening = self.openings.enter(kept);
        let file = match self.kept_file(kept) {
            Err(BackingError::Missing { .. } | BackingError::SnapshotMissing { .. }) => return Ok(()),
            file => file?,
        };
        // Another file of that name has its own figure, and another entry before it has the name.
        if !self.ledger().is_current(promised) {
            return Ok(());
        }
        let fail = |error| self.fail_on(kept, "record what is shared in", error);
        image::set_shared(&file, self.names(&file).shared, bytes).map_err(fail)?;
        if durable { rustix::fs::fsync(&*file).map_err(|error| fail(error.into())) } else { Ok(()) }
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
        if image::shared(file, self.names(file).shared)?.is_none() {
            image::set_shared(file, self.names(file).shared, 0)?;
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

    fn promised(name: &str, borrowed: u64) -> Promised {
        let mut ledger = crate::backing::ledger::Ledger::new(1.0, crate::backing::overhead::Overhead::NONE);
        let promise = crate::backing::ledger::Promise::Copy { bytes: 100, shares: true };
        ledger.adopt(zpod_volume::SnapshotId::from_name(name), promise, 100, borrowed);
        ledger.promises()[0]
    }

    fn part(shared: &[(u64, u64)], next: Option<u64>) -> extents::Part {
        let shared = shared.iter().map(|(at, length)| Shared { at: Some(*at), length: *length }).collect();
        extents::Part { extents: 1, shared, next }
    }

    #[test]
    fn a_block_is_counted_with_the_first_that_has_it() {
        let mut round = Round::default();
        assert!(round.take(part(&[(0, 10), (20, 10)], None), promised("a", 0)));
        round.now = Now::default();
        assert!(!round.take(part(&[(0, 10)], Some(1)), promised("b", 90)));
        assert!(round.take(part(&[(20, 5), (50, 5)], None), promised("b", 90)));
        let found: Vec<_> = round.found.iter().map(|(_, found)| *found).collect();
        assert_eq!(found, [0, 15]);
    }

    #[test]
    fn what_comes_after_something_that_was_left_out_is_not_counted_as_its_own() {
        let mut round = Round::default();
        // Too many pieces: it keeps the figure it had.
        let many = extents::Part { extents: MOST_EXTENTS, ..part(&[(0, 10)], Some(1)) };
        assert!(round.take(many, promised("a", 7)));
        round.now = Now::default();
        assert!(round.take(part(&[(100, 30)], None), promised("b", 90)));
        round.now = Now::default();
        assert!(round.take(part(&[(200, 30)], None), promised("c", 20)));
        let found: Vec<_> = round.found.iter().map(|(_, found)| *found).collect();
        assert_eq!(found, [30, 20], "all that is shared, or what it was before");
    }

    #[test]
    fn looking_takes_a_small_part_of_the_time() {
        let ago = |at: u64, took: u64| {
            let ended = Instant::now().checked_sub(Duration::from_secs(at)).unwrap();
            Last { ended, took: Duration::from_secs(took), seen: 0 }
        };
        assert!(ago(70, 1).is_over(Duration::from_secs(60)));
        assert!(!ago(50, 1).is_over(Duration::from_secs(60)));
        assert!(!ago(70, 10).is_over(Duration::from_secs(60)));
    }
}
