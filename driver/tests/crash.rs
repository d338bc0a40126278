//! Kills zpod between every two steps of a volume's life, and goes on where it was.
//!
//! `cargo test -p zpod-driver --features crash-points --test crash`. Needs root, as the driver mounts.

#![allow(clippy::unwrap_used, clippy::expect_used)]

#[path = "support/calls.rs"]
#[allow(dead_code)]
mod calls;
#[path = "support/daemon.rs"]
#[allow(dead_code)]
mod daemon;
#[path = "support/fake_guest.rs"]
#[allow(dead_code)]
mod fake_guest;

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use calls::Calls;
use daemon::{Daemon, Node};
use fake_guest::{Behaviour, FakeGuest};
use tonic::{Code, Status};
use zpod_proto::guest::{Health, VolumeStatus};
use zpod_volume::{Create, DiskLayout, VolumeId, VolumeSpec};

const NAME: &str = "pvc-1";
const MIB: i64 = 1 << 20;
/// Where a guest has written: its journal, the pool's labels, the pool's inside.
const WRITTEN: [u64; 3] = [DiskLayout::JOURNAL_OFFSET, DiskLayout::PARTITION_START, 64 << 20];
const TENANTS_BYTES: &[u8] = b"the tenant's bytes";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    Create,
    Stage,
    Publish,
    Write,
    Unpublish,
    PublishAgain,
    Expand,
    NodeExpand,
    ExpandBeyondHeadroom,
    NodeExpandBeyondHeadroom,
    UnpublishAgain,
    Unstage,
    Delete,
}

const LIFE: [Step; 13] = [
    Step::Create,
    Step::Stage,
    Step::Publish,
    Step::Write,
    Step::Unpublish,
    Step::PublishAgain,
    Step::Expand,
    Step::NodeExpand,
    Step::ExpandBeyondHeadroom,
    Step::NodeExpandBeyondHeadroom,
    Step::UnpublishAgain,
    Step::Unstage,
    Step::Delete,
];
/// What an orchestrator does that gives up.
const END: [Step; 4] = [Step::Unpublish, Step::UnpublishAgain, Step::Unstage, Step::Delete];

struct Life {
    node: Node,
    written: bool,
}

impl Life {
    fn device(&self) -> PathBuf {
        self.node.device(&VolumeId::from_name(NAME).to_string())
    }

    fn target(&self, step: Step) -> PathBuf {
        let second = matches!(step, Step::PublishAgain | Step::UnpublishAgain);
        self.node.path("pods").join(if second { "pod-2" } else { "pod-1" })
    }

    fn spec(&self, step: Step) -> VolumeSpec {
        self.node.entry(&self.target(step)).unwrap()
    }

    async fn run(&mut self, calls: &mut Calls, step: Step) -> Result<(), Status> {
        let id = VolumeId::from_name(NAME).to_string();
        let (target, staging) = (self.target(step), self.node.path("staging"));
        match step {
            Step::Create => assert_eq!(calls.create(NAME, 256 * MIB).await?.volume_id, id),
            Step::Stage => calls.stage(&id, &staging).await?,
            Step::Publish => {
                calls.publish(&id, &target).await?;
                assert_eq!(
                    self.spec(step).create,
                    Create::Fresh,
                    "nothing was ever written: the guest may make the pool"
                );
            }
            Step::Write => {
                let file = OpenOptions::new().write(true).open(self.device()).unwrap();
                for at in WRITTEN {
                    file.write_all_at(TENANTS_BYTES, at).unwrap();
                }
                file.sync_all().unwrap();
                self.written = true;
            }
            Step::PublishAgain => {
                calls.publish(&id, &target).await?;
                assert_eq!(self.spec(step).create, Create::Resume, "what was written to must not be made anew");
            }
            Step::Unpublish | Step::UnpublishAgain => calls.unpublish(&id, &target).await?,
            Step::Expand => assert_eq!(calls.expand(&id, 300 * MIB + 1).await?, 300 * MIB + 1),
            Step::ExpandBeyondHeadroom => assert_eq!(calls.expand(&id, 4000 * MIB).await?, 4000 * MIB),
            Step::NodeExpand => assert_eq!(calls.node_expand(&id, &target).await?, 300 * MIB + 1),
            Step::NodeExpandBeyondHeadroom => assert_eq!(calls.node_expand(&id, &target).await?, 4000 * MIB),
            Step::Unstage => calls.unstage(&id, &staging).await?,
            Step::Delete => calls.delete(&id).await?,
        }
        Ok(())
    }

    /// What must hold at every moment, dead or alive.
    fn check(&self, ended: bool, context: &str) {
        let devices = self.node.names("volumes");
        let images = devices.iter().filter(|name| name.ends_with(".img")).count();
        let records = self.node.names("state/volumes");
        let records = records.iter().filter(|name| name.ends_with(".json")).count();
        assert!(images <= 1 && records <= 1, "{context}: {devices:?}");
        assert!(records >= images, "{context}: a device without a record");
        if self.written && !ended {
            let file = fs::File::open(self.device()).unwrap_or_else(|e| panic!("{context}: device lost: {e}"));
            for at in WRITTEN {
                let mut found = vec![0; TENANTS_BYTES.len()];
                file.read_exact_at(&mut found, at).unwrap();
                assert_eq!(found, TENANTS_BYTES, "{context}: the tenant's bytes at {at} were changed");
            }
        }
    }

    fn check_clean(&self, context: &str) {
        for dir in ["volumes", "state/volumes", "direct-volumes", "pods"] {
            assert_eq!(self.node.names(dir), [""; 0], "{context}: {dir} is not empty\n{}", self.node.log());
        }
    }
}

/// Lives one life with a kill at the Nth point, and at `again` points after each restart. Gives the step it was killed
/// in.
async fn live(at: u64, again: Option<u64>, give_up: bool) -> Option<Step> {
    let mut life = Life { node: Node::new(), written: false };
    let mut kills = [Some(at), again].into_iter().flatten();
    let mut daemon: Daemon = life.node.start(kills.next());
    let mut calls = Calls::new(daemon.channel());
    let mut killed_in = None;
    let mut steps: Vec<Step> = LIFE.into_iter().rev().collect();
    while let Some(&step) = steps.last() {
        let context = format!("point {at}, again {again:?}, give up {give_up}, {step:?}");
        match life.run(&mut calls, step).await {
            Ok(()) => {
                steps.pop();
            }
            Err(status) => {
                let lost =
                    matches!(status.code(), Code::Unavailable | Code::Unknown | Code::Cancelled | Code::Internal);
                assert!(lost && daemon.crashed(), "{context}: {status:?}\n{}", life.node.log());
                life.check(step == Step::Delete, &context);
                killed_in.get_or_insert(step);
                daemon = life.node.start(kills.next());
                calls = Calls::new(daemon.channel());
                if give_up && steps.len() > END.len() {
                    steps = END.into_iter().rev().collect();
                }
            }
        }
        life.check(steps.len() <= 1, &context);
    }
    life.check_clean(&format!("point {at}, again {again:?}, give up {give_up}, killed in {killed_in:?}"));
    killed_in
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_volume_survives_a_kill_between_any_two_steps_of_its_life() {
    let (mut at, mut steps) = (1, Vec::new());
    while let Some(step) = live(at, None, false).await {
        live(at, None, true).await;
        // Killed again soon after, while it is picking up what the first kill left.
        live(at, Some(1 + at % 5), false).await;
        if !steps.contains(&step) {
            steps.push(step);
        }
        at += 1;
        assert!(at < 500, "no end of crash points");
    }
    println!("killed at each of {} points, in {steps:?}", at - 1);
    for step in LIFE {
        let silent = matches!(step, Step::Stage | Step::Write | Step::Unstage);
        assert!(silent || steps.contains(&step), "no crash point was reached in {step:?}");
    }
}

/// A kill at the Nth point from the start of a zpod that finds a pod running and hears its guest for the first time.
async fn hear(at: u64) -> bool {
    let node = Node::new();
    let target = node.path("pods/pod-1");
    let daemon = node.start(None);
    let mut calls = Calls::new(daemon.channel());
    let id = calls.create(NAME, 256 * MIB).await.unwrap().volume_id;
    calls.publish(&id, &target).await.unwrap();
    daemon.kill();
    let spec = node.entry(&target).unwrap();
    assert_eq!(spec.create, Create::Fresh);
    let report = VolumeStatus {
        volume_id: id.clone(),
        token: spec.token.to_string(),
        health: Health::Online.into(),
        ..VolumeStatus::default()
    };
    let guest = FakeGuest::start(&node.path("kata"), "sandbox-1", Behaviour::Honest, vec![report]);

    let mut daemon = node.start(Some(at));
    let (mut killed, deadline) = (false, Instant::now() + Duration::from_secs(60));
    loop {
        if daemon.ended() {
            killed = true;
            daemon = node.start(None);
        }
        let entry = node.entry(&target).expect("the entry of a running pod is never missing");
        assert_eq!(entry.token, spec.token);
        // A point right behind the last step is reached a moment later.
        if entry.create == Create::Never && !daemon.ended() {
            break;
        }
        assert!(Instant::now() < deadline, "point {at}: not recorded\n{}", node.log());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    drop(guest);
    drop(daemon);
    let daemon = node.start(None);
    let mut calls = Calls::new(daemon.channel());
    calls.unpublish(&id, &target).await.unwrap();
    calls.publish(&id, &target).await.unwrap();
    assert_eq!(node.entry(&target).unwrap().create, Create::Never, "point {at}: the pool could be made again");
    calls.unpublish(&id, &target).await.unwrap();
    calls.delete(&id).await.unwrap();
    killed
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_guest_reports_first_is_recorded_wherever_zpod_is_killed() {
    let mut at = 1;
    while hear(at).await {
        at += 1;
        assert!(at < 100, "no end of crash points");
    }
    println!("killed at each of {} points", at - 1);
    assert!(at > 3, "no crash point was reached");
}
