//! Whose guests zpod listens to, and what it costs when all of them are hostile. Needs root, as the driver mounts.

#![allow(clippy::unwrap_used)]

#[path = "support/calls.rs"]
#[allow(dead_code)]
mod calls;
#[path = "support/daemon.rs"]
#[allow(dead_code)]
mod daemon;
#[path = "support/eventually.rs"]
mod eventually;
#[path = "support/fake_guest.rs"]
#[allow(dead_code)]
mod fake_guest;
#[path = "support/raw_guest.rs"]
mod raw_guest;

use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use calls::Calls;
use daemon::{Daemon, Node};
use eventually::eventually;
use fake_guest::{Behaviour, FakeGuest};
use prost::Message as _;
use raw_guest::{RawGuest, Then};
use zpod_proto::bounded::LONG;
use zpod_proto::guest::{Health, StatusResponse, VolumeStatus};
use zpod_volume::VolumeSpec;

const MIB: i64 = 1 << 20;

struct World {
    // Dropped first: nobody works on the directories when they go.
    daemon: Daemon,
    calls: Calls,
    node: Node,
}

impl World {
    fn on(node: Node, log: &str) -> Self {
        let daemon = node.start_with(None, &[("RUST_LOG", log)]);
        let calls = Calls::new(daemon.channel());
        Self { daemon, calls, node }
    }

    /// Makes a volume and publishes it.
    async fn published(&mut self, name: &str) -> (String, PathBuf, VolumeSpec) {
        let id = self.calls.create(name, 256 * MIB).await.unwrap().volume_id;
        let target = self.node.path("pods").join(name);
        self.calls.publish(&id, &target).await.unwrap();
        let spec = self.node.entry(&target).unwrap();
        (id, target, spec)
    }

    fn guest(&self, sandbox: &str, volumes: Vec<VolumeStatus>) -> FakeGuest {
        FakeGuest::start(&self.node.path("kata"), sandbox, Behaviour::Honest, volumes)
    }

    async fn used(&mut self, id: &str, target: &Path, used: i64) {
        let deadline = Instant::now() + Duration::from_secs(60);
        while self.calls.stats(id, target).await.unwrap().usage[0].used != used {
            assert!(Instant::now() < deadline, "the guest of {id} is not heard");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Waits until a scan has found this sandbox.
    async fn seen(&self, sandbox: &str) {
        let seen = || self.node.log().lines().any(|line| line.contains("new sandbox") && line.contains(sandbox));
        eventually("it is seen", seen).await;
    }
}

/// What a guest says that was given this volume.
fn status(spec: &VolumeSpec, used_bytes: u64) -> VolumeStatus {
    VolumeStatus {
        volume_id: spec.id.to_string(),
        token: spec.token.to_string(),
        health: Health::Online.into(),
        total_bytes: spec.capacity.0,
        used_bytes,
        available_bytes: spec.capacity.0 - used_bytes,
        ..Default::default()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_sandboxes_that_a_publication_waits_for_are_dialled_and_those_with_a_volume_stay_connected() {
    let mut world = World::on(Node::new(), "debug");
    let older = world.guest("older", vec![]);
    world.seen("older").await;
    let (id, target, spec) = world.published("a").await;
    // It may be the pod's, as far as is known.
    let stranger = world.guest("stranger", vec![]);
    eventually("the stranger is listened to", || stranger.state.watches.load(Ordering::SeqCst) == 1).await;
    let own = world.guest("own", vec![status(&spec, 12345)]);
    world.used(&id, &target, 12345).await;
    eventually("nothing waits any more", || stranger.state.watches.load(Ordering::SeqCst) == 0).await;
    let newer = world.guest("newer", vec![]);
    world.seen("newer").await;

    // The next pod's sandbox is the only one that can be the next pod's.
    let (next, next_target, next_spec) = world.published("b").await;
    let nexts = world.guest("nexts", vec![status(&next_spec, 777)]);
    world.used(&next, &next_target, 777).await;
    let dialled = |guest: &FakeGuest| guest.state.dialled.load(Ordering::SeqCst);
    assert_eq!([&older, &newer, &stranger].map(dialled), [0, 0, 1]);
    assert_eq!([&own, &nexts].map(dialled), [1, 1], "connected all the time");

    // A pod's sandbox may go and another one come; the pod's volume may go, and the guest stays.
    drop(own);
    let _again = world.guest("again", vec![status(&spec, 54321)]);
    world.used(&id, &target, 54321).await;
    world.calls.unpublish(&next, &next_target).await.unwrap();
    eventually("it has no volume any more", || nexts.state.watches.load(Ordering::SeqCst) == 0).await;

    // Another process knows of no sandbox whether it is older: it listens to all until each publication has its own.
    let World { daemon, node, .. } = world;
    daemon.kill();
    let mut world = World::on(node, "debug");
    world.used(&id, &target, 54321).await;
}

/// Pods on a node, by kubelet's default.
const PODS: usize = 110;
/// As many as are listened to without a volume.
const WITHOUT_VOLUME: usize = 64;

/// The largest report that is taken: what it makes zpod hold is bounded by its length and the number of its entries.
fn heaviest(first: Option<VolumeStatus>) -> Vec<u8> {
    let text = |length: usize| "\u{e9}".repeat(length / 2);
    let other = VolumeStatus {
        volume_id: uuid::Uuid::from_u128(7).to_string(),
        token: uuid::Uuid::from_u128(8).to_string(),
        containers: vec![String::new(); 256],
        ..VolumeStatus::default()
    };
    let mut volumes = vec![other; 64];
    volumes[0] = VolumeStatus { containers: vec![String::new(); 256], ..first.unwrap_or_else(|| volumes[0].clone()) };
    let mut report = StatusResponse { volumes, ..StatusResponse::default() };
    for volume in &mut report.volumes {
        (volume.message, volume.refusal) = (text(500), text(500));
    }
    report.version = "v".repeat(LONG - report.encoded_len() - 4);
    let bytes = report.encode_to_vec();
    assert!((LONG - 8..=LONG).contains(&bytes.len()), "{}", bytes.len());
    bytes
}

/// The most memory that zpod had resident so far, in KiB.
fn peak(daemon: &Daemon) -> u64 {
    let status = std::fs::read_to_string(daemon.proc("status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_guests_of_a_node_may_be_hostile_at_once_and_others_go_on_in_the_memory_that_the_chart_gives() {
    let mut world = World::on(Node::new(), "info");
    let kata = world.node.path("kata");
    // Nobody will ever have it: so everybody is listened to.
    world.published("waits").await;
    let (mut hostile, mut own) = (Vec::new(), Vec::new());
    let before = peak(&world.daemon);
    for number in 0..PODS {
        let then = if number % 2 == 0 { Then::Again } else { Then::Stalls };
        let mut first = None;
        if number < PODS - WITHOUT_VOLUME {
            let (id, target, spec) = world.published(&format!("own-{number}")).await;
            first = Some(status(&spec, 1));
            own.push((id, target));
        }
        hostile.push(RawGuest::start(&kata, &format!("hostile-{number}"), &heaviest(first), then));
    }
    let taken = |guest: &RawGuest, then| guest.taken.load(Ordering::Relaxed) >= then;
    eventually("all are listened to", || hostile.iter().all(|guest| taken(guest, 2))).await;
    // Their reports are taken: with them goes what is said of their own volumes.
    for (id, target) in [&own[0], &own[1]] {
        world.used(id, target, 1).await;
    }

    // The places are taken, and the pod of another tenant comes.
    for round in 0..2 {
        let (id, target, spec) = world.published("victim").await;
        let guest = world.guest(&format!("victim-{round}"), vec![status(&spec, 12345)]);
        world.used(&id, &target, 12345).await;
        drop(guest);
        world.calls.unpublish(&id, &target).await.unwrap();
        world.calls.delete(&id).await.unwrap();
    }
    let (most, log) = (peak(&world.daemon), world.node.log().len());
    println!("{PODS} hostile guests: {before} KiB resident before, {most} at most; {log} bytes of log");
    assert!(most < 80 << 10, "{most} KiB");
    assert!(log < 64 << 10, "{log} bytes of log");
}
