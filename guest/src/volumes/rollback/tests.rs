use super::super::Wanted;
use super::super::tests::{count, disks, guest, prepare, wanted};
use super::*;
use crate::machine::simulated::{Amiss, Disks, Kill, SimMachine};
use crate::machine::streams::Streams as _;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;
use zpod_volume::{Bytes, Create, Mark, SnapshotId, VolumeMode};

fn with(nth: u128, snapshot: &str, destroy_newer: bool) -> Wanted {
    let mut wanted = wanted("a", Create::Never, "/m1");
    wanted.spec.rollback =
        Some(Rollback { id: Uuid::from_u128(nth), snapshot: snapshot.into(), guid: 0, destroy_newer });
    wanted
}

/// A volume with snapshots "one" and "two" of what containers had written then, and "three" written since. No machine has it.
async fn written() -> Disks {
    let disks = disks(&["a"]);
    let volumes = guest(&disks);
    let volume = wanted("a", Create::Fresh, "/m1");
    let (pool, dataset) = (volume.spec.pool.clone(), volume.spec.dataset());
    let _ = prepare(&volumes, "c1", volume).await.unwrap();
    for name in ["one", "two"] {
        volumes.machine().container_writes(&pool, name);
        volumes.machine().snapshot(&dataset, name).await.unwrap();
    }
    volumes.machine().container_writes(&pool, "three");
    volumes.release_all().await;
    disks
}

/// What is in it, and the names of its snapshots.
fn state(disks: &Disks) -> (String, Vec<String>) {
    let pool = disks.lock().unwrap()[0].pool.clone().unwrap();
    (pool.data, pool.snapshots.into_iter().map(|(name, _)| name).collect())
}

fn is(disks: &Disks, data: &str, snapshots: &[&str]) {
    assert_eq!(state(disks), (data.to_owned(), snapshots.iter().map(|name| (*name).to_owned()).collect()));
}

async fn told(volumes: &Arc<Volumes<SimMachine>>) -> Option<RolledBack> {
    volumes.status(Duration::ZERO).await.remove(0).rolled_back
}

#[test]
fn a_note_is_read_as_it_was_written_and_what_is_none_is_of_no_request() {
    let id = Uuid::from_u128(5);
    for outcome in [RolledBack { id, refused: None }, RolledBack::refused(id, "it has no snapshot a b")] {
        assert_eq!(RolledBack::noted(&outcome.note()), Some(outcome));
    }
    for other in ["", "-", "1", "2 00000000-0000-0000-0000-000000000005 done", "1 x done", "1 x refused y"] {
        assert_eq!(RolledBack::noted(other), None, "{other:?}");
    }
    let long = RolledBack::refused(id, &format!("a\nb{}", "é".repeat(1000)));
    let reason = long.refused.unwrap();
    assert!(reason.len() <= REASON && reason.starts_with("a bé"), "{reason}");
    assert_eq!(RolledBack::refused(id, "\n").refused.as_deref(), Some("no reason was given"));
}

#[tokio::test(start_paused = true)]
async fn a_volume_goes_back_before_its_first_container_and_once_over_all_later_starts() {
    for mode in [VolumeMode::Filesystem, VolumeMode::Block] {
        let disks = written().await;
        let request = || {
            let mut wanted = with(1, "two", false);
            if mode == VolumeMode::Block {
                disks.lock().unwrap()[0].pool.as_mut().unwrap().datasets.values_mut().for_each(|dataset| {
                    dataset.insert("type".into(), "volume".into());
                });
                (wanted.spec.mode, wanted.fs_group) = (mode, None);
            }
            wanted
        };
        let first = guest(&disks);
        let _ = prepare(&first, "c1", request()).await.unwrap();
        is(&disks, "two", &["one", "two"]);
        let outcome = RolledBack { id: Uuid::from_u128(1), refused: None };
        assert_eq!(told(&first).await, Some(outcome.clone()));
        let steps = first.machine().steps();
        let at = |name: &str| steps.iter().position(|step| step.starts_with(name));
        assert!(at("rollback") < at(&format!("note {ROLLED_BACK}")), "{steps:?}");
        assert!(mode == VolumeMode::Block || at("note") < at("mount"), "{steps:?}");
        first.machine().container_writes(&request().spec.pool, "mine");
        // Beside it, after it in the same machine, and in the next one.
        let _ = prepare(&first, "c2", Wanted { mount_point: "/m2".into(), ..request() }).await.unwrap();
        first.release_all().await;
        let _ = prepare(&first, "c3", request()).await.unwrap();
        first.release_all().await;
        let next = guest(&disks);
        let _ = prepare(&next, "c4", request()).await.unwrap();
        is(&disks, "mine", &["one", "two"]);
        assert_eq!((count(&first, "rollback"), count(&next, "rollback")), (1, 0));
        assert_eq!(told(&next).await, Some(outcome), "whoever did not hear it hears it now");
        next.release_all().await;
        // Another request is another thing.
        let mut again = request();
        again.spec.rollback.as_mut().unwrap().id = Uuid::from_u128(2);
        let last = guest(&disks);
        let _ = prepare(&last, "c5", again).await.unwrap();
        is(&disks, "two", &["one", "two"]);
    }
}

#[tokio::test(start_paused = true)]
async fn newer_snapshots_go_only_where_that_is_allowed() {
    let disks = written().await;
    let first = guest(&disks);
    let _ = prepare(&first, "c1", with(1, "one", false)).await.unwrap();
    is(&disks, "three", &["one", "two"]);
    let refused = told(&first).await.unwrap().refused.unwrap();
    assert!(refused.contains("destroyed: two; --destroy-newer"), "{refused}");
    first.release_all().await;
    // It is not tried again, whatever has changed.
    let second = guest(&disks);
    let _ = prepare(&second, "c1", with(1, "one", true)).await.unwrap();
    is(&disks, "three", &["one", "two"]);
    assert_eq!((count(&second, "rollback"), told(&second).await.unwrap().refused), (0, Some(refused)));
    second.release_all().await;
    let third = guest(&disks);
    let _ = prepare(&third, "c1", with(2, "one", true)).await.unwrap();
    is(&disks, "one", &["one"]);
}

#[tokio::test(start_paused = true)]
async fn what_is_in_the_way_is_named_and_nothing_is_lost() {
    type Way = fn(&Arc<Volumes<SimMachine>>);
    let held: Way = |volumes| volumes.machine().pinned.lock().unwrap().extend(["two".to_owned()]);
    let bookmark: Way = |volumes| volumes.machine().bookmarks.lock().unwrap().push("later".into());
    let broken: Way = |volumes| volumes.machine().failing.lock().unwrap().extend(["rollback".to_owned()]);
    let receiving: Way = |volumes| *volumes.machine().resume_token.lock().unwrap() = Some("1-ab".into());
    let nothing: Way = |_| {};
    for (snapshot, destroy_newer, way, want) in [
        ("none", true, nothing, "it has no snapshot none"),
        ("one", true, held, "snapshot two is newer, and has a hold or a clone"),
        ("two", false, bookmark, "destroyed: #later"),
        ("two", true, broken, "rollback fails"),
        ("two", true, receiving, "broke off"),
    ] {
        let disks = written().await;
        let volumes = guest(&disks);
        way(&volumes);
        let _ = prepare(&volumes, "c1", with(1, snapshot, destroy_newer)).await.unwrap();
        is(&disks, "three", &["one", "two"]);
        let refused = told(&volumes).await.unwrap().refused.unwrap();
        assert!(refused.contains(want), "{refused}");
        // Asked for while it runs, it is refused in the same words.
        if want != "rollback fails" {
            let id = with(1, "", false).spec.id;
            let error = volumes.check_rollback(id, snapshot, destroy_newer).await.unwrap_err();
            assert_eq!(error.code(), tonic::Code::FailedPrecondition, "{error}");
            assert!(error.to_string().contains(want), "{error}");
        }
        assert_eq!(count(&volumes, "rollback"), 0);
    }
}

#[tokio::test(start_paused = true)]
async fn a_send_point_is_not_destroyed_and_a_mark_that_was_left_behind_is_not_in_the_way() {
    let disks = written().await;
    let volumes = guest(&disks);
    let (id, dataset) = (with(1, "", false).spec.id, with(1, "", false).spec.dataset());
    let _ = prepare(&volumes, "c1", wanted("a", Create::Never, "/m1")).await.unwrap();
    volumes.mark(id, &Mark::for_snapshot(SnapshotId::from_name("s"))).await.unwrap();
    let losses = volumes.check_rollback(id, "one", true).await.unwrap();
    let guid = volumes.machine().send_points(&dataset).await.unwrap()[0].guid;
    assert_eq!(losses, Losses { newer: vec!["two".into()], written: 4096, guid });
    assert_eq!(volumes.check_rollback(id, "two", false).await.unwrap().newer, Vec::<String>::new());
    for name in ["", "a,b", "one%two", Mark::for_snapshot(SnapshotId::from_name("s")).as_str()] {
        let error = volumes.check_rollback(id, name, true).await.unwrap_err();
        assert_eq!(error.code(), tonic::Code::InvalidArgument, "{error}");
    }
    volumes.release_all().await;
    let next = guest(&disks);
    let _ = prepare(&next, "c1", with(1, "two", false)).await.unwrap();
    is(&disks, "two", &["one", "two"]);
    next.machine().snapshot(&dataset, "zpod-send-1").await.unwrap();
    next.release_all().await;
    let last = guest(&disks);
    let _ = prepare(&last, "c1", with(2, "two", true)).await.unwrap();
    let refused = told(&last).await.unwrap().refused.unwrap();
    assert!(refused.contains("send point zpod-send-1"), "{refused}");
}

#[tokio::test(start_paused = true)]
async fn a_start_that_is_cut_short_anywhere_is_completed_and_nothing_of_a_container_is_ever_lost() {
    let mut number = 0;
    loop {
        number += 1;
        let mut alive = 0;
        for kill in [Kill::Before(number), Kill::After(number)] {
            let disks = written().await;
            disks.lock().unwrap()[0].pool.as_mut().unwrap().datasets.values_mut().for_each(|dataset| {
                dataset.insert("refreservation".into(), "1073741824".into());
            });
            let request = || {
                let mut wanted = with(1, "one", true);
                wanted.spec.reservation = Some(Bytes::gib(1));
                wanted
            };
            let first = Volumes::new(SimMachine::new(&disks, kill), "/zpod/volumes");
            let mut want = "one";
            if prepare(&first, "c1", request()).await.is_ok() && !first.machine().dead() {
                first.machine().container_writes(&request().spec.pool, "mine");
                want = "mine";
                first.release_container("c1").await;
            }
            alive += usize::from(!first.machine().dead());
            let next = guest(&disks);
            let result = prepare(&next, "c2", request()).await;
            assert!(result.is_ok(), "{kill:?}: {result:?}");
            is(&disks, want, &["one"]);
            assert_eq!(told(&next).await, Some(RolledBack { id: Uuid::from_u128(1), refused: None }));
            let kept = next.properties(request().spec.id).await.unwrap().0["refreservation"].clone();
            assert_eq!(kept, "1073741824", "{kill:?}");
        }
        if alive == 2 {
            break;
        }
    }
    assert!(number > 8, "only {number} steps");
}

#[tokio::test(start_paused = true)]
async fn a_volume_whose_note_can_not_be_written_is_not_given_to_a_container() {
    let disks = written().await;
    let volumes = guest(&disks);
    volumes.machine().failing.lock().unwrap().insert(format!("note {ROLLED_BACK}"));
    let deadline = Instant::now() + Duration::from_secs(5);
    let error = volumes.prepare("c1", &[with(1, "two", false)], deadline).await.unwrap_err().to_string();
    assert!(error.contains("noting that it went back"), "{error}");
    volumes.machine().failing.lock().unwrap().clear();
    let _ = prepare(&volumes, "c1", with(1, "two", false)).await.unwrap();
    is(&disks, "two", &["one", "two"]);
    assert_eq!(count(&volumes, "rollback"), 2);
}

async fn fails(volumes: &Arc<Volumes<SimMachine>>, wanted: Wanted) -> String {
    let deadline = Instant::now() + Duration::from_secs(5);
    volumes.prepare("c1", &[wanted], deadline).await.unwrap_err().to_string()
}

#[tokio::test(start_paused = true)]
async fn a_rollback_that_fails_half_way_is_never_said_to_have_changed_nothing_and_the_next_start_goes_on() {
    let disks = written().await;
    let first = guest(&disks);
    *first.machine().amiss.lock().unwrap() = Some(Amiss::HalfWay);
    let error = fails(&first, with(1, "one", true)).await;
    assert!(error.contains("of 1 that are newer 1 are destroyed") && error.contains("dataset is in use"), "{error}");
    is(&disks, "three", &["one"]);
    assert_eq!((count(&first, "mount /"), count(&first, "note")), (0, 0));
    let next = guest(&disks);
    let _ = prepare(&next, "c1", with(1, "one", true)).await.unwrap();
    is(&disks, "one", &["one"]);
    assert_eq!(told(&next).await.unwrap().refused, None);
    next.machine().container_writes(&with(1, "", true).spec.pool, "mine");
    next.release_all().await;
    // Where it fails for good there is nothing left to destroy, and the reason says what may have been.
    let last = guest(&disks);
    *last.machine().amiss.lock().unwrap() = Some(Amiss::HalfWay);
    let _ = prepare(&last, "c1", with(2, "one", true)).await.unwrap();
    is(&disks, "mine", &["one"]);
    let refused = told(&last).await.unwrap().refused.unwrap();
    assert!(refused.contains("an earlier start may have destroyed") && refused.contains("in use"), "{refused}");
}

#[tokio::test(start_paused = true)]
async fn a_tool_that_was_given_up_is_believed_where_it_is_done_and_nothing_is_noted_where_it_is_not() {
    let disks = written().await;
    let first = guest(&disks);
    *first.machine().amiss.lock().unwrap() = Some(Amiss::GivenUp);
    let error = fails(&first, with(1, "one", true)).await;
    assert!(error.contains("given up") && count(&first, "note") == 0, "{error}");
    is(&disks, "three", &["one", "two"]);
    *first.machine().amiss.lock().unwrap() = Some(Amiss::GivenUpDone);
    let _ = prepare(&first, "c1", with(1, "one", true)).await.unwrap();
    is(&disks, "one", &["one"]);
    assert_eq!(told(&first).await, Some(RolledBack { id: Uuid::from_u128(1), refused: None }));
}

#[tokio::test(start_paused = true)]
async fn a_snapshot_of_a_full_volume_is_gone_back_to_and_the_volume_is_bounded_all_the_time() {
    let disks = written().await;
    let capacity = with(1, "", true).spec.capacity.0;
    for (nth, referenced, low, want) in [(1, capacity + 4096, capacity, capacity + 4096), (2, 4096, 1024, capacity)] {
        disks.lock().unwrap()[0].pool.as_mut().unwrap().datasets.values_mut().for_each(|dataset| {
            dataset.insert("refquota".into(), low.to_string());
        });
        let volumes = guest(&disks);
        *volumes.machine().referenced.lock().unwrap() = referenced;
        let _ = prepare(&volumes, "c1", with(nth, "one", true)).await.unwrap();
        is(&disks, "one", &["one"]);
        assert_eq!(told(&volumes).await.unwrap().refused, None);
        let bound = volumes.properties(with(1, "", true).spec.id).await.unwrap().0["refquota"].clone();
        assert_eq!(bound, want.to_string());
        volumes.release_all().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_snapshot_that_was_taken_again_under_its_name_is_not_gone_back_to() {
    let disks = written().await;
    let volumes = guest(&disks);
    let (id, dataset) = (with(1, "", false).spec.id, with(1, "", false).spec.dataset());
    let _ = prepare(&volumes, "c1", wanted("a", Create::Never, "/m1")).await.unwrap();
    let mut asked = with(1, "two", false);
    asked.spec.rollback.as_mut().unwrap().guid = volumes.check_rollback(id, "two", false).await.unwrap().guid;
    volumes.machine().destroy_snapshot(&dataset, "two").await.unwrap();
    volumes.machine().snapshot(&dataset, "two").await.unwrap();
    volumes.machine().container_writes(&asked.spec.pool, "four");
    let again = volumes.check_rollback(id, "two", false).await.unwrap().guid;
    volumes.release_all().await;
    let next = guest(&disks);
    let _ = prepare(&next, "c1", asked.clone()).await.unwrap();
    is(&disks, "four", &["one", "two"]);
    let refused = told(&next).await.unwrap().refused.unwrap();
    assert!(refused.contains("taken under its name"), "{refused}");
    next.release_all().await;
    let rollback = asked.spec.rollback.as_mut().unwrap();
    (rollback.id, rollback.guid) = (Uuid::from_u128(2), again);
    let _ = prepare(&guest(&disks), "c1", asked).await.unwrap();
    is(&disks, "three", &["one", "two"]);
}

#[tokio::test(start_paused = true)]
async fn a_guest_that_may_only_read_does_not_go_back_and_the_next_one_that_can_write_does() {
    let disks = written().await;
    let read_only = |read_only| {
        let disk = &mut disks.lock().unwrap()[0];
        (disk.sequence, disk.read_only) = (disk.sequence + 1, read_only);
    };
    read_only(true);
    let reader = guest(&disks);
    let mut wanted = with(1, "one", true);
    wanted.flags.read_only = true;
    let _ = prepare(&reader, "c1", wanted).await.unwrap();
    is(&disks, "three", &["one", "two"]);
    assert_eq!((count(&reader, "rollback"), count(&reader, "note"), told(&reader).await), (0, 0, None));
    reader.release_all().await;
    read_only(false);
    let next = guest(&disks);
    let _ = prepare(&next, "c1", with(1, "one", true)).await.unwrap();
    is(&disks, "one", &["one"]);
}
