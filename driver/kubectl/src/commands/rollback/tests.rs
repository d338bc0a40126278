use super::*;
use crate::commands::fake::{Answers, path, volume};
use crate::options::HelperOptions;
use hyper::Method;
use serde_json::{Value, json};

fn options(restart: bool) -> Rollback {
    Rollback {
        what: Some("before".into()),
        id: Some(volume("", json!(null)).0.parse().unwrap()),
        destroy_newer: false,
        restart,
        yes: true,
        cancel: false,
        timeout: Duration::from_secs(3),
        helper: HelperOptions {
            no_helper: true,
            helper_image: "pause".into(),
            runtime_class: "kata-zpod".into(),
            helper_timeout: Duration::from_secs(1),
        },
    }
}

/// A volume that this pod uses.
fn used(pod: &str, rollback: Value) -> Value {
    json!({"phase": "Ready", "rollback": rollback,
           "publication": {"targetPath": "/t", "token": "00000000-0000-0000-0000-000000000001", "bootId": "b",
                           "pod": {"namespace": "prod", "name": pod, "uid": "u-1"}}})
}

fn pod(owner: Value, uid: &str) -> Value {
    json!({"metadata": {"name": "db-0", "namespace": "prod", "uid": uid, "ownerReferences": owner}})
}

fn owner(kind: &str, controller: bool) -> Value {
    json!([{"apiVersion": "apps/v1", "kind": kind, "name": "db", "uid": "o", "controller": controller}])
}

const POD: &str = "/api/v1/namespaces/prod/pods/db-0";

#[tokio::test]
async fn a_pod_that_uses_the_volume_is_ended_only_where_that_is_said_and_another_one_follows() {
    let (id, object) = volume("db", used("db-0", Value::Null));
    for (restart, owners, uid, want) in [
        (false, owner("StatefulSet", true), "u-1", "pod prod/db-0 uses"),
        (true, json!([]), "u-1", "no owner that would make it anew"),
        (true, owner("StatefulSet", false), "u-1", "no owner"),
        (true, owner("Node", true), "u-1", "no owner"),
        (true, owner("Job", true), "u-1", "no owner"),
        (true, owner("CloneSet", true), "u-1", "no owner"),
        (true, owner("StatefulSet", true), "u-2", "another one than that which uses"),
    ] {
        let answers = Answers::default().with(&path(&id), object.clone()).with(POD, pod(owners, uid));
        let failure = run(&answers.cluster(), &options(restart), Format::Json).await.unwrap_err();
        assert!(failure.to_string().contains(want), "{failure}");
        assert!(answers.writes().is_empty(), "{want}");
    }
    let answers = Answers::default().with(&path(&id), object).with(POD, pod(owner("StatefulSet", true), "u-1"));
    let user = PodStatus { namespace: "prod".into(), name: "db-0".into(), uid: "u-1".into() };
    let found = replaceable(&answers.cluster(), &user).await.unwrap();
    end(&answers.cluster(), &found, &outcome(), &named()).await.unwrap();
    let write = &answers.writes()[0];
    assert_eq!((&write.method, write.path.as_str()), (&Method::DELETE, POD));
    assert_eq!(write.body["preconditions"]["uid"], "u-1", "{}", write.body);
    assert!(write.body.get("gracePeriodSeconds").is_none_or(Value::is_null), "its own grace period");
}

fn named() -> Named {
    Named::Claim("db".into())
}

#[tokio::test]
async fn a_pod_that_was_replaced_is_no_start_that_goes_back_unless_it_was_told() {
    let with = |told: &str, state: &str| {
        let rollback = json!({"id": "00000000-0000-0000-0000-000000000007", "snapshot": "before", "state": state,
                              "requestedAt": "2026-01-01T00:00:00Z"});
        let mut status = used("db-0", rollback);
        status["publication"]["rollback"] = format!("00000000-0000-0000-0000-00000000000{told}").into();
        status
    };
    let found: Pod = serde_json::from_value(pod(owner("StatefulSet", true), "u-1")).unwrap();
    // The API server does not find the pod.
    for (status, goes_on) in [
        (with("7", "Pending"), true),
        (with("8", "RolledBack"), true),
        (with("8", "Pending"), false),
        (used("db-0", Value::Null), false),
    ] {
        let (id, object) = volume("db", status.clone());
        let answers = Answers::default().with(&path(&id), object);
        match end(&answers.cluster(), &found, &outcome(), &named()).await {
            Ok(()) => assert!(goes_on, "{status}"),
            Err(failure) => {
                let failure = failure.to_string();
                assert!(!goes_on && failure.contains("is another one by now"), "{failure}");
                // There is no node to be asked.
                assert!(
                    failure.contains("it may be asked for") && failure.contains("rollback db --cancel"),
                    "{failure}"
                );
            }
        }
    }
}

#[tokio::test]
async fn a_request_that_may_have_reached_the_node_is_taken_back_and_one_that_was_refused_is_not() {
    let socket = tempfile_path();
    let lines = || async { Ok(Line::Unix(socket.clone())) };
    let failure = || Failure::new(Kind::Interrupted, "interrupted", "");
    let request = Request::new();
    assert_eq!(request.failed(lines(), &named(), failure()).await.what(), "interrupted", "it was not sent");
    request.sent.set(volume("", json!(null)).0.parse().unwrap()).unwrap();
    let unsure = request.failed(lines(), &named(), failure()).await;
    assert!(unsure.to_string().contains("it may be asked for"), "{unsure}");
    assert_eq!(unsure.kind.code(), 130);
    let listener = tokio::net::UnixListener::bind(&socket).unwrap();
    let node = tokio::spawn(async move {
        use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut asked = vec![0; 4096];
        let length = stream.read(&mut asked).await.unwrap();
        let body = json!({"id": "7", "snapshot": "before", "destroyNewer": false}).to_string();
        let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}", body.len());
        stream.write_all(head.as_bytes()).await.unwrap();
        String::from_utf8_lossy(&asked[..length]).into_owned()
    });
    let undone = request.failed(lines(), &named(), failure()).await;
    assert!(undone.to_string().contains("the rollback was taken back"), "{undone}");
    let asked = node.await.unwrap();
    assert!(asked.contains(&format!("/cancel-rollback?id={}", request.id)), "{asked}");
    request.refused.store(true, Ordering::Relaxed);
    assert_eq!(request.failed(lines(), &named(), failure()).await.what(), "interrupted");
    let _ = std::fs::remove_file(&socket);
}

fn tempfile_path() -> std::path::PathBuf {
    std::env::temp_dir().join(format!("zpod-rollback-{}.sock", Uuid::new_v4()))
}

#[test]
fn what_was_seen_is_the_pod_that_has_the_volume() {
    let request = Request::new();
    assert_eq!(request.seen(), None);
    for (status, uid) in [(used("db-0", Value::Null), "u-1"), (json!({"phase": "Ready"}), "")] {
        request.saw(&serde_json::from_value(volume("db", status).1).unwrap());
        assert_eq!(request.seen().as_deref(), Some(uid));
    }
}

#[tokio::test]
async fn without_a_pod_and_without_one_to_be_made_for_it_it_is_said_what_to_start() {
    let (id, object) = volume("db", json!({"phase": "Ready"}));
    let answers = Answers::default().with(&path(&id), object);
    let failure = run(&answers.cluster(), &options(false), Format::Json).await.unwrap_err();
    assert!(failure.to_string().contains("only a running guest"), "{failure}");
}

#[tokio::test]
async fn no_pod_is_made_with_which_a_volume_would_go_back() {
    let pending = json!({"id": "00000000-0000-0000-0000-000000000007", "snapshot": "after", "state": "Pending",
                         "requestedAt": "2026-01-01T00:00:00Z"});
    let (id, object) = volume("db", json!({"phase": "Ready", "rollback": pending}));
    let answers = Answers::default().with(&path(&id), object);
    let mut options = options(false);
    options.helper.no_helper = false;
    let failure = run(&answers.cluster(), &options, Format::Json).await.unwrap_err().to_string();
    assert!(
        failure.contains("goes back to snapshot after with its next pod") && failure.contains("--cancel"),
        "{failure}"
    );
    assert!(answers.writes().is_empty());
}

fn outcome() -> Outcome {
    let (snapshot, id) = ("before".to_owned(), "00000000-0000-0000-0000-000000000007".to_owned());
    let requested = RollbackRequested { id, snapshot: snapshot.clone(), destroy_newer: false, given: false };
    let plan = RollbackPlan { snapshot, newer: Vec::new(), left_out: 0, written_bytes: 1 };
    Outcome::asked(volume("", json!(null)).0.parse().unwrap(), requested, plan)
}

#[tokio::test]
async fn waiting_ends_with_what_came_of_this_request_and_not_of_another() {
    let told = |id: u32, state: &str| {
        json!({"id": format!("00000000-0000-0000-0000-00000000000{id}"), "snapshot": "before", "state": state,
               "requestedAt": "2026-01-01T00:00:00Z", "message": "no"})
    };
    for (rollback, want) in [
        (told(7, "Refused"), Ok(RollbackState::Refused)),
        (told(7, "RolledBack"), Ok(RollbackState::RolledBack)),
        (told(7, "Pending"), Err(5)),
        (told(8, "RolledBack"), Err(1)),
        (Value::Null, Err(1)),
    ] {
        let (id, object) = volume("db", used("db-0", rollback.clone()));
        let answers = Answers::default().with(&path(&id), object);
        match wait(&answers.cluster(), &outcome(), Duration::from_millis(20)).await {
            Ok(told) => assert_eq!(Ok(told.state), want, "{rollback}"),
            Err(failure) => assert_eq!(Err(failure.kind.code()), want, "{failure}"),
        }
    }
}

#[test]
fn the_question_names_what_is_lost() {
    let newer = (0..25).map(|number| format!("s{number}")).collect();
    let plan = RollbackPlan { snapshot: "before".into(), newer, left_out: 3, written_bytes: 3 << 30 };
    let text = question("db", &plan, Some("db-0"));
    for want in
        ["db goes back to snapshot before", "3Gi written since", "s0, s1", "s19 and 8 more", "pod db-0 is ended"]
    {
        assert!(text.contains(want), "{want} in {text}");
    }
    let text = question("db", &RollbackPlan { newer: Vec::new(), left_out: 0, ..plan }, None);
    assert!(!text.contains("destroyed") && !text.contains("is ended"), "{text}");
}

#[test]
fn claim_and_snapshot_are_one_word_and_what_is_missing_is_named() {
    let meant = |what: Option<&str>, id: bool| {
        let options = options(false);
        let id = options.id.filter(|_| id);
        Rollback { what: what.map(str::to_owned), id, ..options }.meant()
    };
    let (named, name) = meant(Some("db@before"), false).unwrap();
    assert_eq!((named, name.to_string()), (Named::Claim("db".into()), "before".into()));
    for what in ["before", "@before"] {
        assert!(matches!(meant(Some(what), true), Ok((Named::Id(_), _))), "{what}");
    }
    for (what, id) in [
        (None, true),
        (Some("db"), false),
        (Some("@before"), false),
        (Some("db@before"), true),
        (Some("db@"), false),
        (Some("db@a@b"), false),
        (Some("db@a,b"), false),
    ] {
        assert_eq!(meant(what, id).unwrap_err().kind.code(), 2, "{what:?}");
    }
    assert!(Rollback { cancel: true, ..options(false) }.whole().is_err(), "a claim and an id");
}
