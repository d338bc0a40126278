//! Keys of encrypted volumes: who gets them, when, and where they never are. Needs root, as the driver mounts.

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
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use calls::{Calls, capability};
use daemon::{Daemon, Node};
use fake_guest::{Behaviour, FakeGuest, State};
use tonic::{Code, Status};
use zpod_proto::csi;
use zpod_proto::guest::{Health, VolumeStatus};
use zpod_volume::{Encryption, VolumeSpec};

const GIB: i64 = 1 << 30;
const KEY: &str = "sesame-open-up-now";
const NEXT: &str = "friend-and-enter-here";
const WRONG: &str = "melon-or-mellon-maybe";

struct World {
    daemon: Daemon,
    calls: Calls,
    node: Node,
    id: String,
    target: PathBuf,
}

impl World {
    /// An encrypted volume that is not published.
    async fn new() -> Self {
        let node = Node::new();
        let daemon = node.start_with(None, &[("RUST_LOG", "trace")]);
        let mut calls = Calls::new(daemon.channel());
        let request = csi::CreateVolumeRequest {
            name: "secret".into(),
            capacity_range: Some(csi::CapacityRange { required_bytes: GIB, limit_bytes: 0 }),
            volume_capabilities: vec![capability()],
            parameters: [("encryption".into(), "aes-256-gcm".into())].into(),
            ..Default::default()
        };
        let id = calls.create_as(request).await.unwrap().volume_id;
        let target = node.path("pods/pod-1");
        Self { daemon, calls, node, id, target }
    }

    async fn publish(&mut self, key: &str, previous: &str) -> Result<(), Status> {
        let secrets = [("encryptionKey", key), ("previousEncryptionKey", previous)];
        let secrets = secrets.into_iter().filter(|(_, value)| !value.is_empty());
        let request = csi::NodePublishVolumeRequest {
            volume_id: self.id.clone(),
            target_path: self.target.to_str().unwrap().to_owned(),
            volume_capability: Some(capability()),
            secrets: secrets.map(|(name, value)| (name.to_owned(), value.to_owned())).collect(),
            ..Default::default()
        };
        self.calls.publish_as(request).await
    }

    fn spec(&self) -> VolumeSpec {
        self.node.entry(&self.target).unwrap()
    }

    /// A guest whose disk is encrypted with this key, and which waits for it.
    fn guest(&self, sandbox: &str, key: &str) -> FakeGuest {
        let guest = FakeGuest::start(&self.node.path("kata"), sandbox, Behaviour::Honest, vec![]);
        *guest.state.key.lock().unwrap() = key.into();
        *guest.state.volumes.lock().unwrap() = vec![waiting(&self.spec())];
        guest
    }

    async fn condition(&mut self) -> (bool, String) {
        let stats = self.calls.stats(&self.id, &self.target).await.unwrap();
        let condition = stats.volume_condition.unwrap();
        (condition.abnormal, condition.message)
    }

    async fn until_condition(&mut self, what: &str) {
        let deadline = Instant::now() + Duration::from_secs(60);
        while !self.condition().await.1.contains(what) {
            assert!(Instant::now() < deadline, "{:?}\n{}", self.condition().await, self.node.log());
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Looks for the keys in everything that the driver leaves on the host.
    fn nowhere(&self) {
        assert!(self.node.log().len() > 1000, "nothing is logged");
        for key in [KEY, NEXT, WRONG] {
            grep(self.node.path("").as_path(), key);
            for name in ["cmdline", "environ"] {
                let bytes = fs::read(self.daemon.proc(name)).unwrap();
                assert!(!holds(&bytes, key), "{name} has {key:?}");
            }
        }
    }
}

fn holds(bytes: &[u8], key: &str) -> bool {
    let numbers = format!("{:?}", key.as_bytes());
    let numbers = numbers.trim_matches(['[', ']']).as_bytes();
    [key.as_bytes(), numbers].into_iter().any(|form| bytes.windows(form.len()).any(|window| window == form))
}

fn grep(dir: &Path, key: &str) {
    for entry in fs::read_dir(dir).unwrap().flatten() {
        let (path, kind) = (entry.path(), entry.file_type().unwrap());
        if kind.is_dir() {
            grep(&path, key);
        } else if kind.is_file() && path.extension().is_none_or(|extension| extension != "img") {
            assert!(!holds(&fs::read(&path).unwrap(), key), "{} has {key:?}", path.display());
        }
    }
}

/// What a guest says whose volume is locked.
fn waiting(spec: &VolumeSpec) -> VolumeStatus {
    VolumeStatus {
        volume_id: spec.id.to_string(),
        token: spec.token.to_string(),
        pool: spec.pool.to_string(),
        health: Health::Unavail.into(),
        awaits_key: true,
        encrypted: true,
        ..Default::default()
    }
}

async fn provided(state: &Arc<State>, count: usize) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while state.provided.lock().unwrap().len() < count {
        assert!(Instant::now() < deadline, "no key came");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_key_nothing_is_published_and_the_error_says_where_it_goes() {
    let mut world = World::new().await;
    let error = world.publish("", "").await.unwrap_err();
    assert_eq!(error.code(), Code::InvalidArgument);
    for want in [&world.id, "encryptionKey", "csi.storage.k8s.io/node-publish-secret-name", "-secret-namespace"] {
        assert!(error.message().contains(want), "{error}");
    }
    let error = world.publish("short", "").await.unwrap_err();
    assert!(error.code() == Code::InvalidArgument && error.message().contains("8 to 512 bytes"), "{error}");
    assert!(!world.target.exists() && world.node.names("direct-volumes").is_empty());

    // Nor does a key go unused.
    world.id = world.calls.create("plain", GIB).await.unwrap().volume_id;
    let error = world.publish(KEY, "").await.unwrap_err();
    assert!(error.code() == Code::InvalidArgument && error.message().contains("is not encrypted"), "{error}");
    world.nowhere();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_second_sandbox_that_shows_the_token_gets_nothing_while_the_first_lives() {
    let mut world = World::new().await;
    world.publish(KEY, "").await.unwrap();
    let guest = world.guest("sandbox-1", KEY);
    provided(&guest.state, 1).await;
    // Nothing that the driver writes has the token, but Kata's entry, where it is encoded.
    grep(world.node.path("").as_path(), &world.spec().token.to_string());

    // While another publication waits for its sandbox, every new one is listened to.
    let other = world.calls.create("other", GIB).await.unwrap().volume_id;
    world.calls.publish(&other, &world.node.path("pods/other")).await.unwrap();
    let thief = world.guest("sandbox-2", KEY);
    thief.state.volumes.lock().unwrap()[0].used_bytes = 54321;
    let deadline = Instant::now() + Duration::from_secs(60);
    while !world.node.log().contains("a second sandbox shows the volume's token") {
        assert!(Instant::now() < deadline, "{}", world.node.log());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    // The next key goes to the first again.
    world.publish(NEXT, KEY).await.unwrap();
    provided(&guest.state, 2).await;
    assert!(thief.state.provided.lock().unwrap().is_empty());
    assert!(world.calls.stats(&world.id, &world.target).await.unwrap().usage[0].used != 54321);

    // When the first is gone, the pod may have a new sandbox.
    drop(guest);
    *thief.state.key.lock().unwrap() = NEXT.into();
    provided(&thief.state, 1).await;
    world.nowhere();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_guest_that_was_given_the_volume_gets_its_key_and_nobody_else() {
    let mut world = World::new().await;
    world.publish(KEY, "").await.unwrap();
    assert_eq!(world.spec().encryption, Some(Encryption::Aes256Gcm));
    let liar = FakeGuest::start(&world.node.path("kata"), "liar", Behaviour::Honest, vec![]);
    let guess = VolumeStatus { token: uuid::Uuid::from_u128(1).to_string(), ..waiting(&world.spec()) };
    *liar.state.volumes.lock().unwrap() = vec![guess];
    let guest = world.guest("sandbox-1", KEY);
    provided(&guest.state, 1).await;
    {
        let provided = guest.state.provided.lock().unwrap();
        assert_eq!((provided[0].key.as_slice(), provided[0].previous_key.as_slice()), (KEY.as_bytes(), &b""[..]));
        assert_eq!(provided[0].token, world.spec().token.to_string());
    }
    world.until_condition("the pool is healthy").await;
    // It has it, and is not asked again, however often kubelet repeats itself.
    for _ in 0..5 {
        world.publish(KEY, "").await.unwrap();
    }
    tokio::time::sleep(Duration::from_millis(1200)).await;
    assert_eq!(guest.state.provided.lock().unwrap().len(), 1);
    assert!(liar.state.provided.lock().unwrap().is_empty());

    // The pod's next machine gets it too; after the pod nobody does.
    drop(guest);
    let guest = world.guest("sandbox-2", KEY);
    provided(&guest.state, 1).await;
    world.calls.unpublish(&world.id, &world.target).await.unwrap();
    *guest.state.volumes.lock().unwrap() = vec![VolumeStatus { awaits_key: true, ..waiting_again(&guest) }];
    tokio::time::sleep(Duration::from_millis(1200)).await;
    assert_eq!(guest.state.provided.lock().unwrap().len(), 1);
    world.nowhere();
}

fn waiting_again(guest: &FakeGuest) -> VolumeStatus {
    guest.state.volumes.lock().unwrap()[0].clone()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_wrong_key_is_told_without_being_shown_and_a_mended_one_is_tried() {
    let mut world = World::new().await;
    world.publish(WRONG, "").await.unwrap();
    let guest = world.guest("sandbox-1", KEY);
    world.until_condition("its key was not taken").await;
    let (abnormal, message) = world.condition().await;
    assert!(abnormal && message.contains("the key *** does not fit"), "{message}");
    world.publish(KEY, "").await.unwrap();
    world.until_condition("the pool is healthy").await;
    assert!(!guest.state.volumes.lock().unwrap()[0].awaits_key);
    world.nowhere();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_key_is_changed_in_the_running_guest_and_only_when_the_one_before_is_named() {
    let mut world = World::new().await;
    world.publish(KEY, "").await.unwrap();
    let guest = world.guest("sandbox-1", KEY);
    provided(&guest.state, 1).await;
    world.until_condition("the pool is healthy").await;

    // It stays published, so that no error may make kubelet forget it, whatever the Secret has.
    for (key, want) in [(NEXT, "previousEncryptionKey"), ("short", "8 to 512 bytes"), ("", "encryptionKey")] {
        let error = world.publish(key, "").await.unwrap_err();
        assert!(error.code() == Code::Unavailable && error.message().contains(want), "{error}");
    }
    assert_eq!(guest.state.provided.lock().unwrap().len(), 1);
    for _ in 0..3 {
        world.publish(NEXT, KEY).await.unwrap();
    }
    assert_eq!(guest.state.provided.lock().unwrap().len(), 2, "changed once");
    assert_eq!(*guest.state.key.lock().unwrap(), NEXT.as_bytes());
    // The old one goes from the Secret.
    world.publish(NEXT, "").await.unwrap();

    // The guest says no: kubelet hears it, and the pod goes on with the key it has.
    *guest.state.key.lock().unwrap() = b"something else altogether".to_vec();
    let error = world.publish(WRONG, NEXT).await.unwrap_err();
    assert_eq!(error.code(), Code::FailedPrecondition);
    assert!(error.message().contains("refused ProvideKey") && error.message().contains("***"), "{error}");
    assert!(world.condition().await.1.contains("its key was not taken"));
    world.nowhere();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_restart_forgets_the_key_and_a_repeated_publication_brings_it_again() {
    let mut world = World::new().await;
    world.publish(KEY, "").await.unwrap();
    let World { daemon, node, id, target, .. } = world;
    daemon.kill();
    let daemon = node.start_with(None, &[("RUST_LOG", "trace")]);
    let calls = Calls::new(daemon.channel());
    let mut world = World { daemon, calls, node, id, target };
    let guest = world.guest("sandbox-1", KEY);
    world.until_condition("requiresRepublish").await;
    assert!(guest.state.provided.lock().unwrap().is_empty());
    world.publish(KEY, "").await.unwrap();
    provided(&guest.state, 1).await;
    world.until_condition("the pool is healthy").await;
    world.nowhere();
}
