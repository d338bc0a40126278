use hyper::StatusCode;
use tempfile::TempDir;
use zpod_volume::SnapshotId;

use super::*;
use crate::commands::fake::{Answers, path, volume};

const TOKEN: &str = "00000000-0000-0000-0000-000000000007";

/// A volume that somebody has deleted by hand while a pod used it.
fn by_hand() -> (String, Value) {
    let (id, mut object) = volume(
        "db",
        json!({"phase": "Ready", "capacity": "10Gi", "initialized": true, "written": true, "revision": 7,
               "publication": {"targetPath": "/t", "token": TOKEN, "bootId": "b"}, "pool": {"health": "Online"}}),
    );
    object["metadata"] = json!({"name": id, "uid": "u-1", "resourceVersion": "5", "finalizers": [FINALIZER],
                                "deletionTimestamp": "2026-01-01T00:00:00Z", "labels": {"team": "db"}});
    (id, object)
}

struct World {
    answers: Answers,
    directory: TempDir,
}

impl World {
    fn of(objects: &[(String, Value)]) -> Self {
        let answers =
            objects.iter().fold(Answers::default(), |answers, (path, object)| answers.with(path, object.clone()));
        Self { answers: answers.keeping(), directory: tempfile::tempdir().unwrap() }
    }

    fn file(&self) -> std::path::PathBuf {
        self.directory.path().join("records.json")
    }

    fn saved(&self) -> Value {
        serde_json::from_slice(&std::fs::read(self.file()).unwrap()).unwrap()
    }

    async fn adopt(&self, ids: &[&str]) -> Result<(), Failure> {
        let ids = ids.iter().map(|&id| id.to_owned()).collect();
        let options = Adopt { ids, file: Some(self.file()), from: None, timeout: Duration::ZERO };
        run(&self.answers.cluster(), &options, Format::Json).await
    }

    async fn go_on(&self) -> Result<(), Failure> {
        let options = Adopt { ids: vec![], file: None, from: Some(self.file()), timeout: Duration::ZERO };
        run(&self.answers.cluster(), &options, Format::Json).await
    }
}

#[tokio::test]
async fn what_was_deleted_by_hand_is_made_anew_with_what_its_node_had_recorded() {
    let (id, object) = by_hand();
    let world = World::of(&[(path(&id), object)]);
    // Nobody plays the node.
    let failure = world.adopt(&[]).await.unwrap_err();
    assert!(failure.kind == crate::failure::Kind::TimedOut && failure.to_string().contains("n1"), "{failure}");
    let made = world.answers.object(&path(&id)).unwrap();
    assert_eq!(made["metadata"], json!({"name": id, "finalizers": [FINALIZER], "labels": {"team": "db"}}));
    assert_eq!(made["spec"]["claim"]["name"], "db");
    let adopt = &made["spec"]["adopt"];
    assert!(adopt["phase"] == "Ready" && adopt["initialized"] == true && adopt["written"] == true, "{adopt}");
    assert!(adopt["pool"].is_null() && made["status"].is_null(), "{made}");
    assert_eq!(adopt["publication"]["targetPath"], "/t");
    assert!(!made.to_string().contains(TOKEN), "a token in the open: {made}");
    let object: ZfsVolume = serde_json::from_value(made.clone()).unwrap();
    assert!(object.is_to_be_adopted());
    // The file is enough, by kubectl's own means too.
    assert_eq!(world.saved()["kind"], "List");
    assert_eq!(world.saved()["items"][0], made);
    let writes = world.answers.writes();
    assert!(writes[1].query.contains("fieldManager=zpod-controller"), "{writes:?}");
}

#[tokio::test]
async fn nothing_else_is_touched() {
    let (id, by_hand) = by_hand();
    let mut wanted = by_hand.clone();
    wanted["metadata"].as_object_mut().unwrap().remove("deletionTimestamp");
    let (mut destroyed, mut refused, mut let_go) = (by_hand.clone(), by_hand.clone(), by_hand);
    destroyed["spec"]["destroy"] = json!(true);
    refused["status"] = json!({"phase": "Refused"});
    let_go["metadata"]["finalizers"] = json!(["others.example/finalizer"]);
    for (object, left) in [(wanted, false), (destroyed, false), (refused, true), (let_go, false)] {
        let world = World::of(&[(path(&id), object.clone())]);
        // What can't be adopted is told of, lest its deletion seem to hang.
        assert_eq!(world.adopt(&[]).await.is_err(), left);
        let failure = world.adopt(&[&id]).await.unwrap_err();
        assert!(
            failure.to_string().contains(if left { "was not adopted" } else { "nothing was changed" }),
            "{failure}"
        );
        assert_eq!(world.answers.object(&path(&id)), Some(object));
        assert!(world.answers.writes().is_empty() && !world.file().exists());
    }
}

#[tokio::test]
async fn snapshots_are_adopted_as_volumes_are() {
    let (volume, id) = (by_hand().0, SnapshotId::from_name("s").to_string());
    let at = format!("/apis/zpod.storage/v1alpha1/zfssnapshots/{id}");
    let object = json!({
        "apiVersion": "zpod.storage/v1alpha1", "kind": "ZfsSnapshot",
        "metadata": {"name": id, "uid": "u-2", "resourceVersion": "9", "finalizers": [FINALIZER],
                     "deletionTimestamp": "2026-01-01T00:00:00Z"},
        "spec": {"snapshotName": "s", "volume": volume, "nodeName": "n1"},
        "status": {"phase": "Ready", "readyToUse": true, "partition": "1Gi", "restoreSize": "1Gi", "revision": 3,
                   "creationTime": "2026-01-01T00:00:00Z", "origin": {"volume": volume, "initialized": true}},
    });
    let world = World::of(&[(at.clone(), object)]);
    world.adopt(&[&id]).await.unwrap_err();
    let made: ZfsSnapshot = serde_json::from_value(world.answers.object(&at).unwrap()).unwrap();
    let record = made.record().unwrap();
    assert!(made.is_to_be_adopted() && record.contents.is_some_and(|contents| contents.origin.initialized));
}

/// Reads it as it is, and lets it go when it is so.
async fn let_go_later(world: &World, object: Value, now: Option<Value>) -> Option<Value> {
    let (id, mut file) = (by_hand().0, RecordFile::create(&world.file()).unwrap());
    let one = of(&serde_json::from_value::<ZfsVolume>(object).unwrap()).unwrap().unwrap();
    file.put(one.anew.clone());
    file.write().unwrap();
    let later = World::of(&now.map(|now| (path(&id), now)).into_iter().collect::<Vec<_>>());
    let cluster = later.answers.cluster();
    let made = let_go(&cluster, one.object.unwrap(), one.anew, &mut file, Duration::ZERO).await.unwrap();
    if made.is_some() {
        assert_eq!(later.answers.object(&path(&id)), None);
    }
    made
}

#[tokio::test]
async fn what_changes_meanwhile_is_saved_and_made_as_it_is_at_its_end() {
    let (_, object) = by_hand();
    let mut later = object.clone();
    later["metadata"]["resourceVersion"] = json!("6");
    later["status"]["behind"] = json!("second");
    let world = World::of(&[]);
    let made = let_go_later(&world, object, Some(later)).await.unwrap();
    assert_eq!(made["spec"]["adopt"]["behind"], "second");
    assert_eq!(world.saved()["items"], json!([made]));
}

#[tokio::test]
async fn what_is_destroyed_meanwhile_is_not_made_anew_and_what_somebody_else_let_go_is() {
    let (_, object) = by_hand();
    let mut destroyed = object.clone();
    destroyed["metadata"]["resourceVersion"] = json!("6");
    destroyed["spec"]["destroy"] = json!(true);
    let world = World::of(&[]);
    assert_eq!(let_go_later(&world, object.clone(), Some(destroyed)).await, None);
    assert_eq!(world.saved()["items"], json!([]));
    let world = World::of(&[]);
    assert!(let_go_later(&world, object, None).await.is_some());
    assert_eq!(world.saved()["items"].as_array().unwrap().len(), 1);
}

#[tokio::test]
async fn what_was_cut_short_before_anything_was_let_go_is_done_from_the_file() {
    let (id, object) = by_hand();
    let world = World::of(&[(path(&id), object.clone())]);
    let one = of(&serde_json::from_value::<ZfsVolume>(object).unwrap()).unwrap().unwrap();
    let mut file = RecordFile::create(&world.file()).unwrap();
    file.put(one.anew);
    file.write().unwrap();
    assert_eq!(world.go_on().await.unwrap_err().kind, crate::failure::Kind::TimedOut);
    assert!(world.answers.object(&path(&id)).unwrap()["metadata"]["deletionTimestamp"].is_null());
}

#[tokio::test]
async fn one_that_can_not_be_let_go_keeps_no_other_from_being_made() {
    let ((id, object), other) = (by_hand(), zpod_volume::VolumeId::from_name("pvc-2").to_string());
    let mut held = object.clone();
    held["metadata"]["name"] = json!(other);
    held["metadata"]["finalizers"] = json!([FINALIZER, "others.example/finalizer"]);
    let world = World::of(&[(path(&id), object), (path(&other), held)]);
    let failure = world.adopt(&[]).await.unwrap_err().to_string();
    assert!(failure.contains(&other) && failure.contains("others.example/finalizer"), "{failure}");
    assert!(failure.contains(&world.file().display().to_string()), "{failure}");
    assert!(world.answers.object(&path(&id)).unwrap()["metadata"]["deletionTimestamp"].is_null());
}

#[tokio::test]
async fn nothing_is_let_go_that_an_earlier_version_would_make_of_it() {
    let (id, object) = by_hand();
    let definition = |spec: Value| {
        json!({"apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition", "metadata": {"name": "x"},
               "spec": {"group": GROUP, "names": {"kind": "ZfsVolume", "plural": "zfsvolumes"}, "scope": "Cluster", "versions": [
                   {"name": "v1alpha1", "served": true, "storage": true, "schema": {"openAPIV3Schema": {"properties": {
                        "spec": {"type": "object", "properties": spec}}}}}]}})
    };
    let node = |version: &str| {
        json!({"apiVersion": "zpod.storage/v1alpha1", "kind": "ZfsNode", "metadata": {"name": "n1"}, "spec": {},
               "status": {"version": version}})
    };
    let (known, unknown) = (definition(json!({"adopt": {"type": "object"}})), definition(json!({})));
    let own = env!("CARGO_PKG_VERSION");
    for (definition, node, why) in [
        (unknown, node(own), "which knows no adoption"),
        (known.clone(), node("0.0.9"), "zpod-node on n1 is of version 0.0.9"),
        (known, node(own), "has not taken all of its records over"),
    ] {
        let world = World::of(&[
            (path(&id), object.clone()),
            ("/apis/apiextensions.k8s.io/v1/customresourcedefinitions/zfsvolumes.zpod.storage".into(), definition),
            ("/apis/zpod.storage/v1alpha1/zfsnodes/n1".into(), node),
        ]);
        let failure = world.adopt(&[]).await.unwrap_err().to_string();
        assert!(failure.contains(why), "{failure}");
        let changed = world.answers.object(&path(&id)) != Some(object.clone());
        assert_eq!(changed, why.starts_with("has"), "{failure}");
    }
}

#[tokio::test]
async fn while_the_definitions_are_being_deleted_records_wait_in_the_file() {
    let (id, object) = by_hand();
    let world = World::of(&[(path(&id), object)]);
    for code in [StatusCode::FORBIDDEN, StatusCode::NOT_FOUND] {
        world.answers.making(code);
        let failure = if world.file().exists() { world.go_on().await } else { world.adopt(&[]).await }.unwrap_err();
        let file = world.file().display().to_string();
        assert!(failure.to_string().contains(&format!("kubectl zpod adopt --from {file}")), "{failure}");
        assert_eq!(world.answers.object(&path(&id)), None);
    }
    world.answers.making(StatusCode::CREATED);
    assert_eq!(world.go_on().await.unwrap_err().kind, crate::failure::Kind::TimedOut);
    let mut made = world.answers.object(&path(&id)).unwrap();
    // Its node takes it over. Asked for again, nothing changes.
    made["status"] = json!({"phase": "Ready", "conditions": [{"type": "Ready", "status": "True", "reason": "Adopted",
        "message": "", "lastTransitionTime": "2026-01-01T00:00:00Z"}]});
    drop(world.answers.clone().with(&path(&id), made.clone()));
    world.go_on().await.unwrap();
    assert_eq!(world.answers.object(&path(&id)), Some(made));
}

#[tokio::test]
async fn a_file_that_is_there_is_neither_written_over_nor_believed_blindly() {
    let (id, object) = by_hand();
    let world = World::of(&[(path(&id), object.clone())]);
    std::fs::write(world.file(), "{}").unwrap();
    assert!(world.adopt(&[]).await.unwrap_err().to_string().contains("nothing was changed"));
    assert_eq!(world.answers.object(&path(&id)), Some(object));
    for text in ["", "{}", r#"{"items": [{"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "s"}}]}"#] {
        std::fs::write(world.file(), text).unwrap();
        assert!(world.go_on().await.unwrap_err().to_string().contains("nothing was changed"), "{text}");
    }
    assert!(world.answers.writes().is_empty());
}

#[tokio::test]
async fn a_backup_of_the_records_is_taken_as_kubectl_wrote_it() {
    let (id, object) = by_hand();
    let (mut backup, mut destroyed) = (object.clone(), object);
    backup["metadata"].as_object_mut().unwrap().remove("deletionTimestamp");
    destroyed["spec"]["destroy"] = json!(true);
    for (item, made) in [(backup, true), (destroyed, false)] {
        let world = World::of(&[]);
        std::fs::write(world.file(), json!({"apiVersion": "v1", "kind": "List", "items": [item]}).to_string()).unwrap();
        assert_eq!(world.go_on().await.is_err(), made, "only where there is a node to wait for");
        let found = world.answers.object(&path(&id));
        assert_eq!(found.is_some(), made);
        if let Some(found) = found {
            assert!(found["spec"]["adopt"]["initialized"] == true && found["metadata"]["uid"].is_null(), "{found}");
            assert!(!found.to_string().contains(TOKEN), "{found}");
        }
    }
}
