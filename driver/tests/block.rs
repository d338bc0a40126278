//! Block devices on the host: the note, the loop device, the node at the target path, and a kill between any two steps.
//!
//! `cargo test -p zpod-driver --features crash-points --test block`. Needs root and loop devices.

#![allow(clippy::unwrap_used)]

#[path = "support/calls.rs"]
#[allow(dead_code)]
mod calls;
#[path = "support/daemon.rs"]
#[allow(dead_code)]
mod daemon;
#[path = "support/fake_guest.rs"]
#[allow(dead_code)]
mod fake_guest;
#[cfg(feature = "crash-points")]
#[path = "support/kills.rs"]
mod kills;
#[path = "support/loops.rs"]
mod loops;
#[path = "support/mortal.rs"]
mod mortal;

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::{FileExt as _, FileTypeExt as _, MetadataExt as _};
use std::path::Path;
use std::time::{Duration, Instant};

use calls::{Calls, capability};
use daemon::Node;
use fake_guest::{Behaviour, FakeGuest};
use loops::{attribute, loops};
use mortal::Mortal;
use tonic::{Code, Status};
use zpod_proto::csi::volume_capability::{AccessType, BlockVolume};
use zpod_proto::csi::{self, VolumeCapability};
use zpod_proto::guest::{Health, VolumeStatus};
use zpod_volume::{Bytes, Create, DiskLayout, VolumeMode, VolumeSpec, note};

const MIB: i64 = 1 << 20;
const GIB: i64 = 1 << 30;

fn block() -> VolumeCapability {
    VolumeCapability { access_type: Some(AccessType::Block(BlockVolume {})), ..capability() }
}

async fn create(calls: &mut Calls, provisioning: &str) -> Result<String, Status> {
    let request = csi::CreateVolumeRequest {
        name: "device".into(),
        capacity_range: Some(csi::CapacityRange { required_bytes: 256 * MIB, limit_bytes: 0 }),
        volume_capabilities: vec![block()],
        parameters: [("provisioning".into(), provisioning.into())].into(),
        ..Default::default()
    };
    Ok(calls.create_as(request).await?.volume_id)
}

async fn publish(calls: &mut Calls, id: &str, target: &Path, readonly: bool) -> Result<(), Status> {
    let request = csi::NodePublishVolumeRequest {
        volume_id: id.into(),
        target_path: target.to_str().unwrap().into(),
        volume_capability: Some(block()),
        readonly,
        ..Default::default()
    };
    calls.publish_as(request).await
}

/// What the guest finds on its disk.
fn left_note(device: &Path) -> VolumeSpec {
    let mut bytes = vec![0; DiskLayout::SPEC_BYTES];
    File::open(device).unwrap().read_exact_at(&mut bytes, DiskLayout::SPEC_OFFSET).unwrap();
    note::decode(&bytes).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_block_volume_is_a_loop_device_at_its_target_with_a_note_for_the_guest() {
    let node = Node::new();
    let daemon = node.start(None);
    let mut calls = Calls::new(daemon.channel());
    let id = create(&mut calls, "thin").await.unwrap();
    let (target, image) = (node.path("pods/device"), node.device(&id));

    // As it was made, and not otherwise.
    let error = calls.publish(&id, &target).await.unwrap_err();
    assert!(error.code() == Code::InvalidArgument && error.message().contains("volumeDevices"), "{error}");
    for _ in 0..3 {
        publish(&mut calls, &id, &target, true).await.unwrap();
    }
    let error = calls.publish(&id, &target).await.unwrap_err();
    assert!(error.code() == Code::Unavailable && error.message().contains("volumeDevices"), "it stands: {error}");
    let found = fs::metadata(&target).unwrap();
    assert!(found.file_type().is_block_device());
    let loops_now = loops(&image);
    assert_eq!(loops_now.len(), 1, "one device, however often kubelet asks");
    assert_eq!(found.rdev(), fs::metadata(&loops_now[0]).unwrap().rdev());
    assert!(node.names("direct-volumes").is_empty(), "Kata finds no entry");
    let spec = left_note(&target);
    assert_eq!((spec.mode, spec.create, spec.capacity), (VolumeMode::Block, Create::Fresh, Bytes::mib(256)));
    assert!(spec.read_only, "the guest hands it out read-only; its pool is writable");
    let flag = |name: &str| attribute(&loops_now[0], name);
    assert_eq!((flag("ro"), flag("loop/partscan"), flag("loop/offset")), ("0".into(), "0".into(), "0".into()));
    assert_ne!(flag("queue/discard_max_bytes"), "0");

    // Deleted and published elsewhere it is not while it is published.
    assert_eq!(calls.delete(&id).await.unwrap_err().code(), Code::FailedPrecondition);
    let other = publish(&mut calls, &id, &node.path("pods/other"), false).await.unwrap_err();
    assert_eq!(other.code(), Code::FailedPrecondition);

    // Kubelet's own device on top is still there when it unpublishes: the next pod waits for it to go.
    let kubelet = File::open(&loops_now[0]).unwrap();
    calls.unpublish(&id, &target).await.unwrap();
    assert!(!target.exists());
    let error = publish(&mut calls, &id, &target, false).await.unwrap_err();
    assert!(error.code() == Code::FailedPrecondition && error.message().contains("is open in another"), "{error}");
    drop(kubelet);
    publish(&mut calls, &id, &target, false).await.unwrap();
    let again = left_note(&target);
    assert!(again.token != spec.token && !again.read_only);
    calls.unpublish(&id, &target).await.unwrap();
    calls.unpublish(&id, &target).await.unwrap();
    assert!(loops(&image).is_empty());
    calls.delete(&id).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_device_that_can_not_be_published_leaves_nothing_and_touches_nothing() {
    let node = Node::new();
    let daemon = node.start(None);
    let mut calls = Calls::new(daemon.channel());
    let id = create(&mut calls, "thin").await.unwrap();
    let (target, image) = (node.path("pods/device"), node.device(&id));
    fs::write(&target, "precious").unwrap();
    let error = publish(&mut calls, &id, &target, false).await.unwrap_err();
    // Final for kubelet, which calls nothing then.
    assert_eq!(error.code(), Code::Internal, "{error}");
    assert!(loops(&image).is_empty() && fs::read(&target).unwrap() == b"precious");
    let error = publish(&mut calls, &id, &node.path("pods/missing/device"), false).await.unwrap_err();
    assert!(loops(&image).is_empty(), "{error}");
    // Another pod can have it.
    let other = node.path("pods/other");
    publish(&mut calls, &id, &other, false).await.unwrap();
    calls.unpublish(&id, &other).await.unwrap();
    calls.delete(&id).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thick_device_keeps_what_was_promised_to_it() {
    let node = Node::new();
    let daemon = node.start(None);
    let mut calls = Calls::new(daemon.channel());
    let id = create(&mut calls, "thick").await.unwrap();
    let target = node.path("pods/device");
    publish(&mut calls, &id, &target, false).await.unwrap();
    let device = loops(&node.device(&id)).pop().unwrap();
    assert_eq!(attribute(&device, "queue/discard_max_bytes"), "0");
    calls.unpublish(&id, &target).await.unwrap();
    calls.delete(&id).await.unwrap();
}

/// What the guest of a device says.
fn report(spec: &VolumeSpec) -> VolumeStatus {
    VolumeStatus {
        volume_id: spec.id.to_string(),
        token: spec.token.to_string(),
        health: Health::Online.into(),
        block: true,
        total_bytes: spec.capacity.0,
        used_bytes: 4096,
        total_inodes: 5,
        partition_bytes: spec.partition.0,
        disk_bytes: DiskLayout::disk_for(DiskLayout::partition_for(Bytes::gib(4))).0,
        quota_bytes: spec.capacity.0,
        ..VolumeStatus::default()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_guest_of_a_device_is_told_what_its_note_is_too_old_for() {
    let node = Node::new();
    let daemon = node.start(None);
    let mut calls = Calls::new(daemon.channel());
    let id = create(&mut calls, "thin").await.unwrap();
    let target = node.path("pods/uid-1");
    publish(&mut calls, &id, &target, false).await.unwrap();
    let spec = left_note(&target);
    let wait = Duration::from_millis(50);
    let guest = FakeGuest::start(&node.path("kata"), "sandbox-1", Behaviour::Honest, vec![report(&spec)]);
    let deadline = Instant::now() + Duration::from_secs(60);
    while let Err(error) = calls.modify(&id, &[("compression", "zstd")]).await {
        assert!(error.code() == Code::Unavailable && Instant::now() < deadline, "{error}\n{}", node.log());
        tokio::time::sleep(wait).await;
    }
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(guest.state.set.lock().unwrap().len(), 1, "it knows already");
    assert_eq!(left_note(&target), spec, "the note is as old as the publication");

    // The virtual machine ends, and kubelet starts another one in the same pod.
    drop(guest);
    let guest = FakeGuest::start(&node.path("kata"), "sandbox-2", Behaviour::Honest, vec![report(&spec)]);
    let deadline = Instant::now() + Duration::from_secs(60);
    while guest.state.set.lock().unwrap().is_empty() {
        assert!(Instant::now() < deadline, "it is not told\n{}", node.log());
        tokio::time::sleep(wait).await;
    }
    assert_eq!(guest.state.set.lock().unwrap()[0].dataset_properties["compression"], "zstd");
    drop(guest);
    calls.unpublish(&id, &target).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_device_has_statistics_without_inodes_and_its_guest_grows_it() {
    let node = Node::new();
    let daemon = node.start(None);
    let mut calls = Calls::new(daemon.channel());
    let id = create(&mut calls, "thin").await.unwrap();
    let target = node.path("pods/uid-1");
    publish(&mut calls, &id, &target, false).await.unwrap();
    let spec = left_note(&target);
    let guest = FakeGuest::start(&node.path("kata"), "sandbox-1", Behaviour::Honest, vec![report(&spec)]);
    let asked = node.path("volumeDevices/pv-1/dev/uid-1");
    let deadline = Instant::now() + Duration::from_secs(60);
    let stats = loop {
        let stats = calls.stats(&id, &asked).await.unwrap();
        if stats.usage[0].used == 4096 {
            break stats;
        }
        assert!(Instant::now() < deadline, "guest is not heard\n{}", node.log());
        tokio::time::sleep(Duration::from_millis(50)).await;
    };
    assert_eq!(stats.usage.len(), 1, "a device has no inodes");
    assert_eq!(calls.stats(&id, &node.path("dev/uid-2")).await.unwrap_err().code(), Code::NotFound);
    calls.expand(&id, GIB).await.unwrap();
    assert_eq!(calls.node_expand(&id, &target).await.unwrap(), GIB);
    assert_eq!(guest.state.grown.lock().unwrap()[0].capacity_bytes, GIB as u64);
    drop(guest);
    calls.unpublish(&id, &target).await.unwrap();
    publish(&mut calls, &id, &target, false).await.unwrap();
    let spec = left_note(&target);
    assert_eq!((spec.create, spec.capacity), (Create::Never, Bytes::gib(1)), "the next pod is told");
    calls.unpublish(&id, &target).await.unwrap();
}

const TENANTS_BYTES: &[u8] = b"the tenant's bytes";

/// One life with a kill at the Nth point and, to make it worse, at another soon after. Whether it was killed.
async fn live(at: u64, again: Option<u64>) -> bool {
    let node = Node::new();
    let (target, second) = (node.path("pods/device"), node.path("pods/second"));
    let mut zpod = Mortal::start(&node, at, again);
    let (mut step, mut id) = (0, String::new());
    while step < 7 {
        let context = format!("point {at}, again {again:?}, step {step}");
        let calls = &mut zpod.calls;
        let done = match step {
            0 => create(calls, "thick").await.map(|made| id = made),
            1 => publish(calls, &id, &target, false).await,
            2 => {
                let file = OpenOptions::new().write(true).open(&target).unwrap();
                file.write_all_at(TENANTS_BYTES, DiskLayout::PARTITION_START).unwrap();
                file.sync_all().unwrap();
                Ok(())
            }
            3 => calls.unpublish(&id, &target).await,
            4 => publish(calls, &id, &second, false).await,
            5 => calls.unpublish(&id, &second).await,
            _ => calls.delete(&id).await,
        };
        if zpod.lived(done, &context).is_none() {
            continue;
        }
        if !id.is_empty() {
            let count = loops(&node.device(&id)).len();
            let want = usize::from(matches!(step, 1 | 2 | 4));
            assert_eq!(count, want, "{context}: loop devices");
        }
        if step == 4 {
            let mut found = vec![0; TENANTS_BYTES.len()];
            File::open(&second).unwrap().read_exact_at(&mut found, DiskLayout::PARTITION_START).unwrap();
            assert_eq!(found, TENANTS_BYTES, "{context}");
            assert_eq!(left_note(&second).create, Create::Resume, "{context}");
        }
        step += 1;
    }
    for dir in ["volumes", "state/volumes", "direct-volumes", "pods"] {
        assert_eq!(node.names(dir), [""; 0], "point {at}, again {again:?}: {dir} is not empty\n{}", node.log());
    }
    zpod.killed
}

#[cfg(feature = "crash-points")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_block_volume_survives_a_kill_between_any_two_steps_of_its_life() {
    assert!(kills::at_each_point(live).await > 20, "no crash point was reached");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_block_volume_lives_its_life() {
    assert!(!live(u64::MAX, None).await);
}
