//! What every backing must do with copies: snapshots, and devices made from them or from each other.

use std::sync::atomic::{AtomicU64, Ordering};

use super::*;

/// What is allowed everywhere.
pub(in super::super) const FULL: Copying<'static> = Copying { full: true, progress: &|_, _| true };
const SHARED_ONLY: Copying<'static> = Copying { full: false, progress: &|_, _| true };

const AT: u64 = 2 * MIB;

pub(in super::super) fn snapshot_id(name: &str) -> SnapshotId {
    SnapshotId::from_name(name)
}

/// A device with something in it; gives what a guest finds there.
fn filled(rig: &dyn Rig, spec: &DeviceSpec) -> u64 {
    rig.backing().create(spec).unwrap();
    rig.guest_rewrites(spec.id, AT);
    let found = rig.contents(spec.id, AT);
    assert_ne!(found, 0);
    found
}

pub(in super::super) fn a_snapshot_keeps_what_was_there_whatever_becomes_of_its_volume(rig: &dyn Rig) {
    let (backing, a, b) = (rig.backing(), thin("a", 16), thin("b", 16));
    let before = filled(rig, &a);
    assert_eq!(backing.snapshot(snapshot_id("s"), &a, &FULL).unwrap(), Outcome::Changed);
    assert_eq!(backing.snapshot(snapshot_id("s"), &a, &FULL).unwrap(), Outcome::Unchanged);
    assert!(backing.snapshot_allocated(snapshot_id("s")).unwrap() >= Bytes(4096));
    rig.guest_rewrites(a.id, AT);
    assert_ne!(rig.contents(a.id, AT), before);
    assert_eq!(backing.snapshot(snapshot_id("s"), &a, &FULL).unwrap(), Outcome::Unchanged);
    backing.destroy(a.id).unwrap();
    let source = CopySource::Snapshot(snapshot_id("s"));
    assert_eq!(backing.create_from(&b, source, Bytes::mib(16), &FULL).unwrap(), Outcome::Changed);
    assert_eq!(backing.create_from(&b, source, Bytes::mib(16), &FULL).unwrap(), Outcome::Unchanged);
    assert_eq!(rig.contents(b.id, AT), before);
    assert!(backing.ever_written(&b).unwrap());
    // And the other way round.
    assert_eq!(backing.destroy_snapshot(snapshot_id("s")).unwrap(), Outcome::Changed);
    assert_eq!(backing.destroy_snapshot(snapshot_id("s")).unwrap(), Outcome::Unchanged);
    assert_eq!(rig.contents(b.id, AT), before);
    // Both have another device's name by now.
    assert_eq!(backing.create_from(&b, source, Bytes::mib(16), &FULL).unwrap(), Outcome::Unchanged);
}

pub(in super::super) fn a_copy_of_a_device_may_be_larger_and_has_a_table_of_its_own(rig: &dyn Rig) {
    let (backing, a) = (rig.backing(), thin("a", 16));
    let before = filled(rig, &a);
    rig.guest_rewrites(a.id, DiskLayout::JOURNAL_OFFSET);
    for (name, mib, disk) in [("same", 16, 130), ("larger", 32, 40), ("shorter disk", 16, 18), ("longer", 64, 1000)] {
        for provisioning in [Provisioning::Thin, Provisioning::Thick] {
            let copy = spec(&format!("{name}{provisioning:?}"), mib, disk, provisioning);
            let source = CopySource::Device(a.id);
            assert_eq!(backing.create_from(&copy, source, Bytes::mib(16), &FULL).unwrap(), Outcome::Changed);
            assert_eq!(rig.table(copy.id), Bytes::mib(mib), "{name}");
            assert_eq!(rig.contents(copy.id, AT), before, "{name}");
            let journal = rig.contents(copy.id, DiskLayout::JOURNAL_OFFSET);
            assert_eq!(journal, rig.contents(a.id, DiskLayout::JOURNAL_OFFSET), "{name}: whose contents they are");
            assert_eq!(backing.create(&copy).unwrap(), Outcome::Unchanged, "{name}");
            if provisioning == Provisioning::Thick {
                assert!(backing.allocated(copy.id).unwrap() >= Bytes::mib(mib), "{name}");
            }
            rig.guest_rewrites(copy.id, AT);
            assert_eq!(rig.contents(a.id, AT), before, "{name}: what a copy writes is its own");
            backing.destroy(copy.id).unwrap();
        }
    }
}

pub(in super::super) fn what_a_guest_wrote_behind_its_partition_is_not_copied(rig: &dyn Rig) {
    let (backing, a, b) = (rig.backing(), thin("a", 16), spec("b", 64, 130, Provisioning::Thin));
    filled(rig, &a);
    rig.guest_rewrites(a.id, 40 * MIB);
    backing.snapshot(snapshot_id("s"), &a, &FULL).unwrap();
    for source in [CopySource::Snapshot(snapshot_id("s")), CopySource::Device(a.id)] {
        backing.create_from(&b, source, Bytes::mib(16), &FULL).unwrap();
        assert_eq!(rig.contents(b.id, 40 * MIB), 0, "{source:?}");
        backing.destroy(b.id).unwrap();
    }
}

pub(in super::super) fn what_is_copied_has_to_be_there_and_to_fit(rig: &dyn Rig) {
    let (backing, a, b) = (rig.backing(), thin("a", 16), thin("b", 16));
    let (here, gone) = (CopySource::Device(a.id), CopySource::Snapshot(snapshot_id("s")));
    let missing = |result: Result<Outcome, BackingError>| {
        assert!(matches!(result, Err(BackingError::Missing { .. })), "{result:?}");
    };
    missing(backing.snapshot(snapshot_id("s"), &a, &FULL));
    missing(backing.create_from(&b, here, Bytes::mib(16), &FULL));
    let error = backing.create_from(&b, gone, Bytes::mib(16), &FULL).unwrap_err();
    assert!(matches!(error, BackingError::SnapshotMissing { .. }), "{error}");
    assert!(matches!(backing.snapshot_allocated(snapshot_id("s")), Err(BackingError::SnapshotMissing { .. })));
    filled(rig, &a);
    // Smaller than what it is made from.
    let small = thin("b", 8);
    assert!(matches!(backing.create_from(&small, here, Bytes::mib(16), &FULL), Err(BackingError::Mismatch { .. })));
    // The device ends before that.
    assert!(backing.create_from(&thin("b", 600), here, Bytes::mib(600), &FULL).is_err());
    backing.snapshot(snapshot_id("s"), &a, &FULL).unwrap();
    assert!(backing.create_from(&thin("b", 17), gone, Bytes::mib(17), &FULL).is_err());
    assert!(backing.snapshot(snapshot_id("s"), &thin("a", 17), &FULL).is_err(), "it was kept of another size");
    missing(backing.device(b.id).map(|_| Outcome::Changed));
    assert_eq!(backing.create_from(&b, gone, Bytes::mib(16), &FULL).unwrap(), Outcome::Changed);
    // There is one, of another shape.
    for other in [spec("b", 16, 200, Provisioning::Thin), spec("b", 17, 130, Provisioning::Thin)] {
        let result = backing.create_from(&other, gone, Bytes::mib(16), &FULL);
        assert!(matches!(result, Err(BackingError::Mismatch { .. })), "{other:?}");
    }
}

pub(in super::super) fn create_once_a_copy_of_what_was_never_written_was_never_written(rig: &dyn Rig) {
    let backing = rig.backing();
    for provisioning in [Provisioning::Thin, Provisioning::Thick] {
        let a = spec(&format!("a{provisioning:?}"), 16, 130, provisioning);
        backing.create(&a).unwrap();
        rig.guest_writes(a.id, DiskLayout::JOURNAL_OFFSET);
        let id = snapshot_id(&format!("s{provisioning:?}"));
        backing.snapshot(id, &a, &FULL).unwrap();
        for (n, source) in [CopySource::Device(a.id), CopySource::Snapshot(id)].into_iter().enumerate() {
            let b = spec(&format!("b{n}{provisioning:?}"), 24, 130, provisioning);
            backing.create_from(&b, source, Bytes::mib(16), &FULL).unwrap();
            assert!(!backing.ever_written(&b).unwrap(), "{provisioning:?} {source:?}");
        }
    }
}

pub(in super::super) fn a_running_volume_is_copied_only_where_that_is_done_at_once(rig: &dyn Rig) {
    let (backing, a, b) = (rig.backing(), thin("a", 16), thin("b", 16));
    filled(rig, &a);
    let elsewhere = rig.opened_elsewhere(a.id);
    let shares = backing.shares_blocks().unwrap();
    for result in [
        backing.snapshot(snapshot_id("s"), &a, &FULL),
        backing.create_from(&b, CopySource::Device(a.id), Bytes::mib(16), &FULL),
    ] {
        match result {
            Ok(Outcome::Changed) if shares => {}
            Err(BackingError::InUse { .. }) if !shares => {}
            result => panic!("{result:?}"),
        }
    }
    drop(elsewhere);
    // Nor does it harm that the caller has a proof.
    let proof = backing.exclusive(a.id).unwrap();
    let expected = if shares { Outcome::Unchanged } else { Outcome::Changed };
    assert_eq!(backing.snapshot(snapshot_id("s"), &a, &FULL).unwrap(), expected);
    backing.write_table(&a, proof.as_ref()).unwrap();
}

pub(in super::super) fn a_full_copy_is_made_only_if_allowed_and_can_be_stopped(rig: &dyn Rig) {
    let (backing, a, b) = (rig.backing(), thin("a", 16), thin("b", 16));
    filled(rig, &a);
    let (calls, last) = (AtomicU64::new(0), AtomicU64::new(0));
    let count = |done: Bytes, total: Bytes| {
        assert!(done <= total);
        last.store(total.0 - done.0, Ordering::SeqCst);
        calls.fetch_add(1, Ordering::SeqCst);
        true
    };
    let counting = Copying { full: true, progress: &count };
    let stopping = Copying { full: true, progress: &|_, _| false };
    let (from, mib) = (CopySource::Device(a.id), Bytes::mib(16));
    if backing.shares_blocks().unwrap() {
        assert_eq!(backing.create_from(&b, from, mib, &stopping).unwrap(), Outcome::Changed, "nothing to stop");
        assert_eq!(backing.snapshot(snapshot_id("s"), &a, &SHARED_ONLY).unwrap(), Outcome::Changed);
        return;
    }
    let promised = || {
        let capacity = backing.capacity().unwrap();
        capacity.total.0 - capacity.available.0
    };
    let before = promised();
    for result in
        [backing.snapshot(snapshot_id("s"), &a, &SHARED_ONLY), backing.create_from(&b, from, mib, &SHARED_ONLY)]
    {
        let error = result.unwrap_err();
        assert!(matches!(error, BackingError::CannotShare { .. }), "{error}");
        assert!(error.to_string().contains("allowCopy"), "{error}");
    }
    for result in [backing.snapshot(snapshot_id("s"), &a, &stopping), backing.create_from(&b, from, mib, &stopping)] {
        assert!(matches!(result, Err(BackingError::Stopped)), "{result:?}");
    }
    assert!(matches!(backing.device(b.id), Err(BackingError::Missing { .. })));
    assert!(matches!(backing.snapshot_allocated(snapshot_id("s")), Err(BackingError::SnapshotMissing { .. })));
    assert_eq!(promised(), before, "nothing is left promised");
    assert_eq!(backing.snapshot(snapshot_id("s"), &a, &counting).unwrap(), Outcome::Changed);
    assert_eq!(backing.create_from(&b, from, mib, &counting).unwrap(), Outcome::Changed);
    assert!(calls.load(Ordering::SeqCst) >= 4);
    assert_eq!(last.load(Ordering::SeqCst), 0, "all of it at the end");
}

pub(in super::super) fn a_note_is_left_with_a_proof_for_that_volume_and_is_not_copied(rig: &dyn Rig) {
    let (backing, a, b) = (rig.backing(), thin("a", 16), thin("b", 16));
    backing.create(&a).unwrap();
    backing.create(&thin("other", 16)).unwrap();
    let others = backing.exclusive(id("other")).unwrap();
    assert!(matches!(backing.write_note(a.id, b"note", others.as_ref()), Err(BackingError::InUse { .. })));
    let proof = backing.exclusive(a.id).unwrap();
    assert!(backing.write_note(a.id, &vec![1; DiskLayout::SPEC_BYTES + 1], proof.as_ref()).is_err());
    backing.write_note(a.id, &vec![1; DiskLayout::SPEC_BYTES], proof.as_ref()).unwrap();
    backing.write_note(a.id, b"note", proof.as_ref()).unwrap();
    drop(proof);
    let note = rig.note(a.id);
    assert!(note.starts_with(b"note"));
    assert!(note[4..].iter().all(|byte| *byte == 0), "nothing is left of the longer one");
    assert!(!backing.ever_written(&a).unwrap());
    assert_eq!(rig.table(a.id), Bytes::mib(16));
    backing.create_from(&b, CopySource::Device(a.id), Bytes::mib(16), &FULL).unwrap();
    assert!(rig.note(b.id).iter().all(|byte| *byte == 0), "it is for another volume");
}

pub(in super::super) fn a_copy_that_there_is_no_room_for_is_refused_and_leaves_nothing(rig: &dyn Rig) {
    let (backing, a) = (rig.backing(), thin("a", 16));
    let before = filled(rig, &a);
    let largest = backing.capacity().unwrap().largest.0 / MIB;
    backing.create(&thin("most", largest - 600)).unwrap();
    let more = thin("more", 1200);
    let error = backing.create_from(&more, CopySource::Device(a.id), Bytes::mib(16), &FULL).unwrap_err();
    assert!(matches!(error, BackingError::NoRoom { .. }), "{error}");
    assert!(matches!(backing.device(more.id), Err(BackingError::Missing { .. })));
    backing.destroy(id("most")).unwrap();
    backing.create_from(&more, CopySource::Device(a.id), Bytes::mib(16), &FULL).unwrap();
    assert_eq!(rig.contents(more.id, AT), before);
}
