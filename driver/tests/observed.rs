//! Who is told what guests say, and who is asked about pods. Needs root, as the driver mounts.

#![allow(clippy::unwrap_used)]

#[path = "support/fake_guest.rs"]
#[allow(dead_code)]
mod fake_guest;

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use fake_guest::{Behaviour, FakeGuest};
use zpod_admin::RollbackQuery;
use zpod_driver::guest::{Health, Monitor, VolumeReport};
use zpod_driver::kata::{DirectVolumes, TargetPath};
use zpod_driver::volumes::{
    CLAIM_NAME, CapacityRange, Context, CreateRequest, EphemeralVolume, InlineLimits, NodeVolumes, Observed, Observer,
    PodCheck, Provision, Provisioner, PublishRequest, VolumeError,
};
use zpod_proto::guest::{Health as WireHealth, VolumeStatus};
use zpod_storage::backing::sim::SimBacking;
use zpod_storage::catalog::dir::DirCatalog;
use zpod_storage::catalog::{
    Catalog, CatalogError, ClaimRef, Created, Page, PodRef, RollbackOutcome, RollbackRecord, Volume,
};
use zpod_volume::{Bytes, Rollback, VolumeId, VolumeSpec};

/// A catalog that counts how often it is read, and may fail behind what it has written.
#[derive(Debug)]
struct Counting(DirCatalog, AtomicUsize, AtomicBool);

#[async_trait]
impl Catalog for Counting {
    async fn create(&self, volume: Volume) -> Result<Created, CatalogError> {
        self.0.create(volume).await
    }

    async fn get(&self, id: VolumeId) -> Result<Option<Volume>, CatalogError> {
        self.1.fetch_add(1, Ordering::Relaxed);
        self.0.get(id).await
    }

    async fn update(&self, volume: Volume) -> Result<Volume, CatalogError> {
        let written = self.0.update(volume).await?;
        match self.2.load(Ordering::Relaxed) {
            true => Err(CatalogError::Io {
                what: "can't read",
                path: "/answer".into(),
                source: std::io::Error::other("the answer was lost"),
            }),
            false => Ok(written),
        }
    }

    async fn remove(&self, id: VolumeId) -> Result<(), CatalogError> {
        self.0.remove(id).await
    }

    async fn list(&self, from: Option<VolumeId>, limit: usize) -> Result<Page, CatalogError> {
        self.0.list(from, limit).await
    }
}

/// Notes what it is told.
#[derive(Debug, Default)]
struct Notes {
    reported: Mutex<Vec<(Observed, Health)>>,
    withdrawn: Mutex<Vec<VolumeId>>,
    unheard: Mutex<Vec<String>>,
    rollbacks: Mutex<Vec<(u128, bool)>>,
    outcomes: Mutex<Vec<RollbackOutcome>>,
    /// What it was told last.
    last: Mutex<&'static str>,
}

impl Observer for Notes {
    fn reported(&self, volume: &Observed, report: &VolumeReport) {
        self.reported.lock().unwrap().push((volume.clone(), report.health));
        *self.last.lock().unwrap() = "reported";
    }

    fn withdrawn(&self, id: VolumeId) {
        self.withdrawn.lock().unwrap().push(id);
        *self.last.lock().unwrap() = "withdrawn";
    }

    fn rollback_changed(&self, _: &Observed, rollback: &Rollback, asked: bool) {
        self.rollbacks.lock().unwrap().push((rollback.id.as_u128(), asked));
    }

    fn rolled_back(&self, _: &Observed, _: &Rollback, outcome: &RollbackOutcome) {
        self.outcomes.lock().unwrap().push(outcome.clone());
    }

    fn unheard(&self, _: &Observed, reason: &str) {
        self.unheard.lock().unwrap().push(reason.to_owned());
        *self.last.lock().unwrap() = "unheard";
    }
}

/// Takes pods of one name, whose containers run or don't yet.
#[derive(Debug)]
struct Only(&'static str, Arc<AtomicBool>);

#[async_trait]
impl PodCheck for Only {
    async fn check(&self, pod: Option<&PodRef>, volume: &Volume, _: &Path) -> Result<Option<ClaimRef>, VolumeError> {
        match pod {
            Some(pod) if pod.name == self.0 => Ok(None),
            pod => {
                let (pod, reason) = (format!("{pod:?}"), "not on the list".into());
                Err(VolumeError::PodRefused { id: volume.id, pod, reason })
            }
        }
    }

    async fn runs_with(&self, _: &Observed, _: &PodRef) -> Result<bool, VolumeError> {
        Ok(self.1.load(Ordering::Relaxed))
    }

    async fn is_gone(&self, _: VolumeId, pod: &PodRef) -> Result<bool, VolumeError> {
        Ok(pod.uid == "gone")
    }
}

struct World {
    dir: tempfile::TempDir,
    catalog: Arc<Counting>,
    context: Arc<Context>,
    backing: SimBacking,
    node: NodeVolumes,
    notes: Arc<Notes>,
    runs: Arc<AtomicBool>,
}

impl World {
    async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("kata")).unwrap();
        let (catalog, snapshots) = zpod_storage::catalog::dir::open(dir.path().join("state")).unwrap();
        let catalog = Arc::new(Counting(catalog, AtomicUsize::default(), AtomicBool::default()));
        let backing = SimBacking::new(Bytes::gib(100), 1.0);
        let (snapshots, shared) = (Arc::new(snapshots), Arc::new(backing.clone()));
        let context = Context::new("node-1".into(), "boot-1".into(), catalog.clone(), snapshots, shared);
        let direct = DirectVolumes::open(&dir.path().join("direct-volumes")).unwrap();
        let (notes, runs) = (Arc::new(Notes::default()), Arc::new(AtomicBool::new(false)));
        let node = NodeVolumes::load(context.clone(), direct).await.unwrap();
        let node = node
            .observed_by(notes.clone())
            .checking_pods(Arc::new(Only("good", runs.clone())))
            .with_ephemeral(InlineLimits::up_to(Bytes::gib(1)));
        Self { dir, catalog, context, backing, node, notes, runs }
    }

    async fn volume(&self) -> VolumeId {
        let labels = [(CLAIM_NAME.to_owned(), "data".to_owned())].into();
        let request = CreateRequest { name: "a".into(), labels, ..CreateRequest::default() };
        Provisioner::new(self.context.clone()).create(request).await.unwrap().id
    }

    /// What a published volume's guest is told.
    fn spec(&self, target: &Path) -> VolumeSpec {
        let direct = DirectVolumes::open(&self.dir.path().join("direct-volumes")).unwrap();
        direct.spec(&TargetPath::resolve(target).unwrap()).unwrap().unwrap()
    }

    async fn publish(&self, id: VolumeId, target: &Path, pod: &str) -> Result<(), VolumeError> {
        let pod = Some(PodRef { namespace: "ns".into(), name: pod.into(), uid: "u-1".into() });
        let request = PublishRequest { pod, ..PublishRequest::new(id, target) };
        self.node.publish(request).await.map(drop)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_believed_guest_says_reaches_the_observer_and_stats_ask_no_catalog() {
    let world = World::new().await;
    let (id, target) = (world.volume().await, world.dir.path().join("pod"));
    world.publish(id, &target, "good").await.unwrap();
    let token = world.spec(&target).token;
    let said = |token: String, health: WireHealth| VolumeStatus {
        volume_id: id.to_string(),
        token,
        health: health.into(),
        total_bytes: 1 << 30,
        used_bytes: 7,
        ..VolumeStatus::default()
    };
    let kata = world.dir.path().join("kata");
    let liar = said(uuid::Uuid::from_u128(1).to_string(), WireHealth::Faulted);
    let _liar = FakeGuest::start(&kata, "liar", Behaviour::Honest, vec![liar]);
    let _guest = FakeGuest::start(&kata, "guest", Behaviour::Honest, vec![said(token.to_string(), WireHealth::Online)]);
    let _monitor = Monitor::start(vec![kata], Arc::new(world.node.clone()));
    let deadline = Instant::now() + Duration::from_secs(60);
    while world.notes.reported.lock().unwrap().len() < 3 {
        assert!(Instant::now() < deadline, "nothing is heard");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let (observed, _) = world.notes.reported.lock().unwrap()[0].clone();
    assert_eq!((observed.label(CLAIM_NAME), observed.pod.as_ref().unwrap().name.as_str()), ("data", "good"));
    assert!(world.notes.reported.lock().unwrap().iter().all(|(_, health)| *health == Health::Online));

    let reads = world.catalog.1.load(Ordering::Relaxed);
    for _ in 0..50 {
        assert_eq!(world.node.stats(id, &target).await.unwrap().bytes[1], 7);
    }
    assert!(matches!(world.node.stats(id, world.dir.path()).await, Err(VolumeError::NotPublished { .. })));
    assert_eq!(world.catalog.1.load(Ordering::Relaxed), reads, "the catalog was asked");

    world.node.unpublish(id, target.clone()).await.unwrap();
    assert_eq!(*world.notes.withdrawn.lock().unwrap(), [id]);
    assert!(matches!(world.node.stats(id, &target).await, Err(VolumeError::NotPublished { .. })));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_container_that_runs_without_its_volume_is_found_and_told_until_a_guest_has_it() {
    let world = World::new().await;
    let (id, target) = (world.volume().await, world.dir.path().join("pod"));
    world.publish(id, &target, "good").await.unwrap();
    let condition = async || world.node.stats(id, &target).await.unwrap().condition;
    let told = || world.notes.unheard.lock().unwrap().len();
    // Its image may still be on the way.
    world.node.find_unheard(Duration::ZERO).await;
    assert!(!condition().await.abnormal);
    world.runs.store(true, Ordering::Relaxed);
    world.node.find_unheard(Duration::from_secs(3600)).await;
    assert!(!condition().await.abnormal, "a container has just started");
    for _ in 0..2 {
        world.node.find_unheard(Duration::ZERO).await;
        let condition = condition().await;
        assert!(condition.abnormal && condition.message.contains("disable_block_device_use"), "{condition:?}");
        assert_eq!(told(), 1, "told once");
    }
    // A container that fails for want of its data, and is started again now and then.
    world.runs.store(false, Ordering::Relaxed);
    world.node.find_unheard(Duration::ZERO).await;
    assert!(condition().await.abnormal, "it has run without its volume");
    assert_eq!(*world.notes.last.lock().unwrap(), "unheard");

    world.node.unpublish(id, target.clone()).await.unwrap();
    assert_eq!(*world.notes.last.lock().unwrap(), "withdrawn");
    world.publish(id, &target, "good").await.unwrap();
    assert!(!condition().await.abnormal, "that was another pod's");
    world.runs.store(true, Ordering::Relaxed);
    world.node.find_unheard(Duration::ZERO).await;
    assert!(condition().await.abnormal);
    assert_eq!(told(), 2);

    let token = world.spec(&target).token.to_string();
    let said =
        VolumeStatus { volume_id: id.to_string(), token, health: WireHealth::Online.into(), ..Default::default() };
    let kata = world.dir.path().join("kata");
    let guest = FakeGuest::start(&kata, "guest", Behaviour::Honest, vec![said]);
    let _monitor = Monitor::start(vec![kata], Arc::new(world.node.clone()));
    let deadline = Instant::now() + Duration::from_secs(60);
    while condition().await.abnormal {
        assert!(Instant::now() < deadline, "nothing is heard");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    world.node.find_unheard(Duration::ZERO).await;
    assert!(!condition().await.abnormal);
    assert_eq!((told(), *world.notes.last.lock().unwrap()), (2, "reported"));
    // Its container has ended, which the API server does not know yet.
    guest.state.volumes.lock().unwrap().clear();
    let deadline = Instant::now() + Duration::from_secs(60);
    while world.node.looks().iter().any(|look| look.heard.is_some()) {
        assert!(Instant::now() < deadline, "the guest tells of it still");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    world.node.find_unheard(Duration::ZERO).await;
    assert!(!condition().await.abnormal && told() == 2, "its guest has had it");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_inline_volume_ends_without_being_unpublished_only_when_its_pod_is_gone() {
    let world = World::new().await;
    let publish = async |handle: &str, uid: &str| {
        let id = VolumeId::from_name(handle);
        let pod = Some(PodRef { namespace: "ns".into(), name: "good".into(), uid: uid.into() });
        let request = PublishRequest { pod, ..PublishRequest::new(id, &world.dir.path().join(handle)) };
        let wanted = EphemeralVolume { handle: handle.into(), size: None, parameters: Default::default() };
        world.node.publish_ephemeral(wanted, request).await.unwrap();
        id
    };
    let (lives, gone) = (publish("lives", "u-1").await, publish("gone", "gone").await);
    // One that a kill has left between being made and being published; and a claim's volume, which is nobody's to end.
    let made = |name: &str, inline: bool| CreateRequest {
        name: name.into(),
        inline: inline.then(|| VolumeId::from_name(name)),
        ..CreateRequest::default()
    };
    let provisioner = Provisioner::new(world.context.clone());
    let begun = provisioner.create(made("begun", true)).await.unwrap().id;
    let claim = provisioner.create(made("claim", false)).await.unwrap().id;
    let there = async |id| world.catalog.0.get(id).await.unwrap().is_some();

    let idle = world.node.end_abandoned(&Default::default()).await.unwrap();
    assert_eq!(idle, [begun].into(), "it may be published in this moment");
    assert!(there(begun).await && !there(gone).await);
    assert!(!world.dir.path().join("gone").exists(), "its target path is there");
    let idle = world.node.end_abandoned(&idle).await.unwrap();
    assert!(idle.is_empty() && !there(begun).await);
    assert!(there(lives).await && there(claim).await);
    world.node.unpublish(lives, world.dir.path().join("lives")).await.unwrap();
    assert!(!there(lives).await);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pod_that_is_refused_leaves_nothing_behind() {
    let world = World::new().await;
    let (id, target) = (world.volume().await, world.dir.path().join("pod"));
    let error = world.publish(id, &target, "bad").await.unwrap_err();
    assert!(error.to_string().contains("not on the list"), "{error}");
    assert!(!target.exists(), "the target path was made");
    assert_eq!(world.catalog.0.get(id).await.unwrap().unwrap().publication, None);
    assert!(world.notes.withdrawn.lock().unwrap().is_empty(), "it never was published");
    // Another pod is not kept from it, at the same path.
    world.publish(id, &target, "good").await.unwrap();
    world.node.unpublish(id, target).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn growth_waits_for_a_guest_that_is_not_heard_yet_and_goes_on_when_its_machine_ends() {
    let world = World::new().await;
    let (id, target) = (world.volume().await, world.dir.path().join("pod"));
    world.publish(id, &target, "good").await.unwrap();
    let to = |gib| CapacityRange { required: Some(Bytes::gib(gib)), limit: None };
    Provisioner::new(world.context.clone()).expand(id, to(2)).await.unwrap();
    let vmm = world.backing.open_device(id).unwrap();
    let begun = tokio::time::Instant::now();
    let error = world.node.expand(id, to(2)).await.unwrap_err();
    assert!(matches!(error, VolumeError::GuestSilent { .. }), "{error}");
    // kubelet waits for two minutes.
    let waited = begun.elapsed().as_secs();
    assert!((60..100).contains(&waited), "{waited} s");

    let node = world.node.clone();
    let waits = tokio::spawn(async move { node.expand(id, to(2)).await });
    tokio::time::sleep(std::time::Duration::from_secs(20)).await;
    assert!(!waits.is_finished());
    drop(vmm);
    assert_eq!(waits.await.unwrap().unwrap(), Bytes::gib(2));
    assert_eq!(world.backing.table(id), Some(zpod_volume::DiskLayout::partition_for(Bytes::gib(2))));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rollback_is_asked_for_by_who_saw_this_pod_and_what_is_answered_is_what_is_recorded() {
    let world = World::new().await;
    let (id, target) = (world.volume().await, world.dir.path().join("pod"));
    world.publish(id, &target, "good").await.unwrap();
    let token = world.spec(&target).token.to_string();
    let said =
        VolumeStatus { volume_id: id.to_string(), token, health: WireHealth::Online.into(), ..Default::default() };
    let kata = world.dir.path().join("kata");
    let guest = FakeGuest::start(&kata, "guest", Behaviour::Honest, vec![said]);
    guest.state.passed.taken.lock().unwrap().push("one".into());
    let _monitor = Monitor::start(vec![kata], Arc::new(world.node.clone()));
    let deadline = Instant::now() + Duration::from_secs(60);
    while world.node.looks().iter().all(|look| look.heard.is_none()) {
        assert!(Instant::now() < deadline, "nothing is heard");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let query = |number: u128, pod: &str| RollbackQuery {
        snapshot: "one".parse().unwrap(),
        destroy_newer: false,
        id: Some(uuid::Uuid::from_u128(number)),
        pod: Some(pod.to_owned()),
    };
    let recorded = async || world.catalog.0.get(id).await.unwrap().unwrap().rollback;
    for other in ["u-2", ""] {
        let error = world.node.request_rollback(id, query(1, other)).await.unwrap_err();
        assert!(matches!(error, VolumeError::RollbackPodChanged { .. }), "{error}");
        assert!(recorded().await.is_none());
    }
    // Written, and then the answer is lost.
    world.catalog.2.store(true, Ordering::Relaxed);
    let requested = world.node.request_rollback(id, query(2, "u-1")).await.unwrap();
    assert_eq!(requested.id, recorded().await.unwrap().request.id.to_string());
    let other = world.node.cancel_rollback(id, Some(uuid::Uuid::from_u128(3))).await;
    assert!(matches!(other, Err(VolumeError::NoRollback { .. })), "{other:?}");
    let taken_back = world.node.cancel_rollback(id, Some(uuid::Uuid::from_u128(2))).await.unwrap();
    assert_eq!((taken_back.id, taken_back.given), (requested.id, false));
    assert!(recorded().await.is_none());
    world.catalog.2.store(false, Ordering::Relaxed);
    assert_eq!(*world.notes.rollbacks.lock().unwrap(), [(2, true), (2, false)], "those that were recorded");

    // A pod that comes too late does not go back.
    world.node.request_rollback(id, query(4, "u-1")).await.unwrap();
    world.node.unpublish(id, target.clone()).await.unwrap();
    let volume = world.catalog.0.get(id).await.unwrap().unwrap();
    let old = volume.rollback.clone().map(|record| RollbackRecord { requested: record.requested - 90_000, ..record });
    world.catalog.0.update(Volume { rollback: old, ..volume }).await.unwrap();
    world.publish(id, &target, "good").await.unwrap();
    let outcome = recorded().await.unwrap().outcome.unwrap();
    assert!(outcome.refused.as_ref().unwrap().contains("more than 24 h ago"), "{outcome:?}");
    assert_eq!(world.spec(&target).rollback, None);
    assert_eq!(*world.notes.outcomes.lock().unwrap(), [outcome]);
}
