use std::sync::Arc;
use std::time::Duration;

use zpod_volume::{Bytes, Create, DiskLayout, Half, Headroom, Mirror, VolumeId};

use crate::error::VolumeError;
use crate::journal::{self, Journal};
use crate::machine::Health;
use crate::machine::simulated::{self, Disks, Kill, SimMachine};
use crate::volumes::tests::{count, prepare, wanted};
use crate::volumes::{Volumes, Wanted};

const TURN: Duration = Duration::from_secs(10);

fn layout() -> DiskLayout {
    DiskLayout::new(Bytes::gib(1), Headroom::default())
}

fn id() -> VolumeId {
    VolumeId::from_name("a")
}

fn new_half(number: u32) -> simulated::SimDisk {
    simulated::half("vda", id(), number, layout().partition, layout().disk)
}

fn new_disk() -> Disks {
    Disks::new(vec![new_half(1), new_half(2)].into())
}

/// The disk as it is, for another machine. `lost` is left out, `replaced` is a new image.
fn next(disks: &Disks, lost: Option<Half>, replaced: Option<Half>) -> Disks {
    let mut halves = disks.lock().unwrap().clone();
    for half in Half::BOTH {
        halves[half.index()].lost = lost == Some(half);
        if replaced == Some(half) {
            halves[half.index()] = new_half(half.index() as u32 + 1);
        }
    }
    Disks::new(halves.into())
}

fn machine(disks: &Disks, kill: Kill) -> Arc<Volumes<SimMachine>> {
    Volumes::new(SimMachine::new(disks, kill), "/zpod/volumes")
}

fn mirrored(create: Create, behind: Option<Half>) -> Wanted {
    let mut wanted = wanted("a", create, "/m1");
    wanted.spec.mirror = Some(Mirror { behind });
    wanted
}

fn journals(disks: &Disks) -> [Journal; 2] {
    let disks = disks.lock().unwrap();
    [0, 1].map(|index| {
        let blocks = &disks[index].blocks;
        let block = (0..journal::BYTES as u64)
            .step_by(512)
            .flat_map(|at| blocks.get(&(DiskLayout::JOURNAL_OFFSET + at)).cloned().unwrap_or_else(|| vec![0; 512]));
        Journal::decode(&block.collect::<Vec<_>>(), id())
    })
}

fn data(disks: &Disks) -> [Option<String>; 2] {
    let disks = disks.lock().unwrap();
    [0, 1].map(|index| disks[index].pool.as_ref().map(|pool| pool.data.clone()))
}

async fn told(volumes: &Volumes<SimMachine>) -> (Option<Health>, Option<Half>, Option<String>) {
    let all = volumes.status(Duration::ZERO).await;
    (all[0].health, all[0].behind, all[0].problem())
}

/// A volume with data, which its guest has left.
async fn used() -> Disks {
    let disks = new_disk();
    let volumes = machine(&disks, Kill::Never);
    let _ = prepare(&volumes, "c1", mirrored(Create::Fresh, None)).await.unwrap();
    volumes.machine().container_writes(&mirrored(Create::Never, None).spec.pool, "precious");
    volumes.release_container("c1").await;
    assert_eq!(volumes.machine().imported().len(), 0);
    disks
}

#[tokio::test(start_paused = true)]
async fn a_mirror_goes_back_to_a_snapshot_on_both_halves_and_the_half_that_is_left_does_not_go_back_again() {
    let disks = used().await;
    let volumes = machine(&disks, Kill::Never);
    let mut wanted = mirrored(Create::Never, None);
    let _ = prepare(&volumes, "c1", wanted.clone()).await.unwrap();
    volumes.take_snapshot(id(), "before").await.unwrap();
    volumes.machine().container_writes(&wanted.spec.pool, "later");
    volumes.release_container("c1").await;
    let rollback = zpod_volume::Rollback {
        id: uuid::Uuid::from_u128(1),
        snapshot: "before".into(),
        guid: 0,
        destroy_newer: false,
    };
    wanted.spec.rollback = Some(rollback);
    let volumes = machine(&disks, Kill::Never);
    let _ = prepare(&volumes, "c1", wanted.clone()).await.unwrap();
    assert_eq!(data(&disks), [Some("precious".to_owned()), Some("precious".to_owned())]);
    volumes.machine().container_writes(&wanted.spec.pool, "mine");
    volumes.release_container("c1").await;
    let disks = next(&disks, Some(Half::First), None);
    wanted.spec.mirror = Some(Mirror { behind: Some(Half::First) });
    let last = machine(&disks, Kill::Never);
    let _ = prepare(&last, "c1", wanted).await.unwrap();
    assert_eq!((data(&disks)[1].as_deref(), count(&last, "rollback")), (Some("mine"), 0));
}

#[tokio::test(start_paused = true)]
async fn a_fresh_mirror_is_made_on_both_halves_and_both_say_so() {
    let disks = used().await;
    assert_eq!(journals(&disks), [Journal::Created; 2]);
    assert_eq!(data(&disks), [Some("precious".to_owned()), Some("precious".to_owned())]);
    let volumes = machine(&disks, Kill::Never);
    let _ = prepare(&volumes, "c1", mirrored(Create::Never, None)).await.unwrap();
    assert_eq!(told(&volumes).await, (Some(Health::Online), None, None));
}

#[tokio::test(start_paused = true)]
async fn a_mirror_is_not_made_on_one_half() {
    for half in Half::BOTH {
        let disks = next(&new_disk(), Some(half), None);
        let volumes = machine(&disks, Kill::Never);
        let error = prepare(&volumes, "c1", mirrored(Create::Fresh, None)).await.unwrap_err();
        assert!(error.to_string().contains("two halves or not at all"), "{error}");
        assert_eq!(count(&volumes, "create") + count(&volumes, "write"), 0);
    }
}

#[tokio::test(start_paused = true)]
async fn killed_between_any_two_steps_of_its_making_nothing_is_lost_whichever_half_is() {
    for number in 1.. {
        let mut alive = 0;
        for kill in [Kill::Before(number), Kill::After(number)] {
            let disks = new_disk();
            let first = machine(&disks, kill);
            let mut written = "";
            if prepare(&first, "c1", mirrored(Create::Fresh, None)).await.is_ok() && !first.machine().dead() {
                first.machine().container_writes(&mirrored(Create::Never, None).spec.pool, "precious");
                written = "precious";
                first.release_container("c1").await;
            }
            alive += usize::from(!first.machine().dead());
            for create in [Create::Fresh, Create::Resume, Create::Never] {
                for lost in [None, Some(Half::First), Some(Half::Second)] {
                    let disks = next(&disks, lost, None);
                    let volumes = machine(&disks, Kill::Never);
                    match prepare(&volumes, "c2", mirrored(create, None)).await {
                        Ok(_) => {
                            let there = data(&disks)[lost.unwrap_or(Half::Second).other().index()].clone();
                            assert_eq!(there.as_deref(), Some(written), "{kill:?} {create:?} {lost:?}");
                        }
                        Err(error) => {
                            assert_eq!(written, "", "{kill:?} {create:?} {lost:?}: {error}");
                            // What was never finished is finished, where both are there and the node lets it.
                            assert!(lost.is_some() || create != Create::Fresh, "{kill:?} {create:?}: {error}");
                        }
                    }
                }
            }
        }
        if alive == 2 {
            assert!(number > 15, "{number}");
            return;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_half_that_missed_something_is_never_used_alone_until_it_has_everything_again() {
    for half in Half::BOTH {
        // A pod that has the other half only.
        let disks = next(&used().await, Some(half), None);
        let volumes = machine(&disks, Kill::Never);
        let _ = prepare(&volumes, "c1", mirrored(Create::Never, Some(half))).await.unwrap();
        let (health, behind, problem) = told(&volumes).await;
        assert_eq!((health, behind), (Some(Health::Degraded), Some(half)));
        assert!(problem.as_ref().is_some_and(|text| text.contains(&half.to_string())), "{problem:?}");
        volumes.machine().container_writes(&mirrored(Create::Never, None).spec.pool, "more");
        volumes.release_container("c1").await;

        // The lost one is all there is: its node knows.
        let alone = machine(&next(&disks, Some(half.other()), None), Kill::Never);
        let error = prepare(&alone, "c1", mirrored(Create::Never, Some(half))).await.unwrap_err().to_string();
        assert!(error.contains("seem never to have been"), "{error}");
        assert_eq!(count(&alone, "import"), 0);

        // It comes back beside the other one.
        let disks = next(&disks, None, None);
        let volumes = machine(&disks, Kill::Never);
        let _ = prepare(&volumes, "c1", mirrored(Create::Never, Some(half))).await.unwrap();
        assert_eq!(journals(&disks)[half.index()], Journal::Behind);
        assert_eq!(told(&volumes).await.1, Some(half));
        let task = tokio::spawn(Arc::clone(&volumes).keep_resuming());
        tokio::time::sleep(6 * TURN).await;
        assert_eq!(told(&volumes).await.1, Some(half), "it has not been resilvered");
        // Killed now, and only this half is left: it says itself that it lacks something.
        let alone = machine(&next(&disks, Some(half.other()), None), Kill::Never);
        assert!(prepare(&alone, "c1", mirrored(Create::Never, None)).await.is_err());

        volumes.machine().resilver();
        tokio::time::sleep(6 * TURN).await;
        assert_eq!(told(&volumes).await, (Some(Health::Online), None, None));
        assert_eq!(journals(&disks), [Journal::Created; 2]);
        task.abort();
        let alone = machine(&next(&disks, Some(half.other()), None), Kill::Never);
        let _ = prepare(&alone, "c1", mirrored(Create::Never, None)).await.unwrap();
        assert_eq!(data(&disks)[half.index()].as_deref(), Some("more"));
    }
}

#[tokio::test(start_paused = true)]
async fn killed_between_any_two_steps_of_a_replacement_no_half_is_used_alone_that_lacks_something() {
    for half in Half::BOTH {
        for number in 1.. {
            let mut alive = 0;
            for kill in [Kill::Before(number), Kill::After(number)] {
                let disks = next(&used().await, None, Some(half));
                let first = machine(&disks, kill);
                let done = prepare(&first, "c1", mirrored(Create::Never, Some(half))).await.is_ok();
                alive += usize::from(done && !first.machine().dead());
                // The new one alone.
                let alone = next(&disks, Some(half.other()), None);
                for behind in [None, Some(half)] {
                    let volumes = machine(&alone, Kill::Never);
                    assert!(prepare(&volumes, "c1", mirrored(Create::Never, behind)).await.is_err(), "{kill:?}");
                    assert_eq!(count(&volumes, "import") + count(&volumes, "create"), 0);
                }
                // Both: all is there, and it goes on.
                let disks = next(&disks, None, None);
                let volumes = machine(&disks, Kill::Never);
                let _ = prepare(&volumes, "c1", mirrored(Create::Never, Some(half))).await.unwrap();
                assert_eq!(data(&disks)[half.other().index()].as_deref(), Some("precious"));
                assert_eq!(journals(&disks)[half.index()], Journal::Rebuilding, "{kill:?}");
                let task = tokio::spawn(Arc::clone(&volumes).keep_resuming());
                volumes.machine().resilver();
                tokio::time::sleep(6 * TURN).await;
                assert_eq!(told(&volumes).await, (Some(Health::Online), None, None), "{kill:?}");
                assert_eq!(data(&disks)[half.index()].as_deref(), Some("precious"));
                task.abort();
            }
            if alive == 2 {
                assert!(number > 8, "{number}");
                break;
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_half_that_is_lost_while_the_volume_is_in_use_is_noticed_and_heals_when_it_is_back() {
    for half in Half::BOTH {
        let disks = next(&used().await, None, None);
        let volumes = machine(&disks, Kill::Never);
        let _ = prepare(&volumes, "c1", mirrored(Create::Never, None)).await.unwrap();
        let task = tokio::spawn(Arc::clone(&volumes).keep_resuming());
        tokio::time::sleep(2 * TURN).await;
        assert_eq!(told(&volumes).await.1, None);

        volumes.machine().lose(half.index(), true);
        tokio::time::sleep(2 * TURN).await;
        assert_eq!(told(&volumes).await.1, Some(half));
        volumes.machine().container_writes(&mirrored(Create::Never, None).spec.pool, "more");
        // The node has not heard of it when the next container starts, and the half has come back.
        volumes.machine().lose(half.index(), false);
        let mut again = mirrored(Create::Never, None);
        again.spec.token = uuid::Uuid::from_u128(8);
        let _ = prepare(&volumes, "c2", again).await.unwrap();
        tokio::time::sleep(6 * TURN).await;
        assert_eq!(told(&volumes).await.1, Some(half), "it lacks what was written meanwhile");
        volumes.machine().resilver();
        tokio::time::sleep(6 * TURN).await;
        assert_eq!(told(&volumes).await, (Some(Health::Online), None, None));
        assert_eq!(data(&disks), [Some("more".to_owned()), Some("more".to_owned())]);
        task.abort();
    }
}

#[tokio::test(start_paused = true)]
async fn what_is_not_blank_is_never_overwritten_by_a_replacement() {
    // The image of another life of this volume in the place of the second half.
    let (disks, other) = (used().await, used().await);
    disks.lock().unwrap()[1] = other.lock().unwrap()[1].clone();
    let volumes = machine(&disks, Kill::Never);
    let error = prepare(&volumes, "c1", mirrored(Create::Never, None)).await.unwrap_err();
    assert!(error.to_string().contains("more than one matching pool"), "{error}");
    let _ = prepare(&volumes, "c1", mirrored(Create::Never, Some(Half::Second))).await.unwrap();
    assert_eq!((count(&volumes, "attach"), count(&volumes, "detach")), (0, 0));
    assert_eq!((told(&volumes).await.1, journals(&disks)[1]), (Some(Half::Second), Journal::Behind));
    let alone = machine(&next(&disks, Some(Half::First), None), Kill::Never);
    assert!(prepare(&alone, "c1", mirrored(Create::Never, None)).await.is_err());
}

#[tokio::test(start_paused = true)]
async fn a_mirror_grows_on_both_halves_and_only_while_neither_lacks_anything() {
    let disks = used().await;
    let volumes = machine(&disks, Kill::Never);
    let _ = prepare(&volumes, "c1", mirrored(Create::Never, None)).await.unwrap();
    let (capacity, partition) = (Bytes::gib(2), DiskLayout::partition_for(Bytes::gib(2)));
    assert_eq!(volumes.grow(id(), capacity, partition).await.unwrap().partition, partition);
    for disk in disks.lock().unwrap().iter() {
        assert_eq!(disk.pool.as_ref().unwrap().size, partition.0);
        let first: Vec<u8> = (0..34u64).flat_map(|at| disk.blocks[&(at * 512)].clone()).collect();
        assert_eq!(zpod_volume::gpt::decode(&first).unwrap().partition_bytes, partition.0);
    }
    // Beyond what one half has room for, though the disk is twice as large.
    let too_large = DiskLayout::partition_for(Bytes::gib(9));
    let error = volumes.grow(id(), Bytes::gib(9), too_large).await.unwrap_err();
    assert!(matches!(error, VolumeError::TooLarge { .. }), "{error}");

    let task = tokio::spawn(Arc::clone(&volumes).keep_resuming());
    volumes.machine().lose(1, true);
    tokio::time::sleep(2 * TURN).await;
    let more = DiskLayout::partition_for(Bytes::gib(3));
    let error = volumes.grow(id(), Bytes::gib(3), more).await.unwrap_err().to_string();
    assert!(error.contains("when both halves have everything"), "{error}");
    task.abort();
}

#[tokio::test(start_paused = true)]
async fn a_mirror_is_found_by_either_half_and_no_other_disk_by_its_middle() {
    let disks = used().await;
    let disk = |disks: &Disks| {
        let machine = SimMachine::new(disks, Kill::Never);
        async move {
            let wait = Duration::from_millis(50);
            let search = crate::disk::Search { mirrored: true, wait, ..crate::disk::Search::new(id()) };
            crate::disk::find(&machine, search, |_| {}).await
        }
    };
    for lost in [None, Some(Half::First), Some(Half::Second)] {
        assert_eq!(disk(&next(&disks, lost, None)).await.unwrap().name, "vda", "{lost:?}");
    }
    // Another volume's disk, in whose middle a container has written this volume's table.
    let other = next(&disks, None, None);
    let stranger = simulated::half("vda", VolumeId::from_name("b"), 1, layout().partition, layout().disk);
    other.lock().unwrap()[0] = stranger;
    assert!(matches!(disk(&other).await, Err(VolumeError::NoDisk { .. })));
}
