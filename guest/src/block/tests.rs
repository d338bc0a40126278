use std::sync::{Arc, Mutex};

use uuid::Uuid;
use zpod_volume::{Bytes, Create, Headroom, VolumeId};

use super::*;
use crate::machine::simulated::{self, Kill, SimDisk, SimMachine};

fn spec(name: &str, mode: VolumeMode) -> VolumeSpec {
    let new = VolumeSpec::new(VolumeId::from_name(name), Uuid::from_u128(7), Create::Fresh, Bytes::gib(1));
    VolumeSpec { mode, ..new }
}

fn disk(name: &str) -> SimDisk {
    let layout = DiskLayout::new(Bytes::gib(1), Headroom::default());
    simulated::disk("vda", VolumeId::from_name(name), layout.partition, layout.disk)
}

fn device(id: &str) -> Device {
    Device { id: id.into(), r#type: "blk".into(), container_path: "/dev/xvda".into(), ..Device::default() }
}

async fn identified(disk: SimDisk, device: &Device) -> Result<Option<VolumeSpec>, BlockError> {
    let machine = SimMachine::new(&Arc::new(Mutex::new(vec![disk])), Kill::Never);
    identify(&machine, device, Instant::now() + Duration::from_secs(1)).await
}

#[tokio::test(start_paused = true)]
async fn a_disk_with_a_volumes_table_and_note_is_ours_and_a_strangers_is_not() {
    let mut ours = disk("pvc-1");
    ours.note(&spec("pvc-1", VolumeMode::Block));
    assert_eq!(identified(ours, &device("02/01")).await, Ok(Some(spec("pvc-1", VolumeMode::Block))));
    let mut stranger = disk("anything");
    stranger.scribble(512);
    assert_eq!(identified(stranger, &device("02/01")).await, Ok(None));
}

#[tokio::test(start_paused = true)]
async fn a_container_never_gets_the_raw_disk_of_a_pool() {
    let no_note = disk("pvc-1");
    let mut file_system = disk("pvc-1");
    file_system.note(&spec("pvc-1", VolumeMode::Filesystem));
    let mut another = disk("pvc-1");
    another.note(&spec("pvc-2", VolumeMode::Block));
    let mut damaged = disk("pvc-1");
    damaged.note(&spec("pvc-1", VolumeMode::Block));
    damaged.flip(DiskLayout::SPEC_OFFSET, 100);
    let mut no_table = disk("pvc-1");
    no_table.note(&spec("pvc-1", VolumeMode::Block));
    no_table.scribble(512);
    for (disk, want) in [
        (no_note, "no node plugin has handed it out"),
        (file_system, "is a file system"),
        (another, "a note for volume"),
        (damaged, "damaged"),
        (no_table, "partition table is damaged"),
    ] {
        let error = identified(disk, &device("02/01")).await.unwrap_err();
        assert!(error.to_string().contains(want) && error.to_string().contains("/dev/xvda"), "{error}");
        assert_eq!(error.code(), Code::FailedPrecondition, "{error}");
    }
    // One that is not there yet may be ours.
    let error = identified(disk("pvc-1"), &device("02/02")).await.unwrap_err();
    assert_eq!(error.code(), Code::NotFound, "{error}");
}

#[tokio::test(start_paused = true)]
async fn no_way_of_attaching_a_disk_passes_one_of_ours_by() {
    let device =
        |kind: &str, id: &str, vm_path: &str| Device { r#type: kind.into(), vm_path: vm_path.into(), ..device(id) };
    let dax = |name: &str| SimDisk { name: "pmem1".into(), ..disk(name) };
    let mut block = dax("pvc-1");
    block.note(&spec("pvc-1", VolumeMode::Block));
    let found = identified(block, &device("nvdimm", "", "/dev/pmem1")).await;
    assert_eq!(found, Ok(Some(spec("pvc-1", VolumeMode::Block))));
    let error = identified(dax("pvc-1"), &device("nvdimm", "", "/dev/pmem1")).await.unwrap_err();
    assert_eq!(error.code(), Code::FailedPrecondition, "{error}");
    // The agent opens whatever the path says: what is no name of a whole disk is not passed on.
    for path in ["/dev/pmem1p1", "/dev/../dev/pmem1", "/dev//pmem1", "/proc/1/root/dev/pmem1", ""] {
        let error = identified(dax("pvc-1"), &device("nvdimm", "", path)).await.unwrap_err();
        assert_eq!(error.code(), Code::NotFound, "{path}: {error}");
    }
    let mut stranger = dax("anything");
    stranger.scribble(512);
    assert_eq!(identified(stranger, &device("nvdimm", "", "/dev/pmem1")).await, Ok(None));
}

#[test]
fn a_disk_is_known_by_its_place_on_the_bus() {
    let disk = |name: &str, place: &str| Disk {
        name: name.into(),
        sequence: 1,
        size: Bytes::gib(1),
        place: place.into(),
        table: Err(String::new()),
        start: 0,
        number: 1,
        read_only: false,
    };
    let virtio = disk("vdb", "/sys/devices/pci0000:00/0000:00:02.0/0000:01:0a.0/virtio3/block/vdb");
    let numa = disk("vdc", "/sys/devices/pci0000:20/0000:20:00.0/0000:21:02.0/virtio4/block/vdc");
    let scsi = disk("sda", "/sys/devices/pci0000:00/0000:00:01.0/virtio0/host0/target0:0:1/0:0:1:2/block/sda");
    let ccw = disk("vdd", "/sys/devices/css0/0.0.0001/0.0.00a2/virtio1/block/vdd");
    let disks = [&virtio, &numa, &scsi, &ccw];
    let found = |kind: &str, id: &str, vm_path: &str| {
        let device = Device { r#type: kind.into(), vm_path: vm_path.into(), ..device(id) };
        let place = Place::of_device(&device)?;
        disks.iter().find(|disk| place.is_of(disk)).map(|disk| disk.name.as_str())
    };
    assert_eq!(found("blk", "02/0a", ""), Some("vdb"));
    assert_eq!(found("blk", "02.0/0a.0", ""), Some("vdb"));
    assert_eq!(found("blk", "20/00/02", ""), Some("vdc"));
    assert_eq!(found("scsi", "1:2", ""), Some("sda"));
    assert_eq!(found("mmioblk", "", "/dev/vdb"), Some("vdb"));
    assert_eq!(found("blk-ccw", "0.0.00a2", ""), Some("vdd"));
    assert_eq!(found("blk-ccw", "0.0.a2", ""), Some("vdd"));
    for (kind, id, vm_path) in [
        ("blk-ccw", "0.0.0001", ""),
        ("blk-ccw", "0.1.00a2", ""),
        ("blk-ccw", "1.0.00a2", ""),
        ("blk-ccw", "0.0.00a2.0", ""),
        ("blk", "0a", ""),
        ("blk", "02/0b", ""),
        ("blk", "00/02", ""),
        ("blk", "", ""),
        ("blk", "02/0a/00", ""),
        ("blk", "+2/0a", ""),
        ("blk", "/dev/vdb", ""),
        ("scsi", "1:3", ""),
        ("scsi", "x", ""),
        ("mmioblk", "", "/dev/../vdb"),
        ("mmioblk", "", "vdb"),
    ] {
        assert_eq!(found(kind, id, vm_path), None, "{kind} {id} {vm_path}");
    }
}
