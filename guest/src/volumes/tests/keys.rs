//! Encrypted volumes.

use super::restore::{copied, mark, restored};
use super::*;
use crate::key::{Key, Keys};
use crate::machine::Step;
use zpod_volume::Encryption;

const TOKEN: Uuid = Uuid::from_u128(7);

fn key(text: &str) -> Key {
    Key::new(format!("{text:-<32}").into_bytes()).unwrap()
}

fn keys(key_text: &str, previous: Option<&str>) -> Keys {
    Keys { key: key(key_text), previous: previous.map(key) }
}

fn encrypted(mut wanted: Wanted) -> Wanted {
    wanted.spec.encryption = Some(Encryption::Aes256Gcm);
    wanted
}

fn id() -> VolumeId {
    VolumeId::from_name("a")
}

fn a(create: Create) -> Wanted {
    encrypted(wanted("a", create, "/m1"))
}

fn key_on(disks: &Disks) -> Option<Key> {
    disks.lock().unwrap()[0].pool.as_ref().unwrap().key.clone()
}

/// A guest that has been given the key early, and has made the volume with it.
async fn made() -> (Arc<Volumes<SimMachine>>, Disks) {
    let disks = disks(&["a"]);
    let volumes = guest(&disks);
    assert_eq!(volumes.provide_key(id(), TOKEN, keys("one", None)).await, Ok(Step::Unchanged));
    let _ = prepare(&volumes, "c1", a(Create::Fresh)).await.unwrap();
    volumes.machine().container_writes(&a(Create::Never).spec.pool, "secret");
    (volumes, disks)
}

#[tokio::test(start_paused = true)]
async fn a_key_that_comes_early_is_kept_for_the_life_of_the_guest() {
    let (volumes, disks) = made().await;
    assert_eq!(key_on(&disks), Some(key("one")));
    let told = volumes.status(Duration::ZERO).await.remove(0);
    assert_eq!((told.encrypted, told.awaits_key, told.problem()), (true, false, None));
    for _ in 0..2 {
        volumes.release_container("c1").await;
        assert!(volumes.machine().imported().is_empty());
        let _ = prepare(&volumes, "c1", a(Create::Never)).await.unwrap();
    }
    assert_eq!((count(&volumes, "load key"), data(&disks).as_str()), (2, "secret"));
}

#[tokio::test(start_paused = true)]
async fn a_volume_goes_back_to_a_snapshot_once_its_key_is_there() {
    let (volumes, disks) = made().await;
    volumes.take_snapshot(id(), "before").await.unwrap();
    volumes.machine().container_writes(&a(Create::Never).spec.pool, "later");
    volumes.release_container("c1").await;
    let mut wanted = a(Create::Never);
    let rollback =
        zpod_volume::Rollback { id: Uuid::from_u128(1), snapshot: "before".into(), guid: 0, destroy_newer: false };
    wanted.spec.rollback = Some(rollback);
    let next = guest(&disks);
    let running = {
        let next = Arc::clone(&next);
        tokio::spawn(async move { prepare(&next, "c1", wanted).await.map(drop) })
    };
    tokio::time::sleep(Duration::from_secs(5)).await;
    assert_eq!((count(&next, "rollback"), data(&disks).as_str()), (0, "later"));
    next.provide_key(id(), TOKEN, keys("one", None)).await.unwrap();
    running.await.unwrap().unwrap();
    assert_eq!((count(&next, "rollback"), data(&disks).as_str()), (1, "secret"));
}

#[tokio::test(start_paused = true)]
async fn a_volume_waits_for_its_key_and_says_so_and_nothing_is_begun_without() {
    let disks = disks(&["a"]);
    let volumes = guest(&disks);
    let running = {
        let volumes = Arc::clone(&volumes);
        tokio::spawn(async move { prepare(&volumes, "c1", a(Create::Fresh)).await.map(drop) })
    };
    tokio::time::sleep(Duration::from_secs(5)).await;
    let told = volumes.status(Duration::ZERO).await.remove(0);
    assert_eq!((told.awaits_key, told.encrypted, told.token, told.health), (true, true, TOKEN, None));
    assert!(told.problem().unwrap().contains("waits for its key"));
    assert_eq!((count(&volumes, "write"), count(&volumes, "create")), (0, 0));

    let stranger = volumes.provide_key(id(), Uuid::from_u128(8), keys("two", None)).await.unwrap_err();
    assert!(matches!(stranger, VolumeError::OtherToken { .. }));
    assert_eq!(volumes.provide_key(id(), TOKEN, keys("one", None)).await, Ok(Step::Unchanged));
    running.await.unwrap().unwrap();
    assert_eq!(key_on(&disks), Some(key("one")));
}

#[tokio::test(start_paused = true)]
async fn without_a_key_the_container_is_refused_in_time_with_what_to_do() {
    let (_, disks) = made().await;
    let volumes = guest(&disks);
    for seconds in [10, 20] {
        let begin = Instant::now();
        let error = volumes.prepare("c1", &[a(Create::Never)], begin + Duration::from_secs(seconds)).await;
        let error = error.unwrap_err();
        assert!(matches!(error, VolumeError::NoKey { .. }), "{error}");
        assert!(begin.elapsed() < Duration::from_secs(seconds) && begin.elapsed().as_secs() >= seconds - 1);
        for part in [id().to_string().as_str(), "encryptionKey", "node-publish-secret-name"] {
            assert!(error.to_string().contains(part), "{error}");
        }
        // The disk can go, and another may come.
        assert!(volumes.machine().imported().is_empty());
        assert_eq!(volumes.status(Duration::ZERO).await[0].refusal, Some(error.to_string()));
    }
    volumes.provide_key(id(), TOKEN, keys("one", None)).await.unwrap();
    let _ = prepare(&volumes, "c1", a(Create::Never)).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_wrong_key_is_told_to_whoever_gave_it_and_whoever_waits_and_the_right_one_helps() {
    let (_, disks) = made().await;
    let volumes = guest(&disks);
    let start = || {
        let volumes = Arc::clone(&volumes);
        tokio::spawn(async move { prepare(&volumes, "c1", a(Create::Never)).await.map(drop) })
    };
    for wrong in [keys("two", None), keys("two", Some("three")), Keys { key: passphrase(), previous: None }] {
        let running = start();
        tokio::time::sleep(Duration::from_secs(1)).await;
        let given = volumes.provide_key(id(), TOKEN, wrong.clone()).await.unwrap_err();
        let waited = running.await.unwrap().unwrap_err();
        assert_eq!((given.code(), &given), (tonic::Code::PermissionDenied, &waited));
        assert_eq!(given.to_string().contains("neither is the one before"), wrong.previous.is_some(), "{given}");
        assert!(!format!("{given:?} {given}").contains("two"));
        assert!(volumes.machine().imported().is_empty());
    }
    let running = start();
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(volumes.status(Duration::ZERO).await[0].awaits_key);
    assert_eq!(volumes.provide_key(id(), TOKEN, keys("one", None)).await, Ok(Step::Unchanged));
    running.await.unwrap().unwrap();
    assert_eq!(data(&disks), "secret");
}

fn passphrase() -> Key {
    Key::new(b"correct horse".to_vec()).unwrap()
}

#[tokio::test(start_paused = true)]
async fn the_key_of_a_running_volume_is_changed_once_and_only_by_who_knows_the_one_before() {
    let (volumes, disks) = made().await;
    for wrong in [keys("two", None), keys("two", Some("three"))] {
        let error = volumes.provide_key(id(), TOKEN, wrong).await.unwrap_err();
        assert!(matches!(error, VolumeError::WrongKey { .. }), "{error}");
    }
    assert_eq!(key_on(&disks), Some(key("one")));
    let error = volumes.provide_key(id(), Uuid::nil(), keys("two", Some("one"))).await.unwrap_err();
    assert!(matches!(error, VolumeError::OtherToken { .. }), "{error}");

    let new = Keys { key: passphrase(), previous: Some(key("one")) };
    assert_eq!(volumes.provide_key(id(), TOKEN, new.clone()).await, Ok(Step::Changed));
    let looks = count(&volumes, "look at key");
    // Kubelet has it repeated; the second guest of a rotation finds it done.
    assert_eq!(volumes.provide_key(id(), TOKEN, new.clone()).await, Ok(Step::Unchanged));
    assert_eq!((count(&volumes, "look at key"), count(&volumes, "change key")), (looks, 1));
    assert_eq!(key_on(&disks), Some(passphrase()));
    // The guest knows the new one from now on.
    volumes.release_container("c1").await;
    let _ = prepare(&volumes, "c1", a(Create::Never)).await.unwrap();

    let plain = guest(&super::disks(&["a"]));
    let _ = prepare(&plain, "c1", wanted("a", Create::Fresh, "/m1")).await.unwrap();
    let error = plain.provide_key(id(), TOKEN, new).await.unwrap_err();
    assert!(matches!(error, VolumeError::NotEncrypted { .. }), "{error}");
}

#[tokio::test(start_paused = true)]
async fn a_key_that_was_changed_while_no_guest_ran_is_changed_at_the_next_start_killed_or_not() {
    let mut number = 0;
    loop {
        number += 1;
        let (volumes, disks) = made().await;
        volumes.release_all().await;
        let first = Volumes::new(SimMachine::new(&disks, Kill::After(number)), "/zpod/volumes");
        first.provide_key(id(), TOKEN, keys("two", Some("one"))).await.unwrap();
        let _ = prepare(&first, "c1", a(Create::Never)).await;
        let next = guest(&disks);
        next.provide_key(id(), TOKEN, keys("two", Some("one"))).await.unwrap();
        let result = prepare(&next, "c1", a(Create::Never)).await;
        assert!(result.is_ok(), "{number}: {result:?}");
        assert_eq!((key_on(&disks), data(&disks).as_str()), (Some(key("two")), "secret"));
        if !first.machine().dead() {
            break;
        }
    }
    assert!(number > 5);
}

#[tokio::test(start_paused = true)]
async fn a_copy_of_an_encrypted_volume_opens_with_the_key_it_had_then_killed_or_not() {
    let (running, source) = made().await;
    running.mark(id(), &mark()).await.unwrap();
    running.machine().container_writes(&a(Create::Never).spec.pool, "later");
    let copy = copied(&source, &["b"]).lock().unwrap().clone();
    // What becomes of the origin's key does not matter to the copy.
    running.provide_key(id(), TOKEN, keys("two", Some("one"))).await.unwrap();
    let b = || encrypted(restored("b", Some(mark()), "/m1"));
    let mut number = 0;
    loop {
        number += 1;
        let disks = Disks::new(copy.clone().into());
        let first = Volumes::new(SimMachine::new(&disks, Kill::After(number)), "/zpod/volumes");
        first.provide_key(b().spec.id, TOKEN, keys("one", None)).await.unwrap();
        let _ = prepare(&first, "c1", b()).await;
        let next = guest(&disks);
        next.provide_key(b().spec.id, TOKEN, keys("new", Some("one"))).await.unwrap();
        let result = prepare(&next, "c1", b()).await;
        assert!(result.is_ok(), "{number}: {result:?}");
        assert_eq!((key_on(&disks), data(&disks).as_str()), (Some(key("new")), "secret"));
        if !first.machine().dead() {
            break;
        }
    }
    assert!(number > 15);
}

#[tokio::test(start_paused = true)]
async fn a_volume_that_is_encrypted_against_its_spec_or_not_is_refused() {
    let (running, disks) = made().await;
    running.release_all().await;
    let volumes = guest(&disks);
    let error = prepare(&volumes, "c1", wanted("a", Create::Never, "/m1")).await.unwrap_err();
    assert!(error.to_string().contains("encryption=aes-256-gcm, and the node says it has encryption=off"), "{error}");

    let plain = super::disks(&["a"]);
    let first = guest(&plain);
    let _ = prepare(&first, "c1", wanted("a", Create::Fresh, "/m1")).await.unwrap();
    first.release_all().await;
    let volumes = guest(&plain);
    volumes.provide_key(id(), TOKEN, keys("one", None)).await.unwrap();
    let error = prepare(&volumes, "c1", a(Create::Never)).await.unwrap_err();
    assert!(matches!(error, VolumeError::Differs { .. }), "{error}");
    assert_eq!(error.code(), tonic::Code::FailedPrecondition);
}

#[tokio::test(start_paused = true)]
async fn a_copy_of_a_volume_whose_contents_were_just_being_replaced_has_the_ones_before() {
    let (running, source) = made().await;
    running.release_all().await;
    let disks = copied(&source, &["b"]);
    {
        // Between the two renames of a receive.
        let mut all = disks.lock().unwrap();
        let pool = all[0].pool.as_mut().unwrap();
        let properties = pool.datasets.remove(&a(Create::Never).spec.dataset()).unwrap();
        pool.datasets.insert(format!("{}/old", pool.name), properties);
    }
    let volumes = guest(&disks);
    let b = encrypted(restored("b", None, "/m1"));
    volumes.provide_key(b.spec.id, TOKEN, keys("one", None)).await.unwrap();
    let _ = prepare(&volumes, "c1", b.clone()).await.unwrap();
    assert_eq!((data(&disks).as_str(), count(&volumes, "rename")), ("secret", 1));
    assert!(disks.lock().unwrap()[0].pool.as_ref().unwrap().datasets.contains_key(&b.spec.dataset()));
}
