//! Volumes that are made from copies of others.

use super::*;
use crate::machine::Properties;
use zpod_volume::{Mark, Origin, QuotaMode, SnapshotId};

pub(super) fn mark() -> Mark {
    Mark::for_snapshot(SnapshotId::from_name("s"))
}

fn origin(mark: Option<Mark>) -> Origin {
    Origin { volume: VolumeId::from_name("a"), mark, initialized: true, copy: None }
}

/// A larger volume, of another class, that is made from a copy of volume "a".
pub(super) fn restored(name: &str, mark: Option<Mark>, mount_point: &str) -> Wanted {
    let mut wanted = wanted(name, Create::Never, mount_point);
    wanted.spec.capacity = Bytes::gib(3);
    wanted.spec.partition = DiskLayout::partition_for(Bytes::gib(3));
    wanted.spec.quota = QuotaMode::Quota;
    wanted.spec.dataset_properties = [("compression".into(), "zstd".into())].into();
    wanted.spec.pool_properties = [("autotrim".into(), "off".into())].into();
    wanted.spec.origin = Some(origin(mark));
    wanted
}

/// A copy of the first disk.
pub(super) fn copied(disks: &Disks, names: &[&str]) -> Disks {
    let layout = DiskLayout::new(Bytes::gib(3), Headroom::default());
    let of = disks.lock().unwrap()[0].clone();
    let all = names.iter().zip('k'..).map(|(name, letter)| {
        simulated::copy(&of, &format!("vd{letter}"), VolumeId::from_name(name), layout.partition, layout.disk)
    });
    Disks::new(all.collect::<Vec<_>>().into())
}

/// The disk of volume "a": in its pool is "old", which is marked, and then "new". A guest has it.
async fn origin_in_use() -> (Arc<Volumes<SimMachine>>, Disks) {
    let disks = disks(&["a"]);
    let volumes = guest(&disks);
    let _ = prepare(&volumes, "c1", wanted("a", Create::Fresh, "/m1")).await.unwrap();
    let spec = spec("a", Create::Fresh);
    volumes.machine().container_writes(&spec.pool, "old");
    volumes.mark(spec.id, &mark()).await.unwrap();
    volumes.machine().container_writes(&spec.pool, "new");
    (volumes, disks)
}

fn pool(disks: &Disks, index: usize) -> simulated::SimPool {
    disks.lock().unwrap()[index].pool.clone().unwrap()
}

fn check(disks: &Disks, index: usize, name: &str, data: &str) {
    let pool = pool(disks, index);
    let spec = restored(name, None, "/m").spec;
    assert_eq!((pool.name.as_str(), pool.data.as_str()), (spec.pool.as_str(), data));
    assert_eq!((pool.size, pool.properties["autotrim"].as_str()), (spec.partition.0, "off"));
    let dataset: &Properties = &pool.datasets[&spec.dataset()];
    let get = |key: &str| dataset[key].as_str();
    assert_eq!((get("compression"), get("quota"), get("refquota")), ("zstd", "3221225472", "none"));
    assert!(pool.snapshots.is_empty(), "{:?}", pool.snapshots);
}

#[tokio::test(start_paused = true)]
async fn a_copy_shows_the_marked_instant_under_its_own_name_size_and_properties() {
    let (_running, source) = origin_in_use().await;
    for (with, data) in [(Some(mark()), "old"), (None, "new")] {
        let disks = copied(&source, &["b"]);
        let volumes = guest(&disks);
        let _ = prepare(&volumes, "c1", restored("b", with, "/m1")).await.unwrap();
        check(&disks, 0, "b", data);
        assert_ne!(pool(&disks, 0).guid, pool(&source, 0).guid);
        let told = volumes.status(Duration::ZERO).await.remove(0);
        assert_eq!((told.id, told.quota), (VolumeId::from_name("b"), Bytes::gib(3).0));
        volumes.release_container("c1").await;

        // From then on it is like any other, whatever its spec still says of its origin.
        let next = guest(&disks);
        let _ = prepare(&next, "c1", restored("b", Some(mark()), "/m1")).await.unwrap();
        assert_eq!((count(&next, "rollback"), count(&next, "reguid"), count(&next, "import")), (0, 0, 1));
    }
}

#[tokio::test(start_paused = true)]
async fn a_restore_that_is_cut_short_anywhere_is_completed_and_nothing_is_rolled_back_after_it() {
    let (_running, source) = origin_in_use().await;
    let mut number = 0;
    loop {
        number += 1;
        let mut alive = 0;
        for kill in [Kill::Before(number), Kill::After(number)] {
            let disks = copied(&source, &["b"]);
            let first = Volumes::new(SimMachine::new(&disks, kill), "/zpod/volumes");
            let mut want = "old";
            if prepare(&first, "c1", restored("b", Some(mark()), "/m1")).await.is_ok() && !first.machine().dead() {
                first.machine().container_writes(&restored("b", None, "/m").spec.pool, "mine");
                want = "mine";
                first.release_container("c1").await;
            }
            alive += usize::from(!first.machine().dead());
            let next = guest(&disks);
            let result = prepare(&next, "c2", restored("b", Some(mark()), "/m1")).await;
            assert!(result.is_ok(), "{kill:?}: {result:?}");
            check(&disks, 0, "b", want);
            assert_ne!(pool(&disks, 0).guid, pool(&source, 0).guid, "{kill:?}");
        }
        if alive == 2 {
            break;
        }
    }
    assert!(number > 15, "only {number} steps");
}

/// Volume "a", made again from a snapshot of itself: the `nth` time.
fn again(nth: u128) -> Wanted {
    let mut wanted = restored("a", Some(mark()), "/m1");
    wanted.spec.origin.as_mut().unwrap().copy = Some(Uuid::from_u128(nth));
    wanted
}

#[tokio::test(start_paused = true)]
async fn a_volume_that_comes_back_under_its_name_shows_the_instant_and_is_rolled_back_once() {
    let (_running, source) = origin_in_use().await;
    let mut number = 0;
    loop {
        number += 1;
        let mut alive = 0;
        for kill in [Kill::Before(number), Kill::After(number)] {
            let disks = copied(&source, &["a"]);
            let first = Volumes::new(SimMachine::new(&disks, kill), "/zpod/volumes");
            let mut want = "old";
            if prepare(&first, "c1", again(1)).await.is_ok() && !first.machine().dead() {
                first.machine().container_writes(&again(1).spec.pool, "mine");
                want = "mine";
                first.release_container("c1").await;
            }
            alive += usize::from(!first.machine().dead());
            let next = guest(&disks);
            let result = prepare(&next, "c2", again(1)).await;
            assert!(result.is_ok(), "{kill:?}: {result:?}");
            check(&disks, 0, "a", want);
        }
        if alive == 2 {
            break;
        }
    }
    assert!(number > 15, "only {number} steps");
}

#[tokio::test(start_paused = true)]
async fn a_name_may_come_back_from_a_copy_that_had_come_back_itself() {
    let (_running, source) = origin_in_use().await;
    let disks = copied(&source, &["a"]);
    let volumes = guest(&disks);
    let _ = prepare(&volumes, "c1", again(1)).await.unwrap();
    let spec = again(1).spec;
    volumes.machine().container_writes(&spec.pool, "second life");
    volumes.mark(spec.id, &mark()).await.unwrap();
    volumes.machine().container_writes(&spec.pool, "after the instant");
    let third = copied(&disks, &["a"]);
    let volumes = guest(&third);
    let _ = prepare(&volumes, "c1", again(2)).await.unwrap();
    check(&third, 0, "a", "second life");
    volumes.release_container("c1").await;
    // Once its guest has reported it the node says nothing of an origin any more.
    let mut plain = again(2);
    plain.spec.origin = None;
    let next = guest(&third);
    let _ = prepare(&next, "c1", plain).await.unwrap();
    check(&third, 0, "a", "second life");
    assert_eq!((count(&next, "rollback"), count(&next, "reguid")), (0, 0));
    // The record of an earlier version has no nonce: it is as it was.
    let unknown = guest(&copied(&source, &["a"]));
    let _ = prepare(&unknown, "c1", restored("a", Some(mark()), "/m1")).await.unwrap();
    assert_eq!(count(&unknown, "rollback"), 0);
}

#[tokio::test(start_paused = true)]
async fn a_restore_whose_steps_fail_once_is_completed_in_the_same_guest() {
    let (_running, source) = origin_in_use().await;
    for step in ["reguid", "rollback", "set [", "expand", "sync", "write", "mount /zpod"] {
        let disks = copied(&source, &["b"]);
        let volumes = guest(&disks);
        volumes.machine().failing.lock().unwrap().insert(step.into());
        let error = prepare(&volumes, "c1", restored("b", Some(mark()), "/m1")).await.unwrap_err().to_string();
        assert!(error.contains(step), "{error}");
        volumes.machine().failing.lock().unwrap().clear();
        let _ = prepare(&volumes, "c1", restored("b", Some(mark()), "/m1")).await.unwrap();
        check(&disks, 0, "b", "old");
    }
}

#[tokio::test(start_paused = true)]
async fn an_origin_and_two_copies_of_it_come_up_in_one_guest_in_any_order() {
    let (running, source) = origin_in_use().await;
    let copies = copied(&source, &["b", "c"]).lock().unwrap().clone();
    running.release_all().await;
    let all = || {
        let own = Wanted { mount_point: "/a".into(), ..wanted("a", Create::Never, "/a") };
        [own, restored("b", Some(mark()), "/b"), restored("c", Some(mark()), "/c")]
    };
    for order in [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]] {
        for at_once in [true, false] {
            let mut three = vec![source.lock().unwrap()[0].clone()];
            three.extend(copies.iter().cloned());
            let disks = Disks::new(three.into());
            let volumes = guest(&disks);
            // Where the journal of a busy pool is long.
            *volumes.machine().import_time.lock().unwrap() = Duration::from_secs(5);
            let wanted = order.map(|index| all()[index].clone());
            if at_once {
                let _ = volumes.prepare("c1", &wanted, Instant::now() + WAIT).await.unwrap();
            } else {
                for (number, wanted) in wanted.into_iter().enumerate() {
                    let _ = prepare(&volumes, &format!("c{number}"), wanted).await.unwrap();
                }
            }
            check(&disks, 1, "b", "old");
            check(&disks, 2, "c", "old");
            assert_eq!(pool(&disks, 0).data, "new");
            let guids: BTreeSet<_> = (0..3).map(|index| pool(&disks, index).guid).collect();
            assert_eq!(guids.len(), 3, "{order:?}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_copy_without_its_instant_or_of_something_else_is_refused_and_left_as_it_is() {
    let (running, source) = origin_in_use().await;
    running.unmark(VolumeId::from_name("a"), &mark()).await.unwrap();
    let disks = copied(&source, &["b"]);
    let volumes = guest(&disks);
    let error = prepare(&volumes, "c1", restored("b", Some(mark()), "/m1")).await.unwrap_err();
    assert!(matches!(error, VolumeError::NoMark { .. }), "{error}");
    let text = error.to_string();
    for part in [VolumeId::from_name("a").to_string(), VolumeId::from_name("b").to_string(), mark().to_string()] {
        assert!(text.contains(&part), "{text}");
    }
    assert_eq!((pool(&disks, 0).data.as_str(), count(&volumes, "rollback"), count(&volumes, "write")), ("new", 0, 0));
    assert!(volumes.machine().imported().is_empty());

    let mut stranger = restored("b", None, "/m1");
    stranger.spec.origin.as_mut().unwrap().volume = VolumeId::from_name("x");
    let next = guest(&copied(&source, &["b"]));
    let error = prepare(&next, "c1", stranger).await.unwrap_err();
    assert!(matches!(error, VolumeError::NotItsCopy { .. }), "{error}");
    assert_eq!((count(&next, "import"), count(&next, "create"), count(&next, "write")), (0, 0, 0));

    // Without an origin it is a disk with another volume's journal.
    let mut plain = restored("b", None, "/m1");
    plain.spec.origin = None;
    let next = guest(&copied(&source, &["b"]));
    assert!(matches!(prepare(&next, "c1", plain).await.unwrap_err(), VolumeError::Import { .. }));
}

#[tokio::test(start_paused = true)]
async fn a_copy_of_what_was_never_finished_is_a_fresh_volume() {
    let begun = disks(&["a"]);
    let failing = guest(&begun);
    failing.machine().failing.lock().unwrap().insert("create dataset".into());
    assert!(prepare(&failing, "c1", wanted("a", Create::Fresh, "/m1")).await.is_err());
    let lives = [(&begun, Create::Resume, "b"), (&begun, Create::Resume, "a"), (&disks(&["a"]), Create::Fresh, "b")];
    for (source, create, name) in lives {
        let mut number = 0;
        loop {
            number += 1;
            let disks = copied(source, &[name]);
            let first = Volumes::new(SimMachine::new(&disks, Kill::After(number)), "/zpod/volumes");
            let mut want = restored(name, None, "/m1");
            want.spec.create = create;
            want.spec.origin.as_mut().unwrap().copy = (name == "a").then_some(Uuid::from_u128(1));
            want.spec.origin.as_mut().unwrap().initialized = false;
            let _ = prepare(&first, "c1", want.clone()).await;
            let next = guest(&disks);
            let result = prepare(&next, "c1", want).await;
            assert!(result.is_ok(), "{create:?}, {number}: {result:?}");
            assert_eq!(pool(&disks, 0).datasets.len(), 1);
            if !first.machine().dead() {
                break;
            }
        }
    }
    let mut never = restored("b", None, "/m1");
    never.spec.origin.as_mut().unwrap().initialized = false;
    let next = guest(&copied(&begun, &["b"]));
    assert!(matches!(prepare(&next, "c1", never).await.unwrap_err(), VolumeError::HalfMade { .. }));
    assert_eq!(count(&next, "create"), 0);
}

#[tokio::test(start_paused = true)]
async fn a_mark_that_was_left_behind_goes_at_the_next_start_and_other_snapshots_stay() {
    let (running, source) = origin_in_use().await;
    running.machine().snapshot(&spec("a", Create::Never).dataset(), "zpod-send-1").await.unwrap();
    running.release_all().await;
    let volumes = guest(&source);
    let _ = prepare(&volumes, "c1", wanted("a", Create::Never, "/m1")).await.unwrap();
    let left: Vec<_> = pool(&source, 0).snapshots.into_iter().map(|(name, _)| name).collect();
    assert_eq!((left, pool(&source, 0).data.as_str()), (vec!["zpod-send-1".to_owned()], "new"));
}
