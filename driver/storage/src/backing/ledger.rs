//! Who was promised how much: the accounting behind [`Capacity`].
//!
//! # Design
//! The room that volumes may take together is what is free plus what they have taken already; what was promised to them
//! is the sum of their partitions, and of the most that it can take to keep track of them where a limit holds them to
//! that ([`Overhead`]). At a ratio of 1 their difference can be promised to others, and then every volume can
//! be filled to its end. What a volume took beyond its promise (a hostile guest can write into the headroom) does not
//! count as room.
//!
//! Promises are exact at any time: they change only through this ledger. What volumes have taken changes with each
//! guest's write and is measured now and then. Between two measurements the estimate errs to the safe side: a guest's
//! writes move bytes from "free" to "taken", so their sum ([`Ledger::space`]) stays the same; the ledger takes the
//! smaller of the sum as measured and the sum of what is free now and what had been taken then.
//!
//! **Shared blocks.** A file system counts a block in each file that has it; here it may count once. A copy therefore
//! comes with what it has **borrowed**: all that it had when it was made. Whatever happens to it or to what it was made
//! from, never more of its blocks than that are another file's too, so that what it has beyond that is room for
//! certain. The figure can only be too large (both sides have written since, or the other is gone), and then there
//! seems to be less room than there is. [`Ledger::refined`] takes in what is shared in truth.
//!
//! A volume is promised its partition in full whatever it shares: its guest may rewrite all of it. A copy that a
//! snapshot keeps never changes; it is promised what it has, and so a snapshot of a volume takes as much from what can
//! be promised as the volume has in it.

use std::collections::HashMap;

use zpod_volume::{Bytes, DiskLayout, VolumeId};

use super::Capacity;
use super::kept::Kept;
use super::overhead::Overhead;

/// Beside its partition a volume takes less than this for partition tables and the guest's journal.
const TABLES: u64 = DiskLayout::PARTITION_START;

/// What a volume that may share blocks can take for a moment beside them: a shared block stays in the file until the
/// new one is written out. XFS counts both meanwhile, in pieces of 128 KiB (`XFS_DEFAULT_COWEXTSZ_HINT`); at its limit
/// it writes out what it can and goes on (`xfs_file_buffered_write`).
const REWRITING: u64 = 64 << 20;

/// What something was promised.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Promise {
    /// A device: all of its partition, of blocks of its own if `shares`.
    Partition { size: Bytes, shares: bool },
    /// A copy that never changes: what it has.
    Copy { bytes: u64, shares: bool },
}

#[derive(Debug, Clone, Copy)]
struct Entry {
    promise: Promise,
    reserved: u64,
    taken: u64,
    borrowed: u64,
    /// Changes when the same id stands for another file.
    generation: u64,
    /// It is there: it takes part in no copying that is not over.
    whole: bool,
}

impl Entry {
    /// Of what it has taken, that which is within its promise and surely nobody else's.
    fn own(&self) -> u64 {
        self.taken.min(self.reserved).saturating_sub(self.borrowed)
    }
}

/// An entry as it was when a measurement began.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Promised {
    /// Whose.
    pub(super) kept: Kept,
    /// What is kept for it.
    pub(super) reserved: u64,
    /// Whether it may share blocks.
    pub(super) shares: bool,
    /// Whether it was complete.
    pub(super) whole: bool,
    borrowed: u64,
    generation: u64,
}

impl Promised {
    /// How much of what it has counted as another's.
    pub(super) fn borrowed(&self) -> u64 {
        self.borrowed
    }
}

/// Promises of one place, and what was taken of them.
#[derive(Debug)]
pub(super) struct Ledger {
    entries: HashMap<Kept, Entry>,
    /// Sum of all promises. Wider than a number of bytes: files that somebody else has put there may claim any length.
    reserved: u128,
    /// Sum of what was taken within the promises, each block once.
    own: u128,
    /// Sum of what was borrowed.
    borrowed: u128,
    /// Free and taken together, as last measured.
    space: u64,
    /// How many times the space may be promised.
    ratio: f64,
    /// What is kept for metadata: with it, a promise holds however a guest writes.
    overhead: Overhead,
    generations: u64,
}

impl Ledger {
    pub(super) fn new(ratio: f64, overhead: Overhead) -> Self {
        let (entries, generations) = (HashMap::new(), 0);
        Self { entries, reserved: 0, own: 0, borrowed: 0, space: 0, ratio, overhead, generations }
    }

    /// Keeps something else for metadata from now on, also for those that were promised something before.
    pub(super) fn keep(&mut self, overhead: Overhead) {
        self.overhead = overhead;
        let promises: Vec<_> = self.entries.iter().map(|(kept, entry)| (*kept, entry.promise)).collect();
        for (kept, promise) in promises {
            self.set(kept, promise, |_| {});
        }
    }

    /// What is kept for a volume with a partition of that size.
    pub(super) fn promise(&self, partition: Bytes, shares: bool) -> u64 {
        let rewriting = if shares { REWRITING.min(partition.0) } else { 0 };
        partition.0.saturating_add(TABLES).saturating_add(self.overhead.of(partition)).saturating_add(rewriting)
    }

    fn kept_for(&self, promise: Promise) -> u64 {
        match promise {
            Promise::Partition { size, shares } => self.promise(size, shares),
            Promise::Copy { bytes, .. } => bytes,
        }
    }

    /// The partition that a volume was promised.
    pub(super) fn partition(&self, id: VolumeId) -> Option<Bytes> {
        match self.entries.get(&id.into())?.promise {
            Promise::Partition { size, .. } => Some(size),
            Promise::Copy { .. } => None,
        }
    }

    /// Whether it may share blocks with others.
    pub(super) fn shares(&self, kept: impl Into<Kept>) -> bool {
        self.entries.get(&kept.into()).is_some_and(|entry| entry.promise.shares())
    }

    /// What is kept for it.
    pub(super) fn reserved(&self, kept: impl Into<Kept>) -> Option<u64> {
        self.entries.get(&kept.into()).map(|entry| entry.reserved)
    }

    /// Whether anything may be counted twice.
    pub(super) fn borrows(&self) -> bool {
        self.borrowed > 0
    }

    /// Promises a partition of that size if there is room, `free` bytes being free; else says what there is.
    pub(super) fn reserve(&mut self, id: VolumeId, partition: Bytes, free: u64) -> Result<(), Bytes> {
        let shares = self.shares(id);
        let before = self.reserved(id).unwrap_or_default();
        let more = self.promise(partition, shares).saturating_sub(before);
        self.afford(more, free)?;
        if more > 0 {
            self.set(id.into(), Promise::Partition { size: partition, shares }, |_| {});
        }
        Ok(())
    }

    /// Promises what a new copy is to have if there is room, and what its source needs when it may have to rewrite all
    /// that the two share (`borrowed`, if they do).
    pub(super) fn reserve_copy(
        &mut self,
        kept: Kept,
        promise: Promise,
        source: Kept,
        borrowed: u64,
        free: u64,
    ) -> Result<(), Bytes> {
        self.afford(self.needed_to_copy(kept, promise, source), free)?;
        self.set(kept, promise, |entry| entry.borrowed = borrowed);
        if let Some(lender) = self.lender(source, promise) {
            self.set(source, lender, |_| {});
        }
        Ok(())
    }

    /// What that takes from what can be promised.
    pub(super) fn needed_to_copy(&self, kept: Kept, promise: Promise, source: Kept) -> u64 {
        let more = |kept, promise| self.kept_for(promise).saturating_sub(self.reserved(kept).unwrap_or_default());
        more(kept, promise).saturating_add(self.lender(source, promise).map_or(0, |lender| more(source, lender)))
    }

    /// What the source of a copy is promised from then on.
    fn lender(&self, source: Kept, copy: Promise) -> Option<Promise> {
        self.entries.get(&source).map(|entry| entry.promise.lending(copy.shares()))
    }

    fn afford(&self, more: u64, free: u64) -> Result<(), Bytes> {
        let available = self.available(free);
        if more > available { Err(Bytes(available)) } else { Ok(()) }
    }

    /// Records a promise that was made before, whether or not there is room.
    pub(super) fn adopt(&mut self, kept: impl Into<Kept>, promise: Promise, taken: u64, borrowed: u64) {
        self.set(kept.into(), promise, |entry| (entry.taken, entry.borrowed, entry.whole) = (taken, borrowed, true));
    }

    /// Records what something that is complete has taken.
    pub(super) fn took(&mut self, kept: impl Into<Kept>, taken: u64) {
        let kept = kept.into();
        if let Some(entry) = self.entries.get(&kept) {
            self.set(kept, entry.promise, |entry| (entry.taken, entry.whole) = (taken, true));
        }
    }

    /// Takes a promise back.
    pub(super) fn release(&mut self, kept: impl Into<Kept>) {
        if let Some(entry) = self.entries.remove(&kept.into()) {
            self.uncount(&entry);
        }
    }

    /// Goes back to a smaller promise, or to none.
    pub(super) fn restore(&mut self, id: VolumeId, partition: Option<Bytes>) {
        match partition {
            Some(size) => {
                let shares = self.shares(id);
                self.set(id.into(), Promise::Partition { size, shares }, |_| {});
            }
            None => self.release(id),
        }
    }

    fn set(&mut self, kept: Kept, promise: Promise, change: impl FnOnce(&mut Entry)) {
        let reserved = self.kept_for(promise);
        let mut entry = match self.entries.remove(&kept) {
            Some(before) => {
                self.uncount(&before);
                before
            }
            None => {
                self.generations += 1;
                let generation = self.generations;
                Entry { promise, reserved, taken: 0, borrowed: 0, generation, whole: false }
            }
        };
        (entry.promise, entry.reserved) = (promise, reserved);
        change(&mut entry);
        self.reserved += u128::from(entry.reserved);
        self.own += u128::from(entry.own());
        self.borrowed += u128::from(entry.borrowed);
        self.entries.insert(kept, entry);
    }

    fn uncount(&mut self, entry: &Entry) {
        self.reserved -= u128::from(entry.reserved);
        self.own -= u128::from(entry.own());
        self.borrowed -= u128::from(entry.borrowed);
    }

    /// What there is and what was promised to it: what a measurement begins with.
    pub(super) fn promises(&self) -> Vec<Promised> {
        let promised = |(kept, entry): (&Kept, &Entry)| {
            let Entry { promise, reserved, borrowed, generation, whole, .. } = *entry;
            Promised { kept: *kept, reserved, borrowed, generation, whole, shares: promise.shares() }
        };
        self.entries.iter().map(promised).collect()
    }

    /// Whether the same id still stands for the same file.
    pub(super) fn is_current(&self, promised: &Promised) -> bool {
        self.entries.get(&promised.kept).is_some_and(|now| now.generation == promised.generation)
    }

    /// Takes in a measurement: `free` is the least that was free while it went on; `taken` has what each of the
    /// [`Ledger::promises`] from its beginning had taken.
    pub(super) fn measured(&mut self, free: u64, promises: &[Promised], taken: &[u64]) {
        let mut own = 0_u64;
        for (promised, taken) in promises.iter().zip(taken) {
            let within = promised.reserved.min(*taken).saturating_sub(promised.borrowed);
            own = own.saturating_add(within);
            if let Some(entry) = self.entries.get(&promised.kept).filter(|now| now.generation == promised.generation) {
                self.set(promised.kept, entry.promise, |entry| entry.taken = *taken);
            }
        }
        self.space = free.saturating_add(own);
    }

    /// Takes in how much of what each has was found to be another's too, and was counted there. All of them were whole
    /// when the looking began; what has been copied since then has borrowed by itself.
    pub(super) fn refined(&mut self, found: &[(Promised, u64)]) {
        for (promised, borrowed) in found {
            if let Some(entry) = self.entries.get(&promised.kept).filter(|now| now.generation == promised.generation) {
                self.set(promised.kept, entry.promise, |entry| entry.borrowed = *borrowed);
            }
        }
    }

    /// Bytes that may be promised in all, `free` bytes being free now.
    fn total(&self, free: u64) -> u64 {
        let own = u64::try_from(self.own).unwrap_or(u64::MAX);
        let space = free.saturating_add(own).min(self.space);
        // A float holds 2^53 bytes exactly; without over-commit none is involved.
        if self.ratio == 1.0 { space } else { (space as f64 * self.ratio) as u64 }
    }

    /// Bytes that can still be promised.
    fn available(&self, free: u64) -> u64 {
        self.total(free).saturating_sub(u64::try_from(self.reserved).unwrap_or(u64::MAX))
    }

    /// The room there is, `free` bytes being free now.
    pub(super) fn capacity(&self, free: u64) -> Capacity {
        let total = self.total(free);
        let available = self.available(free);
        let largest = self.overhead.largest(available.saturating_sub(TABLES));
        Capacity {
            total: Bytes(total),
            available: Bytes(available),
            largest: largest.min(DiskLayout::partition_for(DiskLayout::MAX_CAPACITY)),
        }
    }
}

impl Promise {
    fn shares(self) -> bool {
        match self {
            Self::Partition { shares, .. } | Self::Copy { shares, .. } => shares,
        }
    }

    /// The same, of what a copy was made from.
    fn lending(self, now: bool) -> Self {
        match self {
            Self::Partition { size, shares } => Self::Partition { size, shares: shares || now },
            Self::Copy { bytes, shares } => Self::Copy { bytes, shares: shares || now },
        }
    }
}

#[cfg(test)]
mod tests;
