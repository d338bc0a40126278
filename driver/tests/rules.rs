//! The rules that keep data (docs: design), one test for each that is not in `guests.rs`, against the `zpod` binary;
//! and what a second boot of the host means, against the simulated backing. Needs root, as the driver mounts.

#![allow(clippy::unwrap_used)]

#[path = "support/calls.rs"]
#[allow(dead_code)]
mod calls;
#[path = "support/daemon.rs"]
#[allow(dead_code)]
mod daemon;

use std::fs::{self, File, OpenOptions};
use std::io::ErrorKind;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use calls::Calls;
use daemon::Node;
use tonic::Code;
use zpod_driver::kata::DirectVolumes;
use zpod_driver::volumes::{
    Context, CreateRequest, GroupRequest, NodeVolumes, Provision, Provisioner, PublishRequest, SnapshotRequest,
    Snapshots, Snapshotter, VolumeError,
};
use zpod_proto::csi;
use zpod_storage::backing::sim::SimBacking;
use zpod_storage::catalog::SnapshotPhase;
use zpod_volume::{Bytes, Create, DiskLayout, VolumeId};

const GIB: i64 = 1 << 30;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn create_once_a_device_that_was_ever_written_to_never_becomes_a_new_pool() {
    let node = Node::new();
    let daemon = node.start(None);
    let mut calls = Calls::new(daemon.channel());
    let id = calls.create("a", GIB).await.unwrap().volume_id;
    let target = node.path("pods/pod-1");
    calls.publish(&id, &target).await.unwrap();
    assert_eq!(node.entry(&target).unwrap().create, Create::Fresh);
    calls.unpublish(&id, &target).await.unwrap();
    // No guest ever reported; all there is is a byte somewhere in the partition.
    let file = OpenOptions::new().write(true).open(node.device(&id)).unwrap();
    file.write_all_at(b"x", 512 << 20).unwrap();
    drop(file);
    calls.publish(&id, &target).await.unwrap();
    assert_eq!(node.entry(&target).unwrap().create, Create::Resume);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn destroy_only_in_delete_volume() {
    let node = Node::new();
    let mut daemon = node.start(None);
    let mut calls = Calls::new(daemon.channel());
    let id = calls.create("a", GIB).await.unwrap().volume_id;
    let (target, staging, device) = (node.path("pods/pod-1"), node.path("staging"), node.device(&id));
    let file = OpenOptions::new().write(true).open(&device).unwrap();
    file.write_all_at(b"832 GB", DiskLayout::PARTITION_START).unwrap();
    drop(file);
    let length = fs::metadata(&device).unwrap().len();
    for round in 0..3 {
        calls.stage(&id, &staging).await.unwrap();
        calls.publish(&id, &target).await.unwrap();
        if round == 1 {
            daemon.kill();
            daemon = node.start(None);
            calls = Calls::new(daemon.channel());
        }
        calls.unpublish(&id, &target).await.unwrap();
        calls.unpublish(&id, &target).await.unwrap();
        calls.unstage(&id, &staging).await.unwrap();
        calls.unstage(&id, &staging).await.unwrap();
        // A volume of that name again, larger: refused, and nothing done to the one there is.
        assert_eq!(calls.create("a", 2 * GIB).await.unwrap_err().code(), Code::AlreadyExists);
        let mut found = [0; 6];
        File::open(&device).unwrap().read_exact_at(&mut found, DiskLayout::PARTITION_START).unwrap();
        assert_eq!((&found, fs::metadata(&device).unwrap().len()), (b"832 GB", length));
    }
    calls.delete(&id).await.unwrap();
    calls.delete(&id).await.unwrap();
    assert!(!device.exists());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_kernel_at_a_time() {
    let node = Node::new();
    let daemon = node.start(None);
    let mut calls = Calls::new(daemon.channel());
    let id = calls.create("a", GIB).await.unwrap().volume_id;
    let (first, second) = (node.path("pods/pod-1"), node.path("pods/pod-2"));
    calls.publish(&id, &first).await.unwrap();

    let error = calls.publish(&id, &second).await.unwrap_err();
    assert_eq!(error.code(), Code::FailedPrecondition);
    for part in [id.as_str(), "node-1", first.to_str().unwrap(), "one pod at a time"] {
        assert!(error.message().contains(part), "{part}: {error}");
    }
    assert!(!second.exists() && node.entry(&second).is_none(), "nothing was made for the second pod");

    // The pod is gone, but its virtual machine still closes.
    let vmm = OpenOptions::new().read(true).write(true).open(node.device(&id)).unwrap();
    calls.unpublish(&id, &first).await.unwrap();
    let error = calls.publish(&id, &second).await.unwrap_err();
    assert_eq!(error.code(), Code::FailedPrecondition, "{error}");
    assert!(error.message().contains("virtual machine may still run"), "{error}");
    assert!(!second.exists() && node.entry(&second).is_none());
    let error = calls.delete(&id).await.unwrap_err();
    assert_eq!(error.code(), Code::FailedPrecondition, "{error}");
    assert!(node.device(&id).exists());

    // One that closes in time is waited for.
    let closing = tokio::spawn(async move {
        tokio::time::sleep(Duration::from_millis(700)).await;
        drop(vmm);
    });
    calls.publish(&id, &second).await.unwrap();
    closing.await.unwrap();
}

/// Somebody has changed the PersistentVolume while it was being published. INVALID_ARGUMENT would be kubelet's last word.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_call_that_became_invalid_does_not_hide_that_the_volume_is_published() {
    let node = Node::new();
    let daemon = node.start(None);
    let mut calls = Calls::new(daemon.channel());
    let id = calls.create("a", GIB).await.unwrap().volume_id;
    let target = node.path("pods/pod-1");
    let invalid = |target: &Path| csi::NodePublishVolumeRequest {
        volume_id: id.clone(),
        target_path: target.to_str().unwrap().into(),
        ..Default::default()
    };
    assert_eq!(calls.publish_as(invalid(&target)).await.unwrap_err().code(), Code::InvalidArgument);
    calls.publish(&id, &target).await.unwrap();
    let error = calls.publish_as(invalid(&target)).await.unwrap_err();
    assert_eq!(error.code(), Code::Unavailable, "{error}");
    assert!(error.message().contains("volume_capability"), "{error}");
    let elsewhere = calls.publish_as(invalid(&node.path("pods/pod-2"))).await.unwrap_err();
    assert_eq!(elsewhere.code(), Code::InvalidArgument, "{elsewhere}");
    calls.unpublish(&id, &target).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_falls_through_to_the_host() {
    let node = Node::new();
    let daemon = node.start(None);
    let mut calls = Calls::new(daemon.channel());
    let id = calls.create("a", GIB).await.unwrap().volume_id;
    let target = node.path("pods/pod-1");
    calls.publish(&id, &target).await.unwrap();
    assert_eq!(fs::write(target.join("x"), "x").unwrap_err().kind(), ErrorKind::ReadOnlyFilesystem);
    assert_eq!(fs::create_dir(target.join("subpath")).unwrap_err().kind(), ErrorKind::ReadOnlyFilesystem);
    // A target that has something in it is not covered up, and the failed publication keeps nobody out.
    let full = node.path("pods/full");
    fs::create_dir(&full).unwrap();
    rustix::mount::mount("x", &full, "tmpfs", rustix::mount::MountFlags::empty(), None).unwrap();
    let other = calls.create("b", GIB).await.unwrap().volume_id;
    assert_eq!(calls.publish(&other, &full).await.unwrap_err().code(), Code::Internal);
    assert!(node.entry(&full).is_none());
    calls.publish(&other, &node.path("pods/empty")).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_host_never_reads_a_tenants_bytes() {
    let node = Node::new();
    let daemon = node.start(None);
    let mut calls = Calls::new(daemon.channel());
    let id = calls.create("a", GIB).await.unwrap().volume_id;
    let (target, device) = (node.path("pods/pod-1"), node.device(&id));
    // A guest may leave anything: a table of another disk, labels of another pool, a file system for the host to mount.
    let hostile = vec![0xA5; 4 << 20];
    OpenOptions::new().write(true).open(&device).unwrap().write_all_at(&hostile, 0).unwrap();
    let read = |path: &Path| {
        let mut bytes = vec![0; 4 << 20];
        File::open(path).unwrap().read_exact_at(&mut bytes, 0).unwrap();
        bytes
    };
    calls.publish(&id, &target).await.unwrap();
    assert!(read(&device) == hostile, "not even the table is looked at");
    calls.unpublish(&id, &target).await.unwrap();
    // When the host must write its table, it writes that, blind, and nothing else.
    calls.expand(&id, 2 * GIB).await.unwrap();
    calls.publish(&id, &target).await.unwrap();
    let bytes = read(&device);
    let header = zpod_volume::gpt::decode(&bytes).unwrap();
    assert_eq!(header.disk_guid.to_string(), id);
    assert_eq!(header.partition_bytes, DiskLayout::partition_for(Bytes(2 * GIB as u64)).0);
    assert!(bytes[zpod_volume::gpt::PRIMARY_BYTES..] == hostile[zpod_volume::gpt::PRIMARY_BYTES..]);
}

/// One boot of a host, on directories and devices that outlive it.
async fn boot(dir: &Path, backing: &SimBacking, boot_id: &str) -> (Provisioner, NodeVolumes) {
    let (catalog, snapshots) = zpod_storage::catalog::dir::open(dir.join("state")).unwrap();
    let direct = DirectVolumes::open(&dir.join("direct-volumes")).unwrap();
    let context = Context::new(
        "node-1".into(),
        boot_id.into(),
        Arc::new(catalog),
        Arc::new(snapshots),
        Arc::new(backing.clone()),
    );
    (Provisioner::new(Arc::clone(&context)), NodeVolumes::load(context, direct).await.unwrap())
}

fn publish(id: VolumeId, target: &Path) -> PublishRequest {
    let pod = zpod_storage::catalog::PodRef { namespace: "ns".into(), name: "pod".into(), uid: "u-1".into() };
    PublishRequest { pod: Some(pod), ..PublishRequest::new(id, target) }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_publication_of_an_earlier_boot_is_over_and_one_of_this_boot_is_not() {
    let dir = tempfile::tempdir().unwrap();
    let backing = SimBacking::new(Bytes::gib(100), 1.0);
    let (first, second) = (dir.path().join("pod-1"), dir.path().join("pod-2"));
    let (provisioner, node) = boot(dir.path(), &backing, "boot-1").await;
    let id = provisioner.create(CreateRequest { name: "a".into(), ..CreateRequest::default() }).await.unwrap().id;
    node.publish(publish(id, &first)).await.unwrap();
    assert!(backing.write(id, DiskLayout::PARTITION_START, 4096));
    drop((provisioner, node));

    let (provisioner, node) = boot(dir.path(), &backing, "boot-1").await;
    let error = node.publish(publish(id, &second)).await.unwrap_err();
    assert!(matches!(error, VolumeError::Published { .. }) && error.to_string().contains("ns/pod"), "{error}");
    assert!(matches!(provisioner.delete(id).await, Err(VolumeError::Published { .. })));
    drop((provisioner, node));

    // The host restarted: its mounts and /run are gone, its disk and the records are not.
    rustix::mount::unmount(&first, rustix::mount::UnmountFlags::empty()).unwrap();
    fs::remove_dir_all(dir.path().join("direct-volumes")).unwrap();
    let (provisioner, node) = boot(dir.path(), &backing, "boot-2").await;
    node.publish(publish(id, &second)).await.unwrap();
    assert!(provisioner.get(id).await.unwrap().written, "what was written before the restart counts");
    node.unpublish(id, first.clone()).await.unwrap();
    assert!(!first.exists(), "the leftover of the earlier boot is cleared");
    assert!(second.exists(), "and the publication of this boot is not");
    node.unpublish(id, second.clone()).await.unwrap();
    provisioner.delete(id).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_path_has_one_volume_and_taking_back_another_does_nothing_to_it() {
    let dir = tempfile::tempdir().unwrap();
    let backing = SimBacking::new(Bytes::gib(100), 1.0);
    let (provisioner, node) = boot(dir.path(), &backing, "boot-1").await;
    let mut ids = Vec::new();
    for name in ["a", "b"] {
        ids.push(provisioner.create(CreateRequest { name: name.into(), ..Default::default() }).await.unwrap().id);
    }
    let target = dir.path().join("pod-1");
    node.publish(publish(ids[0], &target)).await.unwrap();
    let error = node.publish(publish(ids[1], &target)).await.unwrap_err();
    assert!(matches!(error, VolumeError::TargetTaken { by, .. } if by == ids[0]), "{error}");
    node.unpublish(ids[1], target.clone()).await.unwrap();
    assert!(target.exists());
    node.publish(publish(ids[0], &target)).await.unwrap();
    let other = PublishRequest { read_only: true, ..publish(ids[0], &target) };
    assert!(matches!(node.publish(other).await, Err(VolumeError::PublishedOtherwise { .. })));
    node.unpublish(ids[0], target.clone()).await.unwrap();
    assert!(!target.exists());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_failure_in_the_middle_keeps_no_name_and_no_pod_out() {
    let dir = tempfile::tempdir().unwrap();
    let backing = SimBacking::new(Bytes::gib(3), 1.0);
    let (provisioner, node) = boot(dir.path(), &backing, "boot-1").await;
    let request = |name: &str, size| CreateRequest {
        name: name.into(),
        range: zpod_driver::volumes::CapacityRange { required: Some(size), limit: None },
        ..Default::default()
    };
    let error = provisioner.create(request("big", Bytes::gib(4))).await.unwrap_err();
    assert!(error.to_string().contains("no room"), "{error}");
    // The name is free: a smaller one of that name is another volume, not a conflict.
    let id = provisioner.create(request("big", Bytes::gib(1))).await.unwrap().id;
    let error = provisioner
        .expand(id, zpod_driver::volumes::CapacityRange { required: Some(Bytes::gib(8)), limit: None })
        .await
        .unwrap_err();
    assert!(error.to_string().contains("no room"), "{error}");
    assert_eq!(provisioner.get(id).await.unwrap().capacity, Bytes::gib(1), "what was refused is not recorded");

    // Whatever call of the backing fails: publishing again works, and so does giving up.
    for nth in 1..6 {
        let target = dir.path().join(format!("pod-{nth}"));
        backing.fail_call(nth, ErrorKind::Other);
        let failed = node.publish(publish(id, &target)).await.is_err();
        backing.fail_call(u64::MAX, ErrorKind::Other);
        let other = dir.path().join(format!("other-{nth}"));
        if failed {
            assert!(!target.exists(), "call {nth}");
            node.publish(publish(id, &other)).await.unwrap();
            node.unpublish(id, other).await.unwrap();
        } else {
            node.unpublish(id, target).await.unwrap();
        }
    }
    provisioner.delete(id).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_volume_that_is_being_refused_stands_in_the_way_of_no_other_of_its_name() {
    let dir = tempfile::tempdir().unwrap();
    let backing = SimBacking::new(Bytes::gib(3), 1.0);
    let (provisioner, _node) = boot(dir.path(), &backing, "boot-1").await;
    let request = |size| CreateRequest {
        name: "a".into(),
        range: zpod_driver::volumes::CapacityRange { required: Some(size), limit: Some(size) },
        ..CreateRequest::default()
    };
    for round in 0..100 {
        let (big, small) =
            tokio::join!(provisioner.create(request(Bytes::gib(4))), provisioner.create(request(Bytes::gib(1))));
        // The small one was there first, or there was nothing.
        let small = small.unwrap_or_else(|error| panic!("round {round}: {error}"));
        assert!(matches!(big, Err(VolumeError::Exists { .. } | VolumeError::Backing { .. })), "{big:?}");
        provisioner.delete(small.id).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_snapshot_whose_removal_was_cut_short_can_be_taken_again() {
    let dir = tempfile::tempdir().unwrap();
    let backing = SimBacking::new(Bytes::gib(3), 1.0);
    let (provisioner, node) = boot(dir.path(), &backing, "boot-1").await;
    let volume = provisioner.create(CreateRequest { name: "a".into(), ..CreateRequest::default() }).await.unwrap().id;
    let snapshots = Snapshotter::new(node.context_shared());
    let alone = SnapshotRequest { name: "alone".into(), volume, allow_copy: false };
    let group = GroupRequest { name: "group".into(), volumes: vec![volume], allow_copy: false };
    let id = snapshots.create(alone.clone()).await.unwrap().id;
    let members = snapshots.create_group(group.clone()).await.unwrap();
    let group_id = members[0].group.as_ref().unwrap().id;
    for group_first in [true, false] {
        for of_group in [group_first, !group_first] {
            backing.fail_call(1, ErrorKind::Other);
            let removed = if of_group { snapshots.delete_group(group_id).await } else { snapshots.delete(id).await };
            removed.unwrap_err();
        }
        backing.fail_call(u64::MAX, ErrorKind::Other);
        assert!(snapshots.list(None, None, 10).await.unwrap().snapshots.is_empty());
        assert_eq!(snapshots.create(alone.clone()).await.unwrap().phase, SnapshotPhase::Ready);
        assert_eq!(snapshots.create_group(group.clone()).await.unwrap()[0].phase, SnapshotPhase::Ready);
    }
    snapshots.delete_group(group_id).await.unwrap();
    snapshots.delete(id).await.unwrap();
    assert_eq!(backing.snapshots(), []);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_snapshot_whose_full_copy_fails_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let backing = SimBacking::new(Bytes::gib(3), 1.0).without_sharing();
    let (provisioner, node) = boot(dir.path(), &backing, "boot-1").await;
    let volume = provisioner.create(CreateRequest { name: "a".into(), ..CreateRequest::default() }).await.unwrap().id;
    let snapshots = Snapshotter::new(node.context_shared());
    let mut failed = 0;
    for nth in 1..12 {
        backing.fail_call(nth, ErrorKind::Other);
        let taken = snapshots.create(SnapshotRequest { name: "s".into(), volume, allow_copy: true }).await;
        backing.fail_call(u64::MAX, ErrorKind::Other);
        match taken {
            Ok(snapshot) => drop(snapshots.delete(snapshot.id).await.unwrap()),
            Err(_) => failed += 1,
        }
        assert!(snapshots.list(None, None, 10).await.unwrap().snapshots.is_empty(), "call {nth}");
    }
    assert!(failed > 0);
    provisioner.delete(volume).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn told_to_end_zpod_finishes_its_calls_and_is_not_held_up_by_idle_connections() {
    let node = Node::new();
    let daemon = node.start(None);
    let mut calls = Calls::new(daemon.channel());
    let mut idle = Calls::new(daemon.channel());
    idle.capacity().await.unwrap();
    let id = calls.create("a", GIB).await.unwrap().volume_id;
    let target = node.path("pods/pod-1");
    // Waits for a virtual machine that closes after zpod was told to end.
    let vmm = File::open(node.device(&id)).unwrap();
    let (call_id, call_target) = (id.clone(), target.clone());
    let call = tokio::spawn(async move { calls.publish(&call_id, &call_target).await });
    tokio::time::sleep(Duration::from_millis(400)).await;
    let end = tokio::task::spawn_blocking(move || daemon.terminate());
    tokio::time::sleep(Duration::from_millis(400)).await;
    drop(vmm);
    call.await.unwrap().unwrap();
    assert!(end.await.unwrap().success());
    assert!(!node.path("csi.sock").exists());

    let daemon = node.start(None);
    let mut calls = Calls::new(daemon.channel());
    calls.unpublish(&id, &target).await.unwrap();
    calls.delete(&id).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_that_writes_past_its_partition_is_found_out() {
    let node = Node::new();
    let daemon = node.start(None);
    let mut calls = Calls::new(daemon.channel());
    let id = calls.create("a", GIB).await.unwrap().volume_id;
    let target = node.path("pods/pod-1");
    calls.publish(&id, &target).await.unwrap();
    let condition = |answer: zpod_proto::csi::NodeGetVolumeStatsResponse| answer.volume_condition.unwrap();
    assert!(!condition(calls.stats(&id, &target).await.unwrap()).abnormal);
    // As a hostile kernel may: all of the partition and 64 MiB behind it.
    let partition = DiskLayout::partition_for(Bytes(GIB as u64)).0;
    let file = OpenOptions::new().write(true).open(node.device(&id)).unwrap();
    let all = DiskLayout::PARTITION_START + partition + (64 << 20);
    rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::KEEP_SIZE, 0, all).unwrap();
    let condition = condition(calls.stats(&id, &target).await.unwrap());
    assert!(condition.abnormal && condition.message.contains("past its partition"), "{}", condition.message);
}
