use super::*;
use crate::cluster::fake::{Answers, Asked, volume};
use crate::guest::Health;
use crate::volumes::CLAIM_NAME;
use serde_json::Value;
use zpod_volume::Bytes;

const MIB: u64 = 1 << 20;

fn id() -> VolumeId {
    volume("data").id
}

fn path() -> String {
    format!("/apis/zpod.storage/v1alpha1/zfsvolumes/{}", id())
}

fn observed() -> Observed {
    Observed {
        id: id(),
        target: "/t".into(),
        pod: None,
        labels: [(CLAIM_NAME.to_owned(), "data".to_owned())].into(),
        capacity: Bytes::gib(10),
    }
}

fn report(health: Health, used: u64) -> VolumeReport {
    let mut report = VolumeReport { health, ..VolumeReport::online(id()) };
    if health.is_imported() {
        (report.bytes.total, report.bytes.used) = (10 << 30, used);
        report.bytes.available = report.bytes.total.saturating_sub(used);
    }
    report
}

fn object(status: Value) -> Value {
    json!({
        "apiVersion": "zpod.storage/v1alpha1", "kind": "ZfsVolume", "metadata": {"name": id().to_string()},
        "spec": {"volumeName": "v", "nodeName": "n1", "capacity": "10Gi", "parameters": volume("data").parameters},
        "status": status,
    })
}

struct World {
    api: Answers,
    states: Arc<PoolStates>,
    writer: tokio::task::JoinHandle<()>,
}

impl Drop for World {
    fn drop(&mut self) {
        self.writer.abort();
    }
}

/// An API server with one volume, and a writer.
fn world(status: Value) -> World {
    let list = json!({"apiVersion": "zpod.storage/v1alpha1", "kind": "ZfsVolumeList", "metadata": {},
                      "items": [object(status.clone())]});
    let api = Answers::default().with("/apis/zpod.storage/v1alpha1/zfsvolumes", list).with(&path(), object(status));
    let states = PoolStates::new("n1", "boot-1");
    let writer = tokio::spawn(write_states(api.client(), states.clone()));
    World { api, states, writer }
}

impl World {
    /// What is written in a while.
    async fn within(&self, time: Duration) -> Vec<Asked> {
        tokio::time::sleep(time).await;
        self.api.writes()
    }

    fn say(&self, health: Health, used: u64) {
        self.states.reported(&observed(), &report(health, used));
    }

    /// What is written when a container is found that runs without the volume.
    async fn unheard(&self) -> Asked {
        self.states.unheard(&observed(), "set disable_block_device_use = false");
        let mut writes = self.within(secs(2)).await;
        assert_eq!(writes.len(), 1, "{writes:?}");
        let condition = &writes[0].body["status"]["conditions"][0];
        assert_eq!((&condition["type"], &condition["status"]), (&json!("Healthy"), &json!("False")));
        assert_eq!(condition["reason"], "VolumeNotPluggedIn");
        assert_eq!(condition["message"], "set disable_block_device_use = false");
        assert_eq!(pool(&writes[0], "health"), "Unknown", "nobody knows how it is");
        assert!(writes[0].body["status"].get("phase").is_none(), "that is another owner's");
        writes.remove(0)
    }
}

fn secs(secs: u64) -> Duration {
    Duration::from_secs(secs)
}

fn pool<'a>(write: &'a Asked, key: &str) -> &'a Value {
    &write.body["status"]["pool"][key]
}

#[tokio::test(start_paused = true)]
async fn health_is_written_at_once_usage_when_it_has_moved_and_nothing_when_nothing_has() {
    let world = world(json!({"publication": {"targetPath": "/t", "token": uuid::Uuid::nil(), "bootId": "boot-1"}}));
    world.say(Health::Online, 100 * MIB);
    let writes = world.within(secs(1)).await;
    assert_eq!(writes.len(), 1, "{writes:?}");
    assert_eq!(writes[0].path, format!("{}/status", path()));
    assert!(writes[0].query.contains("fieldManager=zpod-node-state"), "{}", writes[0].query);
    assert_eq!((pool(&writes[0], "health"), pool(&writes[0], "used")), (&json!("Online"), &json!("100Mi")));
    assert_eq!(writes[0].body["status"]["conditions"][0]["status"], "True");
    assert!(writes[0].body["status"].get("phase").is_none(), "that is another owner's");

    // The same again, and usage that has not moved by 1 % of 10 GiB.
    for used in [100, 150, 200] {
        world.say(Health::Online, used * MIB);
        assert_eq!(world.within(secs(100)).await, [], "{used}");
    }
    world.say(Health::Online, 300 * MIB);
    assert_eq!(world.within(secs(1)).await.len(), 1);
    world.say(Health::Online, 600 * MIB);
    assert_eq!(world.within(secs(25)).await, [], "usage every 30 s");
    world.say(Health::Degraded, 600 * MIB);
    let writes = world.within(secs(2)).await;
    assert_eq!((writes.len(), pool(&writes[0], "health")), (1, &json!("Degraded")));
    assert_eq!(writes[0].body["status"]["conditions"][0]["reason"], "PoolDegraded");
}

#[tokio::test(start_paused = true)]
async fn a_volume_that_is_withdrawn_is_exported_with_what_it_used_last() {
    let world = world(json!({}));
    world.say(Health::Online, 100 * MIB);
    world.within(secs(1)).await;
    world.states.withdrawn(id());
    let writes = world.within(secs(2)).await;
    assert_eq!((writes.len(), pool(&writes[0], "health")), (1, &json!("Exported")));
    assert_eq!(pool(&writes[0], "used"), &json!("100Mi"));
    let condition = &writes[0].body["status"]["conditions"][0];
    assert_eq!((&condition["status"], &condition["reason"]), (&json!("Unknown"), &json!("NotInUse")));
    assert!(world.states.tracks().is_empty(), "it takes no memory any more");
    world.states.withdrawn(id());
    world.within(secs(1)).await;
    assert!(world.states.tracks().is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_volume_that_was_left_out_is_not_healthy_until_a_guest_reports() {
    let world = world(json!({}));
    world.unheard().await;
    assert_eq!(world.within(secs(1000)).await, [], "told once");
    world.say(Health::Online, 100 * MIB);
    let writes = world.within(secs(2)).await;
    let condition = &writes[0].body["status"]["conditions"][0];
    assert_eq!((writes.len(), &condition["status"], &condition["reason"]), (1, &json!("True"), &json!("PoolOnline")));
    assert_eq!((pool(&writes[0], "health"), pool(&writes[0], "used")), (&json!("Online"), &json!("100Mi")));
}

#[tokio::test(start_paused = true)]
async fn a_volume_that_was_left_out_is_not_in_use_once_it_is_withdrawn() {
    let over = async |world: &World| {
        world.states.withdrawn(id());
        let writes = world.within(secs(2)).await;
        let condition = &writes[0].body["status"]["conditions"][0];
        assert_eq!((writes.len(), &condition["status"]), (1, &json!("Unknown")));
        assert_eq!(condition["reason"], "NotInUse");
        assert!(world.states.tracks().is_empty(), "it takes no memory any more");
        writes[0].body["status"].clone()
    };
    // Nobody knows whether it has ever had a pool.
    let never_used = world(json!({}));
    never_used.unheard().await;
    assert_eq!(over(&never_used).await.get("pool"), None);
    // What was known of the pool stays.
    let pool = json!({"health": "Exported", "used": "100Mi", "checksumErrors": 3, "compressRatio": "1.50x"});
    let healthy = json!({"type": "Healthy", "status": "Unknown", "reason": "NotInUse", "message": "",
                         "lastTransitionTime": "2026-01-01T00:00:00Z"});
    let used = world(json!({"pool": pool, "conditions": [healthy]}));
    let written = used.unheard().await;
    let kept = |status: &Value| ["used", "checksumErrors", "compressRatio"].map(|key| status["pool"][key].clone());
    let known = [json!("100Mi"), json!(3), json!("1.50x")];
    assert_eq!(kept(&written.body["status"]), known);
    let status = over(&used).await;
    assert_eq!((&status["pool"]["health"], kept(&status)), (&json!("Exported"), known));
    // Withdrawn before it could be written: the object says so already.
    used.api.fail(true);
    used.states.unheard(&observed(), "left out");
    used.within(secs(1)).await;
    used.states.withdrawn(id());
    used.api.fail(false);
    used.within(secs(60)).await;
    assert!(used.states.tracks().is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_flaps_writes_once_in_ten_seconds() {
    let world = world(json!({}));
    let mut writes = 0;
    for round in 0..3000 {
        let health = if round % 2 == 0 { Health::Degraded } else { Health::Online };
        world.say(health, MIB);
        writes += world.within(Duration::from_millis(200)).await.len();
    }
    assert!((50..80).contains(&writes), "{writes} in 600 s");
}

#[tokio::test(start_paused = true)]
async fn what_an_api_server_missed_is_told_once_it_is_back_and_only_the_latest() {
    let world = world(json!({}));
    world.say(Health::Online, MIB);
    world.within(secs(1)).await;
    world.api.fail(true);
    for (round, health) in [Health::Degraded, Health::Suspended, Health::Faulted].into_iter().enumerate() {
        world.say(health, MIB);
        assert_eq!(world.within(secs(60)).await, [], "round {round}");
    }
    world.api.fail(false);
    let writes = world.within(secs(31)).await;
    assert_eq!((writes.len(), pool(&writes[0], "health")), (1, &json!("Faulted")));
}

#[tokio::test(start_paused = true)]
async fn a_new_process_writes_nothing_that_stands_there_and_ends_what_an_old_one_left() {
    let first = world(json!({}));
    first.say(Health::Online, 100 * MIB);
    let written = first.within(secs(1)).await.remove(0).body["status"].clone();
    let mut published = written.clone();
    published["publication"] = json!({"targetPath": "/t", "token": uuid::Uuid::nil(), "bootId": "boot-1"});
    let second = world(published.clone());
    second.say(Health::Online, 100 * MIB);
    assert_eq!(second.within(secs(100)).await, []);
    // The same in an earlier boot of the host, and unpublished behind our back.
    published["publication"]["bootId"] = json!("boot-0");
    // A volume that was left out is in nobody's use any more either, and has no pool that anybody knows of.
    let left_out = first.unheard().await.body["status"]["conditions"].clone();
    let third = world(json!({"pool": {"health": "Unknown"}, "conditions": left_out}));
    let writes = third.within(secs(1)).await;
    assert_eq!((writes.len(), writes[0].body["status"].get("pool")), (1, None));
    for left in [published, written] {
        let third = world(left);
        let writes = third.within(secs(1)).await;
        assert_eq!((writes.len(), pool(&writes[0], "health")), (1, &json!("Exported")));
    }
}

#[tokio::test(start_paused = true)]
async fn a_volume_whose_object_is_gone_is_left_alone() {
    let world = world(json!({}));
    let gone = Observed { id: VolumeId::from_name("gone"), ..observed() };
    for used in 0..50 {
        let report = VolumeReport { id: gone.id, ..report(Health::Online, used << 30) };
        world.states.reported(&gone, &report);
        assert!(world.within(secs(1)).await.is_empty());
    }
    world.states.withdrawn(gone.id);
    world.within(secs(1)).await;
    assert!(world.states.tracks().is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_refused_volume_keeps_the_usage_that_was_known_and_says_why() {
    let world = world(json!({}));
    world.say(Health::Online, 100 * MIB);
    world.within(secs(1)).await;
    let refused =
        VolumeReport { refusal: Some("no disk".into()), message: "no disk".into(), ..report(Health::Unavailable, 0) };
    world.states.reported(&observed(), &refused);
    let writes = world.within(secs(2)).await;
    assert_eq!((pool(&writes[0], "health"), pool(&writes[0], "used")), (&json!("Unavailable"), &json!("100Mi")));
    assert_eq!(writes[0].body["status"]["conditions"][0]["reason"], "VolumeRefused");
    assert_eq!(writes[0].body["status"]["conditions"][0]["message"], "no disk");
}

#[tokio::test(start_paused = true)]
async fn the_last_snapshot_that_was_asked_for_is_written_at_once_and_stays() {
    let world = world(json!({"publication": {"targetPath": "/t", "token": uuid::Uuid::nil(), "bootId": "boot-1"}}));
    world.say(Health::Online, 100 * MIB);
    let writes = world.within(secs(2)).await;
    assert!(pool(&writes[0], "lastSnapshot").is_null(), "{writes:?}");
    let name = || "before.1".parse().unwrap();
    for (change, state) in [(SnapshotChange::Taken(name()), "Taken"), (SnapshotChange::Destroyed(name()), "Destroyed")]
    {
        world.states.snapshot_changed(&observed(), &change);
        let writes = world.within(secs(2)).await;
        assert_eq!(writes.len(), 1, "{writes:?}");
        let last = pool(&writes[0], "lastSnapshot");
        assert_eq!((&last["name"], &last["state"]), (&json!("before.1"), &json!(state)));
        assert!(last["time"].is_string(), "{last}");
    }
    // A report says nothing of it, and takes nothing of it away; nor does the end of the pod.
    world.say(Health::Degraded, 100 * MIB);
    assert_eq!(pool(&world.within(secs(2)).await[0], "lastSnapshot")["state"], "Destroyed");
    world.states.withdrawn(id());
    assert_eq!(pool(&world.within(secs(20)).await[0], "lastSnapshot")["state"], "Destroyed");
}

#[tokio::test(start_paused = true)]
async fn the_last_snapshot_that_stands_in_an_object_outlives_the_process_that_has_written_it() {
    let last = json!({"name": "before.1", "state": "Taken", "time": "2026-11-30T12:00:00Z"});
    let pool_before = json!({"name": "p", "health": "Online", "used": "1Mi", "available": "1Mi", "lastSnapshot": last});
    let condition = json!({"type": "Healthy", "status": "True", "reason": "PoolOnline", "message": "",
                           "lastTransitionTime": "2026-11-30T12:00:00Z"});
    let publication = json!({"targetPath": "/t", "token": uuid::Uuid::nil(), "bootId": "boot-1"});
    let world = world(json!({"publication": publication, "pool": pool_before, "conditions": [condition]}));
    world.say(Health::Degraded, 100 * MIB);
    assert_eq!(pool(&world.within(secs(2)).await[0], "lastSnapshot"), &last);
}
