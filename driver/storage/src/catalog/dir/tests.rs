use std::path::PathBuf;

use tempfile::TempDir;
use zpod_volume::{Bytes, Origin, SnapshotId, VolumeId, VolumeMode, VolumeParameters};

use super::super::{Contents, Phase, SnapshotPhase};
use super::*;

struct Fixture {
    catalog: DirCatalog,
    dir: TempDir,
}

impl Fixture {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        Self { catalog: open(dir.path()).unwrap().0, dir }
    }

    fn restart(self) -> Self {
        drop(self.catalog);
        Self { catalog: open(self.dir.path()).unwrap().0, dir: self.dir }
    }

    fn path(&self, id: VolumeId) -> PathBuf {
        self.dir.path().join("volumes").join(format!("{id}.json"))
    }

    async fn create(&self, name: &str) -> Volume {
        match self.catalog.create(volume(name)).await.unwrap() {
            Created::Created(volume) => volume,
            Created::Existed(volume) => panic!("{volume:?} existed"),
        }
    }
}

fn volume(name: &str) -> Volume {
    Volume {
        phase: Phase::Ready,
        initialized: true,
        table_capacity: Bytes::gib(1),
        labels: [("pvc".to_owned(), name.to_owned())].into(),
        ..Volume::wanted(name, Bytes::gib(1), VolumeParameters::default(), "node-1")
    }
}

#[tokio::test]
async fn a_record_is_there_after_a_restart_as_it_was_last_written() {
    let fixture = Fixture::new();
    let created = fixture.create("a").await;
    assert_eq!(created.revision, 1);
    let updated = fixture.catalog.update(Volume { phase: Phase::Ready, ..created }).await.unwrap();
    assert_eq!(updated.revision, 2);
    let fixture = fixture.restart();
    assert_eq!(fixture.catalog.get(updated.id).await.unwrap(), Some(updated.clone()));
    fixture.catalog.remove(updated.id).await.unwrap();
    fixture.catalog.remove(updated.id).await.unwrap();
    let fixture = fixture.restart();
    assert_eq!(fixture.catalog.get(updated.id).await.unwrap(), None);
    assert!(matches!(fixture.catalog.update(updated).await, Err(CatalogError::NotFound(_))));
}

#[tokio::test]
async fn a_second_creation_gives_what_is_recorded_unchanged() {
    let fixture = Fixture::new();
    let first = fixture.create("a").await;
    let other = Volume { capacity: Bytes::gib(2), ..volume("a") };
    assert_eq!(fixture.catalog.create(other).await.unwrap(), Created::Existed(first));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_writers_that_read_the_same_record_one_wins() {
    let fixture = Fixture::new();
    let read = fixture.create("a").await;
    let catalog = Arc::new(fixture.catalog);
    let writers: Vec<_> = (0..16u64)
        .map(|n| {
            let (catalog, volume) = (Arc::clone(&catalog), Volume { capacity: Bytes(n), ..read.clone() });
            tokio::spawn(async move { catalog.update(volume).await })
        })
        .collect();
    let mut won = None;
    for writer in writers {
        match writer.await.unwrap() {
            Ok(volume) => assert!(won.replace(volume).is_none(), "two won"),
            Err(error) => assert!(matches!(error, CatalogError::Conflict(_)), "{error}"),
        }
    }
    assert_eq!(catalog.get(read.id).await.unwrap(), won);
}

#[tokio::test]
async fn one_process_has_the_catalog() {
    let fixture = Fixture::new();
    assert!(matches!(open(fixture.dir.path()), Err(CatalogError::Locked(_))));
    fixture.restart();
}

#[tokio::test]
async fn a_damaged_record_is_refused_by_name_and_hides_no_other() {
    let mut fixture = Fixture::new();
    let (good, bad) = (fixture.create("good").await, fixture.create("bad").await);
    // Without the blanks behind it.
    let sound = std::fs::read_to_string(fixture.path(bad.id)).unwrap().trim_end().to_owned();
    let others = sound.replace(&bad.id.to_string(), &good.id.to_string());
    let long = format!("{sound}{}", " ".repeat(1 << 20));
    let unstored = sound.replace("\"revision\": 1", "\"revision\": 0");
    for text in ["", "{", "null", &sound[..sound.len() / 2], &others, &long, &unstored] {
        for restart in [false, true] {
            std::fs::write(fixture.path(bad.id), text).unwrap();
            if restart {
                fixture = fixture.restart();
            }
            let catalog = &fixture.catalog;
            for result in [
                catalog.get(bad.id).await.map(drop),
                catalog.create(volume("bad")).await.map(drop),
                catalog.update(bad.clone()).await.map(drop),
                catalog.remove(bad.id).await,
            ] {
                let error = result.unwrap_err();
                assert!(matches!(error, CatalogError::Damaged { .. }), "{error}");
                assert!(error.to_string().contains(&bad.id.to_string()), "{error}");
            }
            assert_eq!(catalog.list(None, 10).await.unwrap().records, std::slice::from_ref(&good));
            assert_eq!(std::fs::read_to_string(fixture.path(bad.id)).unwrap(), text, "nothing is done to it");
        }
    }
    std::fs::write(fixture.path(bad.id), &sound).unwrap();
    assert_eq!(fixture.catalog.get(bad.id).await.unwrap(), Some(bad.clone()));
    fixture.catalog.update(bad).await.unwrap();
}

#[tokio::test]
async fn leftovers_go_at_the_start_and_nothing_else_does() {
    let fixture = Fixture::new();
    let volumes = fixture.dir.path().join("volumes");
    let ours = volumes.join(directory::temporary_name(VolumeId::from_name("a")));
    let strangers = ["notes.json", ".x.tmp", "README"].map(|name| volumes.join(name));
    std::fs::write(&ours, "{").unwrap();
    strangers.iter().for_each(|path| std::fs::write(path, "x").unwrap());
    let fixture = fixture.restart();
    assert!(!ours.exists());
    assert!(strangers.iter().all(|path| path.exists()));
    assert_eq!(fixture.catalog.list(None, 10).await.unwrap(), Page { records: vec![], next: None });
}

#[tokio::test]
async fn pages_give_every_record_once_in_the_order_of_ids() {
    let fixture = Fixture::new();
    let mut all = Vec::new();
    for n in 0..23 {
        all.push(fixture.create(&n.to_string()).await);
    }
    all.sort_by_key(|volume| volume.id);
    let (mut from, mut seen) = (None, Vec::new());
    loop {
        let page = fixture.catalog.list(from, 5).await.unwrap();
        seen.extend(page.records);
        from = page.next;
        if from.is_none() {
            break;
        }
        // Removed meanwhile: the next page begins behind it.
        if seen.len() == 10 {
            fixture.catalog.remove(all.remove(10).id).await.unwrap();
        }
    }
    assert_eq!(seen, all);
}

#[tokio::test]
#[expect(clippy::await_holding_lock, reason = "it keeps the call waiting until its caller is gone")]
async fn a_call_is_finished_even_if_its_caller_goes_away() {
    let fixture = Fixture::new();
    let id = VolumeId::from_name("a");
    let gate = fixture.catalog.store.lock(id);
    {
        let call = fixture.catalog.create(volume("a"));
        let given_up = tokio::time::timeout(std::time::Duration::from_millis(20), call).await;
        assert!(given_up.is_err());
    }
    drop(gate);
    for _ in 0..100 {
        if fixture.catalog.get(id).await.unwrap().is_some() {
            return;
        }
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    panic!("the creation was dropped half way");
}

fn snapshot(name: &str) -> Snapshot {
    let origin = Origin { volume: VolumeId::from_name("a"), mark: None, initialized: true, copy: None };
    let contents = Contents {
        taken: 1,
        capacity: Bytes::gib(1),
        partition: Bytes::gib(2),
        origin,
        encryption: None,
        mode: VolumeMode::Filesystem,
    };
    Snapshot {
        id: SnapshotId::from_name(name),
        name: name.to_owned(),
        volume: VolumeId::from_name("a"),
        node: "node-1".to_owned(),
        group: None,
        phase: SnapshotPhase::Copying,
        allow_copy: false,
        contents: Some(contents),
        revision: 0,
    }
}

#[tokio::test]
async fn snapshots_are_recorded_as_volumes_are_and_apart_from_them() {
    let dir = tempfile::tempdir().unwrap();
    let (volumes, snapshots) = open(dir.path()).unwrap();
    // A volume and a snapshot of one name have nothing to do with each other.
    volumes.create(volume("a")).await.unwrap();
    let created = snapshots.create(snapshot("a")).await.unwrap().into_record();
    assert_eq!(snapshots.create(snapshot("a")).await.unwrap(), Created::Existed(created.clone()));
    let ready = snapshots.update(Snapshot { phase: SnapshotPhase::Ready, ..created.clone() }).await.unwrap();
    let error = snapshots.update(created).await.unwrap_err();
    assert_eq!(error.to_string(), CatalogError::conflict::<Snapshot>(ready.id).to_string());
    for name in ["b", "c"] {
        snapshots.create(snapshot(name)).await.unwrap();
    }
    drop((volumes, snapshots));

    let (volumes, snapshots) = open(dir.path()).unwrap();
    assert_eq!(snapshots.get(ready.id).await.unwrap(), Some(ready.clone()));
    let page = snapshots.list(None, 2).await.unwrap();
    let rest = snapshots.list(page.next, 2).await.unwrap();
    assert_eq!((page.records.len(), rest.records.len(), rest.next), (2, 1, None));
    volumes.remove(VolumeId::from_name("a")).await.unwrap();
    assert_eq!(snapshots.get(ready.id).await.unwrap(), Some(ready.clone()));
    snapshots.remove(ready.id).await.unwrap();
    assert_eq!(snapshots.get(ready.id).await.unwrap(), None);
    let error = snapshots.update(ready).await.unwrap_err().to_string();
    assert!(error.starts_with("snapshot "), "{error}");
}

#[tokio::test]
async fn a_record_that_cannot_be_read_keeps_nobody_from_the_others() {
    let mut fixture = Fixture::new();
    let (good, bad) = (fixture.create("good").await, fixture.create("bad").await);
    let path = fixture.path(bad.id);
    std::fs::remove_file(&path).unwrap();
    // What reading it gives is an error of the operating system.
    std::fs::create_dir(&path).unwrap();
    for restart in [false, true] {
        if restart {
            fixture = fixture.restart();
        }
        assert_eq!(fixture.catalog.list(None, 10).await.unwrap().records, std::slice::from_ref(&good));
        let error = fixture.catalog.get(bad.id).await.unwrap_err().to_string();
        assert!(error.contains(path.to_str().unwrap()), "{error}");
    }
}
