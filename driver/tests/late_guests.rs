//! Guests that answer Mark and Unmark late or never: what that costs their own volume, and that it costs no other one
//! anything. Needs root, as the driver mounts.

#![allow(clippy::expect_used, clippy::unwrap_used)]

#[path = "support/eventually.rs"]
mod eventually;
#[path = "support/fake_guest.rs"]
#[allow(dead_code)]
mod fake_guest;
#[path = "support/watched.rs"]
mod watched;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use eventually::eventually;
use fake_guest::late::{Fate, When};
use fake_guest::{Behaviour, FakeGuest};
use rustix::mount::UnmountFlags;
use tokio::sync::Notify;
use tokio::time::timeout;
use watched::Watched;
use zpod_driver::cluster::reconcile_snapshots;
use zpod_driver::guest::{GuestError, Monitor};
use zpod_driver::kata::{DirectVolumes, TargetPath};
use zpod_driver::volumes::{
    Context, CreateRequest, MarkBounds, NodeVolumes, Provision, Provisioner, PublishRequest, SnapshotRequest,
    Snapshots as _, Snapshotter, VolumeError,
};
use zpod_kubernetes::Kept as _;
use zpod_kubernetes::crd::ZfsSnapshot;
use zpod_proto::guest::{Health, VolumeStatus};
use zpod_storage::backing::sim::SimBacking;
use zpod_storage::catalog::dir::DirCatalog;
use zpod_storage::catalog::{Catalog as _, Snapshot, SnapshotPhase};
use zpod_volume::{Bytes, SnapshotId, VolumeId};

/// Longer than any test takes: what is not over then has no bound.
const EVER: Duration = Duration::from_secs(120);
/// More than the node looks at at the same time.
const MANY: usize = 40;

struct World {
    dir: tempfile::TempDir,
    snapshots: Arc<DirCatalog<Snapshot>>,
    provisioner: Provisioner,
    node: NodeVolumes,
    snapshotter: Snapshotter,
    _monitor: Monitor,
}

/// A volume that a pod has, with its guest.
struct Pod {
    id: VolumeId,
    target: PathBuf,
    guest: FakeGuest,
}

impl World {
    async fn new(bounds: MarkBounds) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let kata = dir.path().join("kata");
        std::fs::create_dir(&kata).unwrap();
        let (catalog, snapshots) = zpod_storage::catalog::dir::open(dir.path().join("state")).unwrap();
        let (snapshots, backing) = (Arc::new(snapshots), Arc::new(SimBacking::new(Bytes::gib(1000), 1.0)));
        let boot_id = "boot-1".to_owned();
        let mut context = Context::new("node-1".into(), boot_id, Arc::new(catalog), snapshots.clone(), backing);
        Arc::get_mut(&mut context).unwrap().bound_marks(bounds);
        let direct = DirectVolumes::open(&dir.path().join("direct-volumes")).unwrap();
        let node = NodeVolumes::load(context.clone(), direct).await.unwrap();
        let _monitor = Monitor::start(vec![kata], Arc::new(node.clone()));
        let (provisioner, snapshotter) = (Provisioner::new(context.clone()), Snapshotter::new(context));
        Self { dir, snapshots, provisioner, node, snapshotter, _monitor }
    }

    /// A volume whose guest is heard.
    async fn pod(&self, name: &str) -> Pod {
        let request = CreateRequest { name: name.into(), ..CreateRequest::default() };
        let id = self.provisioner.create(request).await.unwrap().id;
        let target = self.dir.path().join(name);
        self.node.publish(PublishRequest::new(id, &target)).await.unwrap();
        let direct = DirectVolumes::open(&self.dir.path().join("direct-volumes")).unwrap();
        let spec = direct.spec(&TargetPath::resolve(&target).unwrap()).unwrap().unwrap();
        let (volume_id, token) = (id.to_string(), spec.token.to_string());
        let status = VolumeStatus { volume_id, token, health: Health::Online.into(), ..VolumeStatus::default() };
        let guest = FakeGuest::start(&self.dir.path().join("kata"), name, Behaviour::Honest, vec![status]);
        let heard = || self.node.looks().iter().any(|look| look.volume.id == id && look.heard.is_some());
        eventually("its guest is heard", heard).await;
        Pod { id, target, guest }
    }

    /// Takes a snapshot as CreateSnapshot does.
    async fn take(&self, name: &str, of: &Pod) -> Result<Snapshot, VolumeError> {
        let request = SnapshotRequest { name: name.into(), volume: of.id, allow_copy: false };
        timeout(EVER, self.snapshotter.create(request)).await.expect("a call has no bound")
    }

    /// Records a snapshot that is wanted, and gives the object that asks for it.
    async fn wanted(&self, name: &str, of: &Pod) -> (SnapshotId, serde_json::Value) {
        let (id, node) = (SnapshotId::from_name(name), "node-1".to_owned());
        let (phase, name) = (SnapshotPhase::Wanted, name.to_owned());
        let record = Snapshot {
            id,
            name,
            volume: of.id,
            node,
            group: None,
            phase,
            allow_copy: false,
            contents: None,
            revision: 0,
        };
        let object = serde_json::to_value(ZfsSnapshot::asking_for(&record)).unwrap();
        self.snapshots.create(record).await.unwrap();
        (id, object)
    }

    async fn phase(&self, id: SnapshotId) -> SnapshotPhase {
        self.snapshots.get(id).await.unwrap().unwrap().phase
    }

    async fn until_ready(&self, id: SnapshotId) {
        let ready = async {
            while self.phase(id).await != SnapshotPhase::Ready {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        timeout(EVER, ready).await.expect("it is never taken");
    }

    /// Everything else that is done for a volume.
    async fn goes_on(&self, victim: &Pod) {
        let all = async {
            self.node.stats(victim.id, &victim.target).await.unwrap();
            let request = CreateRequest { name: "another".into(), ..CreateRequest::default() };
            let id = self.provisioner.create(request).await.unwrap().id;
            let target = self.dir.path().join("another");
            self.node.publish(PublishRequest::new(id, &target)).await.unwrap();
            self.node.stats(id, &target).await.unwrap();
            self.node.unpublish(id, target).await.unwrap();
            self.provisioner.delete(id).await.unwrap();
        };
        timeout(EVER, all).await.expect("another volume is held up");
    }
}

impl Drop for World {
    fn drop(&mut self) {
        for name in ["hostile", "victim", "another"] {
            let _ = rustix::mount::unmount(self.dir.path().join(name), UnmountFlags::DETACH);
        }
    }
}

#[test]
fn the_bounds_are_those_that_the_documents_promise() {
    let MarkBounds { mark, unmark } = MarkBounds::default();
    assert_eq!((mark.as_secs(), unmark.as_secs()), (30, 5));
    assert!(include_str!("../../docs/limitations.md").contains("for up to 35 s each"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_copy_whose_mark_somebody_destroyed_is_no_snapshot_and_the_next_one_is() {
    let world = World::new(MarkBounds::default()).await;
    let victim = world.pod("victim").await;
    victim.guest.state.loses_marks.store(true, Ordering::SeqCst);
    let error = world.take("nightly", &victim).await.unwrap_err();
    assert!(matches!(error, VolumeError::MarkLost { .. }), "{error}");
    let text = error.to_string();
    assert!(text.contains("nothing was kept") && text.contains("has destroyed the volume's ZFS snapshots"), "{text}");
    assert!(
        world.snapshots.get(SnapshotId::from_name("nightly")).await.unwrap().is_none(),
        "nothing of it is recorded"
    );
    // Repeated, as the snapshotter does, it is a copy of a later instant.
    victim.guest.state.loses_marks.store(false, Ordering::SeqCst);
    let taken = world.take("nightly", &victim).await.unwrap();
    assert_eq!((taken.phase, victim.guest.state.marks.lock().unwrap().len()), (SnapshotPhase::Ready, 0));
    timeout(EVER, world.snapshotter.delete(taken.id)).await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_that_does_not_answer_has_the_bounds_and_no_more_and_its_volume_is_free_then() {
    let bounds = MarkBounds { mark: Duration::from_secs(8), unmark: Duration::from_secs(1) };
    let world = World::new(bounds).await;
    let hostile = world.pod("hostile").await;
    let late = &hostile.guest.state.late;
    late.shut(true);
    // The removal of an older mark is answered late, the mark never, and its removal never.
    let first = Duration::from_secs(1);
    late.next(&[When::After(first)]);
    let error = world.take("never", &hostile).await.unwrap_err();
    let VolumeError::Guest { source: GuestError::Timeout { call: "Mark", deadline, .. }, .. } = error else {
        panic!("{error}");
    };
    assert!(first + deadline <= bounds.mark, "{deadline:?}: both have one bound");
    let fates = [("Unmark", Fate::Answered), ("Mark", Fate::GivenUp), ("Unmark", Fate::GivenUp)];
    eventually("nothing is waited for any more", || late.calls() == fates).await;
    assert_eq!(world.snapshots.get(SnapshotId::from_name("never")).await.unwrap(), None);

    // Marked in time, unmarked never: that is no reason not to have the snapshot.
    late.next(&[When::Now, When::Now]);
    let taken = world.take("late", &hostile).await.unwrap();
    assert_eq!(taken.phase, SnapshotPhase::Ready);
    let fates = [("Unmark", Fate::Answered), ("Mark", Fate::Answered), ("Unmark", Fate::GivenUp)];
    eventually("nothing is waited for any more", || late.calls()[3..] == fates).await;
    timeout(EVER, world.node.unpublish(hostile.id, hostile.target.clone())).await.expect("it is held up").unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn objects_of_a_volume_whose_guest_does_not_answer_keep_no_place_from_those_of_others() {
    let world = World::new(MarkBounds { mark: 10 * EVER, unmark: 10 * EVER }).await;
    let (hostile, victim) = (world.pod("hostile").await, world.pod("victim").await);
    let late = &hostile.guest.state.late;
    late.shut(true);
    let (mut waiting, mut objects) = (Vec::new(), Vec::new());
    for n in 0..MANY {
        let (id, object) = world.wanted(&format!("hostile-{n}"), &hostile).await;
        waiting.push(id);
        objects.push(object);
    }
    let server = Watched::new(objects);
    let (snapshotter, changed) = (world.snapshotter.clone(), Arc::new(Notify::new()));
    let work = tokio::spawn(reconcile_snapshots(server.client(), "node-1".into(), snapshotter, changed));
    eventually("the guest is asked", || !late.calls().is_empty()).await;

    let (id, object) = world.wanted("victim", &victim).await;
    server.add(object);
    world.until_ready(id).await;
    world.goes_on(&victim).await;
    assert_eq!(late.calls(), [("Unmark", Fate::Waits)], "one is asked for at a time, and it waits still");
    for id in &waiting {
        assert_eq!(world.phase(*id).await, SnapshotPhase::Wanted);
    }
    // And none of them is lost.
    late.shut(false);
    for id in waiting {
        world.until_ready(id).await;
    }
    let calls = late.calls();
    assert_eq!(calls.len(), 3 * MANY, "each is marked once");
    assert!(calls.iter().all(|(_, fate)| *fate == Fate::Answered), "{calls:?}");
    work.abort();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_for_a_volume_whose_guest_does_not_answer_hold_up_no_other_call() {
    let world = Arc::new(World::new(MarkBounds { mark: 10 * EVER, unmark: 10 * EVER }).await);
    let (hostile, victim) = (world.pod("hostile").await, world.pod("victim").await);
    let late = &hostile.guest.state.late;
    late.shut(true);
    let calls: Vec<_> = (0..MANY)
        .map(|n| {
            let (snapshotter, volume) = (world.snapshotter.clone(), hostile.id);
            let request = SnapshotRequest { name: format!("hostile-{n}"), volume, allow_copy: false };
            tokio::spawn(async move { snapshotter.create(request).await })
        })
        .collect();
    eventually("the guest is asked", || !late.calls().is_empty()).await;
    assert_eq!(world.take("victim", &victim).await.unwrap().phase, SnapshotPhase::Ready);
    world.goes_on(&victim).await;
    assert_eq!(late.calls(), [("Unmark", Fate::Waits)], "one is asked for at a time, and it waits still");
    assert!(calls.iter().all(|call| !call.is_finished()));
    late.shut(false);
    for call in calls {
        let taken = timeout(EVER, call).await.expect("it never ends").unwrap().unwrap();
        assert_eq!(taken.phase, SnapshotPhase::Ready);
    }
}
