//! zpod starts, takes publications back and deletes where nothing new can be made: with a full disk that has its records
//! as well, and without its directory. Root is needed, for mounts in a mount namespace of the tests' own.
#![allow(clippy::unwrap_used)]

#[path = "support/calls.rs"]
#[allow(dead_code)]
mod calls;
#[path = "support/daemon.rs"]
#[allow(dead_code)]
mod daemon;
#[path = "support/own_mounts.rs"]
mod own_mounts;
#[path = "support/xfs.rs"]
mod xfs;

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::time::Duration;

use calls::{Calls, capability};
use daemon::{Daemon, Node};
use rustix::mount::MountFlags;
use tonic::{Code, Status};
use zpod_proto::csi::controller_client::ControllerClient;
use zpod_proto::csi::identity_client::IdentityClient;
use zpod_proto::csi::{
    CapacityRange, CreateSnapshotRequest, CreateVolumeRequest, DeleteSnapshotRequest, GetCapacityRequest, ProbeRequest,
};
use zpod_storage::backing::file::FileBacking;
use zpod_storage::backing::{Backing as _, Outcome};
use zpod_volume::{SnapshotId, VolumeId};

const MIB: i64 = 1 << 20;

#[test]
fn on_a_full_disk_it_starts_and_takes_back_and_deletes() {
    own_mounts::in_own_mounts("full");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "what another test runs in a mount namespace of its own"]
async fn full() {
    let node = Node::new();
    xfs::mount(&node.path("volumes"), 600 << 20);
    fs::create_dir(node.path("volumes/.state")).unwrap();
    std::os::unix::fs::symlink(node.path("volumes/.state"), node.path("state")).unwrap();
    let target = node.path("pods").join("pod-1");
    let daemon = node.start(None);
    let mut calls = Calls::new(daemon.channel());
    let [a, b] = [calls.create("a", 256 * MIB).await.unwrap(), calls.create("b", 256 * MIB).await.unwrap()];
    calls.publish(&a.volume_id, &target).await.unwrap();
    let snapshot = CreateSnapshotRequest {
        source_volume_id: b.volume_id.clone(),
        name: "s".into(),
        ..CreateSnapshotRequest::default()
    };
    let mut controller = ControllerClient::new(daemon.channel());
    let snapshot = controller.create_snapshot(snapshot).await.unwrap().into_inner().snapshot.unwrap();
    daemon.kill();

    fill(&node.path("volumes/filler"));
    let daemon = node.start(None);
    let mut calls = Calls::new(daemon.channel());
    assert!(ready(&daemon).await.unwrap());
    assert_eq!(calls.capacity().await.unwrap().available_capacity, 0);
    let status = calls.create("c", 256 * MIB).await.unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted, "{status:?}");
    calls.unpublish(&a.volume_id, &target).await.unwrap();
    let request = DeleteSnapshotRequest { snapshot_id: snapshot.snapshot_id, ..Default::default() };
    ControllerClient::new(daemon.channel()).delete_snapshot(request).await.unwrap();
    for volume in [&a, &b] {
        calls.delete(&volume.volume_id).await.unwrap();
    }
    assert_eq!(calls.list(0, "").await.unwrap().entries.len(), 0);

    // Without a restart.
    fs::remove_file(node.path("volumes/filler")).unwrap();
    until(async || calls.create("c", 256 * MIB).await.is_ok()).await;
    daemon.kill();
}

#[test]
fn on_a_read_only_file_system_what_is_not_there_is_removed_already() {
    own_mounts::in_own_mounts("read_only");
}

#[test]
#[ignore = "what another test runs in a mount namespace of its own"]
fn read_only() {
    let node = Node::new();
    let at = node.path("volumes");
    xfs::mount(&at, 300 << 20);
    fs::write(at.join(format!("{}.snap", SnapshotId::from_name("there"))), "").unwrap();
    rustix::mount::mount_remount(&at, MountFlags::RDONLY, "").unwrap();
    let backing = FileBacking::open(&at, 1.0).unwrap();
    assert_eq!(backing.destroy(VolumeId::from_name("not there")).unwrap(), Outcome::Unchanged);
    assert_eq!(backing.destroy_snapshot(SnapshotId::from_name("not there")).unwrap(), Outcome::Unchanged);
    backing.destroy_snapshot(SnapshotId::from_name("there")).unwrap_err();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_its_directory_it_starts_and_takes_back_and_goes_on_when_that_is_there() {
    let node = Node::new();
    let target = node.path("pods").join("pod-1");
    let daemon = node.start(None);
    let mut calls = Calls::new(daemon.channel());
    let volume = calls.create("a", 256 * MIB).await.unwrap();
    calls.publish(&volume.volume_id, &target).await.unwrap();
    daemon.kill();
    fs::rename(node.path("volumes"), node.path("aside")).unwrap();
    let daemon = node.start(None);
    let mut calls = Calls::new(daemon.channel());
    assert!(ready(&daemon).await.unwrap(), "another start would not bring it back");
    assert_eq!(calls.capacity().await.unwrap().available_capacity, 0);
    calls.unpublish(&volume.volume_id, &target).await.unwrap();
    for status in [
        calls.publish(&volume.volume_id, &target).await.unwrap_err(),
        calls.delete(&volume.volume_id).await.unwrap_err(),
        calls.create("b", 256 * MIB).await.map(drop).unwrap_err(),
    ] {
        assert_eq!(status.code(), Code::Unavailable, "{status:?}");
        assert!(status.message().contains(node.path("volumes").to_str().unwrap()), "{status:?}");
    }
    assert!(!node.path("volumes").exists(), "nothing is made in its place");
    fs::rename(node.path("aside"), node.path("volumes")).unwrap();
    until(async || calls.publish(&volume.volume_id, &target).await.is_ok()).await;
    calls.unpublish(&volume.volume_id, &target).await.unwrap();
    calls.delete(&volume.volume_id).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_creation_that_failed_or_was_cut_short_leaves_its_name_to_another_class() {
    let node = Node::new();
    let daemon = node.start(None);
    let mut calls = Calls::new(daemon.channel());
    let wanted = |headroom: &str| CreateVolumeRequest {
        name: "a".into(),
        capacity_range: Some(CapacityRange { required_bytes: 256 * MIB, limit_bytes: 0 }),
        volume_capabilities: vec![capability()],
        parameters: [("headroom".to_owned(), headroom.to_owned())].into(),
        ..CreateVolumeRequest::default()
    };
    // What is in the way of its file is an error of the operating system, and says nothing about room.
    let id = zpod_volume::VolumeId::from_name("a");
    let obstacle = node.path("volumes").join(format!(".{id}.tmp"));
    fs::create_dir(&obstacle).unwrap();
    let status = calls.create_as(wanted("8x")).await.unwrap_err();
    assert_eq!(status.code(), Code::Internal, "{status:?}");
    assert_eq!(node.names("state/volumes"), Vec::<String>::new(), "no record stays");
    fs::remove_dir(&obstacle).unwrap();
    let made = calls.create_as(wanted("2x")).await.unwrap();

    // A record of a creation that was cut short before there was a device, as an earlier process may have left it.
    daemon.kill();
    fs::remove_file(node.device(&made.volume_id)).unwrap();
    let path = node.path("state/volumes").join(format!("{id}.json"));
    let record = fs::read_to_string(&path).unwrap().replace("\"Ready\"", "\"Creating\"");
    fs::write(&path, record).unwrap();
    let daemon = node.start(None);
    let mut calls = Calls::new(daemon.channel());
    // Whether or not it is collected by now.
    calls.create_as(wanted("4x")).await.unwrap();
    // The same with a device: it is listed, and can be deleted.
    daemon.kill();
    let record = fs::read_to_string(&path).unwrap().replace("\"Ready\"", "\"Creating\"");
    fs::write(&path, record).unwrap();
    let daemon = node.start(None);
    let mut calls = Calls::new(daemon.channel());
    until(async || calls.list(0, "").await.unwrap().entries.len() == 1).await;
    calls.delete(&made.volume_id).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_room_is_offered_for_mirrors_where_there_are_none() {
    let node = Node::new();
    let daemon = node.start(None);
    let ask = async |vdevs: &str| {
        let parameters = [("vdevs".to_owned(), vdevs.to_owned())].into();
        let request = GetCapacityRequest { parameters, ..GetCapacityRequest::default() };
        ControllerClient::new(daemon.channel()).get_capacity(request).await.unwrap().into_inner()
    };
    assert!(ask("single").await.available_capacity > 0);
    let mirrors = ask("mirror-2").await;
    assert_eq!((mirrors.available_capacity, mirrors.maximum_volume_size), (0, Some(0)));
}

async fn ready(daemon: &Daemon) -> Result<bool, Status> {
    let answer = IdentityClient::new(daemon.channel()).probe(ProbeRequest {}).await?;
    Ok(answer.into_inner().ready.unwrap_or_default())
}

/// Takes all the space there is, to the last block.
fn fill(path: &Path) {
    let file = File::create(path).unwrap();
    let mut at = 0;
    for size in [MIB as u64, 64 << 10, 4096, 512, 1] {
        while file.write_all_at(&vec![1; size as usize], at).is_ok() {
            at += size;
        }
    }
    let _ = file.sync_all();
}

/// Waits until something is so.
async fn until(mut is_so: impl AsyncFnMut() -> bool) {
    for _ in 0..1200 {
        if is_so().await {
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("it was not to be");
}
