//! Volumes with two devices on the node's side: what is joined and parted, which half is lost, and what is recorded of it
//! before a pod can start. The devices are simulated; `e2e/tests/mirror.rs` has the real ones. Needs root, as the driver
//! mounts.

#![allow(clippy::unwrap_used)]

#[path = "support/fake_guest.rs"]
#[allow(dead_code)]
mod fake_guest;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE;
use fake_guest::{Behaviour, FakeGuest};
use zpod_driver::guest::Monitor;
use zpod_driver::kata::{DirectVolumes, Halves, KataError, MapperError, Removal};
use zpod_driver::volumes::{
    Context, CreateRequest, Mirrors, NodeVolumes, PodCheck, Provision, Provisioner, PublishRequest, SnapshotRequest,
    Snapshots, Snapshotter, VolumeError,
};
use zpod_proto::guest::{Health, VolumeStatus};
use zpod_storage::backing::mirrored::Mirrored;
use zpod_storage::backing::sim::{Opener, SimBacking};
use zpod_storage::backing::{Backing as _, BackingError, Outcome};
use zpod_storage::catalog::dir::DirCatalog;
use zpod_storage::catalog::{Catalog as _, ClaimRef, PodRef, Source, Volume};
use zpod_volume::{Bytes, Half, Vdevs, VolumeId, VolumeMode, VolumeParameters, VolumeSpec};

/// Which images a device was made of, which it has open.
#[derive(Debug)]
struct Joined([bool; 2], #[allow(dead_code)] Vec<Opener>);

/// Devices of two halves that exist in memory only.
#[derive(Debug)]
struct FakeHalves {
    sides: [SimBacking; 2],
    joined: Mutex<BTreeMap<VolumeId, Joined>>,
    /// A virtual machine has them.
    used: Mutex<bool>,
}

impl Halves for FakeHalves {
    fn path(&self, id: VolumeId) -> PathBuf {
        Path::new("/mapped").join(id.to_string())
    }

    fn join(&self, id: VolumeId, images: [Option<&Path>; 2], half: Bytes, _: bool) -> Result<Outcome, KataError> {
        assert!(half > Bytes::mib(256));
        let images = images.map(|image| image.is_some());
        let opened = self.sides.iter().filter_map(|side| side.open_device(id)).collect();
        Ok(match self.joined.lock().unwrap().insert(id, Joined(images, opened)) {
            None => Outcome::Changed,
            Some(Joined(before, _)) => {
                assert_eq!(before, images, "a device that is there stays as it is");
                Outcome::Unchanged
            }
        })
    }

    fn part(&self, id: VolumeId, _: [Option<&Path>; 2], when: Removal) -> Result<Outcome, KataError> {
        let mut joined = self.joined.lock().unwrap();
        if joined.contains_key(&id) && *self.used.lock().unwrap() {
            return match when {
                Removal::Now => Err(MapperError::InUse(self.path(id)).into()),
                Removal::WhenUnused => Ok(Outcome::Changed),
            };
        }
        Ok(if joined.remove(&id).is_some() { Outcome::Changed } else { Outcome::Unchanged })
    }
}

struct World {
    dir: tempfile::TempDir,
    sides: [SimBacking; 2],
    halves: Arc<FakeHalves>,
    catalog: Arc<DirCatalog>,
    context: Arc<Context>,
    node: NodeVolumes,
    _monitor: Monitor,
}

fn parameters(vdevs: Vdevs) -> VolumeParameters {
    VolumeParameters { vdevs, ..VolumeParameters::default() }
}

fn wanted() -> CreateRequest {
    CreateRequest { name: "a".into(), parameters: parameters(Vdevs::Mirror2), ..CreateRequest::default() }
}

impl World {
    async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("kata")).unwrap();
        let (catalog, snapshots) = zpod_storage::catalog::dir::open(dir.path().join("state")).unwrap();
        let sides = [SimBacking::new(Bytes::gib(100), 1.0), SimBacking::new(Bytes::gib(100), 1.0)];
        let halves = FakeHalves { sides: sides.clone(), joined: Mutex::default(), used: Mutex::default() };
        let (catalog, halves) = (Arc::new(catalog), Arc::new(halves));
        let backing = Mirrored::new(Arc::new(sides[0].clone()), Arc::new(sides[1].clone()));
        let mirrors = Mirrors { backing: Arc::new(backing), halves: halves.clone() };
        let context = Context::with_mirrors(
            "node-1".into(),
            "boot-1".into(),
            catalog.clone(),
            Arc::new(snapshots),
            Arc::new(sides[0].clone()),
            Ok(mirrors),
        );
        let direct = DirectVolumes::open(&dir.path().join("direct-volumes")).unwrap();
        let node = NodeVolumes::load(context.clone(), direct).await.unwrap();
        let _monitor = Monitor::start(vec![dir.path().join("kata")], Arc::new(node.clone()));
        Self { dir, sides, halves, catalog, context, node, _monitor }
    }

    async fn volume(&self) -> VolumeId {
        Provisioner::new(self.context.clone()).create(wanted()).await.unwrap().id
    }

    fn target(&self) -> PathBuf {
        self.dir.path().join("pod")
    }

    async fn publish(&self, id: VolumeId) -> Result<(), VolumeError> {
        self.node.publish(PublishRequest::new(id, &self.target())).await.map(drop)
    }

    async fn unpublish(&self, id: VolumeId) {
        self.node.unpublish(id, self.target()).await.unwrap();
    }

    async fn record(&self, id: VolumeId) -> Volume {
        self.catalog.get(id).await.unwrap().unwrap()
    }

    /// What Kata finds.
    fn entry(&self) -> (PathBuf, VolumeSpec) {
        let name = URL_SAFE.encode(self.target().to_str().unwrap());
        let json = std::fs::read(self.dir.path().join("direct-volumes").join(name).join("mountInfo.json")).unwrap();
        let json: serde_json::Value = serde_json::from_slice(&json).unwrap();
        let option = json["options"][0].as_str().unwrap().strip_prefix("zpod=").unwrap();
        (json["device"].as_str().unwrap().into(), VolumeSpec::decode(option).unwrap())
    }

    fn behind(&self) -> Option<Half> {
        self.entry().1.mirror.unwrap().behind
    }

    fn joined(&self, id: VolumeId) -> Option<[bool; 2]> {
        self.halves.joined.lock().unwrap().get(&id).map(|joined| joined.0)
    }

    fn lose(&self, id: VolumeId, half: Half) {
        assert_eq!(self.sides[half.index()].destroy(id).unwrap(), Outcome::Changed);
    }

    async fn initialized(&self, id: VolumeId) {
        let record = self.record(id).await;
        self.catalog.update(Volume { initialized: true, ..record }).await.unwrap();
    }

    /// A guest that says this of the volume, until it is recorded.
    async fn heard(&self, id: VolumeId, sandbox: &str, status: VolumeStatus, want: impl Fn(&Volume) -> bool) {
        let kata = self.dir.path().join("kata");
        let token = self.entry().1.token.to_string();
        let status = VolumeStatus { volume_id: id.to_string(), token, ..status };
        let _guest = FakeGuest::start(&kata, sandbox, Behaviour::Honest, vec![status]);
        let deadline = Instant::now() + Duration::from_secs(60);
        while !want(&self.record(id).await) {
            assert!(Instant::now() < deadline, "it is not recorded: {:?}", self.record(id).await);
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        // The entry follows the record.
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
}

fn says(health: Health, behind: u32) -> VolumeStatus {
    VolumeStatus { health: health.into(), behind, ..VolumeStatus::default() }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_mirror_is_two_devices_that_are_one_while_it_is_published() {
    let world = World::new().await;
    let id = world.volume().await;
    assert!(world.sides.iter().all(|side| side.device(id).is_ok()));
    for _ in 0..2 {
        world.publish(id).await.unwrap();
        world.publish(id).await.unwrap();
        assert_eq!((world.entry().0, world.joined(id)), (world.halves.path(id), Some([true, true])));
        assert_eq!((world.behind(), world.record(id).await.behind), (None, None));
        world.unpublish(id).await;
        world.unpublish(id).await;
        assert_eq!(world.joined(id), None);
    }
    Provisioner::new(world.context.clone()).delete(id).await.unwrap();
    assert!(!world.sides.iter().any(|side| side.device(id).is_ok()));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn while_a_virtual_machine_has_it_nobody_else_gets_it_and_nobody_destroys_it() {
    let world = World::new().await;
    let id = world.volume().await;
    world.publish(id).await.unwrap();
    *world.halves.used.lock().unwrap() = true;
    world.unpublish(id).await;
    let error = world.publish(id).await.unwrap_err();
    assert!(matches!(error, VolumeError::Backing { source: BackingError::InUse { .. }, .. }), "{error}");
    let error = Provisioner::new(world.context.clone()).delete(id).await.unwrap_err();
    assert!(matches!(error, VolumeError::Backing { source: BackingError::InUse { .. }, .. }), "{error}");
    assert!(world.sides.iter().all(|side| side.device(id).is_ok()));
    *world.halves.used.lock().unwrap() = false;
    world.publish(id).await.unwrap();
}

/// An API server that knows no pod.
#[derive(Debug)]
struct NoPods;

#[async_trait::async_trait]
impl PodCheck for NoPods {
    async fn check(&self, _: Option<&PodRef>, _: &Volume, _: &Path) -> Result<Option<ClaimRef>, VolumeError> {
        Ok(None)
    }

    async fn is_gone(&self, _: VolumeId, _: &PodRef) -> Result<bool, VolumeError> {
        Ok(true)
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_mirror_of_a_pod_that_is_gone_is_taken_back_when_no_virtual_machine_has_it() {
    let world = World::new().await;
    let (id, node) = (world.volume().await, world.node.clone().checking_pods(Arc::new(NoPods)));
    let pod = PodRef { namespace: "ns".into(), name: "pod".into(), uid: "u-1".into() };
    node.publish(PublishRequest { pod: Some(pod), ..PublishRequest::new(id, &world.target()) }).await.unwrap();
    rustix::mount::unmount(world.target(), rustix::mount::UnmountFlags::DETACH).unwrap();
    std::fs::remove_dir(world.target()).unwrap();
    for used in [true, false] {
        *world.halves.used.lock().unwrap() = used;
        node.withdraw_abandoned().await;
        assert_eq!(world.record(id).await.publication.is_some(), used);
        assert_eq!(world.joined(id), used.then_some([true, true]));
    }
    Provisioner::new(world.context.clone()).delete(id).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_half_is_recorded_and_replaced_before_a_pod_starts_and_never_the_only_one_until_it_has_everything() {
    for half in Half::BOTH {
        let world = World::new().await;
        let id = world.volume().await;
        world.initialized(id).await;
        world.lose(id, half);
        world.publish(id).await.unwrap();
        assert_eq!((world.record(id).await.behind, world.behind()), (Some(half), Some(half)));
        assert_eq!(world.joined(id), Some([true, true]), "a new one is there");
        world.unpublish(id).await;

        // The other one is lost too: what is left is blank.
        world.lose(id, half.other());
        let error = world.publish(id).await.unwrap_err();
        assert!(matches!(error, VolumeError::HalfLost { half: newest, .. } if newest == half.other()), "{error}");
        assert_eq!((world.joined(id), world.record(id).await.behind), (None, Some(half)));
        assert!(world.sides[half.other().index()].device(id).is_err(), "nothing is made in the place of the newest");
        assert!(world.record(id).await.publication.is_none());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_half_that_can_not_be_replaced_leaves_the_volume_with_the_other_one() {
    let world = World::new().await;
    let id = world.volume().await;
    world.initialized(id).await;
    // Its disk is full of others.
    world.lose(id, Half::Second);
    let other = VolumeId::from_name("other");
    let layout = zpod_volume::DiskLayout { capacity: Bytes::gib(99), partition: Bytes::gib(99), disk: Bytes::gib(100) };
    let spec = zpod_storage::backing::DeviceSpec { id: other, layout, provisioning: zpod_volume::Provisioning::Thin };
    world.sides[1].create(&spec).unwrap();
    world.publish(id).await.unwrap();
    assert_eq!((world.joined(id), world.behind()), (Some([true, false]), Some(Half::Second)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_half_that_is_lost_while_a_publication_is_installed_is_no_half_that_is_recorded() {
    for half in Half::BOTH {
        let world = World::new().await;
        let id = world.volume().await;
        world.initialized(id).await;
        world.publish(id).await.unwrap();
        // As zpod finds it that was killed before it had made the device.
        world.halves.joined.lock().unwrap().clear();
        std::fs::remove_dir_all(world.dir.path().join("direct-volumes")).unwrap();
        let direct = DirectVolumes::open(&world.dir.path().join("direct-volumes")).unwrap();
        let node = NodeVolumes::load(world.context.clone(), direct).await.unwrap();
        world.lose(id, half);
        // The publication stands meanwhile, and says so around the reason.
        let again = || async {
            match node.publish(PublishRequest::new(id, &world.target())).await.unwrap_err() {
                VolumeError::StillPublished { source, .. } => *source,
                error => panic!("{error}"),
            }
        };
        let error = again().await;
        assert!(matches!(error, VolumeError::Backing { source: BackingError::Missing { .. }, .. }), "{error}");
        assert_eq!(world.joined(id), None);
        let record = world.record(id).await;
        world.catalog.update(Volume { behind: Some(half.other()), ..record }).await.unwrap();
        assert!(matches!(again().await, VolumeError::HalfLost { .. }));
        // The next pod finds it out.
        world.unpublish(id).await;
        assert!(matches!(world.publish(id).await.unwrap_err(), VolumeError::HalfLost { .. }));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_volume_that_no_guest_was_given_gets_a_new_half_and_is_made_on_both() {
    let world = World::new().await;
    let id = world.volume().await;
    world.lose(id, Half::First);
    world.publish(id).await.unwrap();
    assert_eq!((world.joined(id), world.behind()), (Some([true, true]), None));
    assert_eq!(world.entry().1.create, zpod_volume::Create::Fresh);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_guest_says_of_its_halves_is_recorded_and_told_the_next_machine_of_the_same_pod() {
    let world = World::new().await;
    let id = world.volume().await;
    world.publish(id).await.unwrap();
    world.heard(id, "one", says(Health::Online, 0), |volume| volume.initialized).await;
    assert_eq!(world.behind(), None);
    world.heard(id, "two", says(Health::Degraded, 1), |volume| volume.behind.is_some()).await;
    assert_eq!((world.record(id).await.behind, world.behind()), (Some(Half::First), Some(Half::First)));
    // One that has not brought the pool up knows nothing.
    world.heard(id, "three", VolumeStatus { refusal: "no".into(), ..says(Health::Unavail, 0) }, |_| true).await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert_eq!(world.record(id).await.behind, Some(Half::First));
    world.heard(id, "four", says(Health::Online, 0), |volume| volume.behind.is_none()).await;
    assert_eq!(world.behind(), None);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_can_not_be_a_mirror_is_refused_with_the_reason_and_leaves_nothing() {
    let world = World::new().await;
    let provisioner = Provisioner::new(world.context.clone());
    let block = CreateRequest { mode: VolumeMode::Block, ..wanted() };
    let copy = CreateRequest { source: Some(Source::Volume(VolumeId::from_name("b"))), ..wanted() };
    let inline = CreateRequest { inline: Some(VolumeId::from_name("csi-1")), ..wanted() };
    for (request, want) in [(block, "for file systems"), (copy, "for new volumes"), (inline, "inline")] {
        let error = provisioner.create(request).await.unwrap_err().to_string();
        assert!(error.contains(want), "{error}");
    }
    // Nothing is copied of one.
    let id = world.volume().await;
    let single = CreateRequest {
        name: "b".into(),
        source: Some(Source::Volume(id)),
        parameters: parameters(Vdevs::Single),
        ..CreateRequest::default()
    };
    let error = provisioner.create(single).await.unwrap_err().to_string();
    assert!(error.contains("no snapshots or clones"), "{error}");
    let request = SnapshotRequest { name: "s".into(), volume: id, allow_copy: true };
    let error = Snapshotter::new(world.context.clone()).create(request).await.unwrap_err().to_string();
    assert!(error.contains("no snapshots or clones"), "{error}");

    // A node with one directory.
    let (catalog, snapshots) = zpod_storage::catalog::dir::open(world.dir.path().join("other")).unwrap();
    let (catalog, backing) = (Arc::new(catalog), Arc::new(SimBacking::new(Bytes::gib(9), 1.0)));
    let context = Context::new("n".into(), "b".into(), catalog.clone(), Arc::new(snapshots), backing.clone());
    let error = Provisioner::new(context).create(wanted()).await.unwrap_err();
    assert!(matches!(error, VolumeError::NoMirrors { .. }) && error.to_string().contains("--mirror-dir"), "{error}");
    assert!(catalog.get(id).await.unwrap().is_none() && backing.device(id).is_err());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_mirror_grows_on_both_halves_or_says_why_not() {
    let world = World::new().await;
    let (id, provisioner) = (world.volume().await, Provisioner::new(world.context.clone()));
    let to = |gib| zpod_driver::volumes::CapacityRange { required: Some(Bytes::gib(gib)), limit: None };
    provisioner.expand(id, to(2)).await.unwrap();
    world.node.expand(id, to(2)).await.unwrap();
    let partition = zpod_volume::DiskLayout::partition_for(Bytes::gib(2));
    assert!(world.sides.iter().all(|side| side.table(id) == Some(partition)));
    world.lose(id, Half::Second);
    assert!(provisioner.expand(id, to(3)).await.is_err());
    assert_eq!(world.record(id).await.capacity, Bytes::gib(2));
}
