use super::super::tests::{count, disks, guest, prepare, wanted};
use super::*;
use crate::key::{Key, Keys};
use crate::machine::simulated::Disks;
use std::sync::Arc;
use std::time::Duration;
use uuid::Uuid;
use zpod_volume::{Create, Encryption, VolumeMode};

fn id() -> VolumeId {
    VolumeId::from_name("a")
}

fn reader(mount_point: &str) -> Wanted {
    let mut reader = wanted("a", Create::Never, mount_point);
    reader.flags.read_only = true;
    reader
}

fn replug(disks: &Disks, read_only: bool) {
    let disk = &mut disks.lock().unwrap()[0];
    disk.sequence += 1;
    disk.read_only = read_only;
}

/// A disk whose pool was made and exported by a guest that ended in good order.
async fn exported() -> Disks {
    let disks = disks(&["a"]);
    let volumes = guest(&disks);
    let _ = prepare(&volumes, "c1", wanted("a", Create::Fresh, "/m1")).await.unwrap();
    volumes.machine().container_writes(&wanted("a", Create::Never, "/m1").spec.pool, "precious");
    volumes.release_container("c1").await;
    disks
}

fn reason(error: &VolumeError) -> &'static str {
    match error {
        VolumeError::ReadOnly { reason, .. } => reason,
        other => panic!("{other}"),
    }
}

#[tokio::test(start_paused = true)]
async fn a_pool_that_was_exported_is_read_from_a_read_only_disk_and_nothing_is_written_to_it() {
    let disks = exported().await;
    for _ in 0..2 {
        replug(&disks, true);
        let volumes = guest(&disks);
        let _ = prepare(&volumes, "c1", reader("/m1")).await.unwrap();
        let _ = prepare(&volumes, "c2", reader("/m2")).await.unwrap();
        assert!(volumes.machine().mounts().iter().all(|(_, _, flags)| flags.read_only));
        assert_eq!(volumes.status(Duration::ZERO).await[0].health, Some(Health::Online));
        volumes.sync(id()).await.unwrap();
        let more = DiskLayout::partition_for(Bytes::gib(2));
        assert_eq!(reason(&volumes.grow(id(), Bytes::gib(2), more).await.unwrap_err()), CHANGE);
        volumes.release_all().await;
        assert_eq!((volumes.machine().mounts().len(), volumes.machine().imported().len()), (0, 0));
        let steps = volumes.machine().steps();
        let writes = ["write", "set", "own", "expand", "sync", "destroy"];
        let wrote = |step: &&String| writes.iter().any(|write| step.starts_with(write));
        assert_eq!(steps.iter().find(wrote), None);
    }
    // With a disk that can be written to all is as ever.
    replug(&disks, false);
    let volumes = guest(&disks);
    let _ = prepare(&volumes, "c1", wanted("a", Create::Never, "/m1")).await.unwrap();
    volumes.machine().container_writes(&reader("/m1").spec.pool, "more");
}

#[tokio::test(start_paused = true)]
async fn a_pool_whose_machine_was_killed_is_refused_until_it_was_exported_once() {
    let disks = exported().await;
    let killed = guest(&disks);
    let _ = prepare(&killed, "c1", wanted("a", Create::Never, "/m1")).await.unwrap();
    drop(killed);
    replug(&disks, true);
    let volumes = guest(&disks);
    for _ in 0..2 {
        let error = prepare(&volumes, "c1", reader("/m1")).await.unwrap_err();
        assert_eq!((reason(&error), error.code()), (NOT_EXPORTED, tonic::Code::FailedPrecondition));
        assert_eq!(count(&volumes, "import"), 0);
        let text = error.to_string();
        assert!(
            text.contains("without the last fsynced writes") && text.contains("mounts it writable first"),
            "{text}"
        );
    }
    replug(&disks, false);
    let _ = prepare(&volumes, "c1", wanted("a", Create::Never, "/m1")).await.unwrap();
    volumes.release_all().await;
    replug(&disks, true);
    let _ = prepare(&volumes, "c1", reader("/m1")).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_pool_that_was_exported_before_its_log_was_replayed_is_refused() {
    let disks = disks(&["a"]);
    let keys = |text: &str| Keys { key: Key::new(text.repeat(32).into_bytes()).unwrap(), previous: None };
    let encrypted = |mut wanted: Wanted| {
        wanted.spec.encryption = Some(Encryption::Aes256Gcm);
        wanted
    };
    let killed = guest(&disks);
    killed.provide_key(id(), Uuid::from_u128(7), keys("a")).await.unwrap();
    let _ = prepare(&killed, "c1", encrypted(wanted("a", Create::Fresh, "/m1"))).await.unwrap();
    killed.release_all().await;
    let _ = prepare(&killed, "c1", encrypted(wanted("a", Create::Never, "/m1"))).await.unwrap();
    disks.lock().unwrap()[0].pool.as_mut().unwrap().log_waits();
    drop(killed);
    // The next one has the wrong key, and exports the pool.
    let next = guest(&disks);
    next.provide_key(id(), Uuid::from_u128(7), keys("b")).await.unwrap();
    let error = prepare(&next, "c1", encrypted(wanted("a", Create::Never, "/m1"))).await.unwrap_err();
    assert!(matches!(error, VolumeError::WrongKey { .. }), "{error}");
    assert!(next.machine().imported().is_empty());
    replug(&disks, true);
    let volumes = guest(&disks);
    volumes.provide_key(id(), Uuid::from_u128(7), keys("a")).await.unwrap();
    let error = prepare(&volumes, "c1", encrypted(reader("/m1"))).await.unwrap_err();
    assert_eq!(reason(&error), NOT_EXPORTED);
    // With the key and a disk that can be written to it is replayed, and then it can be read.
    replug(&disks, false);
    let _ = prepare(&volumes, "c1", encrypted(wanted("a", Create::Never, "/m1"))).await.unwrap();
    volumes.release_all().await;
    replug(&disks, true);
    let _ = prepare(&volumes, "c1", encrypted(reader("/m1"))).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_container_that_wants_to_write_is_refused_on_a_read_only_disk_with_what_to_do() {
    let disks = exported().await;
    replug(&disks, true);
    let volumes = guest(&disks);
    let _ = prepare(&volumes, "reader", reader("/m1")).await.unwrap();
    let error = prepare(&volumes, "writer", wanted("a", Create::Never, "/m2")).await.unwrap_err();
    assert_eq!(reason(&error), WRITER);
    assert!(error.to_string().contains("kata-zpod"), "{error}");
    assert_eq!(volumes.machine().mounts().len(), 2, "the reader has it still");
    volumes.release_container("reader").await;
    // Alone it is refused too; the disk can go, and the one that comes can be written to.
    let error = prepare(&volumes, "writer", wanted("a", Create::Never, "/m2")).await.unwrap_err();
    assert_eq!(reason(&error), WRITER);
    assert!(volumes.machine().imported().is_empty());
    replug(&disks, false);
    let _ = prepare(&volumes, "writer", wanted("a", Create::Never, "/m2")).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn what_was_left_imported_from_a_read_only_disk_is_not_in_the_way_of_a_writable_one() {
    let disks = exported().await;
    replug(&disks, true);
    let volumes = guest(&disks);
    volumes.machine().failing.lock().unwrap().insert("mount".into());
    assert!(prepare(&volumes, "reader", reader("/m1")).await.is_err());
    volumes.machine().failing.lock().unwrap().clear();
    replug(&disks, false);
    let _ = prepare(&volumes, "writer", wanted("a", Create::Never, "/m1")).await.unwrap();
    volumes.machine().container_writes(&reader("/m1").spec.pool, "more");
}

#[tokio::test(start_paused = true)]
async fn a_volume_that_was_never_made_is_not_made_on_a_read_only_disk() {
    let disks = disks(&["a"]);
    replug(&disks, true);
    let volumes = guest(&disks);
    let mut fresh = reader("/m1");
    fresh.spec.create = Create::Fresh;
    let error = prepare(&volumes, "c1", fresh).await.unwrap_err();
    assert_eq!(reason(&error), NEVER_MADE);
}

#[tokio::test(start_paused = true)]
async fn a_block_device_is_read_from_a_read_only_disk_when_its_device_was_there_before() {
    let disks = disks(&["a"]);
    let block = |read_only: bool, create| {
        let mut wanted = wanted("a", create, "/dev/xvda");
        (wanted.spec.mode, wanted.fs_group) = (VolumeMode::Block, None);
        (wanted.spec.read_only, wanted.flags.read_only) = (read_only, read_only);
        wanted
    };
    let volumes = guest(&disks);
    let _ = prepare(&volumes, "c1", block(false, Create::Fresh)).await.unwrap();
    volumes.release_all().await;
    replug(&disks, true);
    let volumes: Arc<_> = guest(&disks);
    let _ = prepare(&volumes, "c1", block(true, Create::Never)).await.unwrap();
    volumes.block_device(id()).await.unwrap();
    volumes.release_all().await;
    assert!(volumes.machine().imported().is_empty());
}
