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
    end(&answers.cluster(), &found).await.unwrap();
    let write = &answers.writes()[0];
    assert_eq!((&write.method, write.path.as_str()), (&Method::DELETE, POD));
    assert_eq!(write.body["preconditions"]["uid"], "u-1", "{}", write.body);
    assert!(write.body.get("gracePeriodSeconds").is_none_or(Value::is_null), "its own grace period");
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
    let requested = RollbackRequested { id, snapshot: snapshot.clone(), destroy_newer: false };
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
        (told(7, "Refused"), Some(RollbackState::Refused)),
        (told(7, "RolledBack"), Some(RollbackState::RolledBack)),
        (told(7, "Pending"), None),
        (told(8, "RolledBack"), None),
        (Value::Null, None),
    ] {
        let (id, object) = volume("db", used("db-0", rollback.clone()));
        let answers = Answers::default().with(&path(&id), object);
        match wait(&answers.cluster(), &outcome(), Duration::from_millis(20)).await {
            Ok(told) => assert_eq!(Some(told.state), want, "{rollback}"),
            Err(failure) => {
                assert!(want.is_none(), "{failure}");
                assert_eq!(failure.kind.code(), 5);
            }
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
