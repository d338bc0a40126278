//! Block volumes of pods that are gone and that nobody unpublishes: taken back when nobody can have the device, and not
//! before. Needs root and loop devices.

#![allow(clippy::unwrap_used)]

#[path = "support/eventually.rs"]
mod eventually;
#[path = "support/fake_guest.rs"]
#[allow(dead_code)]
mod fake_guest;
#[path = "support/loops.rs"]
mod loops;
#[path = "support/pods.rs"]
mod pods;

use std::fs::{self, File};
use std::os::unix::fs::{FileExt as _, FileTypeExt as _};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::slice::from_ref;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use eventually::eventually;
use fake_guest::{Behaviour, FakeGuest};
use loops::{attribute, loops};
use pods::Pods;
use rustix::mount::UnmountFlags;
use zpod_driver::guest::Monitor;
use zpod_driver::kata::{DirectVolumes, LoopDevice};
use zpod_driver::volumes::{Context, CreateRequest, NodeVolumes, Provision, Provisioner, PublishRequest};
use zpod_proto::guest::{Health, VolumeStatus};
use zpod_storage::backing::file::FileBacking;
use zpod_storage::catalog::{Catalog, PodRef, Volume};
use zpod_volume::{DiskLayout, VolumeId, VolumeMode, note};

/// A node with one block volume, which is published as kubelet has it done.
struct World {
    dir: tempfile::TempDir,
    pods: Arc<Pods>,
    catalog: Arc<dyn Catalog<Volume>>,
    provisioner: Provisioner,
    node: NodeVolumes,
    id: VolumeId,
    device: PathBuf,
}

impl World {
    async fn new() -> Self {
        let dir = tempfile::Builder::new().prefix("zpod").tempdir_in("/dev/shm").unwrap();
        for name in ["volumes", "kata", "kubelet/pods", "kubelet/plugins/kubernetes.io/csi/volumeDevices/publish/pv-1"]
        {
            fs::create_dir_all(dir.path().join(name)).unwrap();
        }
        let (catalog, snapshots) = zpod_storage::catalog::dir::open(dir.path().join("state")).unwrap();
        let backing = Arc::new(FileBacking::open(dir.path().join("volumes"), 100.0).unwrap());
        let boot_id = Context::boot_id().unwrap();
        let catalog: Arc<dyn Catalog<Volume>> = Arc::new(catalog);
        let context = Context::new("node-1".into(), boot_id, Arc::clone(&catalog), Arc::new(snapshots), backing);
        let direct = DirectVolumes::open(&dir.path().join("direct-volumes")).unwrap();
        let pods = Arc::<Pods>::default();
        let node = NodeVolumes::load(Arc::clone(&context), direct).await.unwrap();
        let (provisioner, node) = (Provisioner::new(context), node.checking_pods(Arc::<Pods>::clone(&pods)));
        let request = CreateRequest { name: "a".into(), mode: VolumeMode::Block, ..CreateRequest::default() };
        let id = provisioner.create(request).await.unwrap().id;
        let mut world = Self { dir, pods, catalog, provisioner, node, id, device: PathBuf::new() };
        world.publish().await;
        world.device = world.loops().pop().unwrap();
        world
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn target(&self) -> PathBuf {
        self.path("kubelet/plugins/kubernetes.io/csi/volumeDevices/publish/pv-1/uid-1")
    }

    fn image(&self) -> PathBuf {
        self.path("volumes").join(format!("{}.img", self.id))
    }

    fn loops(&self) -> Vec<PathBuf> {
        loops(&self.image())
    }

    async fn publish(&self) {
        let pod = PodRef { namespace: "ns".into(), name: "pod".into(), uid: "uid-1".into() };
        let (mode, pod) = (VolumeMode::Block, Some(pod));
        let request = PublishRequest { mode, pod, ..PublishRequest::new(self.id, &self.target()) };
        self.node.publish(request).await.unwrap();
        assert!(fs::metadata(self.target()).unwrap().file_type().is_block_device());
    }

    async fn is_published(&self) -> bool {
        self.provisioner.get(self.id).await.unwrap().publication.is_some()
    }

    /// What whoever holds the volume still can do with it, and what kubelet can, should it come after all.
    async fn stands(&self, keeper: &str) {
        assert!(self.is_published().await, "{keeper}");
        assert_eq!(self.loops(), from_ref(&self.device), "{keeper}");
        assert_eq!(attribute(&self.device, "loop/autoclear"), "0", "{keeper}: it stays when its user goes");
        self.publish().await;
        assert_eq!(self.loops(), from_ref(&self.device), "{keeper}");
    }

    /// Nothing is left, and another pod can have it.
    async fn is_taken_back(&self) {
        assert!(!self.is_published().await);
        assert!(!self.target().exists() && self.loops().is_empty());
    }

    /// With another process that has this open, as a virtual machine would.
    fn held(path: &Path) -> Holder {
        let file = File::options().read(true).write(true).open(path).unwrap();
        Holder(Command::new("/bin/sleep").arg("600").stdin(Stdio::from(file)).spawn().unwrap())
    }

    /// With a loop device on top, as kubelet makes one.
    fn kubelets_device(&self) -> PathBuf {
        LoopDevice::attach(&self.device, true).unwrap().0.path().to_owned()
    }
}

impl Drop for World {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            return;
        }
        let _ = rustix::mount::unmount(self.target(), UnmountFlags::DETACH);
        let _ = LoopDevice::detach(&self.device);
        let _ = LoopDevice::detach(&self.image());
    }
}

/// Ends when dropped.
struct Holder(Child);

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_device_that_somebody_may_have_stays_published_and_attached_whoever_that_is() {
    let world = World::new().await;
    let look = async |keeper: &str| {
        world.node.withdraw_abandoned().await;
        world.stands(keeper).await;
    };
    look("the API server knows the pod").await;
    world.pods.gone.store(true, Ordering::SeqCst);
    let kubelets = ["kubelet/pods/uid-1", "kubelet/plugins/kubernetes.io/csi/volumeDevices/pv-1/dev/uid-1"];
    for name in kubelets.map(|name| world.path(name)) {
        fs::create_dir_all(&name).unwrap();
        look(&name.display().to_string()).await;
        fs::remove_dir(&name).unwrap();
    }
    let machine = World::held(&world.device);
    look("a virtual machine has the device").await;
    drop(machine);
    // Kubelet's on top of it: as it stands there, with a virtual machine, and when kubelet has let go of it.
    let upper = world.kubelets_device();
    look("kubelet's device").await;
    let machine = World::held(&upper);
    look("a virtual machine that has kubelet's device").await;
    LoopDevice::detach(&world.device).unwrap();
    look("a virtual machine that has kubelet's device, which kubelet has detached").await;
    // Through all of that it went on with the same disk.
    let mut bytes = [0; 8];
    File::open(&upper).unwrap().read_exact_at(&mut bytes, 512).unwrap();
    assert_eq!(&bytes, b"EFI PART");
    drop(machine);
    let machine = World::held(&world.image());
    world.node.withdraw_abandoned().await;
    assert!(world.is_published().await, "a virtual machine has the image");
    drop(machine);
    world.node.withdraw_abandoned().await;
    world.is_taken_back().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_device_that_nobody_can_have_any_more_is_taken_back_in_whatever_state_it_is() {
    for state in ["as it was published", "the target path is gone", "killed half way", "detached"] {
        let world = World::new().await;
        world.pods.gone.store(true, Ordering::SeqCst);
        let target = world.target();
        let clear = || {
            rustix::mount::unmount(&target, UnmountFlags::DETACH).unwrap();
            fs::remove_file(&target).unwrap();
        };
        match state {
            "the target path is gone" => {
                clear();
                fs::remove_dir(target.parent().unwrap()).unwrap();
            }
            // Told to go while somebody looked at it.
            "killed half way" => {
                clear();
                let user = File::open(&world.device).unwrap();
                LoopDevice::detach(&world.image()).unwrap();
                assert_eq!(attribute(&world.device, "loop/autoclear"), "1");
                world.node.withdraw_abandoned().await;
                assert!(world.is_published().await, "somebody looks at it");
                drop(user);
            }
            "detached" => {
                clear();
                LoopDevice::detach(&world.image()).unwrap();
            }
            _ => {}
        }
        world.node.withdraw_abandoned().await;
        world.is_taken_back().await;
        fs::create_dir_all(target.parent().unwrap()).unwrap();
        world.publish().await;
        world.node.unpublish(world.id, target.clone()).await.unwrap();
        world.is_taken_back().await;
        world.provisioner.delete(world.id).await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_device_that_a_guest_speaks_of_stays_published_until_it_is_silent() {
    let world = World::new().await;
    world.pods.gone.store(true, Ordering::SeqCst);
    let mut bytes = vec![0; DiskLayout::SPEC_BYTES];
    File::open(&world.device).unwrap().read_exact_at(&mut bytes, DiskLayout::SPEC_OFFSET).unwrap();
    let token = note::decode(&bytes).unwrap().token.to_string();
    let (volume_id, health) = (world.id.to_string(), Health::Online.into());
    let status = VolumeStatus { volume_id, token, health, block: true, ..VolumeStatus::default() };
    let guest = FakeGuest::start(&world.path("kata"), "guest", Behaviour::Honest, vec![status]);
    let _monitor = Monitor::start(vec![world.path("kata")], Arc::new(world.node.clone()));
    let heard = || world.node.looks().iter().any(|look| look.heard.is_some());
    eventually("the guest is heard", heard).await;
    world.node.withdraw_abandoned().await;
    world.stands("a guest").await;
    drop(guest);
    eventually("the guest is gone", || !heard()).await;
    world.node.withdraw_abandoned().await;
    world.is_taken_back().await;
}

/// Somebody deletes the record by hand, the pod ends, and the record is made anew as it was.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_publication_that_ended_while_there_was_no_record_is_taken_back_when_the_record_is_adopted() {
    let world = World::new().await;
    let record = world.catalog.get(world.id).await.unwrap().unwrap();
    world.catalog.remove(world.id).await.unwrap();
    world.node.unpublish(world.id, world.target()).await.unwrap();
    world.catalog.create(record).await.unwrap();
    assert!(world.is_published().await && world.node.looks().is_empty(), "nobody here knows of it");
    world.pods.gone.store(true, Ordering::SeqCst);
    world.node.adopted(world.id).await.unwrap();
    world.is_taken_back().await;
    world.provisioner.delete(world.id).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_publication_that_stands_is_known_again_when_the_record_is_adopted() {
    let world = World::new().await;
    let record = world.catalog.get(world.id).await.unwrap().unwrap();
    world.catalog.remove(world.id).await.unwrap();
    world.node.unpublish(world.id, world.target()).await.unwrap();
    world.catalog.create(record).await.unwrap();
    world.node.adopted(world.id).await.unwrap();
    assert_eq!(world.node.looks().len(), 1, "its guest is listened to");
    world.publish().await;
    world.node.unpublish(world.id, world.target()).await.unwrap();
    world.is_taken_back().await;
}
