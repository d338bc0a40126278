//! More than one disk of one volume in a guest: one that is going away, and one that Kata's runtime-rs has forgotten.

use super::*;
use crate::machine::simulated::SimDisk;
use crate::place::Place;

/// Another appearance of the first disk.
fn view(name: &str, sequence: u64) -> SimDisk {
    SimDisk { name: name.into(), sequence, image_of: Some(0), plugged: true, ..SimDisk::default() }
}

fn used(volumes: &Volumes<SimMachine>) -> String {
    volumes.known(VolumeId::from_name("a")).unwrap().1.disk.name
}

/// A pool that was made and exported.
async fn exported() -> Disks {
    let disks = disks(&["a"]);
    let volumes = guest(&disks);
    let _ = prepare(&volumes, "c0", wanted("a", Create::Fresh, "/m0")).await.unwrap();
    volumes.release_all().await;
    disks
}

fn later(volumes: &Arc<Volumes<SimMachine>>, millis: u64, work: impl FnOnce(&SimMachine) + Send + 'static) {
    let volumes = Arc::clone(volumes);
    tokio::spawn(async move {
        tokio::time::sleep(Duration::from_millis(millis)).await;
        work(volumes.machine());
    });
}

#[tokio::test(start_paused = true)]
async fn a_disk_that_is_going_away_is_not_taken_for_the_one_that_comes() {
    let disks = exported().await;
    let volumes = guest(&disks);
    later(&volumes, 60, |machine| machine.add(view("vdb", 20)));
    later(&volumes, 120, |machine| machine.plug(0, false));
    let mut second = wanted("a", Create::Never, "/m1");
    second.place = Place::of_storage("blk", "02/02");
    let _ = prepare(&volumes, "c1", second).await.unwrap();
    assert_eq!(used(&volumes), "vdb");
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(volumes.status(Duration::ZERO).await[0].health, Some(crate::machine::Health::Online));
}

#[tokio::test(start_paused = true)]
async fn a_copy_that_goes_is_waited_for_and_one_that_stays_is_refused() {
    for stays in [false, true] {
        let disks = exported().await;
        let copy = SimDisk { name: "vdb".into(), sequence: 20, ..disks.lock().unwrap()[0].clone() };
        let volumes = guest(&disks);
        volumes.machine().add(copy);
        if !stays {
            later(&volumes, 120, |machine| machine.plug(0, false));
        }
        match prepare(&volumes, "c1", wanted("a", Create::Never, "/m1")).await {
            Ok(_) => assert_eq!((stays, used(&volumes).as_str()), (false, "vdb")),
            Err(error) => assert!(stays && matches!(error, VolumeError::ManyDisks { .. }), "{error}"),
        }
        // Each set of disks is compared once, and one that stays a last time.
        let nonces = count(&volumes, &format!("write {}", DiskLayout::NONCE_OFFSET));
        assert_eq!(nonces, if stays { 2 } else { 1 });
    }
}

#[tokio::test(start_paused = true)]
async fn a_second_view_of_the_image_is_used_where_nobody_uses_the_first() {
    let disks = exported().await;
    let volumes = guest(&disks);
    let mut block = wanted("a", Create::Never, "/m1");
    for (sequence, name) in [(20, "vdb"), (30, "vdc"), (40, "vdd")] {
        // The ones before are still there, for ever.
        volumes.machine().add(view(name, sequence));
        let _ = prepare(&volumes, name, block.clone()).await.unwrap();
        assert_eq!(used(&volumes), name);
        volumes.release_all().await;
        block.spec.create = Create::Never;
    }
    assert_eq!(count(&volumes, "import"), 3);
}

#[tokio::test(start_paused = true)]
async fn a_second_view_of_the_image_changes_nothing_for_those_who_use_the_first() {
    let disks = exported().await;
    let volumes = guest(&disks);
    let _ = prepare(&volumes, "c1", wanted("a", Create::Never, "/m1")).await.unwrap();
    let _ = prepare(&volumes, "c2", wanted("a", Create::Never, "/m2")).await.unwrap();
    for (turn, place) in [(1, "02/02"), (2, "02/03")] {
        volumes.release_container("c1").await;
        volumes.machine().add(view(&format!("vd{turn}"), 10 + turn));
        let again = Wanted { place: Place::of_storage("blk", place), ..wanted("a", Create::Never, "/m1") };
        let _ = prepare(&volumes, "c1", again).await.unwrap();
        assert_eq!(used(&volumes), "vda");
    }
    assert_eq!((count(&volumes, "import"), count(&volumes, "resume")), (1, 0));
    // A copy beside the disk in use is nothing to be used, whoever asks for it.
    let copy = SimDisk { name: "vdx".into(), sequence: 50, ..disks.lock().unwrap()[0].clone() };
    volumes.machine().add(copy);
    let error = prepare(&volumes, "c3", wanted("a", Create::Never, "/m3")).await.unwrap_err();
    assert!(matches!(error, VolumeError::ManyDisks { .. }), "{error}");
    assert_eq!(volumes.machine().mounts().len(), 3, "the two go on");
}

#[tokio::test(start_paused = true)]
async fn a_disk_elsewhere_than_the_request_says_is_taken_when_it_stays_the_only_one() {
    let disks = exported().await;
    let volumes = guest(&disks);
    let elsewhere = Wanted { place: Place::of_storage("blk", "1f"), ..wanted("a", Create::Never, "/m1") };
    let _ = prepare(&volumes, "c1", elsewhere).await.unwrap();
    assert_eq!(used(&volumes), "vda");
}
