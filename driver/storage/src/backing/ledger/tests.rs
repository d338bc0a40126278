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

fn partition(mib: u64) -> Promise {
    Promise::Partition { size: Bytes::mib(mib), shares: true }
}

fn copy(mib: u64) -> Promise {
    Promise::Copy { bytes: mib * MIB, shares: true }
}

#[test]
fn a_snapshot_takes_from_what_can_be_promised_what_its_volume_has_and_gives_it_back() {
    let mut ledger = Ledger::new(1.0, Overhead::NONE);
    ledger.measured(400 * MIB, &[], &[]);
    ledger.reserve(id(1), Bytes::mib(99), 400 * MIB).unwrap();
    ledger.took(id(1), 80 * MIB);
    let free = 320 * MIB;
    ledger.measured(free, &ledger.promises(), &[80 * MIB]);
    let snapshot = Kept::from(zpod_volume::SnapshotId::from_name("s"));
    ledger.reserve_copy(snapshot, copy(80), id(1).into(), 80 * MIB, free).unwrap();
    ledger.took(snapshot, 80 * MIB);
    // And what its volume needs for a moment when it rewrites what the two share.
    assert_eq!(ledger.capacity(free).available, Bytes::mib(400 - 100 - 64 - 80));
    assert_eq!(ledger.capacity(free).total, Bytes::mib(400), "shared blocks are there once");
    ledger.release(snapshot);
    assert_eq!(ledger.capacity(free).available, Bytes::mib(400 - 100 - 64));
}

#[test]
fn what_outlives_its_source_counts_again_once_somebody_has_looked() {
    let mut ledger = Ledger::new(1.0, Overhead::NONE);
    ledger.measured(400 * MIB, &[], &[]);
    ledger.reserve(id(1), Bytes::mib(99), 400 * MIB).unwrap();
    ledger.took(id(1), 80 * MIB);
    ledger.reserve_copy(id(2).into(), partition(99), id(1).into(), 80 * MIB, 320 * MIB).unwrap();
    ledger.took(id(2), 80 * MIB);
    ledger.release(id(1));
    assert_eq!(ledger.capacity(320 * MIB).total, Bytes::mib(320), "for all that is known, nothing is its own");
    let promises = ledger.promises();
    ledger.refined(&[(promises[0], 0)]);
    ledger.measured(320 * MIB, &ledger.promises(), &[80 * MIB]);
    assert_eq!(ledger.capacity(320 * MIB).total, Bytes::mib(400));
    // Made anew since then: nothing that was found is about it.
    ledger.release(id(2));
    ledger.reserve_copy(id(2).into(), partition(99), id(1).into(), 80 * MIB, 320 * MIB).unwrap();
    ledger.refined(&[(promises[0], 0)]);
    ledger.took(id(2), 80 * MIB);
    assert_eq!(ledger.own, 0);
}

/// What happens to a disk: promises, copies, writes and trims by guests, measurements.
#[derive(Debug, Clone)]
enum Event {
    Reserve(u8, u64),
    Release(u8),
    /// A copy with blocks shared, of this size and of that name.
    Clone(u8, u8, u64),
    Snapshot(u8, u8),
    ReleaseSnapshot(u8),
    Write(u8, u64, u64),
    Trim(u8, u64, u64),
    Measure,
    Look,
}

fn event() -> impl Strategy<Value = Event> {
    let name = 0u8..4;
    prop_oneof![
        (name.clone(), 1u64..60).prop_map(|(n, mib)| Event::Reserve(n, mib)),
        name.clone().prop_map(Event::Release),
        (name.clone(), name.clone(), 1u64..60).prop_map(|(from, to, mib)| Event::Clone(from, to, mib)),
        (name.clone(), name.clone()).prop_map(|(from, to)| Event::Snapshot(from, to)),
        name.clone().prop_map(Event::ReleaseSnapshot),
        (name.clone(), 0u64..60, 1u64..40).prop_map(|(n, at, mib)| Event::Write(n, at, mib)),
        (name, 0u64..60, 1u64..40).prop_map(|(n, at, mib)| Event::Trim(n, at, mib)),
        Just(Event::Measure),
        Just(Event::Look),
    ]
}

/// A disk in blocks of 1 MiB, as it is in truth.
#[derive(Debug, Default)]
struct Disk {
    files: HashMap<Kept, (u64, HashMap<u64, u64>)>,
    blocks: u64,
}

impl Disk {
    const SIZE: u64 = 600 * MIB;

    fn free(&self) -> u64 {
        let all: std::collections::HashSet<u64> =
            self.files.values().flat_map(|(_, blocks)| blocks.values().copied()).collect();
        Self::SIZE.checked_sub(all.len() as u64 * MIB).expect("a promise is broken: the disk is full")
    }

    fn taken(&self, kept: Kept) -> u64 {
        self.files.get(&kept).map_or(0, |(_, blocks)| blocks.len() as u64 * MIB)
    }

    /// Each block counted with the first that has it, in any order.
    fn look(&self, promises: &[Promised]) -> Vec<(Promised, u64)> {
        let mut seen = std::collections::HashSet::new();
        let mut look = |promised: &Promised| {
            let blocks = self.files[&promised.kept].1.values();
            (*promised, blocks.filter(|block| !seen.insert(**block)).count() as u64 * MIB)
        };
        promises.iter().map(&mut look).collect()
    }
}

proptest! {
    /// Without over-commit, every volume can always be filled to its end, and what it shares with others rewritten,
    /// whatever guests did between measurements.
    #[test]
    fn no_promise_is_ever_broken(events in proptest::collection::vec(event(), 0..80)) {
        let mut ledger = Ledger::new(1.0, Overhead::NONE);
        ledger.measured(Disk::SIZE, &[], &[]);
        let mut disk = Disk::default();
        let snapshot = |n: u8| Kept::from(zpod_volume::SnapshotId::from_name(&n.to_string()));
        for event in events {
            let free = disk.free();
            match event {
                Event::Reserve(n, mib) => {
                    let kept = Kept::from(id(n));
                    let larger = disk.files.get(&kept).is_none_or(|(size, _)| *size < mib);
                    if larger && ledger.reserve(id(n), Bytes::mib(mib), free).is_ok() {
                        disk.files.entry(kept).or_default().0 = mib;
                        ledger.took(kept, disk.taken(kept));
                    }
                }
                Event::Release(n) => {
                    ledger.release(id(n));
                    disk.files.remove(&id(n).into());
                }
                Event::ReleaseSnapshot(n) => {
                    ledger.release(snapshot(n));
                    disk.files.remove(&snapshot(n));
                }
                Event::Clone(from, to, mib) => {
                    let (from, to) = (Kept::from(id(from)), Kept::from(id(to)));
                    let source = disk.files.get(&from).cloned().filter(|(size, _)| *size <= mib);
                    if let Some((_, blocks)) = source.filter(|_| !disk.files.contains_key(&to)) {
                        let taken = disk.taken(from);
                        if ledger.reserve_copy(to, partition(mib), from, taken, free).is_ok() {
                            disk.files.insert(to, (mib, blocks));
                            ledger.took(to, taken);
                        }
                    }
                }
                Event::Snapshot(from, to) => {
                    let (from, to) = (Kept::from(id(from)), snapshot(to));
                    let source = disk.files.get(&from).cloned().filter(|_| !disk.files.contains_key(&to));
                    if let Some(source) = source {
                        let taken = disk.taken(from);
                        if ledger.reserve_copy(to, copy(taken / MIB), from, taken, free).is_ok() {
                            disk.files.insert(to, source);
                            ledger.took(to, taken);
                        }
                    }
                }
                Event::Write(n, at, mib) => {
                    if let Some((size, blocks)) = disk.files.get_mut(&id(n).into()) {
                        for at in at..(at + mib).min(*size) {
                            disk.blocks += 1;
                            blocks.insert(at, disk.blocks);
                        }
                    }
                }
                Event::Trim(n, at, mib) => {
                    if let Some((_, blocks)) = disk.files.get_mut(&id(n).into()) {
                        blocks.retain(|block, _| !(at..at + mib).contains(block));
                    }
                }
                Event::Measure | Event::Look => {
                    if matches!(event, Event::Look) {
                        ledger.refined(&disk.look(&ledger.promises()));
                    }
                    let promises = ledger.promises();
                    let taken: Vec<u64> = promises.iter().map(|promised| disk.taken(promised.kept)).collect();
                    ledger.measured(free, &promises, &taken);
                    if matches!(event, Event::Look) {
                        prop_assert_eq!(ledger.capacity(free).total, Bytes(Disk::SIZE), "exact");
                    }
                }
            }
            // All that could still be asked for: volumes filled, no block shared.
            let least = |(kept, (size, blocks)): (&Kept, &(u64, HashMap<u64, u64>))| match kept {
                Kept::Volume(_) => (size + 1) * MIB,
                Kept::Snapshot(_) => blocks.len() as u64 * MIB,
            };
            let reserved: u64 = disk.files.iter().map(least).sum();
            prop_assert!(reserved <= Disk::SIZE, "promised {reserved}");
            prop_assert!(ledger.reserved >= u128::from(reserved));
            prop_assert!(ledger.capacity(disk.free()).total.0 <= Disk::SIZE);
        }
    }
}
