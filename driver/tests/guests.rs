//! What zpod makes of what guests say, honest and hostile. Needs root, as the driver mounts.

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

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use calls::Calls;
use daemon::{Daemon, Node};
use eventually::eventually;
use fake_guest::{Behaviour, FakeGuest};
use tonic::Code;
use zpod_proto::guest::{Health, VolumeStatus};
use zpod_volume::{Bytes, Create, DiskLayout, VolumeSpec};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

struct World {
    // Dropped first: nobody works on the directories when they go.
    daemon: Daemon,
    calls: Calls,
    node: Node,
}

impl World {
    fn new() -> Self {
        let node = Node::new();
        let daemon = node.start(None);
        let calls = Calls::new(daemon.channel());
        Self { node, daemon, calls }
    }

    /// Makes a volume of 1 GiB and publishes it.
    async fn published(&mut self, name: &str) -> (String, PathBuf, VolumeSpec) {
        let id = self.calls.create(name, GIB as i64).await.unwrap().volume_id;
        let target = self.node.path("pods").join(name);
        self.calls.publish(&id, &target).await.unwrap();
        let spec = self.node.entry(&target).unwrap();
        (id, target, spec)
    }

    fn guest(&self, sandbox: &str, behaviour: Behaviour, volumes: Vec<VolumeStatus>) -> FakeGuest {
        FakeGuest::start(&self.node.path("kata"), sandbox, behaviour, volumes)
    }

    fn restart(self) -> Self {
        let Self { node, daemon, .. } = self;
        daemon.kill();
        let daemon = node.start(None);
        let calls = Calls::new(daemon.channel());
        Self { node, daemon, calls }
    }

    /// What NodeGetVolumeStats says of used bytes and condition.
    async fn stats(&mut self, id: &str, target: &Path) -> (i64, bool, String) {
        let stats = self.calls.stats(id, target).await.unwrap();
        let condition = stats.volume_condition.unwrap();
        (stats.usage[0].used, condition.abnormal, condition.message)
    }

    async fn heard(&mut self, id: &str, target: &Path, used: i64) {
        let deadline = Instant::now() + Duration::from_secs(60);
        while self.stats(id, target).await.0 != used {
            assert!(Instant::now() < deadline, "guest is not heard\n{}", self.node.log());
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
}

/// What a guest says that was given this volume.
fn status(spec: &VolumeSpec) -> VolumeStatus {
    VolumeStatus {
        volume_id: spec.id.to_string(),
        token: spec.token.to_string(),
        pool: spec.pool.to_string(),
        health: Health::Online.into(),
        total_bytes: spec.capacity.0,
        used_bytes: 12345,
        available_bytes: spec.capacity.0 - 12345,
        total_inodes: 1000,
        used_inodes: 7,
        available_inodes: 993,
        partition_bytes: spec.partition.0,
        disk_bytes: DiskLayout::disk_for(DiskLayout::partition_for(Bytes(8 * spec.capacity.0))).0,
        quota_bytes: spec.capacity.0,
        ..Default::default()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn create_once_the_pool_that_a_guest_reported_is_never_made_again() {
    let mut world = World::new();
    let (id, target, spec) = world.published("a").await;
    assert_eq!(spec.create, Create::Fresh);
    let _guest = world.guest("sandbox-1", Behaviour::Honest, vec![status(&spec)]);
    let create = |world: &World| world.node.entry(&target).unwrap().create;
    eventually("the entry of the running pod forbids it", || create(&world) == Create::Never).await;
    assert_eq!(world.node.entry(&target).unwrap().token, spec.token, "the publication stays what it is");
    // The device was never written to here: it is the guest's word that counts.
    world.calls.unpublish(&id, &target).await.unwrap();
    let mut world = world.restart();
    world.calls.publish(&id, &target).await.unwrap();
    assert_eq!(create(&world), Create::Never);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_cannot_speak_for_another_tenants_volume() {
    let mut world = World::new();
    let (own, own_target, own_spec) = world.published("own").await;
    let (other, other_target, other_spec) = world.published("other").await;
    let lie = VolumeStatus {
        token: own_spec.token.to_string(),
        health: Health::Faulted.into(),
        message: "format me".into(),
        partition_bytes: 1,
        disk_bytes: u64::MAX,
        ..status(&other_spec)
    };
    let guess = VolumeStatus { token: "00000000-0000-0000-0000-000000000000".into(), ..lie.clone() };
    let guest = world.guest("sandbox-1", Behaviour::Honest, vec![lie, guess, status(&own_spec)]);
    world.heard(&own, &own_target, 12345).await;
    tokio::time::sleep(Duration::from_secs(1)).await;

    let (_, abnormal, message) = world.stats(&other, &other_target).await;
    assert!(!abnormal && message.contains("no guest has reported"), "{message}");
    assert_eq!(world.node.entry(&other_target).unwrap().create, Create::Fresh, "nothing was recorded of it");
    assert!(guest.state.grown.lock().unwrap().is_empty());
    let condition = world.calls.get(&other).await.unwrap().status.unwrap().volume_condition.unwrap();
    assert!(!condition.abnormal, "{condition:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_guest_reports_is_what_stats_and_conditions_say() {
    let mut world = World::new();
    let (id, target, spec) = world.published("a").await;
    let guest = world.guest("sandbox-1", Behaviour::Honest, vec![status(&spec)]);
    world.heard(&id, &target, 12345).await;
    let stats = world.calls.stats(&id, &target).await.unwrap();
    assert_eq!((stats.usage[0].total, stats.usage[1].total, stats.usage[1].used), (GIB as i64, 1000, 7));

    {
        let mut volumes = guest.state.volumes.lock().unwrap();
        volumes[0].health = Health::Degraded.into();
        volumes[0].message = "2 checksum errors\n\u{1b}[31m; run zpool scrub".into();
        volumes[0].used_bytes = u64::MAX;
        volumes[0].total_bytes = u64::MAX;
    }
    let (used, abnormal, message) = world.stats(&id, &target).await;
    assert!(used > 0, "no number of a guest comes out negative");
    assert!(abnormal && message.starts_with("2 checksum errors"), "{message}");
    assert!(!message.contains(char::is_control));
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let condition = world.calls.get(&id).await.unwrap().status.unwrap().volume_condition.unwrap();
        if condition.abnormal {
            break;
        }
        assert!(Instant::now() < deadline, "the condition is not recorded");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let wrong = world.calls.stats(&id, &world.node.path("pods")).await.unwrap_err();
    assert_eq!(wrong.code(), Code::NotFound);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_silence_of_a_guest_is_told_with_what_was_known_before_until_it_is_heard_again() {
    let mut world = World::new();
    let (id, target, spec) = world.published("a").await;
    let guest = world.guest("sandbox-1", Behaviour::Honest, vec![status(&spec)]);
    world.heard(&id, &target, 12345).await;
    drop(guest);
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let (used, abnormal, message) = world.stats(&id, &target).await;
        assert!(used == 12345 && !abnormal, "{message}");
        if message.contains("can't be heard for") {
            break;
        }
        assert!(Instant::now() < deadline, "{message}");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let again = VolumeStatus { used_bytes: 777, ..status(&spec) };
    let _guest = world.guest("sandbox-2", Behaviour::Honest, vec![again]);
    world.heard(&id, &target, 777).await;
    assert_eq!(world.stats(&id, &target).await.2, "the pool is healthy");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_running_guest_grows_its_volume_inside_the_headroom_and_is_not_asked_beyond() {
    let mut world = World::new();
    let (id, target, spec) = world.published("a").await;
    let guest = world.guest("sandbox-1", Behaviour::Honest, vec![status(&spec)]);
    let _vmm = fs::File::open(world.node.device(&id)).unwrap();
    world.heard(&id, &target, 12345).await;

    world.calls.expand(&id, 2 * GIB as i64).await.unwrap();
    assert_eq!(world.calls.node_expand(&id, &target).await.unwrap(), 2 * GIB as i64);
    assert_eq!(world.calls.node_expand(&id, &target).await.unwrap(), 2 * GIB as i64);
    {
        let grown = guest.state.grown.lock().unwrap();
        assert_eq!(grown.len(), 1, "grown once: {grown:?}");
        assert_eq!(grown[0].capacity_bytes, 2 * GIB);
        assert_eq!(grown[0].partition_bytes, DiskLayout::partition_for(Bytes(2 * GIB)).0);
    }
    let entry = world.node.entry(&target).unwrap();
    assert_eq!(entry.capacity, Bytes(2 * GIB), "a container that starts later is told the new size");

    world.calls.expand(&id, 20 * GIB as i64).await.unwrap();
    let error = world.calls.node_expand(&id, &target).await.unwrap_err();
    assert_eq!(error.code(), Code::FailedPrecondition);
    assert!(error.message().contains("when its pod starts next"), "{error}");
    assert_eq!(guest.state.grown.lock().unwrap().len(), 1);
    assert_eq!(world.calls.get(&id).await.unwrap().volume.unwrap().capacity_bytes, 20 * GIB as i64);

    // The pod ends; the next one gets it.
    drop((guest, _vmm));
    world.calls.unpublish(&id, &target).await.unwrap();
    world.calls.publish(&id, &target).await.unwrap();
    assert_eq!(world.node.entry(&target).unwrap().capacity, Bytes(20 * GIB));
    let disk = fs::metadata(world.node.device(&id)).unwrap().len();
    assert!(disk >= DiskLayout::disk_for(DiskLayout::partition_for(Bytes(20 * GIB))).0);
    assert_eq!(world.calls.node_expand(&id, &target).await.unwrap(), 20 * GIB as i64);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_volume_that_grew_while_its_guest_was_silent_is_grown_when_the_guest_is_heard() {
    let mut world = World::new();
    let (id, target, spec) = world.published("a").await;
    let _vmm = fs::File::open(world.node.device(&id)).unwrap();
    world.calls.expand(&id, 2 * GIB as i64).await.unwrap();
    let (mut calls, asked, path) = (Calls::new(world.daemon.channel()), id.clone(), target.clone());
    let waits = tokio::spawn(async move { calls.node_expand(&asked, &path).await });
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert!(!waits.is_finished(), "a guest that boots is waited for");
    assert_eq!(world.node.entry(&target).unwrap(), spec, "nothing was changed under a running machine");

    let guest = world.guest("sandbox-1", Behaviour::Honest, vec![status(&spec)]);
    eventually("grown", || !guest.state.grown.lock().unwrap().is_empty()).await;
    assert_eq!(waits.await.unwrap().unwrap(), 2 * GIB as i64);
    assert_eq!(world.calls.node_expand(&id, &target).await.unwrap(), 2 * GIB as i64);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_call_that_waits_for_a_guest_does_not_hold_up_the_end_of_the_process() {
    let mut world = World::new();
    let (id, target, _) = world.published("a").await;
    let _vmm = fs::File::open(world.node.device(&id)).unwrap();
    world.calls.expand(&id, 2 * GIB as i64).await.unwrap();
    let mut calls = Calls::new(world.daemon.channel());
    let waits = tokio::spawn(async move { calls.node_expand(&id, &target).await });
    eventually("the call has come", || world.node.log().contains("expand waits")).await;
    let World { daemon, node, .. } = world;
    let ended = tokio::task::spawn_blocking(|| daemon.terminate());
    // Its answer, and not the end of its connection: nothing was cut short.
    let error = waits.await.unwrap().unwrap_err();
    assert_eq!(error.code(), Code::Unavailable);
    assert!(error.message().contains("does not answer on the control channel"), "{error}");
    assert!(ended.await.unwrap().success());
    assert!(!node.log().contains("cut short"), "{}", node.log());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn attributes_are_changed_once_the_guest_that_runs_is_heard_or_nobody_has_the_volume() {
    let mut world = World::new();
    let (id, target, spec) = world.published("a").await;
    let compression = |world: &World| world.node.entry(&target).unwrap().dataset_properties["compression"].clone();
    // No machine has it: the next one is told by the entry.
    world.calls.modify(&id, &[("compression", "zstd")]).await.unwrap();
    assert_eq!(compression(&world), "zstd");

    let vmm = fs::File::open(world.node.device(&id)).unwrap();
    let error = world.calls.modify(&id, &[("compression", "gzip")]).await.unwrap_err();
    assert_eq!(error.code(), Code::Unavailable, "{error}");
    assert_eq!(compression(&world), "zstd", "nothing is changed that its guest does not hear of");

    let guest = world.guest("sandbox-1", Behaviour::Honest, vec![status(&spec)]);
    world.heard(&id, &target, 12345).await;
    world.calls.modify(&id, &[("compression", "gzip")]).await.unwrap();
    assert_eq!(compression(&world), "gzip");
    assert_eq!(guest.state.set.lock().unwrap()[0].dataset_properties["compression"], "gzip");
    // Only a guest that takes snapshots by itself is given a schedule: the record, and what the next container is told, stay.
    guest.state.knows_no_schedules.store(true, Ordering::SeqCst);
    let schedule = [("snapshotSchedule", "hourly=24")];
    let error = world.calls.modify(&id, &schedule).await.unwrap_err();
    assert!(error.code() == Code::FailedPrecondition && error.message().contains("an earlier image"), "{error}");
    assert_eq!(world.node.entry(&target).unwrap().snapshot_schedule, None);
    guest.state.knows_no_schedules.store(false, Ordering::SeqCst);
    world.calls.modify(&id, &schedule).await.unwrap();
    assert!(world.node.entry(&target).unwrap().snapshot_schedule.is_some());
    world.calls.modify(&id, &[("snapshotSchedule", "none")]).await.unwrap();
    // The same after a restart of zpod, as long as it has not heard the guest again.
    drop(guest);
    let mut world = world.restart();
    let error = world.calls.modify(&id, &[("compression", "gzip")]).await.unwrap_err();
    assert!(error.code() == Code::Unavailable && error.message().contains("does not answer"), "{error}");
    drop(vmm);
    world.calls.modify(&id, &[("compression", "gzip")]).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restart_of_zpod_finds_pods_guests_and_publications_again() {
    let mut world = World::new();
    let (id, target, spec) = world.published("a").await;
    let _guest = world.guest("sandbox-1", Behaviour::Honest, vec![status(&spec)]);
    let _vmm = fs::File::open(world.node.device(&id)).unwrap();
    world.heard(&id, &target, 12345).await;
    let mut world = world.restart();
    world.heard(&id, &target, 12345).await;
    // The CO repeats its call: the same publication, with the machine running.
    world.calls.publish(&id, &target).await.unwrap();
    assert_eq!(world.node.entry(&target).unwrap().token, spec.token);
    let error = world.calls.publish(&id, &world.node.path("pods/other")).await.unwrap_err();
    assert_eq!(error.code(), Code::FailedPrecondition);
    let error = world.calls.delete(&id).await.unwrap_err();
    assert_eq!(error.code(), Code::FailedPrecondition);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hostile_guests_neither_stop_nor_fill_zpod() {
    let mut world = World::new();
    let (id, target, spec) = world.published("honest").await;
    let (deaf_id, deaf_target, deaf_spec) = world.published("deaf").await;
    // Nobody shows it: so all are listened to.
    world.published("waits").await;
    let mut many = vec![VolumeStatus { token: "x".repeat(1000), ..status(&spec) }; 2000];
    many.push(VolumeStatus { message: "m".repeat(100_000), ..VolumeStatus::default() });
    let _hostile = [
        world.guest("silent", Behaviour::Silent, vec![]),
        world.guest("garbage", Behaviour::Garbage, vec![]),
        world.guest("flood", Behaviour::Flood, many),
        world.guest("huge", Behaviour::Huge, vec![status(&spec)]),
        world.guest("deaf", Behaviour::DeafToCalls, vec![status(&deaf_spec)]),
    ];
    let _guest = world.guest("honest", Behaviour::Honest, vec![status(&spec)]);
    world.heard(&id, &target, 12345).await;

    let until = Instant::now() + Duration::from_secs(6);
    let mut quickest = Duration::MAX;
    while Instant::now() < until {
        let begun = Instant::now();
        let other = world.calls.create("other", 256 * MIB as i64).await.unwrap().volume_id;
        world.calls.delete(&other).await.unwrap();
        assert_eq!(world.stats(&id, &target).await.0, 12345);
        quickest = quickest.min(begun.elapsed());
    }
    // Did a call wait for any of them, all rounds would take that guest's deadline of 3 s.
    assert!(quickest < Duration::from_secs(2), "create, delete and stats took {quickest:?}");

    // Calls to a guest that never answers end by their deadline, with what was known before.
    let begun = Instant::now();
    let (used, _, message) = world.stats(&deaf_id, &deaf_target).await;
    assert!(begun.elapsed() < Duration::from_secs(60), "{:?}", begun.elapsed());
    assert_eq!(used, 12345);
    assert!(message.contains("did not answer Status"), "{message}");

    let memory = world.daemon.resident();
    println!("resident with hostile guests: {} KiB; quickest round {quickest:?}", memory >> 10);
    assert!(memory < 64 * MIB, "{memory} bytes resident");
    // And no guest has made it say much: the log is not theirs to fill.
    assert!(world.node.log().len() < 64 << 10, "{} bytes of log", world.node.log().len());
}

/// The most memory that zpod had resident so far, in KiB.
fn peak(daemon: &Daemon) -> u64 {
    let status = std::fs::read_to_string(daemon.proc("status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn reports_of_half_a_million_volumes_take_no_memory_and_hold_up_no_other() {
    let mut world = World::new();
    let (id, target, spec) = world.published("a").await;
    let before = peak(&world.daemon);
    // Two bytes each on the wire; some 300 each in memory. The second is below the bound of a report in bytes.
    let _first = world.guest("hostile-1", Behaviour::Honest, vec![VolumeStatus::default(); 500_000]);
    let _second = world.guest("hostile-2", Behaviour::Honest, vec![VolumeStatus::default(); 65_000]);
    let refused = |sandbox: &str, why: &str| {
        let log = world.node.log();
        log.lines().any(|line| line.contains(sandbox) && line.contains(why))
    };
    eventually("the first is refused", || refused("hostile-1", "message length too large")).await;
    eventually("the second is refused", || refused("hostile-2", "more entries than any sound one")).await;
    let _guest = world.guest("sandbox-1", Behaviour::Honest, vec![status(&spec)]);
    world.heard(&id, &target, 12345).await;
    world.calls.unpublish(&id, &target).await.unwrap();
    let grown = peak(&world.daemon) - before;
    assert!(grown < 32 << 10, "grown by {grown} KiB");
}
