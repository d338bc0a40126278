//! The admin endpoint of `zpod --standalone`: who may ask, what passes through, and what it takes. Needs root, as the
//! driver mounts.

#![allow(clippy::unwrap_used)]

#[path = "support/calls.rs"]
#[allow(dead_code)]
mod calls;
#[path = "support/daemon.rs"]
#[allow(dead_code)]
mod daemon;
#[path = "support/fake_guest.rs"]
#[allow(dead_code)]
mod fake_guest;

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use calls::Calls;
use daemon::{Daemon, Node};
use fake_guest::{Behaviour, FakeGuest};
use futures_util::stream;
use http_body_util::{BodyExt as _, Full, StreamBody};
use hyper::body::{Body, Bytes, Frame, Incoming};
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;
use zpod_proto::guest::{Health, RolledBack, VolumeStatus, rolled_back};

const MIB: u64 = 1 << 20;

struct World {
    // Dropped first: nobody works on the directories when they go.
    daemon: Daemon,
    guest: FakeGuest,
    id: String,
    node: Node,
}

impl World {
    /// One volume, whose guest is heard.
    async fn new(behaviour: Behaviour) -> Self {
        let node = Node::new();
        let daemon = node.start(None);
        let mut calls = Calls::new(daemon.channel());
        let id = calls.create("a", 1 << 30).await.unwrap().volume_id;
        let target = node.path("pods").join("a");
        calls.publish(&id, &target).await.unwrap();
        let spec = node.entry(&target).unwrap();
        let status = VolumeStatus {
            volume_id: id.clone(),
            token: spec.token.to_string(),
            health: Health::Online.into(),
            ..VolumeStatus::default()
        };
        let guest = FakeGuest::start(&node.path("kata"), "sandbox-1", behaviour, vec![status]);
        let world = Self { daemon, guest, id, node };
        let deadline = Instant::now() + Duration::from_secs(60);
        while world.text("properties").await.0 == 503 {
            assert!(Instant::now() < deadline, "guest is not heard\n{}", world.node.log());
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        world
    }

    async fn ask<B>(&self, method: &str, path: &str, body: B) -> Response<Incoming>
    where
        B: Body<Data = Bytes> + Send + 'static,
        B::Error: std::error::Error + Send + Sync,
    {
        let stream = UnixStream::connect(self.node.path("admin.sock")).await.unwrap();
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
        tokio::spawn(connection);
        let request = Request::builder().method(method).uri(path).header("host", "zpod").body(body).unwrap();
        sender.send_request(request).await.unwrap()
    }

    async fn get(&self, path: &str) -> Response<Incoming> {
        self.ask("GET", path, Full::<Bytes>::default()).await
    }

    async fn text(&self, what: &str) -> (u16, Value) {
        let answer = self.get(&format!("/v1/volumes/{}/{what}", self.id)).await;
        let code = answer.status().as_u16();
        let body = answer.into_body().collect().await.unwrap().to_bytes();
        (code, serde_json::from_slice(&body).unwrap())
    }

    fn path(&self, what: &str) -> String {
        format!("/v1/volumes/{}/{what}", self.id)
    }
}

fn chunks(first: u8, count: u64, each: usize) -> impl Body<Data = Bytes, Error = std::io::Error> + Send + 'static {
    let chunk = Bytes::from(vec![first; each]);
    StreamBody::new(stream::iter((0..count).map(move |_| Ok(Frame::data(chunk.clone())))))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_socket_is_roots_alone_and_answers_what_its_paths_say() {
    let world = World::new(Behaviour::Honest).await;
    let mode = fs::metadata(world.node.path("admin.sock")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let (code, properties) = world.text("properties").await;
    assert_eq!((code, &properties["dataset"]["volume"]), (200, &Value::from(world.id.clone())));
    assert!(properties["dataset"].get("bad key").is_none(), "{properties}");
    let (_, points) = world.text("send-points").await;
    assert_eq!(points["points"][0]["name"], "zpod-send-a", "cleaned");
    assert_eq!(points["points"][0]["guid"], u64::MAX.to_string());
    for (name, code, why) in [
        ("zpod-send-a", 200, "zpod-send-a"),
        ("zpod-send-b", 422, "no send point zpod-send-b"),
        ("a%40b", 400, "a-z"),
        ("a&from=b", 400, "only snapshot"),
    ] {
        let path = world.path(&format!("remove-send-point?snapshot={name}"));
        let answer = world.ask("POST", &path, Full::<Bytes>::default()).await;
        assert_eq!(answer.status(), code, "{name}");
        let text = answer.into_body().collect().await.unwrap().to_bytes();
        assert!(String::from_utf8_lossy(&text).contains(why), "{name}: {text:?}");
    }
    assert_eq!(*world.guest.state.passed.removed.lock().unwrap(), ["zpod-send-a"]);
    assert_eq!(world.text("remove-send-point").await.0, 405, "what only looks removes nothing");
    for (call, code, why) in [
        ("take-snapshot?snapshot=before.1", 200, "before.1"),
        ("take-snapshot?snapshot=after", 200, "after"),
        ("take-snapshot?snapshot=a%40b", 400, "is not a name for a snapshot"),
        ("take-snapshot?snapshot=", 400, "is not a name for a snapshot"),
        ("take-snapshot?snapshot=zpod-mine", 400, "not zpod- at the beginning"),
        ("take-snapshot", 400, "snapshot=NAME is needed"),
        ("destroy-snapshot?snapshot=before.1", 200, "before.1"),
        ("destroy-snapshot?snapshot=before.1", 422, "it has no snapshot before.1"),
    ] {
        let answer = world.ask("POST", &world.path(call), Full::<Bytes>::default()).await;
        assert_eq!(answer.status(), code, "{call}");
        let text = answer.into_body().collect().await.unwrap().to_bytes();
        assert!(String::from_utf8_lossy(&text).contains(why), "{call}: {text:?}");
    }
    let (_, left) = world.text("snapshots").await;
    assert_eq!((&left["snapshots"][0]["name"], &left["leftOut"]), (&Value::from("after"), &Value::from(7)));
    for call in ["take-snapshot", "destroy-snapshot"] {
        assert_eq!(world.text(call).await.0, 405, "what only looks changes nothing");
    }
    *world.guest.state.passed.resume_token.lock().unwrap() = "not one; rm -rf /".into();
    assert!(world.text("send-points").await.1.get("resumeToken").is_none());
    let doctor = world.get("/v1/doctor").await.into_body().collect().await.unwrap().to_bytes();
    let doctor: Vec<Value> = serde_json::from_slice(&doctor).unwrap();
    let names: Vec<_> = doctor.iter().map(|check| check["name"].as_str().unwrap()).collect();
    for name in ["backing-directory", "backing-room", "kata-run-dirs", "direct-volumes", "guest-image", "kvm", "guests"]
    {
        assert!(names.contains(&name), "{name} in {names:?}");
    }
    assert_eq!(doctor.iter().find(|check| check["name"] == "guests").unwrap()["level"], "ok", "{doctor:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rollback_is_planned_asked_for_taken_back_and_told_to_the_next_guest_alone() {
    let world = World::new(Behaviour::Honest).await;
    let ask = async |method: &str, call: &str| {
        let answer = world.ask(method, &world.path(call), Full::<Bytes>::default()).await;
        let code = answer.status().as_u16();
        let body = answer.into_body().collect().await.unwrap().to_bytes();
        (code, serde_json::from_slice::<Value>(&body).unwrap())
    };
    for name in ["one", "two"] {
        assert_eq!(ask("POST", &format!("take-snapshot?snapshot={name}")).await.0, 200);
    }
    let (code, plan) = ask("GET", "rollback-plan?snapshot=one&destroy-newer").await;
    assert_eq!((code, &plan["newer"][0], &plan["writtenBytes"]), (200, &Value::from("two"), &Value::from(4096)));
    for (method, call, code, why) in [
        ("GET", "rollback-plan?snapshot=one", 422, "would be destroyed: two"),
        ("POST", "rollback?snapshot=one", 422, "would be destroyed: two"),
        ("POST", "rollback?snapshot=none&destroy-newer", 422, "no snapshot none"),
        ("POST", "rollback?snapshot=a%40b", 400, "is not the name of a snapshot"),
        ("POST", "rollback?snapshot=one&clones", 400, "is not the name of a snapshot"),
        ("POST", "cancel-rollback", 409, "nothing to take back"),
        ("GET", "rollback?snapshot=one", 405, "POST"),
    ] {
        let (found, error) = ask(method, call).await;
        assert_eq!(found, code, "{call}: {error}");
        assert!(error["error"].as_str().unwrap().contains(why), "{call}: {error}");
    }
    world.guest.state.passed.knows_no_rollbacks.store(true, Ordering::SeqCst);
    let (code, error) = ask("POST", "rollback?snapshot=two").await;
    assert!(code == 422 && error["error"].as_str().unwrap().contains("an earlier image"), "{error}");
    world.guest.state.passed.knows_no_rollbacks.store(false, Ordering::SeqCst);
    let target = world.node.path("pods").join("a");
    let told = || world.node.entry(&target).unwrap().rollback;

    // The guest that runs is told nothing. A later request takes the place of an earlier one.
    let (code, first) = ask("POST", "rollback?snapshot=two").await;
    assert_eq!((code, &first["snapshot"], &first["destroyNewer"]), (200, &Value::from("two"), &Value::from(false)));
    let (_, second) = ask("POST", "rollback?snapshot=one&destroy-newer").await;
    assert_ne!(first["id"], second["id"]);
    let mut calls = Calls::new(world.daemon.channel());
    calls.modify(&world.id, &[("compression", "gzip")]).await.unwrap();
    assert_eq!(told(), None);
    let (code, taken_back) = ask("POST", "cancel-rollback").await;
    assert_eq!((code, &taken_back["id"]), (200, &second["id"]));
    let (_, third) = ask("POST", "rollback?snapshot=one&destroy-newer").await;

    // A read-only publication does not tell its guest, the next one that writes does. It can't be taken back any more.
    calls.unpublish(&world.id, &target).await.unwrap();
    let mut read_only = Calls::publication(&world.id, &target);
    read_only.readonly = true;
    calls.publish_as(read_only).await.unwrap();
    assert_eq!(told(), None);
    calls.unpublish(&world.id, &target).await.unwrap();
    calls.publish(&world.id, &target).await.unwrap();
    let rollback = told().unwrap();
    assert_eq!((rollback.id.to_string(), rollback.destroy_newer), (third["id"].as_str().unwrap().to_owned(), true));
    let (code, error) = ask("POST", "cancel-rollback").await;
    assert!(code == 409 && error["error"].as_str().unwrap().contains("was told so already"), "{error}");

    // What came of it is believed with the right token and id, recorded, and told to nobody any more.
    let token = world.node.entry(&target).unwrap().token.to_string();
    let say = |id: String, token: &str| {
        let rolled_back = RolledBack { id, state: rolled_back::State::Done.into(), message: String::new() };
        let mut volumes = world.guest.state.volumes.lock().unwrap();
        volumes[0].token = token.to_owned();
        volumes[0].rolled_back = Some(rolled_back);
    };
    say(first["id"].as_str().unwrap().to_owned(), &token);
    let deadline = Instant::now() + Duration::from_secs(60);
    while world.text("properties").await.0 == 503 {
        assert!(Instant::now() < deadline, "guest is not heard\n{}", world.node.log());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    // Each answer is of a report that was believed, or not, before.
    let later = async || {
        let before = world.guest.state.reports.load(Ordering::SeqCst);
        while world.guest.state.reports.load(Ordering::SeqCst) < before + 3 {
            assert!(Instant::now() < deadline, "no more reports are asked for\n{}", world.node.log());
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    later().await;
    assert!(told().is_some(), "of another request");
    say(rollback.id.to_string(), "00000000-0000-4000-8000-000000000001");
    later().await;
    assert!(told().is_some(), "with another token");
    say(rollback.id.to_string(), &token);
    while told().is_some() {
        assert!(Instant::now() < deadline, "what came of it is not recorded\n{}", world.node.log());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert!(world.node.log().contains("went back to snapshot one"), "{}", world.node.log());
    calls.unpublish(&world.id, &target).await.unwrap();
    calls.publish(&world.id, &target).await.unwrap();
    assert_eq!(told(), None);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_asked_is_refused_with_a_reason() {
    let world = World::new(Behaviour::Honest).await;
    let other = "11111111-1111-4111-8111-111111111111";
    for (method, path, code) in [
        ("GET", "/v1/volumes/../../etc/passwd".to_owned(), 404),
        ("GET", format!("/v1/volumes/{other}/properties"), 404),
        ("POST", world.path("send?snapshot=1"), 405),
        ("GET", world.path("receive"), 405),
        ("GET", world.path("send"), 400),
        ("GET", world.path("send?snapshot=a%00b"), 400),
        ("GET", world.path("send?snapshot=nothing"), 422),
    ] {
        let answer = world.ask(method, &path, Full::<Bytes>::default()).await;
        assert_eq!(answer.status().as_u16(), code, "{method} {path}");
        let body = answer.into_body().collect().await.unwrap().to_bytes();
        let error: Value = serde_json::from_slice(&body).unwrap();
        assert!(error["error"].as_str().unwrap().len() > 10, "{error}");
        assert!(!error["error"].as_str().unwrap().contains('\n'), "{error}");
    }
    // A head without an end, and one that is too large.
    let mut stream = UnixStream::connect(world.node.path("admin.sock")).await.unwrap();
    let _ = stream.write_all(format!("GET /{} HTTP/1.1\r\n", "x".repeat(1 << 20)).as_bytes()).await;
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer).await;
    let answer = String::from_utf8_lossy(&answer);
    assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 4"), "{answer}");
}

/// A GiB each way, in a debug build. What is asserted is a bound; what was measured is printed.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn streams_of_gibibytes_take_no_memory() {
    const LENGTH: u64 = 1024 * MIB;
    let world = World::new(Behaviour::Honest).await;
    let before = world.daemon.resident();
    let begun = Instant::now();
    let answer = world.get(&world.path("send?snapshot=1024")).await;
    assert_eq!(answer.headers()["x-zpod-estimated-bytes"], LENGTH.to_string());
    let (mut bytes, mut most) = (0, 0);
    let mut body = answer.into_body();
    while let Some(frame) = body.frame().await {
        bytes += frame.unwrap().data_ref().map_or(0, Bytes::len) as u64;
        if bytes % (64 * MIB) < MIB {
            most = most.max(world.daemon.resident());
        }
    }
    assert_eq!(bytes, LENGTH);
    println!(
        "sent {} MiB in {:?}; resident {} MiB before, {} MiB at most",
        bytes / MIB,
        begun.elapsed(),
        before / MIB,
        most / MIB
    );
    assert!(most < before + 16 * MIB, "{before} -> {most}");
    let begun = Instant::now();
    let path = world.path("receive");
    let answer = world.ask("POST", &path, chunks(0, LENGTH / MIB, MIB as usize));
    tokio::pin!(answer);
    let answer = loop {
        tokio::select! {
            answer = &mut answer => break answer,
            () = tokio::time::sleep(Duration::from_millis(200)) => most = most.max(world.daemon.resident()),
        }
    };
    assert_eq!(answer.status(), 200);
    println!("received in {:?}; resident {} MiB at most", begun.elapsed(), most / MIB);
    assert!(most < before + 16 * MIB, "{before} -> {most}");
    assert_eq!(*world.guest.state.passed.received.lock().unwrap(), [(LENGTH, true)]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_reads_slowly_slows_the_guest_down_and_leaves_its_reports_alone() {
    let world = World::new(Behaviour::Honest).await;
    let answer = world.get(&world.path("send?snapshot=512")).await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    let sent = world.guest.state.passed.sent.load(Ordering::Relaxed);
    assert!(sent < 8 * MIB, "{sent} bytes were taken for nobody");
    // A stream that stands still takes no room from the others.
    assert_eq!(world.text("properties").await.0, 200);
    let (code, busy) = world.text("send?snapshot=1").await;
    assert_eq!(code, 409, "{busy}");
    drop(answer);
    let deadline = Instant::now() + Duration::from_secs(60);
    while world.get(&world.path("send?snapshot=1")).await.status() == 409 {
        assert!(Instant::now() < deadline, "the transfer does not end with its reader");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stream_that_breaks_off_is_no_success_at_either_end() {
    let world = World::new(Behaviour::Honest).await;
    // From the guest.
    let mut body = world.get(&world.path("send?snapshot=4-breaks")).await.into_body();
    let mut last = None;
    while let Some(frame) = body.frame().await {
        last = Some(frame.is_ok());
    }
    assert_eq!(last, Some(false), "the client must hear of it");
    // From the client: half of a chunked body, and gone.
    let mut stream = UnixStream::connect(world.node.path("admin.sock")).await.unwrap();
    let head = format!("POST {} HTTP/1.1\r\nhost: z\r\ntransfer-encoding: chunked\r\n\r\n", world.path("receive"));
    stream.write_all(head.as_bytes()).await.unwrap();
    stream.write_all(format!("100000\r\n{}\r\n", "a".repeat(1 << 20)).as_bytes()).await.unwrap();
    let passed = &world.guest.state.passed;
    let deadline = Instant::now() + Duration::from_secs(60);
    while passed.coming.load(Ordering::Relaxed) < MIB {
        assert!(Instant::now() < deadline, "the guest does not read");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    drop(stream);
    while passed.received.lock().unwrap().is_empty() {
        assert!(Instant::now() < deadline, "the guest does not hear of it");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    // HTTP/2 of hyper tells a server that a cancelled stream has ended; a ZFS stream has an end of its own, with a sum.
    assert_eq!(passed.received.lock().unwrap()[0].0, MIB);
    assert!(!world.node.log().contains("zpod-send-a"), "nobody is told that it was received");
    // A guest that refuses is quoted, whatever is still on its way.
    let answer = world.ask("POST", &world.path("receive"), chunks(b'x', 2, 1 << 10)).await;
    assert_eq!(answer.status(), 422);
    let body = answer.into_body().collect().await.unwrap().to_bytes();
    assert!(String::from_utf8_lossy(&body).contains("not a ZFS stream"), "{body:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_guest_it_is_said_what_to_start() {
    let node = Node::new();
    let daemon = node.start(None);
    let mut calls = Calls::new(daemon.channel());
    let id = calls.create("a", 1 << 30).await.unwrap().volume_id;
    let ask = |socket: PathBuf, id: String| async move {
        let stream = UnixStream::connect(socket).await.unwrap();
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
        tokio::spawn(connection);
        let request = Request::get(format!("/v1/volumes/{id}/properties")).header("host", "z");
        let answer = sender.send_request(request.body(Full::<Bytes>::default()).unwrap()).await.unwrap();
        let code = answer.status().as_u16();
        (code, String::from_utf8(answer.into_body().collect().await.unwrap().to_bytes().to_vec()).unwrap())
    };
    let (code, text) = ask(node.path("admin.sock"), id.clone()).await;
    assert_eq!(code, 409, "{text}");
    assert!(text.contains("start its pod"), "{text}");
    calls.publish(&id, &node.path("pods").join("a")).await.unwrap();
    let (code, text) = ask(node.path("admin.sock"), id).await;
    assert_eq!(code, 503, "{text}");
    assert!(text.contains("is not heard"), "{text}");
}
