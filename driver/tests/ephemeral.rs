//! Inline volumes as kubelet asks for them: made when they are published, gone when they are unpublished, with a kill
//! between any two steps.
//!
//! `cargo test -p zpod-driver --features crash-points --test ephemeral`. Needs root, as the driver mounts.

#![allow(clippy::unwrap_used)]

#[path = "support/calls.rs"]
#[allow(dead_code)]
mod calls;
#[path = "support/daemon.rs"]
#[allow(dead_code)]
mod daemon;
#[cfg(feature = "crash-points")]
#[path = "support/kills.rs"]
mod kills;
#[path = "support/mortal.rs"]
mod mortal;

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use calls::{Calls, capability};
use daemon::Node;
use mortal::Mortal;
use tonic::{Code, Status};
use zpod_proto::csi::NodePublishVolumeRequest;
use zpod_proto::csi::volume_capability::{AccessType, BlockVolume};
use zpod_volume::{Bytes, Create, DiskLayout, VolumeId};

const TENANTS_BYTES: &[u8] = b"the tenant's bytes";

fn handle() -> String {
    format!("csi-{}", "5e".repeat(32))
}

fn request(target: &Path, attributes: &[(&str, &str)]) -> NodePublishVolumeRequest {
    let kubelet = [
        ("csi.storage.k8s.io/ephemeral", "true"),
        ("csi.storage.k8s.io/pod.name", "scratch"),
        ("csi.storage.k8s.io/pod.namespace", "prod"),
        ("csi.storage.k8s.io/pod.uid", "u-1"),
    ];
    let context: HashMap<_, _> =
        kubelet.iter().chain(attributes).map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
    NodePublishVolumeRequest {
        volume_id: handle(),
        target_path: target.to_str().unwrap().into(),
        volume_capability: Some(capability()),
        volume_context: context,
        ..Default::default()
    }
}

fn device(node: &Node) -> std::path::PathBuf {
    node.device(&VolumeId::from_name(&handle()).to_string())
}

fn nothing_is_left(node: &Node, context: &str) {
    for dir in ["volumes", "state/volumes", "direct-volumes", "pods"] {
        assert_eq!(node.names(dir), [""; 0], "{context}: {dir} is not empty\n{}", node.log());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_inline_volume_is_of_the_size_and_the_properties_its_pod_asks_for() {
    let node = Node::new();
    let daemon = node.start(None);
    let mut calls = Calls::new(daemon.channel());
    let target = node.path("pods/pod-1");
    let wanted = request(&target, &[("size", "300Mi"), ("compression", "zstd")]);
    for _ in 0..3 {
        calls.publish_as(wanted.clone()).await.unwrap();
    }
    let spec = node.entry(&target).unwrap();
    assert_eq!((spec.capacity, spec.create), (Bytes::mib(300), Create::Fresh));
    assert_eq!(spec.dataset_properties["compression"], "zstd");
    let partition = DiskLayout::partition_for(Bytes::mib(300));
    assert_eq!(device(&node).metadata().unwrap().len(), DiskLayout::disk_for(partition).0, "it has no headroom");
    let stats = calls.stats(&handle(), &target).await.unwrap();
    assert_eq!(stats.usage[0].total, 300 << 20);

    // Another pod does not get it, and a path where it is not does not end it.
    let other = node.path("pods/pod-2");
    let error = calls.publish_as(request(&other, &[("size", "300Mi"), ("compression", "zstd")])).await.unwrap_err();
    assert_eq!(error.code(), Code::FailedPrecondition, "{error}");
    calls.unpublish(&handle(), &other).await.unwrap();
    assert!(device(&node).exists() && node.entry(&target).is_some());

    // Nor does unpublishing while a virtual machine has it.
    let machine = File::open(device(&node)).unwrap();
    assert_eq!(calls.unpublish(&handle(), &target).await.unwrap_err().code(), Code::FailedPrecondition);
    assert!(device(&node).exists());
    drop(machine);
    for _ in 0..2 {
        calls.unpublish(&handle(), &target).await.unwrap();
    }
    nothing_is_left(&node, "unpublished");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_inline_volume_ends_though_its_path_is_another_volumes_by_then() {
    let node = Node::new();
    let daemon = node.start(None);
    let mut calls = Calls::new(daemon.channel());
    let target = node.path("pods/pod-1");
    calls.publish_as(request(&target, &[])).await.unwrap();
    let machine = File::open(device(&node)).unwrap();
    assert_eq!(calls.unpublish(&handle(), &target).await.unwrap_err().code(), Code::FailedPrecondition);
    let other = calls.create("other", 256 << 20).await.unwrap().volume_id;
    calls.publish(&other, &target).await.unwrap();
    drop(machine);
    calls.unpublish(&handle(), &target).await.unwrap();
    assert!(!device(&node).exists(), "nobody comes for it any more");
    assert_eq!(node.entry(&target).unwrap().id.to_string(), other);
    calls.unpublish(&other, &target).await.unwrap();
    calls.delete(&other).await.unwrap();
    nothing_is_left(&node, "deleted");
}

/// One after the other: kubelet names each of a pod's volumes.
fn numbered(node: &Node, number: u32, namespace: &str, pod: &str) -> NodePublishVolumeRequest {
    let target = node.path("pods").join(format!("{pod}-{number}"));
    let mut request = request(&target, &[("size", "256Mi")]);
    request.volume_id = format!("csi-{number:064x}");
    for (key, value) in [("namespace", namespace), ("name", pod), ("uid", pod)] {
        request.volume_context.insert(format!("csi.storage.k8s.io/pod.{key}"), value.to_owned());
    }
    request
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pod_and_a_namespace_have_their_part_of_a_node_and_leave_others_theirs() {
    let mut node = Node::new();
    node.arguments = vec!["--ephemeral-pod-count=2", "--ephemeral-namespace-count=3", "--ephemeral-pod-size=600Mi"];
    let mut daemon = node.start(None);
    for again in [false, true] {
        let mut calls = Calls::new(daemon.channel());
        for (number, pod) in [(1, "evil-1"), (2, "evil-1"), (3, "evil-2")] {
            calls.publish_as(numbered(&node, number, "evil", pod)).await.unwrap();
        }
        for (number, pod, want) in [(4, "evil-1", "pod evil/evil-1 has 2"), (5, "evil-3", "namespace \"evil\" has 3")] {
            let error = calls.publish_as(numbered(&node, number, "evil", pod)).await.unwrap_err();
            assert_eq!(error.code(), Code::ResourceExhausted, "{error}");
            assert!(error.message().contains(want) && error.message().contains("PersistentVolumeClaim"), "{error}");
        }
        let mut large = numbered(&node, 6, "prod", "db");
        large.volume_context.insert("size".into(), "601Mi".into());
        let error = calls.publish_as(large).await.unwrap_err();
        assert!(error.message().contains("of 600 MiB together"), "{error}");
        let victim = numbered(&node, 7, "prod", "db");
        calls.publish_as(victim.clone()).await.unwrap();
        calls.unpublish(&victim.volume_id, Path::new(&victim.target_path)).await.unwrap();
        // What is known of them outlives zpod.
        if !again {
            daemon.kill();
            daemon = node.start(None);
        }
    }
    let mut calls = Calls::new(daemon.channel());
    let ended = numbered(&node, 1, "evil", "evil-1");
    calls.unpublish(&ended.volume_id, Path::new(&ended.target_path)).await.unwrap();
    calls.publish_as(numbered(&node, 4, "evil", "evil-1")).await.unwrap();
    for (number, pod) in [(2, "evil-1"), (3, "evil-2"), (4, "evil-1")] {
        let there = numbered(&node, number, "evil", pod);
        calls.unpublish(&there.volume_id, Path::new(&there.target_path)).await.unwrap();
    }
    nothing_is_left(&node, "ended");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_can_not_be_had_inline_is_refused_and_leaves_nothing() {
    let node = Node::new();
    let daemon = node.start(None);
    let mut calls = Calls::new(daemon.channel());
    let target = node.path("pods/pod-1");
    let block = || Some(AccessType::Block(BlockVolume {}));
    let mut device = request(&target, &[]);
    device.volume_capability = Some(zpod_proto::csi::VolumeCapability { access_type: block(), ..capability() });
    let table = [
        (request(&target, &[("size", "1Mi")]), Code::OutOfRange, "256 MiB is the smallest"),
        (request(&target, &[("size", "17Gi")]), Code::InvalidArgument, "16 GiB at most"),
        (request(&target, &[("sise", "1Gi")]), Code::InvalidArgument, "\"sise\" is not known"),
        (request(&target, &[("headroom", "2x")]), Code::InvalidArgument, "does not grow"),
        // Without its key, which would come from the pod's nodePublishSecretRef.
        (request(&target, &[("encryption", "aes-256-gcm")]), Code::InvalidArgument, "is encrypted"),
        (device, Code::InvalidArgument, "volumeMode"),
    ];
    for (request, code, message) in table {
        let error = calls.publish_as(request).await.unwrap_err();
        assert_eq!(error.code(), code, "{error}");
        assert!(error.message().contains(message), "{message}: {error}");
        nothing_is_left(&node, message);
    }

    // What fails when the volume is made already: something foreign is where it is to appear.
    fs::write(&target, "precious").unwrap();
    let error = calls.publish_as(request(&target, &[])).await.unwrap_err();
    assert_eq!(error.code(), Code::Internal, "{error}");
    assert_eq!(fs::read(&target).unwrap(), b"precious");
    fs::remove_file(&target).unwrap();
    nothing_is_left(&node, "an occupied target path");

    // What a tenant writes is as long as it likes, and neither answer nor log are.
    let long = "\u{e9}".repeat(1 << 19);
    for attribute in [("size", long.as_str()), ("compression", &long), (&long, "x")] {
        let error = calls.publish_as(request(&target, &[attribute])).await.unwrap_err();
        assert_eq!(error.code(), Code::InvalidArgument, "{error}");
        assert!(error.message().contains("(1048576 bytes)") && error.message().len() < 4096, "{error}");
    }
    let longest = node.log().lines().map(str::len).max();
    assert!(longest < Some(4096), "a line of {longest:?} bytes is in the log");

    // A volume of that name that is none for a pod is not taken for one.
    let id = calls.create(&handle(), 256 << 20).await.unwrap().volume_id;
    let error = calls.publish_as(request(&target, &[("size", "256Mi")])).await.unwrap_err();
    assert_eq!(error.code(), Code::AlreadyExists, "{error}");
    calls.unpublish(&handle(), &target).await.unwrap();
    assert!(node.device(&id).exists());
}

/// One life with a kill at the Nth point and, to make it worse, at another soon after. Whether it was killed.
async fn live(at: u64, again: Option<u64>) -> bool {
    let node = Node::new();
    let target = node.path("pods/pod-1");
    let mut zpod = Mortal::start(&node, at, again);
    let mut step = 0;
    while step < 4 {
        let context = format!("point {at}, again {again:?}, step {step}");
        let calls = &mut zpod.calls;
        let done: Result<(), Status> = match step {
            0 | 2 => calls.publish_as(request(&target, &[("size", "256Mi"), ("provisioning", "thick")])).await,
            1 => {
                let file = OpenOptions::new().write(true).open(device(&node)).unwrap();
                file.write_all_at(TENANTS_BYTES, DiskLayout::PARTITION_START).unwrap();
                file.sync_all().unwrap();
                Ok(())
            }
            _ => calls.unpublish(&handle(), &target).await,
        };
        if zpod.lived(done, &context).is_none() {
            continue;
        }
        // Kubelet repeats its call as long as the pod lives.
        if step == 2 {
            let mut found = vec![0; TENANTS_BYTES.len()];
            File::open(device(&node)).unwrap().read_exact_at(&mut found, DiskLayout::PARTITION_START).unwrap();
            assert_eq!(found, TENANTS_BYTES, "{context}");
        }
        step += 1;
    }
    nothing_is_left(&node, &format!("point {at}, again {again:?}"));
    zpod.killed
}

#[cfg(feature = "crash-points")]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_inline_volume_survives_a_kill_between_any_two_steps_and_leaves_nothing_at_its_end() {
    assert!(kills::at_each_point(live).await > 15, "no crash point was reached");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_inline_volume_lives_its_life() {
    assert!(!live(u64::MAX, None).await);
}
