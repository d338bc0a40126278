use super::*;
use crate::machine::simulated::{self, Kill, SimMachine};
use crate::ttrpc::REQUEST;
use prost::Message as _;
use tokio::io::DuplexStream;
use tokio::net::UnixListener;
use uuid::Uuid;
use zpod_proto::agent::{self, CreateContainerRequest, RemoveContainerRequest, Storage, VolumeStatsRequest};
use zpod_proto::agent::{VolumeStatsResponse, volume_usage::Unit};
use zpod_proto::ttrpc::{Request, Response, Status};
use zpod_volume::{Bytes, Create, DiskLayout, Headroom, VolumeId, VolumeMode, VolumeSpec};

struct World {
    volumes: Arc<Volumes<SimMachine>>,
    listener: UnixListener,
    proxy: Arc<Proxy<SimMachine>>,
    _directory: tempfile::TempDir,
}

struct Session {
    host: DuplexStream,
    agent: UnixStream,
}

fn world(names: &[&str]) -> World {
    let layout = DiskLayout::new(Bytes::gib(1), Headroom::default());
    let disk = |name: &&str| simulated::disk(name, VolumeId::from_name(name), layout.partition, layout.disk);
    world_of(names.iter().map(disk).collect())
}

fn world_of(disks: Vec<simulated::SimDisk>) -> World {
    let disks = Arc::new(Mutex::new(disks));
    let volumes = Volumes::new(SimMachine::new(&disks, Kill::Never), "/base");
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("agent.sock");
    let listener = UnixListener::bind(&path).unwrap();
    World { proxy: Proxy::new(Arc::clone(&volumes), path), volumes, listener, _directory: directory }
}

impl World {
    async fn session(&self) -> Session {
        let (host, inside) = tokio::io::duplex(1 << 16);
        tokio::spawn(Arc::clone(&self.proxy).serve(inside));
        let (agent, _) = self.listener.accept().await.unwrap();
        Session { host, agent }
    }
}

impl Session {
    async fn send(&mut self, stream: u32, method: &str, payload: Vec<u8>) {
        let frame = request(stream, method, payload, 0);
        self.host.write_all(&frame).await.unwrap();
    }

    async fn answer(&mut self, stream: u32, code: i32, message: &str) {
        let status = Some(Status { code, message: message.into() });
        let response = Response { status, payload: vec![9; 3] }.encode_to_vec();
        let header = Header { length: 0, stream, kind: ttrpc::RESPONSE, flags: 0 };
        self.agent.write_all(&header.frame(&response)).await.unwrap();
    }

    async fn at_agent(&mut self) -> (Header, Request) {
        let (header, payload) = read_frame(&mut self.agent).await;
        (header, Request::decode(&payload[..]).unwrap())
    }

    async fn at_host(&mut self) -> (u32, i32, String) {
        let (header, payload) = read_frame(&mut self.host).await;
        assert_eq!(header.kind, ttrpc::RESPONSE);
        let status = Response::decode(&payload[..]).unwrap().status.unwrap();
        (header.stream, status.code, status.message)
    }

    /// The first call of a session: a container that the agent makes.
    async fn created(&mut self, container: &str, volumes: &[&str]) {
        self.send(1, "CreateContainer", create(container, volumes)).await;
        self.at_agent().await;
        self.answer(1, 0, "").await;
        self.at_host().await;
    }

    /// Nothing has come through to the agent.
    async fn nothing_at_agent(&mut self) {
        let mut byte = [0];
        let read = tokio::time::timeout(Duration::from_millis(50), self.agent.read(&mut byte)).await;
        assert!(read.is_err(), "{read:?}");
    }
}

async fn read_frame(from: &mut (impl AsyncRead + Unpin)) -> (Header, Vec<u8>) {
    let header = read_header(from).await.unwrap().unwrap();
    let mut payload = Vec::new();
    read_to(from, &mut payload, header.length as usize).await.unwrap();
    (header, payload)
}

fn request(stream: u32, method: &str, payload: Vec<u8>, timeout_nano: i64) -> Vec<u8> {
    let request =
        Request { service: agent::SERVICE.into(), method: method.into(), payload, timeout_nano, metadata: vec![] };
    Header { length: 0, stream, kind: REQUEST, flags: 0 }.frame(&request.encode_to_vec())
}

fn storage(name: &str) -> Storage {
    let id = VolumeId::from_name(name);
    let spec = VolumeSpec::new(id, Uuid::from_u128(7), Create::Fresh, Bytes::gib(1));
    Storage {
        fstype: "zfs".into(),
        mount_point: format!("/run/{name}"),
        options: vec!["ro".into(), spec.to_option()],
        ..Storage::default()
    }
}

fn create(container: &str, names: &[&str]) -> Vec<u8> {
    let storages = names.iter().map(|name| storage(name)).collect();
    CreateContainerRequest { container_id: container.into(), storages, ..CreateContainerRequest::default() }
        .encode_to_vec()
}

fn remove(container: &str) -> Vec<u8> {
    RemoveContainerRequest { container_id: container.into(), timeout: 0 }.encode_to_vec()
}

#[tokio::test]
async fn a_container_gets_its_volume_before_the_agent_hears_of_it() {
    let world = world(&["a"]);
    let mut session = world.session().await;
    session.send(1, "CreateContainer", create("c1", &["a"])).await;
    let (header, seen) = session.at_agent().await;
    assert_eq!(header.stream, 1);
    assert_eq!(seen.payload, create("c1", &[]));
    let mounts = world.volumes.machine().mounts();
    let (_, _, flags) = mounts.iter().find(|(at, ..)| at.ends_with("run/a")).unwrap();
    assert!(flags.read_only && mounts.len() == 2);
    session.answer(1, 0, "").await;
    assert_eq!(session.at_host().await, (1, 0, String::new()));

    session.send(3, "RemoveContainer", remove("c1")).await;
    assert_eq!(session.at_agent().await.1.payload, remove("c1"));
    assert_eq!(world.volumes.machine().imported().len(), 1, "the container is still there");
    session.answer(3, 0, "").await;
    assert_eq!(session.at_host().await.0, 3);
    assert_eq!(world.volumes.machine().imported().len(), 0, "exported before the answer");
}

/// A container with the disks at `02/01`, `02/02`, ... as devices.
fn create_with_devices(container: &str, count: usize, major: i64) -> Vec<u8> {
    let device = |at: usize| agent::Device {
        id: format!("02/{:02x}", at + 1),
        r#type: "blk".into(),
        container_path: format!("/dev/x{at}"),
        ..Default::default()
    };
    let node = |at: usize| agent::LinuxDevice {
        path: format!("/dev/x{at}"),
        r#type: "b".into(),
        major,
        minor: 16 * at as i64,
        ..Default::default()
    };
    let linux = agent::Linux { devices: (0..count).map(node).collect(), ..Default::default() };
    CreateContainerRequest {
        container_id: container.into(),
        devices: (0..count).map(device).collect(),
        oci: Some(agent::Spec { linux: Some(linux), ..Default::default() }),
        ..CreateContainerRequest::default()
    }
    .encode_to_vec()
}

#[tokio::test]
async fn a_container_gets_the_zvol_for_a_disk_of_ours_and_a_strangers_disk_as_it_is() {
    let layout = DiskLayout::new(Bytes::gib(1), Headroom::default());
    let disk = |name: &str| simulated::disk(name, VolumeId::from_name(name), layout.partition, layout.disk);
    let (mut ours, mut stranger) = (disk("a"), disk("b"));
    let spec = VolumeSpec::new(VolumeId::from_name("a"), Uuid::from_u128(7), Create::Fresh, Bytes::gib(1));
    ours.note(&VolumeSpec { mode: VolumeMode::Block, ..spec });
    stranger.scribble(512);
    let world = world_of(vec![ours, stranger]);
    let mut session = world.session().await;
    // An init container and the container after it overlap: the pool stays.
    for (stream, container) in [(1, "init"), (3, "app")] {
        session.send(stream, "CreateContainer", create_with_devices(container, 2, 7)).await;
        let seen = CreateContainerRequest::decode(&session.at_agent().await.1.payload[..]).unwrap();
        let left: Vec<_> = seen.devices.iter().map(|device| device.id.as_str()).collect();
        assert_eq!(left, ["02/02"], "the agent looks for the stranger's disk only");
        let nodes: Vec<_> = seen.oci.unwrap().linux.unwrap().devices.iter().map(|d| (d.major, d.minor)).collect();
        assert_eq!(nodes, [(230, 0), (7, 16)]);
        session.answer(stream, 0, "").await;
        session.at_host().await;
    }
    assert_eq!(world.volumes.machine().mounts(), [], "there is nothing to mount");
    for (stream, container, pools) in [(5, "init", 1), (7, "app", 0)] {
        session.send(stream, "RemoveContainer", remove(container)).await;
        session.at_agent().await;
        session.answer(stream, 0, "").await;
        session.at_host().await;
        assert_eq!(world.volumes.machine().imported().len(), pools, "{container}");
    }
}

#[tokio::test]
async fn a_disk_of_a_pool_is_never_handed_out_as_a_device() {
    let world = world(&["a"]);
    let mut session = world.session().await;
    session.send(1, "CreateContainer", create_with_devices("c1", 1, 7)).await;
    let (stream, code, message) = session.at_host().await;
    assert_eq!((stream, code), (1, Code::FailedPrecondition as i32));
    assert!(message.contains("/dev/x0") && message.contains("pool"), "{message}");
    session.nothing_at_agent().await;
}

#[tokio::test]
async fn other_streams_flow_while_a_volume_is_waited_for() {
    let world = world(&["other"]);
    let mut session = world.session().await;
    let create = request(1, "CreateContainer", create("c1", &["a"]), 1_000_000_000);
    session.host.write_all(&create).await.unwrap();
    session.send(3, "StatsContainer", vec![1]).await;
    assert_eq!(session.at_agent().await.1.method, "StatsContainer");
    session.answer(3, 0, "").await;
    assert_eq!(session.at_host().await.0, 3);
    let (stream, code, message) = session.at_host().await;
    assert_eq!((stream, code), (1, 4));
    assert!(message.contains("waiting for its disk"), "{message}");
    session.nothing_at_agent().await;
}

#[tokio::test]
async fn a_bad_volume_fails_the_call_and_never_reaches_the_agent() {
    let world = world(&["a"]);
    let mut session = world.session().await;
    let mut storage = storage("a");
    storage.options.clear();
    let bad = CreateContainerRequest { storages: vec![storage], ..CreateContainerRequest::default() };
    session.send(1, "CreateContainer", bad.encode_to_vec()).await;
    let (stream, code, message) = session.at_host().await;
    assert_eq!((stream, code), (1, 3));
    assert!(message.contains("no zpod= option"), "{message}");
    session.nothing_at_agent().await;
}

#[tokio::test]
async fn when_the_agent_fails_the_volumes_are_released_before_the_answer() {
    let world = world(&["a"]);
    let mut session = world.session().await;
    session.send(1, "CreateContainer", create("c1", &["a"])).await;
    session.at_agent().await;
    session.answer(1, 13, "no such rootfs").await;
    assert_eq!(session.at_host().await, (1, 13, "no such rootfs".into()));
    assert_eq!(world.volumes.machine().imported().len(), 0);
}

#[tokio::test]
async fn a_second_create_that_the_agent_refuses_leaves_the_running_container_alone() {
    let world = world(&["a"]);
    let mut session = world.session().await;
    for (stream, code) in [(1, 0), (3, 6)] {
        session.send(stream, "CreateContainer", create("c1", &["a"])).await;
        session.at_agent().await;
        session.answer(stream, code, "").await;
        session.at_host().await;
    }
    assert_eq!(world.volumes.machine().mounts().len(), 2);
}

#[tokio::test]
async fn a_removal_that_fails_keeps_the_mounts_and_one_of_an_unknown_container_does_not() {
    let world = world(&["a"]);
    let mut session = world.session().await;
    session.created("c1", &["a"]).await;
    for (stream, message, left) in [(3, "ETIME", 1), (5, "Invalid container id", 0)] {
        session.send(stream, "RemoveContainer", remove("c1")).await;
        session.at_agent().await;
        session.answer(stream, 13, message).await;
        assert_eq!(session.at_host().await, (stream, 13, message.into()));
        assert_eq!(world.volumes.machine().imported().len(), left, "{message}");
    }
}

#[tokio::test]
async fn a_removal_waits_for_the_creation_before_it() {
    let world = world(&["a"]);
    let mut session = world.session().await;
    session.send(1, "CreateContainer", create("c1", &["a"])).await;
    session.send(3, "RemoveContainer", remove("c1")).await;
    assert_eq!(session.at_agent().await.1.method, "CreateContainer");
    session.nothing_at_agent().await;
    session.answer(1, 0, "").await;
    assert_eq!(session.at_agent().await.1.method, "RemoveContainer");
    session.answer(3, 0, "").await;
    session.at_host().await;
    session.at_host().await;
    assert_eq!(world.volumes.machine().imported().len(), 0);
}

#[tokio::test]
async fn the_end_of_the_sandbox_releases_what_is_left() {
    let world = world(&["a", "b"]);
    let mut session = world.session().await;
    session.created("c1", &["a", "b"]).await;
    session.send(3, "DestroySandbox", vec![]).await;
    session.at_agent().await;
    session.answer(3, 0, "").await;
    session.at_host().await;
    assert_eq!(world.volumes.machine().imported().len(), 0);
}

#[tokio::test]
async fn stats_of_our_mount_points_come_from_zfs_and_others_from_the_agent() {
    let world = world(&["a"]);
    let mut session = world.session().await;
    session.created("c1", &["a"]).await;
    let stats = |path: &str| VolumeStatsRequest { volume_guest_path: path.into() }.encode_to_vec();
    session.send(3, "GetVolumeStats", stats("/run/a")).await;
    let (header, payload) = read_frame(&mut session.host).await;
    assert_eq!(header.stream, 3);
    let response = Response::decode(&payload[..]).unwrap();
    let stats_of = VolumeStatsResponse::decode(&response.payload[..]).unwrap();
    assert_eq!((stats_of.usage[0].total, stats_of.usage[0].unit()), (100, Unit::Bytes));
    assert!(!stats_of.volume_condition.unwrap().abnormal);
    session.send(5, "GetVolumeStats", stats("/run/else")).await;
    assert_eq!(session.at_agent().await.0.stream, 5);
}

#[tokio::test]
async fn frames_of_any_kind_and_length_pass_byte_for_byte() {
    let world = world(&[]);
    let mut session = world.session().await;
    let big = request(5, "CopyFile", vec![7; 9 << 20], 0);
    let mut frames = [
        Header { length: 0, stream: 1, kind: 3, flags: 5 }.frame(&[]),
        Header { length: 0, stream: 1, kind: 77, flags: 255 }.frame(&[0xff; 1000]),
        Header { length: 0, stream: 3, kind: REQUEST, flags: 0 }.frame(&[]),
        Header { length: 0, stream: 3, kind: 3, flags: 0 }.frame(&[0xff; 5000]),
        request(7, "StartContainer", b"c1".to_vec(), 5),
    ]
    .concat();
    frames.extend_from_slice(&big);
    let (mut host, mut agent) = (session.host, session.agent);
    let expected = frames.clone();
    let writer = tokio::spawn(async move {
        host.write_all(&frames).await.unwrap();
        host
    });
    let mut seen = vec![0; expected.len()];
    agent.read_exact(&mut seen).await.unwrap();
    assert!(seen == expected);
    session.host = writer.await.unwrap();

    // And the other way.
    let writer = tokio::spawn(async move { agent.write_all(&expected).await.map(|()| expected) });
    let mut back = vec![0; seen.len()];
    session.host.read_exact(&mut back).await.unwrap();
    assert!(back == writer.await.unwrap().unwrap());
}

#[tokio::test]
async fn a_request_for_us_that_is_too_long_is_refused_and_the_next_one_passes() {
    let world = world(&["a"]);
    let mut session = world.session().await;
    session.send(1, "CreateContainer", vec![0; MAX_BUFFERED]).await;
    let (stream, code, _) = session.at_host().await;
    assert_eq!((stream, code), (1, 8));
    session.send(3, "StartContainer", vec![]).await;
    assert_eq!(session.at_agent().await.0.stream, 3);
}

#[tokio::test]
async fn a_malformed_request_is_refused_whosever_it_is_and_the_next_one_passes() {
    let world = world(&["a"]);
    let mut session = world.session().await;
    let group = |frame: Vec<u8>| [&[0xc3, 0x3e, 0xc4, 0x3e][..], &frame[ttrpc::HEADER_BYTES..]].concat();
    for payload in [
        vec![0xff; 5000],
        group(request(1, "CreateContainer", create("c1", &["a"]), 0)),
        group(request(1, "StartContainer", vec![], 0)),
    ] {
        let frame = Header { length: 0, stream: 1, kind: REQUEST, flags: 0 }.frame(&payload);
        session.host.write_all(&frame).await.unwrap();
        let (stream, code, message) = session.at_host().await;
        assert_eq!((stream, code), (1, Code::InvalidArgument as i32), "{message}");
    }
    session.send(3, "StartContainer", vec![]).await;
    assert_eq!(session.at_agent().await.0.stream, 3);
}

#[tokio::test]
async fn a_request_that_never_reached_the_agent_leaves_nothing_mounted() {
    let world = world(&["a"]);
    let Session { mut host, agent } = world.session().await;
    *world.volumes.machine().import_time.lock().unwrap() = Duration::from_millis(1);
    host.write_all(&request(1, "CreateContainer", create("c1", &["a"]), 0)).await.unwrap();
    drop(agent);
    drop(host);
    for _ in 0..100 {
        tokio::time::sleep(Duration::from_millis(10)).await;
        let left = world.volumes.machine().mounts().iter().any(|(at, ..)| at.ends_with("run/a"));
        if !left {
            return;
        }
    }
    panic!("the mount was left");
}

proptest::proptest! {
    #[test]
    fn no_bytes_from_the_host_crash_the_proxy(bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..300)) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let world = world(&[]);
            let Session { mut host, agent } = world.session().await;
            let (mut from_agent, _keep) = agent.into_split();
            let drain = tokio::spawn(async move { tokio::io::copy(&mut from_agent, &mut tokio::io::sink()).await });
            let mut frame = Header { length: bytes.len() as u32, stream: 1, kind: REQUEST, flags: 0 }.encode().to_vec();
            frame.extend_from_slice(&bytes);
            host.write_all(&frame).await.unwrap();
            host.write_all(&bytes).await.unwrap();
            drop(host);
            tokio::time::timeout(Duration::from_secs(10), drain).await.unwrap().unwrap().unwrap();
        });
    }
}
