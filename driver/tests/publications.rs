//! Publications: one place by many names, failures half way, and pods that nobody unpublishes. Against the simulated
//! backing; needs root, as the driver mounts.

#![allow(clippy::unwrap_used)]

#[path = "support/fake_guest.rs"]
#[allow(dead_code)]
mod fake_guest;
#[path = "support/pods.rs"]
mod pods;

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use fake_guest::{Behaviour, FakeGuest};
use pods::Pods;
use rustix::mount::{MountFlags, UnmountFlags};
use zpod_driver::guest::Monitor;
use zpod_driver::kata::{DirectVolumes, TargetPath};
use zpod_driver::volumes::{
    Context, CreateRequest, NodeVolumes, Provision, Provisioner, PublishRequest, SnapshotRequest, Snapshots,
    Snapshotter, VolumeError,
};
use zpod_proto::guest::{Health, VolumeStatus};
use zpod_storage::backing::sim::SimBacking;
use zpod_storage::catalog::{Catalog, PodRef, Publication, Source, Volume};
use zpod_volume::{Bytes, Create, VolumeId, VolumeMode};

/// A node on directories of its own.
struct World {
    dir: Directory,
    backing: SimBacking,
    pods: Arc<Pods>,
    provisioner: Provisioner,
    node: NodeVolumes,
}

impl World {
    async fn new() -> Self {
        let dir = Directory(tempfile::tempdir().unwrap());
        let direct = dir.path().join("direct-volumes");
        fs::create_dir(&direct).unwrap();
        rustix::mount::mount("direct", &direct, "tmpfs", MountFlags::empty(), None).unwrap();
        let (backing, pods) = (SimBacking::new(Bytes::gib(100), 1.0), Arc::default());
        let (provisioner, node) = start(dir.path(), &backing, &pods).await;
        Self { dir, backing, pods, provisioner, node }
    }

    /// With another process in the place of this one, which finds its records changed.
    async fn restarted(self, change: impl FnOnce(Volume) -> Volume, id: VolumeId) -> Self {
        let Self { dir, backing, pods, provisioner, node } = self;
        drop((provisioner, node));
        let (catalog, snapshots) = zpod_storage::catalog::dir::open(dir.path().join("state")).unwrap();
        let volume = Catalog::<Volume>::get(&catalog, id).await.unwrap().unwrap();
        catalog.update(change(volume)).await.unwrap();
        drop((catalog, snapshots));
        let (provisioner, node) = start(dir.path(), &backing, &pods).await;
        Self { dir, backing, pods, provisioner, node }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    async fn create(&self, name: &str) -> VolumeId {
        self.provisioner.create(CreateRequest { name: name.into(), ..CreateRequest::default() }).await.unwrap().id
    }

    async fn publish(&self, id: VolumeId, target: &Path) -> Result<(), VolumeError> {
        let pod = PodRef { namespace: "ns".into(), name: "pod".into(), uid: "u-1".into() };
        let request = PublishRequest { pod: Some(pod), ..PublishRequest::new(id, target) };
        self.node.publish(request).await.map(drop)
    }

    async fn publication(&self, id: VolumeId) -> Option<Publication> {
        self.provisioner.get(id).await.unwrap().publication
    }

    /// What Kata would find.
    fn entries(&self) -> Vec<PathBuf> {
        let entries = fs::read_dir(self.path("direct-volumes")).unwrap().map(|entry| entry.unwrap().path());
        entries.filter(|path| !path.ends_with(".zpod")).collect()
    }

    fn make_entries_writable(&self, writable: bool) {
        let flags = if writable { MountFlags::empty() } else { MountFlags::RDONLY };
        rustix::mount::mount_remount(self.path("direct-volumes"), flags, "").unwrap();
    }

    /// Nothing of a publication is left, and the volume can be deleted.
    async fn nothing_is_left(&self, id: VolumeId, target: &Path) {
        assert_eq!(self.publication(id).await, None);
        assert!(!target.exists() && self.entries().is_empty(), "{:?}", self.entries());
        self.provisioner.delete(id).await.unwrap();
    }
}

/// What a failed test leaves mounted in it would keep it.
struct Directory(tempfile::TempDir);

impl Directory {
    fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        for name in ["direct-volumes", "bound"] {
            let _ = rustix::mount::unmount(self.path().join(name), UnmountFlags::DETACH);
        }
    }
}

async fn start(dir: &Path, backing: &SimBacking, pods: &Arc<Pods>) -> (Provisioner, NodeVolumes) {
    let (catalog, snapshots) = zpod_storage::catalog::dir::open(dir.join("state")).unwrap();
    let direct = DirectVolumes::open(&dir.join("direct-volumes")).unwrap();
    let (catalog, snapshots) = (Arc::new(catalog), Arc::new(snapshots));
    let context = Context::new("node-1".into(), "boot-1".into(), catalog, snapshots, Arc::new(backing.clone()));
    let node = NodeVolumes::load(Arc::clone(&context), direct).await.unwrap();
    (Provisioner::new(context), node.checking_pods(Arc::<Pods>::clone(pods)))
}

/// Kubelet's directory by three names: its own, through a link, and bound to another one.
async fn with_names() -> (World, [PathBuf; 3]) {
    let world = World::new().await;
    for name in ["real/pods", "bound"] {
        fs::create_dir_all(world.path(name)).unwrap();
    }
    symlink(world.path("real"), world.path("link")).unwrap();
    rustix::mount::mount_bind(world.path("real"), world.path("bound")).unwrap();
    let names = ["real", "link", "bound"].map(|name| world.path(name).join("pods/mount"));
    (world, names)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_was_published_by_one_name_is_unpublished_by_any() {
    let (mut world, names) = with_names().await;
    for restart in [false, true] {
        for published in &names {
            for unpublished in &names {
                let id = world.create("a").await;
                world.publish(id, published).await.unwrap();
                assert_eq!(world.entries().len(), 1);
                if restart {
                    world = world.restarted(|volume| volume, id).await;
                }
                world.node.unpublish(id, unpublished.clone()).await.unwrap();
                world.nothing_is_left(id, published).await;
            }
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_record_with_the_path_as_it_was_given_is_found_by_every_name() {
    let (mut world, [real, link, bound]) = with_names().await;
    for name in [&real, &link, &bound] {
        let id = world.create("a").await;
        world.publish(id, &link).await.unwrap();
        assert_eq!(world.publication(id).await.unwrap().target_path, real.canonicalize().unwrap());
        // As earlier versions wrote it.
        let as_given = |volume: Volume| {
            let publication = Publication { target_path: link.clone(), ..volume.publication.unwrap() };
            Volume { publication: Some(publication), ..volume }
        };
        world = world.restarted(as_given, id).await;
        world.publish(id, &link).await.unwrap();
        world.publish(id, &real).await.unwrap();
        world.node.stats(id, name).await.unwrap();
        world.node.unpublish(id, name.clone()).await.unwrap();
        world.nothing_is_left(id, &real).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_place_has_one_volume_whatever_it_is_called() {
    let (world, [real, link, bound]) = with_names().await;
    let (first, second) = (world.create("a").await, world.create("b").await);
    world.publish(first, &real).await.unwrap();
    for name in [&real, &link, &bound] {
        let error = world.publish(second, name).await.unwrap_err();
        assert!(matches!(error, VolumeError::TargetTaken { by, .. } if by == first), "{error}");
        world.node.unpublish(second, name.clone()).await.unwrap();
        assert_eq!(world.entries().len(), 1, "the other's is not taken away");
    }
    // Kata looks for the entry by the name that the runtime was told: it can't be had by two.
    world.publish(first, &link).await.unwrap();
    let error = world.publish(first, &bound).await.unwrap_err();
    assert!(matches!(error, VolumeError::PublishedOtherwise { .. }), "{error}");
    assert!(error.to_string().contains("another name of the same directory"), "{error}");
    world.node.unpublish(first, bound).await.unwrap();
    world.publish(second, &link).await.unwrap();
    world.node.unpublish(second, link).await.unwrap();
    world.nothing_is_left(first, &real).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_publication_that_fails_leaves_nothing_or_says_that_it_may() {
    let world = World::new().await;
    let (id, target) = (world.create("a").await, world.path("pod-1"));
    world.make_entries_writable(false);
    let error = world.publish(id, &target).await.unwrap_err();
    // Final for kubelet, which calls nothing then.
    assert!(matches!(error, VolumeError::Kata(_)), "{error}");
    assert_eq!(world.publication(id).await, None);
    assert!(!target.exists());
    world.make_entries_writable(true);
    world.publish(id, &world.path("pod-2")).await.unwrap();
    world.node.unpublish(id, world.path("pod-2")).await.unwrap();

    // What stands already, and can't be mended, stands: so kubelet has to come again.
    world.publish(id, &target).await.unwrap();
    for entry in world.entries() {
        fs::remove_dir_all(entry).unwrap();
    }
    world.make_entries_writable(false);
    let error = world.publish(id, &target).await.unwrap_err();
    assert!(matches!(error, VolumeError::StillPublished { .. }), "{error}");
    for part in [id.to_string().as_str(), "node-1", "Read-only file system"] {
        assert!(error.to_string().contains(part), "{part:?} in {error}");
    }
    world.make_entries_writable(true);
    world.publish(id, &target).await.unwrap();
    world.node.unpublish(id, target.clone()).await.unwrap();
    world.nothing_is_left(id, &target).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_final_error_hides_what_an_earlier_call_has_published_at_that_path() {
    let world = World::new().await;
    let (id, target) = (world.create("a").await, world.path("pod-1"));
    let request = |target: &Path| PublishRequest::new(id, target);
    let (block, read_only) = (VolumeMode::Block, true);
    let other_mode = |target| PublishRequest { mode: block, ..request(target) };
    assert!(matches!(world.node.publish(other_mode(&target)).await, Err(VolumeError::Invalid { .. })));
    world.node.publish(request(&target)).await.unwrap();
    // Kubelet has given that call up, and makes another one.
    let still = async |wanted| match world.node.publish(wanted).await {
        Err(VolumeError::StillPublished { source, .. }) => *source,
        answer => panic!("{answer:?}"),
    };
    assert!(matches!(still(other_mode(&target)).await, VolumeError::Invalid { .. }));
    assert!(matches!(world.node.publish(other_mode(&world.path("pod-2"))).await, Err(VolumeError::Invalid { .. })));
    // What is there can't be read.
    let entry = world.entries().pop().unwrap().join("mountInfo.json");
    let kept = fs::read(&entry).unwrap();
    fs::remove_file(&entry).unwrap();
    fs::create_dir(&entry).unwrap();
    assert!(matches!(still(request(&target)).await, VolumeError::Kata(_)));
    fs::remove_dir(&entry).unwrap();
    fs::write(&entry, kept).unwrap();
    world.node.publish(request(&target)).await.unwrap();
    // CSI has a code of its own for that, and kubelet never asks for it.
    let otherwise = world.node.publish(PublishRequest { read_only, ..request(&target) }).await;
    assert!(matches!(otherwise, Err(VolumeError::PublishedOtherwise { .. })), "{otherwise:?}");
    world.node.unpublish(id, target.clone()).await.unwrap();
    world.nothing_is_left(id, &target).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_publication_of_an_earlier_boot_of_the_host_is_over_with_nobody_to_unpublish_it() {
    let world = World::new().await;
    let (id, target) = (world.create("a").await, world.path("pod-1"));
    world.publish(id, &target).await.unwrap();
    assert!(matches!(world.publish(id, &world.path("pod-2")).await, Err(VolumeError::Published { .. })));
    rustix::mount::unmount(&target, UnmountFlags::DETACH).unwrap();
    fs::remove_dir(&target).unwrap();
    for entry in world.entries() {
        fs::remove_dir_all(entry).unwrap();
    }
    let boot_before = |volume: Volume| {
        let publication = volume.publication.clone().unwrap();
        Volume { publication: Some(Publication { boot_id: "boot-0".into(), ..publication }), ..volume }
    };
    let world = world.restarted(boot_before, id).await;
    world.publish(id, &world.path("pod-2")).await.unwrap();
    world.node.unpublish(id, world.path("pod-2")).await.unwrap();
    world.nothing_is_left(id, &target).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_publication_of_a_pod_that_is_gone_is_taken_back_only_when_that_is_certain() {
    let world = World::new().await;
    let (id, target) = (world.create("a").await, world.path("pod-1"));
    world.publish(id, &target).await.unwrap();
    // Kubelet's files, the API server, a virtual machine: while one of them speaks for the pod it stays.
    for (files, api, machine) in
        [(true, false, false), (false, false, false), (true, true, false), (false, true, true), (true, true, true)]
    {
        if !files {
            rustix::mount::unmount(&target, UnmountFlags::DETACH).unwrap();
            fs::remove_dir(&target).unwrap();
        }
        world.pods.gone.store(api, Ordering::SeqCst);
        let opener = machine.then(|| world.backing.open_device(id).unwrap());
        world.node.withdraw_abandoned().await;
        assert!(world.publication(id).await.is_some(), "{files} {api} {machine}");
        drop(opener);
        if !files {
            world.publish(id, &target).await.unwrap();
        }
    }
    rustix::mount::unmount(&target, UnmountFlags::DETACH).unwrap();
    fs::remove_dir(&target).unwrap();
    world.pods.gone.store(true, Ordering::SeqCst);
    world.node.withdraw_abandoned().await;
    world.nothing_is_left(id, &target).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_entry_that_could_not_be_written_is_written_once_it_can_be_by_report_or_call() {
    for reported in [true, false] {
        let world = World::new().await;
        let (id, target, kata) = (world.create("a").await, world.path("pod-1"), world.path("kata"));
        fs::create_dir(&kata).unwrap();
        world.publish(id, &target).await.unwrap();
        let direct = DirectVolumes::open(&world.path("direct-volumes")).unwrap();
        let spec = || direct.spec(&TargetPath::resolve(&target).unwrap()).unwrap().unwrap();
        assert_eq!(spec().create, Create::Fresh);
        // Its guest has made the pool. That is recorded, and the next guest can't be told.
        world.make_entries_writable(false);
        let (volume_id, token) = (id.to_string(), spec().token.to_string());
        let status = VolumeStatus { volume_id, token, health: Health::Online.into(), ..VolumeStatus::default() };
        let guest = FakeGuest::start(&kata, "guest", Behaviour::Honest, vec![status]);
        let monitor = Monitor::start(vec![kata], Arc::new(world.node.clone()));
        eventually(async || world.provisioner.get(id).await.unwrap().initialized).await;
        // It waits until nothing else is done for the volume, and can't tell the next guest either.
        let error = world.publish(id, &target).await.unwrap_err();
        assert!(matches!(error, VolumeError::StillPublished { .. }), "{error}");
        assert_eq!(spec().create, Create::Fresh);
        if !reported {
            drop((guest, monitor));
            world.make_entries_writable(true);
            world.publish(id, &target).await.unwrap();
            assert_eq!(spec().create, Create::Never);
        } else {
            world.make_entries_writable(true);
            eventually(async || spec().create == Create::Never).await;
        }
        world.node.unpublish(id, target).await.unwrap();
    }
}

async fn eventually(holds: impl AsyncFn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !holds().await {
        assert!(Instant::now() < deadline, "it did not happen");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copy_that_has_its_origins_name_is_told_from_it_by_a_nonce_of_its_own() {
    let world = World::new().await;
    let (id, target) = (world.create("a").await, world.path("pod-1"));
    let snapshots = Snapshotter::new(world.node.context_shared());
    let request = SnapshotRequest { name: "s".into(), volume: id, allow_copy: false };
    let snapshot = snapshots.create(request).await.unwrap().id;
    let restore = async |name: &str| {
        let source = Some(Source::Snapshot(snapshot));
        let request = CreateRequest { name: name.into(), source, ..CreateRequest::default() };
        world.provisioner.create(request).await.unwrap()
    };
    assert_eq!(restore("b").await.origin.unwrap().copy, None, "its id tells");
    let mut nonces = std::collections::HashSet::new();
    for _ in 0..2 {
        world.provisioner.delete(id).await.unwrap();
        let again = restore("a").await;
        assert_eq!(again.id, id);
        nonces.insert(again.origin.unwrap().copy.unwrap());
        // Its guest is told, and hears the same until it has reported.
        for pod in [&target, &world.path("pod-2")] {
            world.publish(id, pod).await.unwrap();
            let direct = DirectVolumes::open(&world.path("direct-volumes")).unwrap();
            let spec = direct.spec(&TargetPath::resolve(pod).unwrap()).unwrap().unwrap();
            assert!(nonces.contains(&spec.origin.unwrap().copy.unwrap()));
            world.node.unpublish(id, pod.clone()).await.unwrap();
        }
        // One that is repeated after an answer that was lost makes no other copy.
        assert!(nonces.contains(&restore("a").await.origin.unwrap().copy.unwrap()));
    }
    assert_eq!(nonces.len(), 2);
}
