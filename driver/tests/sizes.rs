//! How large a volume can be where files can't be as long as their headroom asks for: on ext4, below 16 TiB.
#![allow(clippy::unwrap_used)]

use std::sync::Arc;

use tempfile::TempDir;
use tonic::Code;
use zpod_driver::csi::to_status;
use zpod_driver::volumes::{CapacityRange, Context, CreateRequest, Provision as _, Provisioner, VolumeError};
use zpod_storage::backing::Backing as _;
use zpod_storage::backing::sim::SimBacking;
use zpod_storage::catalog::{Source, Volume, dir};
use zpod_volume::{Bytes, DiskLayout, Vdevs, VolumeId, VolumeParameters};

const TIB: u64 = 1 << 40;
/// 2^32 blocks of 4 KiB, less what ext4 keeps for itself, in whole MiB.
const EXT4: Bytes = Bytes(16 * TIB - (1 << 20));

struct World {
    sim: SimBacking,
    provisioner: Provisioner,
    _dir: TempDir,
}

impl World {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let sim = SimBacking::new(Bytes(100 * TIB), 10.0).with_longest_disk(EXT4);
        let (catalog, snapshots) = dir::open(dir.path()).unwrap();
        let (catalog, snapshots) = (Arc::new(catalog), Arc::new(snapshots));
        let context = Context::new("n1".into(), "boot".into(), catalog, snapshots, Arc::new(sim.clone()));
        Self { sim, provisioner: Provisioner::new(context), _dir: dir }
    }

    async fn create(
        &self,
        name: &str,
        bytes: u64,
        headroom: &str,
        source: Option<Source>,
    ) -> Result<Volume, VolumeError> {
        let request = CreateRequest {
            name: name.into(),
            range: CapacityRange { required: Some(Bytes(bytes)), limit: None },
            parameters: VolumeParameters::parse([("headroom", headroom)]).unwrap(),
            source,
            ..CreateRequest::default()
        };
        self.provisioner.create(request).await
    }
}

fn out_of_range(result: Result<Volume, VolumeError>) {
    let status = to_status(&result.unwrap_err());
    assert_eq!(status.code(), Code::OutOfRange, "{status:?}");
    assert!(status.message().contains("capacity"), "{status:?}");
}

#[tokio::test]
async fn headroom_is_what_the_file_system_can_hold_and_the_record_says_so() {
    let world = World::new();
    for (name, bytes, headroom) in [("a", 2 * TIB, "8x"), ("b", 100 << 30, "1000x"), ("c", 14 * TIB, "8x")] {
        let volume = world.create(name, bytes, headroom, None).await.unwrap();
        assert_eq!((volume.disk_limit, volume.layout().disk), (Some(EXT4), EXT4), "{name}");
        // The same again, and a volume that fits has no limit.
        assert_eq!(world.create(name, bytes, headroom, None).await.unwrap(), volume);
    }
    assert_eq!(world.create("d", 1 << 30, "8x", None).await.unwrap().disk_limit, None);
    // A copy, and growth within it.
    let source = Some(Source::Volume(VolumeId::from_name("c")));
    assert_eq!(world.create("copy", 14 * TIB, "8x", source).await.unwrap().layout().disk, EXT4);
    let more = CapacityRange { required: Some(Bytes(12 * TIB)), limit: None };
    let grown = world.provisioner.expand(VolumeId::from_name("a"), more).await.unwrap();
    assert_eq!((grown.capacity, grown.layout().disk), (Bytes(12 * TIB), EXT4));
}

#[tokio::test]
async fn sizes_that_no_file_can_have_are_out_of_range_and_leave_nothing() {
    let world = World::new();
    out_of_range(world.create("a", 17 * TIB, "1x", None).await);
    out_of_range(world.create("a", i64::MAX as u64, "8x", None).await);
    // Its name is free.
    world.create("a", TIB, "8x", None).await.unwrap();
    let more = CapacityRange { required: Some(Bytes(17 * TIB)), limit: None };
    out_of_range(world.provisioner.expand(VolumeId::from_name("a"), more).await);
    assert_eq!(world.provisioner.get(VolumeId::from_name("a")).await.unwrap().capacity, Bytes(TIB));
    out_of_range(world.create("copy", 17 * TIB, "8x", Some(Source::Volume(VolumeId::from_name("a")))).await);
}

#[tokio::test]
async fn a_volume_of_the_maximum_size_can_be_had_with_any_headroom() {
    for headroom in ["1x", "8x", "1000x"] {
        let world = World::new();
        let room = world.provisioner.room(None, Vdevs::Single).await.unwrap();
        assert!(room.largest < EXT4 && room.largest > Bytes(15 * TIB), "{room:?}");
        world.create("largest", room.largest.0, headroom, None).await.unwrap();
        assert!(DiskLayout::partition_for(room.largest) <= DiskLayout::largest_partition(EXT4));
    }
}

#[tokio::test]
async fn there_is_no_room_for_mirrors_where_there_can_be_none() {
    let world = World::new();
    let room = world.provisioner.room(None, Vdevs::Mirror2).await.unwrap();
    assert_eq!((room.available, room.largest), (Bytes(0), Bytes(0)));
}

#[tokio::test]
async fn a_creation_that_failed_leaves_no_record_and_its_name_to_another_class() {
    let world = World::new();
    world.sim.fail_call(1, std::io::ErrorKind::Other);
    let error = world.create("a", 1 << 30, "8x", None).await;
    let failed = error.is_err();
    let made = world.create("a", 2 << 30, "2x", None).await.unwrap();
    assert!(failed && made.capacity == Bytes(2 << 30));
    assert!(world.sim.device(made.id).is_ok());
}
