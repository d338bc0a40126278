use super::super::attributes::Attributes;
use super::super::tests::{count, disks, guest, prepare, wanted};
use super::*;
use crate::machine::simulated::SimMachine;
use jiff::Timestamp;
use std::collections::BTreeMap;
use zpod_volume::{Bytes, Create, Mark, VolumeId, VolumeMode};

struct Pod {
    volumes: Arc<Volumes<SimMachine>>,
    id: VolumeId,
    dataset: String,
}

impl Pod {
    /// A pod with a volume that has this schedule, at noon.
    async fn with(schedule: &str, change: impl FnOnce(&mut super::super::Wanted)) -> Self {
        let volumes = guest(&disks(&["a"]));
        let mut volume = wanted("a", Create::Fresh, "/m1");
        volume.spec.snapshot_schedule = Some(schedule.parse().unwrap());
        change(&mut volume);
        let (id, dataset) = (volume.spec.id, volume.spec.dataset());
        let pod = Self { volumes, id, dataset };
        pod.has_free(1 << 30);
        pod.at("2026-11-30T12:00:07Z");
        let _ = prepare(&pod.volumes, "c1", volume).await.unwrap();
        pod
    }

    fn at(&self, time: &str) {
        *self.volumes.machine().clock.lock().unwrap() = time.parse::<Timestamp>().unwrap();
    }

    fn has_free(&self, bytes: u64) {
        *self.volumes.machine().free.lock().unwrap() = bytes;
    }

    /// The names there are after a turn, without what all have in common.
    async fn turn(&self) -> Vec<String> {
        self.volumes.turn().await;
        self.names().await
    }

    async fn names(&self) -> Vec<String> {
        let all = self.volumes.machine().snapshots(&self.dataset).await.unwrap();
        all.into_iter().map(|name| name.trim_start_matches("zpod-auto-").to_owned()).collect()
    }

    async fn paused(&self) -> Option<Paused> {
        self.volumes.status(Duration::ZERO).await[0].paused
    }

    async fn change(&self, schedule: Option<&str>) {
        let schedule = Some(schedule.map(|schedule| schedule.parse().unwrap()));
        self.volumes.change(self.id, &Attributes { schedule, ..Attributes::default() }).await.unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn the_first_are_taken_at_start_and_each_period_has_one() {
    let pod = Pod::with("hourly=2 daily=2", |_| {}).await;
    assert_eq!(pod.turn().await, ["hourly-20261130T120007Z", "daily-20261130T120007Z"]);
    assert_eq!(count(&pod.volumes, "snapshot"), 2);
    let steps = pod.volumes.machine().steps().len();
    pod.at("2026-11-30T12:59:59Z");
    assert_eq!(pod.turn().await.len(), 2);
    assert_eq!(pod.volumes.machine().steps().len(), steps);
    for (time, want) in [
        ("2026-11-30T13:00:00Z", vec!["hourly-20261130T120007Z", "daily-20261130T120007Z", "hourly-20261130T130000Z"]),
        // What was missed is missed.
        ("2026-11-30T20:30:00Z", vec!["daily-20261130T120007Z", "hourly-20261130T130000Z", "hourly-20261130T203000Z"]),
        (
            "2026-12-01T00:00:01Z",
            vec![
                "daily-20261130T120007Z",
                "hourly-20261130T203000Z",
                "hourly-20261201T000001Z",
                "daily-20261201T000001Z",
            ],
        ),
    ] {
        pod.at(time);
        assert_eq!(pod.turn().await, want, "{time}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_pod_that_starts_again_within_the_hour_takes_no_second_one() {
    let pod = Pod::with("hourly=24", |_| {}).await;
    assert_eq!(pod.turn().await.len(), 1);
    pod.volumes.release_all().await;
    pod.volumes.turn().await;
    let mut again = wanted("a", Create::Never, "/m1");
    again.spec.snapshot_schedule = Some("hourly=24".parse().unwrap());
    pod.at("2026-11-30T12:40:00Z");
    let _ = prepare(&pod.volumes, "c1", again).await.unwrap();
    assert_eq!(pod.turn().await, ["hourly-20261130T120007Z"]);
    pod.at("2026-11-30T13:00:00Z");
    assert_eq!(pod.turn().await.len(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_schedule_can_be_turned_off_and_on_and_changed_and_what_was_taken_stays_until_a_schedule_says_otherwise() {
    let pod = Pod::with("hourly=24 daily=7", |_| {}).await;
    for hour in 12..18 {
        pod.at(&format!("2026-11-30T{hour}:00:07Z"));
        pod.volumes.turn().await;
    }
    assert_eq!(pod.names().await.len(), 7);
    pod.change(None).await;
    pod.at("2026-11-30T20:00:07Z");
    assert_eq!(pod.turn().await.len(), 7, "off keeps what there is, and takes nothing");
    pod.change(Some("hourly=2")).await;
    let names = pod.turn().await;
    assert_eq!(names, ["daily-20261130T120007Z", "hourly-20261130T170007Z", "hourly-20261130T200007Z"]);
}

#[tokio::test(start_paused = true)]
async fn the_loop_takes_the_first_at_once_and_after_a_change() {
    let pod = Pod::with("daily=7", |_| {}).await;
    let task = tokio::spawn(Arc::clone(&pod.volumes).keep_snapshots());
    let begin = Instant::now();
    while pod.names().await.is_empty() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    pod.change(Some("daily=7 hourly=1")).await;
    while pod.names().await.len() < 2 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    assert!(begin.elapsed() < SOON, "{:?}", begin.elapsed());
    pod.at("2026-11-30T13:00:00Z");
    tokio::time::sleep(EVERY + SOON).await;
    assert_eq!(pod.names().await, ["daily-20261130T120007Z", "hourly-20261130T130000Z"]);
    task.abort();
}

#[tokio::test(start_paused = true)]
async fn with_little_room_the_oldest_go_but_not_the_newest_of_a_kind_and_none_are_taken_until_there_is_more() {
    let pod = Pod::with("hourly=24 daily=7", |_| {}).await;
    for hour in 12..16 {
        pod.at(&format!("2026-11-30T{hour}:00:07Z"));
        pod.volumes.turn().await;
    }
    for other in ["mine", "zpod-send-x"] {
        pod.volumes.machine().snapshot(&pod.dataset, other).await.unwrap();
    }
    pod.volumes.machine().pinned.lock().unwrap().insert("zpod-auto-hourly-20261130T130007Z".into());
    let tenth = (1 << 30) / 10;
    pod.has_free(tenth);
    assert_eq!((pod.turn().await.len(), pod.paused().await), (7, None));
    pod.has_free(tenth - 1);
    pod.at("2026-11-30T16:00:00Z");
    assert_eq!(pod.volumes.turn().await, Left::Something);
    assert_eq!(pod.paused().await, Some(Paused::NoRoom));
    assert_eq!(pod.names().await.len(), 6, "one a turn");
    assert_eq!(pod.volumes.turn().await, Left::Something);
    assert_eq!(pod.volumes.turn().await, Left::Nothing);
    let left = ["hourly-20261130T130007Z", "daily-20261130T120007Z", "hourly-20261130T150007Z", "mine", "zpod-send-x"];
    let sorted = |names: Vec<String>| names.into_iter().map(|name| (name, ())).collect::<BTreeMap<_, _>>();
    assert_eq!(sorted(pod.names().await), sorted(left.map(str::to_owned).to_vec()));
    pod.has_free(tenth);
    assert!(pod.turn().await.contains(&"hourly-20261130T160000Z".to_owned()));
    assert_eq!(pod.paused().await, None);
    pod.has_free(0);
    pod.volumes.turn().await;
    pod.change(None).await;
    pod.volumes.turn().await;
    assert_eq!(pod.paused().await, None, "whoever takes none is not kept from it");
}

#[tokio::test(start_paused = true)]
async fn nothing_goes_where_that_makes_no_room_for_the_application() {
    let pod = Pod::with("hourly=24", |_| {}).await;
    for hour in 12..16 {
        pod.at(&format!("2026-11-30T{hour}:00:07Z"));
        pod.volumes.turn().await;
    }
    let set = |free: u64, used: u64, held: u64| {
        let machine = pod.volumes.machine();
        (*machine.free.lock().unwrap(), *machine.used.lock().unwrap()) = (free, used);
        *machine.held_by_snapshots.lock().unwrap() = held;
    };
    let (quota, tenth) = (1 << 30, (1 << 30) / 10);
    pod.at("2026-11-30T16:00:07Z");
    // The volume's own files fill it; then snapshots hold next to nothing.
    for (free, used, held) in [(tenth - 1, quota - tenth + 1, 1 << 30), (0, 1 << 20, quota / 100 - 1)] {
        set(free, used, held);
        assert_eq!(pod.volumes.turn().await, Left::Nothing);
        assert_eq!((pod.names().await.len(), pod.paused().await), (4, Some(Paused::NoRoom)));
    }
    set(0, 1 << 20, quota / 100 + 1);
    *pod.volumes.machine().freeing.lock().unwrap() = 1;
    assert_eq!((pod.volumes.turn().await, pod.names().await.len()), (Left::Something, 4), "the last one's room comes");
    *pod.volumes.machine().freeing.lock().unwrap() = 0;
    assert_eq!(pod.volumes.turn().await, Left::Something);
    assert_eq!(pod.names().await.len(), 3);
}

#[tokio::test(start_paused = true)]
async fn where_zfs_finds_no_room_for_a_snapshot_the_oldest_make_it() {
    let pod = Pod::with("hourly=24", |_| {}).await;
    for hour in 12..15 {
        pod.at(&format!("2026-11-30T{hour}:00:07Z"));
        pod.volumes.turn().await;
    }
    // The simulated pool has no room beside what is kept.
    let kept = |bytes: &str| [("refreservation".to_owned(), bytes.to_owned())];
    pod.volumes.machine().set_dataset(&pod.dataset, &kept("536870912")).await.unwrap();
    pod.at("2026-11-30T15:00:07Z");
    assert_eq!(pod.volumes.turn().await, Left::Something);
    assert_eq!((pod.names().await.len(), pod.paused().await), (2, Some(Paused::NoRoom)));
    assert_eq!(pod.volumes.turn().await, Left::Something);
    assert_eq!(pod.volumes.turn().await, Left::Nothing, "the newest stays");
    assert_eq!(pod.names().await, ["hourly-20261130T140007Z"]);
    pod.volumes.machine().set_dataset(&pod.dataset, &kept("none")).await.unwrap();
    tokio::time::sleep(SELDOM).await;
    assert_eq!((pod.turn().await.len(), pod.paused().await), (2, None));
}

#[tokio::test(start_paused = true)]
async fn what_is_kept_for_the_volume_is_not_taken_by_snapshots_nor_while_it_is_lent_to_a_mark() {
    // The simulated pool has no room beside what is kept.
    let pod = Pod::with("hourly=24", |volume| volume.spec.reservation = Some(Bytes::mib(512))).await;
    assert!(pod.turn().await.is_empty());
    assert_eq!(pod.paused().await, Some(Paused::NoRoom));
    let kept = || async { pod.volumes.properties(pod.id).await.unwrap().0["refreservation"].clone() };
    assert_eq!(kept().await, "536870912");
    let mark = Mark::for_snapshot(zpod_volume::SnapshotId::from_name("s"));
    pod.volumes.mark(pod.id, &mark).await.unwrap();
    assert_eq!(pod.turn().await, [mark.to_string()]);
    pod.volumes.unmark(pod.id, &mark).await.unwrap();
    assert_eq!(kept().await, "536870912");
}

#[tokio::test(start_paused = true)]
async fn a_suspended_pool_a_read_only_publication_and_a_volume_at_work_are_left_alone() {
    let pod = Pod::with("hourly=24", |_| {}).await;
    pod.volumes.machine().break_disk(0, true);
    let steps = pod.volumes.machine().steps().len();
    pod.volumes.turn().await;
    assert_eq!(pod.volumes.machine().steps().len(), steps);
    pod.volumes.machine().break_disk(0, false);
    let pool = zpod_volume::PoolName::for_volume(pod.id);
    pod.volumes.machine().resume(&pool, true).await.unwrap();
    {
        let volume = pod.volumes.volume(pod.id);
        let _gate = volume.gate.lock().await;
        assert_eq!(pod.volumes.turn().await, Left::Something);
    }
    {
        let volume = pod.volumes.volume(pod.id);
        let _stream = volume.receiving.lock().await;
        assert_eq!(pod.volumes.turn().await, Left::Something);
    }
    assert!(pod.names().await.is_empty());
    assert_eq!(pod.turn().await.len(), 1);

    let read_only = Pod::with("hourly=24", |volume| volume.spec.read_only = true).await;
    assert!(read_only.turn().await.is_empty());
}

#[tokio::test(start_paused = true)]
async fn what_fails_is_told_and_tried_again_a_minute_later() {
    let pod = Pod::with("hourly=24", |_| {}).await;
    pod.volumes.machine().failing.lock().unwrap().insert("snapshot".into());
    assert!(pod.turn().await.is_empty());
    assert_eq!(pod.paused().await, Some(Paused::Failing));
    pod.volumes.machine().failing.lock().unwrap().clear();
    assert!(pod.turn().await.is_empty());
    tokio::time::sleep(SELDOM).await;
    assert_eq!(pod.turn().await.len(), 1);
    assert_eq!(pod.paused().await, None);
}

#[tokio::test(start_paused = true)]
async fn a_block_device_is_written_out_first() {
    let block = |volume: &mut super::super::Wanted| {
        (volume.spec.mode, volume.fs_group) = (VolumeMode::Block, None);
        volume.mount_point = "/dev/xvda".into();
    };
    let pod = Pod::with("hourly=24", block).await;
    let free = |bytes: u64| ("available".to_owned(), bytes.to_string());
    pod.volumes.machine().set_dataset(&pod.dataset, &[free(1 << 20)]).await.unwrap();
    assert!(pod.turn().await.is_empty());
    assert_eq!(pod.paused().await, Some(Paused::NoRoom));
    pod.volumes.machine().set_dataset(&pod.dataset, &[free(1 << 28)]).await.unwrap();
    assert_eq!(pod.turn().await.len(), 1);
    let steps = pod.volumes.machine().steps();
    assert_eq!(steps[steps.len() - 2..], ["flush", "snapshot"]);
    assert_eq!(pod.paused().await, None);
}
