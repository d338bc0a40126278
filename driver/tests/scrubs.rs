//! When zpod has its guests scrub their volumes. Needs root, as the driver mounts.

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

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use calls::{Calls, capability};
use daemon::Node;
use fake_guest::{Behaviour, FakeGuest};
use zpod_proto::csi::{CapacityRange, CreateVolumeRequest};
use zpod_proto::guest::{Health, LastScrub, VolumeStatus, last_scrub::State};

/// Enough for the schedule to look several times.
const A_WHILE: Duration = Duration::from_secs(12);

async fn published(node: &Node, calls: &mut Calls, name: &str, interval: &str) -> VolumeStatus {
    let request = CreateVolumeRequest {
        name: name.into(),
        capacity_range: Some(CapacityRange { required_bytes: 1 << 30, limit_bytes: 0 }),
        volume_capabilities: vec![capability()],
        parameters: [("scrubInterval".to_owned(), interval.to_owned())].into(),
        ..Default::default()
    };
    let id = calls.create_as(request).await.unwrap().volume_id;
    let target = node.path("pods").join(name);
    calls.publish(&id, &target).await.unwrap();
    let spec = node.entry(&target).unwrap();
    VolumeStatus {
        volume_id: id,
        token: spec.token.to_string(),
        health: Health::Online.into(),
        scrub: Some(finished(seconds() - 3600)),
        ..VolumeStatus::default()
    }
}

fn seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()
}

fn finished(ended: u64) -> LastScrub {
    LastScrub { state: State::Finished.into(), ended, errors: 0, bytes: 1 }
}

fn scrubbed(guest: &FakeGuest) -> Vec<String> {
    guest.state.scrubbed.lock().unwrap().clone()
}

async fn wait_for(guest: &FakeGuest, count: usize, log: impl Fn() -> String) {
    let deadline = Instant::now() + 5 * A_WHILE;
    while scrubbed(guest).len() < count {
        assert!(Instant::now() < deadline, "{:?} were scrubbed, not {count}\n{}", scrubbed(guest), log());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn volumes_are_scrubbed_one_after_another_when_their_interval_has_passed() {
    let node = Node::new();
    let daemon = node.start(None);
    let mut calls = Calls::new(daemon.channel());
    let mut due = Vec::new();
    for name in ["a", "b", "suspended", "recent"] {
        due.push(published(&node, &mut calls, name, if name == "recent" { "2h" } else { "1m" }).await);
    }
    due[2].health = Health::Suspended.into();
    let ids: Vec<_> = due.iter().map(|volume| volume.volume_id.clone()).collect();
    let guest = FakeGuest::start(&node.path("kata"), "sandbox-1", Behaviour::Honest, due);

    wait_for(&guest, 1, || node.log()).await;
    tokio::time::sleep(A_WHILE).await;
    let first = scrubbed(&guest);
    assert_eq!(first.len(), 1, "a second one was started beside the one that runs");
    for volume in guest.state.volumes.lock().unwrap().iter_mut().filter(|volume| volume.volume_id == first[0]) {
        volume.scrub = Some(finished(seconds()));
    }
    wait_for(&guest, 2, || node.log()).await;
    for volume in guest.state.volumes.lock().unwrap().iter_mut() {
        volume.scrub = Some(finished(seconds()));
    }
    tokio::time::sleep(A_WHILE).await;
    let mut both = scrubbed(&guest);
    both.sort();
    let mut want = ids[..2].to_vec();
    want.sort();
    assert_eq!(both, want, "neither the suspended nor the recent one, and none twice");
}
