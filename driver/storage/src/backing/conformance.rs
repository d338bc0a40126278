//! What every backing must do, run against each of them.

pub(super) mod copies;

use std::any::Any;

use super::*;

pub(super) const MIB: u64 = 1 << 20;

/// A backing with a world around it.
pub(super) trait Rig {
    fn backing(&self) -> &dyn Backing;
    /// What a guest does that writes 4 KiB at an offset.
    fn guest_writes(&self, id: VolumeId, at: u64);
    /// What a virtual machine does that has the device, until it is dropped.
    fn opened_elsewhere(&self, id: VolumeId) -> Box<dyn Any>;
    /// The same, but nothing that was there before.
    fn guest_rewrites(&self, id: VolumeId, at: u64);
    /// What a guest finds at an offset, as a number; zero where nothing is.
    fn contents(&self, id: VolumeId, at: u64) -> u64;
    /// What was left for a guest.
    fn note(&self, id: VolumeId) -> Vec<u8>;
    /// The partition's size in the device's table. Not while a proof is held: whoever opens the device then waits.
    fn table(&self, id: VolumeId) -> Bytes;
}

pub(super) fn id(name: &str) -> VolumeId {
    VolumeId::from_name(name)
}

pub(super) fn spec(name: &str, partition_mib: u64, disk_mib: u64, provisioning: Provisioning) -> DeviceSpec {
    let layout = DiskLayout {
        capacity: Bytes::mib(partition_mib),
        partition: Bytes::mib(partition_mib),
        disk: Bytes::mib(disk_mib),
    };
    DeviceSpec { id: id(name), layout, provisioning }
}

pub(super) fn thin(name: &str, partition_mib: u64) -> DeviceSpec {
    spec(name, partition_mib, partition_mib * 8 + 2, Provisioning::Thin)
}

pub(super) fn steps_that_find_their_work_done_say_so(rig: &dyn Rig) {
    let backing = rig.backing();
    let (small, large) = (thin("a", 16), spec("a", 32, 130, Provisioning::Thin));
    assert_eq!(backing.create(&small).unwrap(), Outcome::Changed);
    assert_eq!(backing.create(&small).unwrap(), Outcome::Unchanged);
    assert_eq!(rig.table(small.id), small.layout.partition);
    assert_eq!(backing.grow(&large).unwrap(), Outcome::Changed);
    assert_eq!(backing.grow(&large).unwrap(), Outcome::Unchanged);
    assert_eq!(backing.destroy(small.id).unwrap(), Outcome::Changed);
    assert_eq!(backing.destroy(small.id).unwrap(), Outcome::Unchanged);
}

pub(super) fn a_device_of_other_sizes_is_left_alone(rig: &dyn Rig) {
    let backing = rig.backing();
    backing.create(&thin("a", 16)).unwrap();
    rig.guest_writes(id("a"), 2 * MIB);
    for other in [spec("a", 16, 200, Provisioning::Thin), spec("a", 17, 130, Provisioning::Thin)] {
        assert!(matches!(backing.create(&other), Err(BackingError::Mismatch { .. })), "{other:?}");
    }
    assert_eq!(rig.table(id("a")), Bytes::mib(16));
    assert!(backing.ever_written(&thin("a", 16)).unwrap());
}

pub(super) fn a_layout_that_no_disk_can_have_is_refused(rig: &dyn Rig) {
    for bad in [spec("a", 16, 17, Provisioning::Thin), spec("a", 0, 16, Provisioning::Thin)] {
        assert!(matches!(rig.backing().create(&bad), Err(BackingError::Mismatch { .. })), "{bad:?}");
        assert!(matches!(rig.backing().device(bad.id), Err(BackingError::Missing { .. })));
    }
}

pub(super) fn what_does_not_exist_is_missing(rig: &dyn Rig) {
    let (backing, spec) = (rig.backing(), thin("nothing", 16));
    let missing = |result: Result<(), BackingError>| assert!(matches!(result, Err(BackingError::Missing { .. })));
    missing(backing.grow(&spec).map(drop));
    missing(backing.exclusive(spec.id).map(drop));
    missing(backing.ever_written(&spec).map(drop));
    missing(backing.device(spec.id).map(drop));
    missing(backing.allocated(spec.id).map(drop));
}

pub(super) fn over_commit_is_refused_and_leaves_nothing_behind(rig: &dyn Rig) {
    let backing = rig.backing();
    let before = backing.capacity().unwrap();
    let largest = before.largest.0 / MIB;
    // The world around may take or give a little meanwhile.
    backing.create(&thin("most", largest - 600)).unwrap();
    let error = backing.create(&thin("more", 1200)).unwrap_err();
    assert!(matches!(error, BackingError::NoRoom { .. }), "{error}");
    assert!(error.to_string().contains("--overprovision"), "{error}");
    assert!(matches!(backing.device(id("more")), Err(BackingError::Missing { .. })));
    backing.create(&thin("little", 16)).unwrap();
    let grown = thin("little", 1200);
    assert!(matches!(backing.grow(&grown), Err(BackingError::NoRoom { .. })));
    assert_eq!(backing.create(&thin("little", 16)).unwrap(), Outcome::Unchanged);
    backing.destroy(id("most")).unwrap();
    assert_eq!(backing.grow(&grown).unwrap(), Outcome::Changed);
    backing.destroy(id("little")).unwrap();
    let after = backing.capacity().unwrap();
    assert!(after.available.0.abs_diff(before.available.0) < 512 * MIB, "{before:?} {after:?}");
}

pub(super) fn nothing_ever_shrinks(rig: &dyn Rig) {
    let backing = rig.backing();
    let (small, large) = (thin("a", 16), thin("a", 64));
    backing.create(&large).unwrap();
    let promised = backing.capacity().unwrap().available;
    assert_eq!(backing.grow(&small).unwrap(), Outcome::Unchanged);
    // Another disk, same partition: the partition stays as it is.
    assert_eq!(backing.grow(&spec("a", 16, 1024, Provisioning::Thin)).unwrap(), Outcome::Changed);
    assert!(backing.capacity().unwrap().available.0.abs_diff(promised.0) < 16 * MIB);
    assert_eq!(backing.create(&spec("a", 64, 1024, Provisioning::Thin)).unwrap(), Outcome::Unchanged);
}

pub(super) fn one_kernel_at_a_time_what_is_open_elsewhere_is_neither_destroyed_nor_given_a_table(rig: &dyn Rig) {
    let (backing, spec) = (rig.backing(), thin("a", 16));
    backing.create(&spec).unwrap();
    let elsewhere = rig.opened_elsewhere(spec.id);
    let error = backing.exclusive(spec.id).unwrap_err();
    assert!(matches!(error, BackingError::InUse { .. }), "{error}");
    assert!(matches!(backing.destroy(spec.id), Err(BackingError::InUse { .. })));
    backing.device(spec.id).unwrap();
    // A guest runs, and grows.
    assert_eq!(backing.grow(&thin("a", 32)).unwrap(), Outcome::Changed);
    drop(elsewhere);
    let proof = backing.exclusive(spec.id).unwrap();
    backing.write_table(&thin("a", 32), proof.as_ref()).unwrap();
    drop(proof);
    assert_eq!(rig.table(spec.id), Bytes::mib(32));
    assert_eq!(backing.destroy(spec.id).unwrap(), Outcome::Changed);
}

pub(super) fn while_a_proof_is_held_everything_else_works(rig: &dyn Rig) {
    let (backing, spec) = (rig.backing(), thin("a", 16));
    backing.create(&spec).unwrap();
    let proof = backing.exclusive(spec.id).unwrap();
    let second = backing.exclusive(spec.id).unwrap();
    assert!(!backing.ever_written(&spec).unwrap());
    assert_eq!(backing.create(&spec).unwrap(), Outcome::Unchanged);
    assert_eq!(backing.grow(&thin("a", 32)).unwrap(), Outcome::Changed);
    backing.allocated(spec.id).unwrap();
    backing.device(spec.id).unwrap();
    drop(second);
    backing.write_table(&thin("a", 32), proof.as_ref()).unwrap();
    assert_eq!(backing.destroy(spec.id).unwrap(), Outcome::Changed);
    drop(proof);
}

pub(super) fn a_table_is_written_with_a_proof_for_that_volume_and_never_beyond_the_promise(rig: &dyn Rig) {
    let backing = rig.backing();
    backing.create(&thin("a", 16)).unwrap();
    backing.create(&thin("b", 16)).unwrap();
    let others = backing.exclusive(id("b")).unwrap();
    assert!(matches!(backing.write_table(&thin("a", 16), others.as_ref()), Err(BackingError::InUse { .. })));
    let proof = backing.exclusive(id("a")).unwrap();
    let beyond = spec("a", 17, 130, Provisioning::Thin);
    assert!(matches!(backing.write_table(&beyond, proof.as_ref()), Err(BackingError::Mismatch { .. })));
    let longer = spec("a", 16, 131, Provisioning::Thin);
    assert!(matches!(backing.write_table(&longer, proof.as_ref()), Err(BackingError::Mismatch { .. })));
    drop(proof);
    assert_eq!(rig.table(id("a")), Bytes::mib(16));
}

pub(super) fn create_once_a_fresh_device_was_never_written_thick_or_thin(rig: &dyn Rig) {
    let backing = rig.backing();
    for (name, provisioning) in [("thin", Provisioning::Thin), ("thick", Provisioning::Thick)] {
        let spec = spec(name, 16, 130, provisioning);
        backing.create(&spec).unwrap();
        assert!(!backing.ever_written(&spec).unwrap(), "{name}: fresh");
        let taken = backing.allocated(spec.id).unwrap();
        assert_eq!(taken >= spec.layout.partition, provisioning == Provisioning::Thick, "{name} takes {taken}");
        // The guest says that it is about to make the pool, and is killed.
        rig.guest_writes(spec.id, DiskLayout::JOURNAL_OFFSET);
        assert!(!backing.ever_written(&spec).unwrap(), "{name}: journal");
        let proof = backing.exclusive(spec.id).unwrap();
        backing.write_table(&spec, proof.as_ref()).unwrap();
        assert!(!backing.ever_written(&spec).unwrap(), "{name}: table");
    }
}

pub(super) fn create_once_one_written_block_anywhere_in_the_partition_is_seen(rig: &dyn Rig) {
    let backing = rig.backing();
    let ends = [DiskLayout::PARTITION_START, 8 * MIB, DiskLayout::PARTITION_START + 16 * MIB - 4096];
    for (n, at) in ends.into_iter().enumerate() {
        for provisioning in [Provisioning::Thin, Provisioning::Thick] {
            let spec = spec(&format!("{n}{provisioning:?}"), 16, 130, provisioning);
            backing.create(&spec).unwrap();
            rig.guest_writes(spec.id, at);
            assert!(backing.ever_written(&spec).unwrap(), "{at} {provisioning:?}");
        }
    }
}

pub(super) fn growing_the_disk_of_a_volume_that_was_never_used_leaves_it_never_written(rig: &dyn Rig) {
    let backing = rig.backing();
    backing.create(&spec("a", 16, 18, Provisioning::Thin)).unwrap();
    let large = spec("a", 64, 66, Provisioning::Thin);
    backing.grow(&large).unwrap();
    assert!(!backing.ever_written(&large).unwrap());
    let proof = backing.exclusive(large.id).unwrap();
    backing.write_table(&large, proof.as_ref()).unwrap();
    assert!(!backing.ever_written(&large).unwrap());
    drop(proof);
    assert_eq!(rig.table(large.id), Bytes::mib(64));
}

/// One test for each requirement, against the rig that the expression makes.
macro_rules! conformance {
    (@test $rig:expr; $name:ident) => {
        #[test]
        fn $name() {
            $crate::backing::conformance::$name(&$rig);
        }
    };
    (@test $rig:expr; $module:ident::$name:ident) => {
        #[test]
        fn $name() {
            $crate::backing::conformance::$module::$name(&$rig);
        }
    };
    ($rig:expr) => {
        $crate::backing::conformance::conformance!($rig;
            steps_that_find_their_work_done_say_so
            a_device_of_other_sizes_is_left_alone
            a_layout_that_no_disk_can_have_is_refused
            what_does_not_exist_is_missing
            over_commit_is_refused_and_leaves_nothing_behind
            nothing_ever_shrinks
            one_kernel_at_a_time_what_is_open_elsewhere_is_neither_destroyed_nor_given_a_table
            while_a_proof_is_held_everything_else_works
            a_table_is_written_with_a_proof_for_that_volume_and_never_beyond_the_promise
            create_once_a_fresh_device_was_never_written_thick_or_thin
            create_once_one_written_block_anywhere_in_the_partition_is_seen
            growing_the_disk_of_a_volume_that_was_never_used_leaves_it_never_written
            copies::a_snapshot_keeps_what_was_there_whatever_becomes_of_its_volume
            copies::a_copy_of_a_device_may_be_larger_and_has_a_table_of_its_own
            copies::what_a_guest_wrote_behind_its_partition_is_not_copied
            copies::what_is_copied_has_to_be_there_and_to_fit
            copies::create_once_a_copy_of_what_was_never_written_was_never_written
            copies::a_running_volume_is_copied_only_where_that_is_done_at_once
            copies::a_full_copy_is_made_only_if_allowed_and_can_be_stopped
            copies::a_note_is_left_with_a_proof_for_that_volume_and_is_not_copied
            copies::a_copy_that_there_is_no_room_for_is_refused_and_leaves_nothing
        );
    };
    ($rig:expr; $($name:ident $(:: $in_module:ident)?)*) => {
        $(
            $crate::backing::conformance::conformance!(@test $rig; $name $(:: $in_module)?);
        )*
    };
}
pub(super) use conformance;
