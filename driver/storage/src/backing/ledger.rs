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

use std::collections::HashMap;

use zpod_volume::{Bytes, DiskLayout, VolumeId};

use super::Capacity;
use super::overhead::Overhead;

/// Beside its partition a volume takes less than this for partition tables and the guest's journal.
const TABLES: u64 = DiskLayout::PARTITION_START;

#[derive(Debug, Clone, Copy)]
struct Entry {
    partition: Bytes,
    reserved: u64,
    taken: u64,
}

impl Entry {
    fn kept(self) -> u64 {
        self.taken.min(self.reserved)
    }
}

/// Promises of one place, and what was taken of them.
#[derive(Debug)]
pub(super) struct Ledger {
    entries: HashMap<VolumeId, Entry>,
    /// Sum of all promises.
    reserved: u64,
    /// Sum of what was taken within the promises.
    kept: u64,
    /// Free and taken together, as last measured.
    space: u64,
    /// How many times the space may be promised.
    ratio: f64,
    /// What is kept for metadata: with it, a promise holds however a guest writes.
    overhead: Overhead,
}

impl Ledger {
    pub(super) fn new(ratio: f64, overhead: Overhead) -> Self {
        Self { entries: HashMap::new(), reserved: 0, kept: 0, space: 0, ratio, overhead }
    }

    /// What is kept for a partition of that size.
    pub(super) fn promise(&self, partition: Bytes) -> u64 {
        partition.0.saturating_add(TABLES).saturating_add(self.overhead.of(partition))
    }

    /// The partition that a volume was promised.
    pub(super) fn partition(&self, id: VolumeId) -> Option<Bytes> {
        self.entries.get(&id).map(|entry| entry.partition)
    }

    /// What is kept for a volume.
    pub(super) fn reserved(&self, id: VolumeId) -> Option<u64> {
        self.entries.get(&id).map(|entry| entry.reserved)
    }

    /// Promises a partition of that size if there is room, `free` bytes being free; else says what there is.
    pub(super) fn reserve(&mut self, id: VolumeId, partition: Bytes, free: u64) -> Result<(), Bytes> {
        let before = self.entries.get(&id).map_or(0, |entry| entry.reserved);
        let more = self.promise(partition).saturating_sub(before);
        let available = self.total(free).saturating_sub(self.reserved);
        if more > available {
            return Err(Bytes(available));
        }
        if more > 0 {
            self.set(id, partition, None);
        }
        Ok(())
    }

    /// Records a promise that was made before, whether or not there is room.
    pub(super) fn adopt(&mut self, id: VolumeId, partition: Bytes, taken: u64) {
        self.set(id, partition, Some(taken));
    }

    /// Records what a volume has taken.
    pub(super) fn took(&mut self, id: VolumeId, taken: u64) {
        if let Some(partition) = self.partition(id) {
            self.set(id, partition, Some(taken));
        }
    }

    /// Takes a promise back.
    pub(super) fn release(&mut self, id: VolumeId) {
        if let Some(entry) = self.entries.remove(&id) {
            self.reserved -= entry.reserved;
            self.kept -= entry.kept();
        }
    }

    /// Goes back to a smaller promise, or to none.
    pub(super) fn restore(&mut self, id: VolumeId, partition: Option<Bytes>) {
        match partition {
            Some(partition) => self.set(id, partition, None),
            None => self.release(id),
        }
    }

    fn set(&mut self, id: VolumeId, partition: Bytes, taken: Option<u64>) {
        let none = Entry { partition: Bytes(0), reserved: 0, taken: 0 };
        let before = self.entries.get(&id).copied().unwrap_or(none);
        let after = Entry { partition, reserved: self.promise(partition), taken: taken.unwrap_or(before.taken) };
        self.reserved = self.reserved - before.reserved + after.reserved;
        self.kept = self.kept - before.kept() + after.kept();
        self.entries.insert(id, after);
    }

    /// The volumes there are and what they were promised: what a measurement begins with.
    pub(super) fn promises(&self) -> Vec<(VolumeId, u64)> {
        self.entries.iter().map(|(id, entry)| (*id, entry.reserved)).collect()
    }

    /// Takes in a measurement: `free` is the least that was free while it went on; `taken` has what each of the
    /// [`Ledger::promises`] from its beginning had taken.
    pub(super) fn measured(&mut self, free: u64, promises: &[(VolumeId, u64)], taken: &[u64]) {
        let kept: u64 = promises.iter().zip(taken).map(|((_, reserved), taken)| *reserved.min(taken)).sum();
        for ((id, _), taken) in promises.iter().zip(taken) {
            self.took(*id, *taken);
        }
        self.space = free.saturating_add(kept);
    }

    /// Bytes that may be promised in all, `free` bytes being free now.
    fn total(&self, free: u64) -> u64 {
        let space = free.saturating_add(self.kept).min(self.space);
        // A float holds 2^53 bytes exactly; without over-commit none is involved.
        if self.ratio == 1.0 { space } else { (space as f64 * self.ratio) as u64 }
    }

    /// The room there is, `free` bytes being free now.
    pub(super) fn capacity(&self, free: u64) -> Capacity {
        let total = self.total(free);
        let available = total.saturating_sub(self.reserved);
        let largest = self.overhead.largest(available.saturating_sub(TABLES));
        Capacity {
            total: Bytes(total),
            available: Bytes(available),
            largest: largest.min(DiskLayout::partition_for(DiskLayout::MAX_CAPACITY)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MIB: u64 = 1 << 20;

    fn id(n: u8) -> VolumeId {
        VolumeId::from_name(&n.to_string())
    }

    #[test]
    fn what_was_promised_is_not_promised_again() {
        let mut ledger = Ledger::new(1.0, Overhead::NONE);
        ledger.measured(100 * MIB, &[], &[]);
        assert_eq!(ledger.capacity(100 * MIB).largest, Bytes::mib(99));
        ledger.reserve(id(1), Bytes::mib(59), 100 * MIB).unwrap();
        assert_eq!(ledger.reserve(id(2), Bytes::mib(40), 100 * MIB), Err(Bytes::mib(40)));
        ledger.reserve(id(2), Bytes::mib(39), 100 * MIB).unwrap();
        assert_eq!(ledger.capacity(100 * MIB).available, Bytes(0));
        ledger.release(id(1));
        assert_eq!(ledger.capacity(100 * MIB).available, Bytes::mib(60));
    }

    #[test]
    fn room_does_not_change_as_guests_fill_their_volumes() {
        let mut ledger = Ledger::new(1.0, Overhead::NONE);
        ledger.measured(100 * MIB, &[], &[]);
        ledger.reserve(id(1), Bytes::mib(59), 100 * MIB).unwrap();
        // Not measured yet: less than there is, never more.
        assert!(ledger.capacity(70 * MIB).available <= Bytes::mib(40));
        ledger.measured(70 * MIB, &ledger.promises(), &[30 * MIB]);
        assert_eq!(ledger.capacity(70 * MIB).available, Bytes::mib(40));
    }

    #[test]
    fn what_a_guest_took_beyond_its_promise_is_nobodys_room() {
        let mut ledger = Ledger::new(1.0, Overhead::NONE);
        ledger.measured(100 * MIB, &[], &[]);
        ledger.reserve(id(1), Bytes::mib(9), 100 * MIB).unwrap();
        ledger.measured(40 * MIB, &ledger.promises(), &[60 * MIB]);
        assert_eq!(ledger.capacity(40 * MIB).available, Bytes::mib(40));
    }

    #[test]
    fn a_ratio_above_one_promises_more_than_there_is() {
        let mut ledger = Ledger::new(2.5, Overhead::NONE);
        ledger.measured(100 * MIB, &[], &[]);
        assert_eq!(ledger.capacity(100 * MIB).total, Bytes::mib(250));
        ledger.reserve(id(1), Bytes::mib(200), 100 * MIB).unwrap();
        assert_eq!(ledger.capacity(100 * MIB).available, Bytes::mib(49));
    }

    #[test]
    fn what_is_kept_for_metadata_is_promised_to_nobody() {
        let mut ledger = Ledger::new(1.0, Overhead::in_blocks_of(4096));
        ledger.measured(1000 * MIB, &[], &[]);
        let largest = ledger.capacity(1000 * MIB).largest;
        assert!(largest > Bytes::mib(980) && largest < Bytes::mib(993), "{largest}");
        assert!(ledger.reserve(id(1), Bytes::mib(995), 1000 * MIB).is_err());
        ledger.reserve(id(1), largest, 1000 * MIB).unwrap();
        assert_eq!(ledger.partition(id(1)), Some(largest));
        assert!(ledger.reserved(id(1)).unwrap() > largest.0 + 8 * MIB);
        assert_eq!(ledger.capacity(1000 * MIB).largest, Bytes(0));
    }

    /// What happens to a disk: promises, writes and trims by guests, writes by others, measurements.
    #[derive(Debug, Clone)]
    enum Event {
        Reserve(u8, u64),
        Release(u8),
        Write(u8, u64),
        Trim(u8, u64),
        Measure,
    }

    fn event() -> impl Strategy<Value = Event> {
        prop_oneof![
            (0u8..6, 1u64..60).prop_map(|(n, mib)| Event::Reserve(n, mib)),
            (0u8..6).prop_map(Event::Release),
            (0u8..6, 1u64..40).prop_map(|(n, mib)| Event::Write(n, mib)),
            (0u8..6, 1u64..40).prop_map(|(n, mib)| Event::Trim(n, mib)),
            Just(Event::Measure),
        ]
    }

    proptest! {
        /// Without over-commit, every volume can always be filled to its end, whatever guests did between measurements.
        #[test]
        fn no_promise_is_ever_broken(events in proptest::collection::vec(event(), 0..80)) {
            let disk = 200 * MIB;
            let mut ledger = Ledger::new(1.0, Overhead::NONE);
            ledger.measured(disk, &[], &[]);
            let mut volumes: HashMap<VolumeId, (u64, u64)> = HashMap::new();
            for event in events {
                let free = disk - volumes.values().map(|(_, taken)| taken).sum::<u64>();
                match event {
                    Event::Reserve(n, mib) => {
                        let larger = volumes.get(&id(n)).is_none_or(|(reserved, _)| *reserved < (mib + 1) * MIB);
                        if larger && ledger.reserve(id(n), Bytes::mib(mib), free).is_ok() {
                            volumes.entry(id(n)).or_default().0 = (mib + 1) * MIB;
                        }
                    }
                    Event::Release(n) => {
                        ledger.release(id(n));
                        volumes.remove(&id(n));
                    }
                    Event::Write(n, mib) => {
                        if let Some((reserved, taken)) = volumes.get_mut(&id(n)) {
                            *taken = (*taken + mib * MIB).min(*reserved);
                        }
                    }
                    Event::Trim(n, mib) => {
                        if let Some((_, taken)) = volumes.get_mut(&id(n)) {
                            *taken = taken.saturating_sub(mib * MIB);
                        }
                    }
                    Event::Measure => {
                        let promises = ledger.promises();
                        let taken: Vec<u64> = promises.iter().map(|(id, _)| volumes[id].1).collect();
                        ledger.measured(free, &promises, &taken);
                    }
                }
                let reserved: u64 = volumes.values().map(|(reserved, _)| reserved).sum();
                prop_assert!(reserved <= disk, "promised {reserved} of {disk}");
                prop_assert_eq!(ledger.reserved, reserved);
                let free = disk - volumes.values().map(|(_, taken)| taken).sum::<u64>();
                prop_assert!(ledger.capacity(free).total.0 <= disk);
            }
        }
    }
}
