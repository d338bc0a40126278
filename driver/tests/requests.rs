//! What bad input gets: the code of the CSI specification, a message that names the field and what is allowed, and
//! nothing created. Needs root, as the driver mounts.

#![allow(clippy::unwrap_used)]

#[path = "support/calls.rs"]
#[allow(dead_code)]
mod calls;
#[path = "support/daemon.rs"]
#[allow(dead_code)]
mod daemon;

use std::collections::HashMap;

use calls::{Calls, capability};
use daemon::Node;
use tonic::Code;
use zpod_proto::csi::volume_capability::access_mode::Mode;
use zpod_proto::csi::volume_capability::{AccessMode, AccessType, BlockVolume, MountVolume};
use zpod_proto::csi::{
    CapacityRange, CreateVolumeRequest, NodePublishVolumeRequest, Topology, TopologyRequirement, VolumeCapability,
    VolumeContentSource,
};

const MIB: i64 = 1 << 20;

fn map(pairs: &[(&str, &str)]) -> HashMap<String, String> {
    pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
}

fn mount(fs_type: &str, flags: &[&str], group: &str) -> VolumeCapability {
    let mount = MountVolume {
        fs_type: fs_type.into(),
        mount_flags: flags.iter().map(|flag| (*flag).to_owned()).collect(),
        volume_mount_group: group.into(),
    };
    VolumeCapability { access_type: Some(AccessType::Mount(mount)), ..capability() }
}

fn create() -> CreateVolumeRequest {
    CreateVolumeRequest { name: "bad".into(), volume_capabilities: vec![capability()], ..Default::default() }
}

fn sized(required_bytes: i64, limit_bytes: i64) -> CreateVolumeRequest {
    CreateVolumeRequest { capacity_range: Some(CapacityRange { required_bytes, limit_bytes }), ..create() }
}

fn with(capability: VolumeCapability) -> CreateVolumeRequest {
    CreateVolumeRequest { volume_capabilities: vec![capability], ..create() }
}

fn parameter(key: &str, value: &str) -> CreateVolumeRequest {
    CreateVolumeRequest { parameters: map(&[(key, value)]), ..create() }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bad_volume_is_refused_with_the_field_and_what_is_allowed_and_nothing_is_created() {
    let node = Node::new();
    let daemon = node.start(None);
    let mut calls = Calls::new(daemon.channel());
    let block = VolumeCapability { access_type: Some(AccessType::Block(BlockVolume {})), ..capability() };
    let neither = VolumeCapability { access_type: None, ..capability() };
    let both = CreateVolumeRequest { volume_capabilities: vec![capability(), block], ..create() };
    let shared =
        VolumeCapability { access_mode: Some(AccessMode { mode: Mode::MultiNodeMultiWriter.into() }), ..capability() };
    let elsewhere = Topology { segments: map(&[("csi.zpod.storage/node", "node-2")]) };
    let elsewhere = TopologyRequirement { requisite: vec![elsewhere], preferred: vec![] };
    let table = [
        (CreateVolumeRequest { name: String::new(), ..create() }, Code::InvalidArgument, "name: is missing"),
        (CreateVolumeRequest { name: "x".repeat(129), ..create() }, Code::InvalidArgument, "1 to 128 are allowed"),
        (CreateVolumeRequest { volume_capabilities: vec![], ..create() }, Code::InvalidArgument, "volume_capabilities"),
        (with(neither), Code::InvalidArgument, "access_type: is missing"),
        (both, Code::InvalidArgument, "volume_capabilities"),
        (with(shared), Code::InvalidArgument, "MULTI_NODE_MULTI_WRITER is not possible"),
        (with(mount("ext4", &[], "")), Code::InvalidArgument, "--default-fstype"),
        (
            with(mount("", &["discard"], "")),
            Code::InvalidArgument,
            "allowed are noatime, nodev, noexec, nosuid, ro, rw",
        ),
        (with(mount("", &[], "wheel")), Code::InvalidArgument, "volume_mount_group"),
        (sized(MIB, 0), Code::OutOfRange, "256 MiB is the smallest"),
        (sized(0, 100 * MIB), Code::OutOfRange, "256 MiB is the smallest"),
        (sized(i64::MAX, 0), Code::OutOfRange, "is the largest"),
        (sized(-5, 0), Code::InvalidArgument, "-5 is negative"),
        (sized(600 * MIB, 500 * MIB), Code::InvalidArgument, "is more than limit_bytes"),
        (sized(1 << 49, 0), Code::ResourceExhausted, "no room at"),
        (parameter("compresion", "lz4"), Code::InvalidArgument, "\"compresion\" is not known; allowed are"),
        (parameter("recordsize", "3K"), Code::InvalidArgument, "recordsize: \"3K\" is not allowed"),
        (
            CreateVolumeRequest { mutable_parameters: map(&[("speed", "fast")]), ..create() },
            Code::InvalidArgument,
            "\"speed\"",
        ),
        (
            CreateVolumeRequest { volume_content_source: Some(VolumeContentSource::default()), ..create() },
            Code::InvalidArgument,
            "names neither a snapshot nor a volume",
        ),
        (
            CreateVolumeRequest { accessibility_requirements: Some(elsewhere), ..create() },
            Code::ResourceExhausted,
            "csi.zpod.storage/node=node-1",
        ),
    ];
    for (request, code, message) in table {
        let error = calls.create_as(request).await.unwrap_err();
        assert_eq!(error.code(), code, "{error}");
        assert!(error.message().contains(message), "{message}: {error}");
    }
    assert_eq!(node.names("volumes"), [""; 0]);
    assert_eq!(node.names("state/volumes"), [""; 0]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bad_publication_is_refused_and_leaves_nothing() {
    let node = Node::new();
    let daemon = node.start(None);
    let mut calls = Calls::new(daemon.channel());
    let id = calls.create("a", 256 * MIB).await.unwrap().volume_id;
    let target = node.path("pods/pod-1").to_str().unwrap().to_owned();
    let good = NodePublishVolumeRequest {
        volume_id: id.clone(),
        target_path: target.clone(),
        volume_capability: Some(capability()),
        ..Default::default()
    };
    let long = format!("{target}{}", "x".repeat(200));
    let table = [
        (NodePublishVolumeRequest { volume_id: String::new(), ..good.clone() }, Code::InvalidArgument, "volume_id"),
        (NodePublishVolumeRequest { target_path: String::new(), ..good.clone() }, Code::InvalidArgument, "target_path"),
        (
            NodePublishVolumeRequest { volume_capability: None, ..good.clone() },
            Code::InvalidArgument,
            "volume_capability",
        ),
        (NodePublishVolumeRequest { target_path: "pods/x".into(), ..good.clone() }, Code::InvalidArgument, "absolute"),
        (NodePublishVolumeRequest { target_path: long, ..good.clone() }, Code::InvalidArgument, "at most 189"),
        (NodePublishVolumeRequest { volume_id: "nope".into(), ..good.clone() }, Code::NotFound, "does not exist"),
        (
            NodePublishVolumeRequest {
                volume_context: map(&[("csi.storage.k8s.io/ephemeral", "true")]),
                ..good.clone()
            },
            Code::InvalidArgument,
            "not what kubelet calls an inline volume",
        ),
    ];
    for (request, code, message) in table {
        let error = calls.publish_as(request).await.unwrap_err();
        assert_eq!(error.code(), code, "{error}");
        assert!(error.message().contains(message), "{message}: {error}");
    }
    assert_eq!(node.names("pods"), [""; 0]);
    assert_eq!(node.names("direct-volumes"), [""; 0]);

    // What a good one carries arrives at the guest.
    let flags = mount("zfs", &["nosuid", "ro"], "2000");
    calls.publish_as(NodePublishVolumeRequest { volume_capability: Some(flags), ..good }).await.unwrap();
    let spec = node.entry(target.as_ref()).unwrap();
    assert!(spec.read_only);
    assert_eq!(spec.fs_group, Some(2000));
    assert_eq!(spec.mount_flags.len(), 1);
    assert_eq!(spec.dataset_properties["compression"], "lz4");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sizes_are_exact_lists_are_paged_and_room_goes_down_with_what_is_promised() {
    let node = Node::new();
    let daemon = node.start(None);
    let mut calls = Calls::new(daemon.channel());
    let before = calls.capacity().await.unwrap();
    assert_eq!(before.minimum_volume_size, Some(256 * MIB));
    let mut ids = Vec::new();
    for name in ["a", "b", "c", "d", "e"] {
        let volume = calls.create(name, 1000 * MIB + 1).await.unwrap();
        assert_eq!(volume.capacity_bytes, 1000 * MIB + 1);
        assert_eq!(volume.accessible_topology[0].segments["csi.zpod.storage/node"], "node-1");
        ids.push(volume.volume_id);
    }
    assert_eq!(calls.create("a", 1000 * MIB + 1).await.unwrap().volume_id, ids[0], "one name, one volume");
    let after = calls.capacity().await.unwrap();
    // A pool has whole metaslabs, of 4 GiB here: what fits goes down in steps of that.
    assert!(after.available_capacity <= before.available_capacity - 3 * 1000 * MIB, "{before:?} {after:?}");

    ids.sort();
    let (mut token, mut listed) = (String::new(), Vec::new());
    loop {
        let page = calls.list(2, &token).await.unwrap();
        assert!(page.entries.len() <= 2);
        listed.extend(page.entries.into_iter().map(|entry| entry.volume.unwrap().volume_id));
        token = page.next_token;
        if token.is_empty() {
            break;
        }
    }
    assert_eq!(listed, ids);
    assert_eq!(calls.list(0, "nonsense").await.unwrap_err().code(), Code::Aborted);
    assert_eq!(calls.list(-1, "").await.unwrap_err().code(), Code::InvalidArgument);

    assert_eq!(calls.expand(&ids[0], 1500 * MIB + 7).await.unwrap(), 1500 * MIB + 7);
    assert_eq!(calls.expand(&ids[0], 300 * MIB).await.unwrap(), 1500 * MIB + 7, "never smaller");
    assert_eq!(calls.expand(&ids[0], 1 << 49).await.unwrap_err().code(), Code::ResourceExhausted);
    assert_eq!(calls.expand("nope", 300 * MIB).await.unwrap_err().code(), Code::NotFound);
    calls.delete("nope").await.unwrap();
}
