use super::*;
use crate::journal::Journal;
use crate::machine::simulated::{self, Disks, Kill, SimMachine};
use uuid::Uuid;
use zpod_volume::{Create, DiskLayout, Headroom, MountFlag};

mod appearances;
mod keys;
mod restore;
mod swap;

const WAIT: Duration = Duration::from_secs(60);

fn spec(name: &str, create: Create) -> VolumeSpec {
    VolumeSpec {
        pool_creation_properties: [("ashift".into(), "12".into())].into(),
        pool_properties: [("autotrim".into(), "on".into())].into(),
        dataset_properties: [("compression".into(), "lz4".into())].into(),
        mount_flags: vec![MountFlag::Nosuid],
        ..VolumeSpec::new(VolumeId::from_name(name), Uuid::from_u128(7), create, Bytes::gib(1))
    }
}

pub(super) fn wanted(name: &str, create: Create, mount_point: &str) -> Wanted {
    Wanted {
        spec: spec(name, create),
        fs_group: Some(2000),
        mount_point: mount_point.into(),
        flags: MountFlags::default(),
        place: None,
    }
}

pub(super) fn disks(names: &[&str]) -> Disks {
    let layout = DiskLayout::new(Bytes::gib(1), Headroom::default());
    let all = names.iter().zip('a'..).map(|(name, letter)| {
        simulated::disk(&format!("vd{letter}"), VolumeId::from_name(name), layout.partition, layout.disk)
    });
    Disks::new(all.collect::<Vec<_>>().into())
}

pub(super) fn guest(disks: &Disks) -> Arc<Volumes<SimMachine>> {
    Volumes::new(SimMachine::new(disks, Kill::Never), "/zpod/volumes")
}

pub(super) async fn prepare(
    volumes: &Arc<Volumes<SimMachine>>,
    container: &str,
    wanted: Wanted,
) -> Result<Added, VolumeError> {
    volumes.prepare(container, &[wanted], Instant::now() + WAIT).await
}

pub(super) fn count(volumes: &Volumes<SimMachine>, step: &str) -> usize {
    volumes.machine().steps().iter().filter(|name| name.starts_with(step)).count()
}

fn data(disks: &Disks) -> String {
    disks.lock().unwrap()[0].pool.as_ref().map(|pool| pool.data.clone()).unwrap_or_default()
}

#[tokio::test(start_paused = true)]
async fn a_fresh_volume_is_made_mounted_and_exported_with_its_last_user() {
    let disks = disks(&["a"]);
    let volumes = guest(&disks);
    let added = prepare(&volumes, "c1", wanted("a", Create::Fresh, "/m1")).await.unwrap();
    assert_eq!(added.0.len(), 1);
    assert_eq!(volumes.machine().mounts().len(), 2, "ours and the container's");
    let made = disks.lock().unwrap()[0].pool.clone().unwrap();
    assert_eq!(made.properties["ashift"], "12");
    let dataset = &made.datasets[&spec("a", Create::Fresh).dataset()];
    assert_eq!((dataset["refquota"].as_str(), dataset["compression"].as_str()), ("1073741824", "lz4"));

    volumes.release_container("c1").await;
    assert_eq!((volumes.machine().mounts().len(), volumes.machine().imported().len()), (0, 0));
    let steps = volumes.machine().steps();
    assert!(steps.ends_with(&[
        "sync".into(),
        format!("unmount /zpod/volumes/{}", spec("a", Create::Fresh).id),
        "export".into(),
        format!("write {}", DiskLayout::EXPORT_OFFSET)
    ]));
}

#[tokio::test(start_paused = true)]
async fn a_second_container_shares_the_pool_and_the_last_one_exports_it() {
    let disks = disks(&["a"]);
    let volumes = guest(&disks);
    let _ = prepare(&volumes, "c1", wanted("a", Create::Fresh, "/m1")).await.unwrap();
    // runtime-rs gives another mount point, Go the same one.
    let _ = prepare(&volumes, "c2", wanted("a", Create::Fresh, "/m2")).await.unwrap();
    let _ = prepare(&volumes, "c3", wanted("a", Create::Fresh, "/m1")).await.unwrap();
    assert_eq!(count(&volumes, "create: pool"), 1);
    assert_eq!(volumes.machine().mounts().len(), 3);
    volumes.release_container("c1").await;
    assert_eq!(volumes.machine().mounts().len(), 3, "c3 still uses /m1");
    volumes.release_container("c3").await;
    assert_eq!(volumes.machine().mounts().len(), 2);
    assert_eq!(volumes.machine().imported().len(), 1);
    volumes.release_container("c2").await;
    assert_eq!(volumes.machine().imported().len(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_request_repeated_after_a_lost_answer_adds_nothing_and_takes_nothing_back() {
    let volumes = guest(&disks(&["a"]));
    let _ = prepare(&volumes, "c1", wanted("a", Create::Fresh, "/m1")).await.unwrap();
    let again = prepare(&volumes, "c1", wanted("a", Create::Fresh, "/m1")).await.unwrap();
    assert_eq!(again, Added::default());
    volumes.undo(again).await;
    assert_eq!(volumes.machine().mounts().len(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_failing_volume_releases_the_ones_before_it() {
    let volumes = guest(&disks(&["a", "b"]));
    volumes.machine().failing.lock().unwrap().insert("mount /m2".into());
    let two = [wanted("a", Create::Fresh, "/m1"), wanted("b", Create::Fresh, "/m2")];
    let error = volumes.prepare("c1", &two, Instant::now() + WAIT).await.unwrap_err().to_string();
    assert!(error.contains("mount /m2 fails"), "{error}");
    assert!(!volumes.machine().imported().contains(&spec("a", Create::Fresh).pool.to_string()));
    // Nobody came for the other one: after a while it goes too.
    tokio::time::sleep(2 * IDLE).await;
    assert_eq!(volumes.machine().imported().len(), 0);
    volumes.machine().failing.lock().unwrap().clear();
    let _ = volumes.prepare("c1", &two, Instant::now() + WAIT).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_pool_that_a_container_exported_is_imported_again_and_one_that_it_destroyed_is_refused() {
    let disks = disks(&["a"]);
    let volumes = guest(&disks);
    let volume = |create| wanted("a", create, "/m1");
    let _ = prepare(&volumes, "c1", volume(Create::Fresh)).await.unwrap();
    for destroyed in [false, true] {
        // With CAP_SYS_ADMIN, and our mounts out of the way.
        for (at, ..) in volumes.machine().mounts() {
            volumes.machine().unmount(&at, false).await.unwrap();
        }
        volumes.machine().export(&spec("a", Create::Never).pool).await.unwrap();
        disks.lock().unwrap()[0].pool.as_mut().unwrap().destroyed = destroyed;
        volumes.release_all().await;
        assert_eq!(volumes.status(Duration::ZERO).await, [], "nothing is told of what is not here");
        let made = count(&volumes, "create");
        let again = prepare(&volumes, "c1", volume(Create::Never)).await;
        match again {
            Ok(_) => assert!(!destroyed),
            Err(error) => {
                let error = error.to_string();
                assert!(destroyed && error.contains("somebody has destroyed it"), "{error}");
                assert!(error.contains("zpool import -D") && error.contains("from a snapshot"), "{error}");
            }
        }
        assert_eq!(count(&volumes, "create"), made);
    }
}

#[tokio::test(start_paused = true)]
async fn killed_between_any_two_steps_the_next_start_does_the_right_thing() {
    let mut finished = 0;
    for number in 1.. {
        let mut alive = 0;
        for kill in [Kill::Before(number), Kill::After(number)] {
            let disks = disks(&["a"]);
            let first = Volumes::new(SimMachine::new(&disks, kill), "/zpod/volumes");
            let mut written = false;
            if prepare(&first, "c1", wanted("a", Create::Fresh, "/m1")).await.is_ok() && !first.machine().dead() {
                first.machine().container_writes(&spec("a", Create::Fresh).pool, "precious");
                written = true;
                first.release_container("c1").await;
            }
            alive += usize::from(!first.machine().dead());
            // The node's word may be as it was before, or know better.
            let words = [Create::Fresh, Create::Resume, Create::Never];
            for create in &words[..if written { 3 } else { 2 }] {
                let disks = Disks::new(disks.lock().unwrap().clone().into());
                let next = guest(&disks);
                match prepare(&next, "c2", wanted("a", *create, "/m1")).await {
                    // Killed before anything was begun: there is nothing to resume.
                    Err(VolumeError::Blank { .. }) if *create == Create::Resume && !written => {
                        assert_eq!(count(&next, "create"), 0);
                    }
                    Err(error) => panic!("{kill:?}, {create:?}: {error}"),
                    Ok(_) => assert_eq!(data(&disks), if written { "precious" } else { "" }, "{kill:?}"),
                }
            }
        }
        finished = number;
        if alive == 2 {
            break;
        }
    }
    assert!(finished > 15, "only {finished} steps");
}

#[tokio::test(start_paused = true)]
async fn a_pool_cut_short_is_made_again_in_the_same_machine_too() {
    for step in ["create: pool", "create dataset", "sync", "mount /zpod"] {
        let volumes = guest(&disks(&["a"]));
        volumes.machine().failing.lock().unwrap().insert(step.into());
        let error = prepare(&volumes, "c1", wanted("a", Create::Fresh, "/m1")).await.unwrap_err().to_string();
        assert!(error.contains(step), "{error}");
        volumes.machine().failing.lock().unwrap().clear();
        let _ = prepare(&volumes, "c1", wanted("a", Create::Fresh, "/m1")).await.unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn a_blank_disk_where_data_is_expected_is_refused_and_nothing_is_formatted() {
    let disks = disks(&["a"]);
    let volumes = guest(&disks);
    let error = prepare(&volumes, "c1", wanted("a", Create::Never, "/m1")).await.unwrap_err();
    assert_eq!(error.code(), tonic::Code::FailedPrecondition);
    let text = error.to_string();
    assert!(
        text.contains(&spec("a", Create::Never).id.to_string()) && text.contains("vda") && text.contains("blank"),
        "{text}"
    );
    assert_eq!(count(&volumes, "create"), 0);
    assert_eq!(count(&volumes, "write"), 0);
}

#[tokio::test(start_paused = true)]
async fn what_looks_written_is_only_ever_imported() {
    // A label, or a journal that is not ours: whatever the node says, no pool is made over it.
    for offset in [DiskLayout::PARTITION_START, DiskLayout::JOURNAL_OFFSET] {
        let disks = disks(&["a"]);
        disks.lock().unwrap()[0].scribble(offset);
        let volumes = guest(&disks);
        assert!(prepare(&volumes, "c1", wanted("a", Create::Fresh, "/m1")).await.is_err());
        assert_eq!(count(&volumes, "create"), 0);
    }
}

#[tokio::test(start_paused = true)]
async fn a_half_made_pool_is_not_made_again_against_the_nodes_word() {
    let disks = disks(&["a"]);
    let volumes = guest(&disks);
    volumes.machine().failing.lock().unwrap().insert("create: pool".into());
    assert!(prepare(&volumes, "c1", wanted("a", Create::Fresh, "/m1")).await.is_err());
    let next = guest(&disks);
    let error = prepare(&next, "c1", wanted("a", Create::Never, "/m1")).await.unwrap_err();
    assert!(matches!(error, VolumeError::HalfMade { .. }), "{error}");
    assert_eq!(count(&next, "create"), 0);
}

#[tokio::test(start_paused = true)]
async fn a_missing_disk_is_named_with_the_disks_that_are_there() {
    let volumes = guest(&disks(&["other"]));
    let error = volumes.prepare("c1", &[wanted("a", Create::Fresh, "/m1")], Instant::now() + WAIT).await.unwrap_err();
    assert!(matches!(error, VolumeError::NoDisk { .. }));
    assert!(error.to_string().contains(&VolumeId::from_name("other").to_string()), "{error}");
}

#[tokio::test(start_paused = true)]
async fn two_disks_with_one_guid_are_refused() {
    let volumes = guest(&disks(&["a", "a"]));
    let error = prepare(&volumes, "c1", wanted("a", Create::Fresh, "/m1")).await.unwrap_err();
    assert!(matches!(error, VolumeError::ManyDisks { .. }), "{error}");
    assert_eq!(count(&volumes, "create"), 0);
}

#[tokio::test(start_paused = true)]
async fn an_overrun_says_how_far_it_is_and_the_retry_finds_it_done() {
    let disks = disks(&["a"]);
    let first = guest(&disks);
    let _ = prepare(&first, "c1", wanted("a", Create::Fresh, "/m1")).await.unwrap();
    first.release_container("c1").await;

    let volumes = guest(&disks);
    *volumes.machine().import_time.lock().unwrap() = Duration::from_secs(20);
    let soon = Instant::now() + Duration::from_secs(5);
    let error = volumes.prepare("c1", &[wanted("a", Create::Never, "/m1")], soon).await.unwrap_err();
    assert_eq!(error.code(), tonic::Code::DeadlineExceeded);
    assert!(error.to_string().contains("importing its pool for 5.0 s"), "{error}");
    assert_eq!(volumes.machine().mounts().len(), 0);
    let _ = prepare(&volumes, "c1", wanted("a", Create::Never, "/m1")).await.unwrap();
    assert_eq!(count(&volumes, "import"), 1);

    let missing = guest(&disks);
    let error =
        missing.prepare("c1", &[wanted("b", Create::Fresh, "/m")], Instant::now() + Duration::from_secs(2)).await;
    let error = error.unwrap_err().to_string();
    assert!(error.contains("waiting for its disk for 2.0 s (vda ("), "{error}");
}

#[tokio::test(start_paused = true)]
async fn a_held_mount_is_taken_lazily_and_the_pool_resumed_on_its_replugged_disk() {
    let disks = disks(&["a"]);
    let volumes = guest(&disks);
    let _ = prepare(&volumes, "c1", wanted("a", Create::Fresh, "/m1")).await.unwrap();
    volumes.machine().container_writes(&spec("a", Create::Fresh).pool, "precious");
    volumes.machine().held.lock().unwrap().insert("/m1".into());
    volumes.release_container("c1").await;
    assert_eq!(volumes.machine().mounts().len(), 0);
    assert_eq!(volumes.machine().imported().len(), 1, "still busy");
    assert!(count(&volumes, "sync") >= 1);

    volumes.machine().plug(0, false);
    disks.lock().unwrap()[0].name = "vdq".into();
    volumes.machine().plug(0, true);
    let _ = prepare(&volumes, "c1", wanted("a", Create::Never, "/m2")).await.unwrap();
    assert_eq!(count(&volumes, "resume"), 1);
    assert_eq!(data(&disks), "precious");
}

#[tokio::test(start_paused = true)]
async fn a_leftover_that_does_not_resume_says_what_to_do() {
    let disks = disks(&["a"]);
    let volumes = guest(&disks);
    let _ = prepare(&volumes, "c1", wanted("a", Create::Fresh, "/m1")).await.unwrap();
    volumes.machine().plug(0, true);
    volumes.machine().failing.lock().unwrap().insert("resume".into());
    let error = prepare(&volumes, "c2", wanted("a", Create::Fresh, "/m2")).await.unwrap_err();
    assert!(matches!(error, VolumeError::Stuck { .. }));
    assert!(error.to_string().contains("delete the pod"), "{error}");
}

#[tokio::test(start_paused = true)]
async fn properties_that_differ_are_set_and_a_quota_is_only_raised() {
    let disks = disks(&["a"]);
    let first = guest(&disks);
    let _ = prepare(&first, "c1", wanted("a", Create::Fresh, "/m1")).await.unwrap();
    let (id, gib) = (spec("a", Create::Fresh).id, Bytes::gib);
    let grown = first.grow(id, gib(2), DiskLayout::partition_for(gib(2))).await.unwrap();
    assert_eq!((grown.capacity, grown.partition), (gib(2), DiskLayout::partition_for(gib(2))));
    // Again, and with less: nothing shrinks.
    assert_eq!(first.grow(id, gib(2), DiskLayout::partition_for(gib(2))).await.unwrap(), grown);
    let less = first.grow(id, gib(1), DiskLayout::partition_for(gib(1))).await.unwrap();
    assert_eq!(less, grown);
    first.release_container("c1").await;

    let next = guest(&disks);
    let mut older = wanted("a", Create::Never, "/m1");
    older.spec.dataset_properties.insert("compression".into(), "zstd".into());
    let _ = prepare(&next, "c1", older).await.unwrap();
    let pool = disks.lock().unwrap()[0].pool.clone().unwrap();
    let dataset = &pool.datasets[&spec("a", Create::Fresh).dataset()];
    assert_eq!((dataset["compression"].as_str(), dataset["refquota"].as_str()), ("zstd", "2147483648"));
    assert_eq!(count(&next, "set ["), 1);
    assert_eq!(next.status(Duration::ZERO).await[0].quota, gib(2).0);
}

#[tokio::test(start_paused = true)]
async fn growth_beyond_the_disk_is_refused_with_both_numbers() {
    let volumes = guest(&disks(&["a"]));
    let _ = prepare(&volumes, "c1", wanted("a", Create::Fresh, "/m1")).await.unwrap();
    let id = spec("a", Create::Fresh).id;
    let error = volumes.grow(id, Bytes::gib(20), DiskLayout::partition_for(Bytes::gib(20))).await.unwrap_err();
    assert_eq!(error.code(), tonic::Code::OutOfRange);
    let largest = DiskLayout::partition_for(Bytes::gib(8)).to_string();
    assert!(error.to_string().contains(&largest), "{error}");
    assert_eq!(count(&volumes, "expand"), 0);
}

#[tokio::test(start_paused = true)]
async fn a_growth_cut_short_is_completed_at_the_next_start() {
    let (id, two) = (spec("a", Create::Fresh).id, Bytes::gib(2));
    for number in 1..6 {
        let disks = disks(&["a"]);
        let first = guest(&disks);
        let _ = prepare(&first, "c1", wanted("a", Create::Fresh, "/m1")).await.unwrap();
        let before = first.machine().steps().len() as u32;
        first.release_container("c1").await;

        let killed = Volumes::new(SimMachine::new(&disks, Kill::After(before - 3 + number)), "/zpod/volumes");
        let _ = prepare(&killed, "c1", wanted("a", Create::Never, "/m1")).await;
        let _ = killed.grow(id, two, DiskLayout::partition_for(two)).await;

        let next = guest(&disks);
        let mut spec = wanted("a", Create::Never, "/m1");
        (spec.spec.capacity, spec.spec.partition) = (two, DiskLayout::partition_for(two));
        let _ = prepare(&next, "c1", spec).await.unwrap();
        let pool = disks.lock().unwrap()[0].pool.clone().unwrap();
        assert_eq!(pool.size, DiskLayout::partition_for(two).0);
        assert_eq!(pool.datasets[&format!("{}/data", pool.name)]["refquota"], two.0.to_string());
    }
}

#[tokio::test(start_paused = true)]
async fn the_arc_gets_the_largest_bound_of_the_pods_volumes() {
    let volumes = guest(&disks(&["a", "b"]));
    for (name, arc) in [("a", Some(Bytes::mib(512))), ("b", Some(Bytes::mib(128)))] {
        let mut wanted = wanted(name, Create::Fresh, &format!("/{name}"));
        wanted.spec.arc_max = arc;
        let _ = prepare(&volumes, "c1", wanted).await.unwrap();
    }
    assert_eq!(volumes.machine().arc(), Some(Bytes::mib(512)));
}

#[tokio::test(start_paused = true)]
async fn eight_volumes_come_up_at_once_and_all_go() {
    let names = ["a", "b", "c", "d", "e", "f", "g", "h"];
    let volumes = guest(&disks(&names));
    let all: Vec<_> = names.iter().map(|name| wanted(name, Create::Fresh, &format!("/{name}"))).collect();
    let _ = volumes.prepare("c1", &all, Instant::now() + WAIT).await.unwrap();
    assert_eq!(volumes.status(Duration::ZERO).await.len(), 8);
    volumes.release_all().await;
    assert_eq!(volumes.machine().imported().len(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_mount_point_that_is_none_is_refused() {
    let volumes = guest(&disks(&["a", "b"]));
    for bad in ["", "relative", "/", "/a/../b"] {
        let error = prepare(&volumes, "c1", wanted("a", Create::Fresh, bad)).await.unwrap_err();
        assert_eq!(error.code(), tonic::Code::InvalidArgument, "{bad}");
    }
    let _ = prepare(&volumes, "c1", wanted("a", Create::Fresh, "/m")).await.unwrap();
    let error = prepare(&volumes, "c1", wanted("b", Create::Fresh, "/m")).await.unwrap_err();
    assert!(error.to_string().contains("mounted at /m already"), "{error}");
}

#[tokio::test(start_paused = true)]
async fn the_journal_says_created_before_a_container_sees_the_volume() {
    let disks = disks(&["a"]);
    let volumes = guest(&disks);
    let _ = prepare(&volumes, "c1", wanted("a", Create::Fresh, "/m1")).await.unwrap();
    let steps = volumes.machine().steps();
    let place = |name: &str| steps.iter().rposition(|step| step.starts_with(name)).unwrap();
    assert!(place(&format!("write {}", DiskLayout::JOURNAL_OFFSET)) < place("mount /m1"));
    let disk = volumes.machine().disks().await.unwrap().remove(0);
    let block = volumes.machine().read(&disk, DiskLayout::JOURNAL_OFFSET, crate::journal::BYTES).await.unwrap();
    assert_eq!(Journal::decode(&block, spec("a", Create::Fresh).id), Journal::Created);
}

#[tokio::test(start_paused = true)]
async fn a_refused_volume_is_told_with_its_token_until_a_container_gets_it() {
    let disks = disks(&["a"]);
    let volumes = guest(&disks);
    volumes.machine().failing.lock().unwrap().insert("create: pool".into());
    let error = prepare(&volumes, "c1", wanted("a", Create::Fresh, "/m1")).await.unwrap_err().to_string();
    let told = volumes.status(Duration::ZERO).await;
    assert_eq!((told.len(), told[0].token, told[0].health), (1, Uuid::from_u128(7), None));
    assert_eq!((told[0].refusal.as_ref(), told[0].problem().as_ref()), (Some(&error), Some(&error)));
    // It waits for the next try's outcome: a state that came and went with each try would tell nobody anything.
    volumes.machine().failing.lock().unwrap().clear();
    let _ = prepare(&volumes, "c1", wanted("a", Create::Fresh, "/m1")).await.unwrap();
    let told = volumes.status(Duration::ZERO).await;
    assert_eq!((told.len(), told[0].refusal.clone(), told[0].problem()), (1, None, None));

    // One that can't be mounted for one container is still there for the other, and says so.
    volumes.machine().failing.lock().unwrap().insert("mount /m2".into());
    assert!(prepare(&volumes, "c2", wanted("a", Create::Never, "/m2")).await.is_err());
    let told = volumes.status(Duration::ZERO).await.remove(0);
    assert!(told.health.is_some() && told.problem().unwrap().contains("mount /m2 fails"));
    // Its pool goes with the container that had it; the refusal stays to be told.
    volumes.release_container("c1").await;
    assert_eq!(volumes.status(Duration::ZERO).await[0].health, None);
}

#[tokio::test(start_paused = true)]
async fn a_refusal_because_of_the_time_ends_when_the_pool_is_up_after_all() {
    let disks = disks(&["a"]);
    let first = guest(&disks);
    let _ = prepare(&first, "c1", wanted("a", Create::Fresh, "/m1")).await.unwrap();
    first.release_container("c1").await;
    let volumes = guest(&disks);
    *volumes.machine().import_time.lock().unwrap() = Duration::from_secs(20);
    let soon = Instant::now() + Duration::from_secs(5);
    assert!(volumes.prepare("c1", &[wanted("a", Create::Never, "/m1")], soon).await.is_err());
    assert!(volumes.status(Duration::ZERO).await[0].refusal.as_ref().unwrap().contains("not ready yet"));
    tokio::time::sleep(Duration::from_secs(20)).await;
    assert_eq!(volumes.status(Duration::ZERO).await[0].refusal, None);
}
