use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use async_trait::async_trait;
use tokio::sync::watch;
use uuid::Uuid;
use zpod_storage::backing::{Backing, BackingError, CopySource, DeviceSpec};
use zpod_storage::catalog::{Catalog, Phase, Publication, Snapshot, Volume};
use zpod_volume::{SnapshotId, TokenDigest, VolumeId};

use super::copies::Copies;
use super::lock::{VolumeLock, VolumeLocks};
use super::published::Published;
use super::{MarkBounds, Mirrors, NO_MIRRORS, VolumeError};

/// In which publication's guest the instant of a snapshot was marked; none where nobody ran. In memory: after a restart
/// nobody knows whether a mark is still there.
type Marks = Mutex<HashMap<SnapshotId, Option<TokenDigest>>>;

/// What all work on volumes needs.
#[derive(Debug)]
pub struct Context {
    pub(super) node: String,
    pub(super) boot_id: String,
    pub(super) catalog: Arc<dyn Catalog>,
    pub(super) snapshots: Arc<dyn Catalog<Snapshot>>,
    pub(super) backing: Arc<dyn Backing>,
    pub(super) published: Published,
    pub(super) copies: Copies,
    /// What there is for mirrors, or why there is nothing.
    pub(super) mirrors: Result<Mirrors, String>,
    pub(super) mark_bounds: MarkBounds,
    marks: Marks,
    locks: VolumeLocks,
    /// Whether the process was told to end.
    ending: watch::Sender<bool>,
    /// The UID of this node in the cluster.
    node_uid: OnceLock<Uuid>,
    /// Whether containers may have ZFS itself.
    access: AtomicBool,
}

impl Context {
    /// Puts together what there is on this node. `boot_id` names this boot of the host: [`Context::boot_id`].
    pub fn new(
        node: String,
        boot_id: String,
        catalog: Arc<dyn Catalog>,
        snapshots: Arc<dyn Catalog<Snapshot>>,
        backing: Arc<dyn Backing>,
    ) -> Arc<Self> {
        Self::with_mirrors(node, boot_id, catalog, snapshots, backing, Err(NO_MIRRORS.to_owned()))
    }

    /// The same on a node that can have volumes with two devices, or with the reason why it can't.
    pub fn with_mirrors(
        node: String,
        boot_id: String,
        catalog: Arc<dyn Catalog>,
        snapshots: Arc<dyn Catalog<Snapshot>>,
        backing: Arc<dyn Backing>,
        mirrors: Result<Mirrors, String>,
    ) -> Arc<Self> {
        let (published, locks) = (Published::default(), VolumeLocks::default());
        let (copies, marks, ending) = (Copies::default(), Marks::default(), watch::Sender::default());
        let (node_uid, mark_bounds, access) = (OnceLock::new(), MarkBounds::default(), AtomicBool::default());
        Arc::new(Self {
            node,
            boot_id,
            catalog,
            snapshots,
            backing,
            published,
            copies,
            mirrors,
            mark_bounds,
            marks,
            locks,
            ending,
            node_uid,
            access,
        })
    }

    /// The id of this boot of the host.
    ///
    /// # Errors
    /// When `/proc` can't be read.
    pub fn boot_id() -> std::io::Result<String> {
        std::fs::read_to_string("/proc/sys/kernel/random/boot_id").map(|id| id.trim().to_owned())
    }

    /// Gives guests another time for marks than [`MarkBounds::default`]. Before it is shared with anybody.
    pub fn bound_marks(&mut self, bounds: MarkBounds) {
        self.mark_bounds = bounds;
    }

    /// Allows volumes with `zfsAccess: volume`, or forbids them, as it is at first.
    pub fn allow_zfs_access(&self, allowed: bool) {
        self.access.store(allowed, Ordering::Relaxed);
    }

    /// Whether they are allowed.
    pub(super) fn allows_zfs_access(&self) -> bool {
        self.access.load(Ordering::Relaxed)
    }

    /// Says which UID this node has in the cluster: inline volumes are named after it.
    pub fn set_node_uid(&self, uid: Uuid) {
        let _ = self.node_uid.set(uid);
    }

    /// The id of a new inline volume, which no other node gives to one of its own.
    pub(super) fn new_inline_id(&self, handle: &str) -> VolumeId {
        self.node_uid.get().map_or_else(|| VolumeId::from_name(handle), |uid| VolumeId::inline(handle, *uid))
    }

    /// The node's name.
    pub fn node(&self) -> &str {
        &self.node
    }

    /// Tells calls that only wait for somebody, such as for a guest that is not heard yet, that the process is to end.
    /// What is under way goes on to its end.
    pub fn end(&self) {
        self.ending.send_replace(true);
    }

    /// Waits until the process is to end.
    pub(super) async fn ending(&self) {
        // The sender lives as long as this.
        let _ = self.ending.subscribe().wait_for(|ending| *ending).await;
    }

    pub(super) async fn lock(&self, id: VolumeId) -> VolumeLock {
        self.locks.lock(id).await
    }

    /// Locks several volumes, always in the same order, so that nobody waits for anybody in a circle.
    pub(super) async fn lock_all(&self, ids: impl IntoIterator<Item = VolumeId>) -> Vec<VolumeLock> {
        let ids: BTreeSet<_> = ids.into_iter().collect();
        let mut locks = Vec::with_capacity(ids.len());
        for id in ids {
            locks.push(self.locks.lock(id).await);
        }
        locks
    }

    pub(super) async fn find(&self, id: VolumeId) -> Result<Volume, VolumeError> {
        self.catalog.get(id).await?.ok_or_else(|| self.not_found(&id.to_string()))
    }

    pub(super) fn marks(&self) -> MutexGuard<'_, HashMap<SnapshotId, Option<TokenDigest>>> {
        self.marks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) async fn find_snapshot(&self, id: SnapshotId) -> Result<Snapshot, VolumeError> {
        self.snapshots.get(id).await?.ok_or_else(|| self.snapshot_not_found(&id.to_string()))
    }

    /// The record of a volume that is kept here and can be used. Under its lock.
    pub(super) async fn ready(&self, id: VolumeId) -> Result<Volume, VolumeError> {
        let volume = self.find(id).await?;
        self.check_home(&volume)?;
        match volume.phase {
            Phase::Ready => {
                self.check_not_read(CopySource::Device(id))?;
                Ok(volume)
            }
            Phase::Creating => {
                Err(VolumeError::NotReady { id, state: "not finished yet", remedy: "let CreateVolume be repeated" })
            }
            Phase::Deleting => Err(deleting(id)),
        }
    }

    pub(super) fn check_home(&self, volume: &Volume) -> Result<(), VolumeError> {
        if volume.node == self.node {
            return Ok(());
        }
        Err(VolumeError::OtherNode { id: volume.id, home: volume.node.clone(), node: self.node.clone() })
    }

    /// That nothing is being copied in full from this: until then it must not change.
    pub(super) fn check_not_read(&self, source: CopySource) -> Result<(), VolumeError> {
        let Some((target, progress)) = self.copies.reading(source) else { return Ok(()) };
        let what = match source {
            CopySource::Device(id) => format!("volume {id}"),
            CopySource::Snapshot(id) => format!("snapshot {id}"),
        };
        Err(VolumeError::BeingCopied { what, target: target.to_string(), node: self.node.clone(), progress })
    }

    /// The error for an id that no snapshot has.
    pub fn snapshot_not_found(&self, id: &str) -> VolumeError {
        VolumeError::SnapshotNotFound { id: crate::guest::clean(id, 128), node: self.node.clone() }
    }

    /// The error for an id that nothing here has.
    pub fn not_found(&self, id: &str) -> VolumeError {
        VolumeError::NotFound { id: crate::guest::clean(id, 128), node: self.node.clone() }
    }

    /// Where the volume is published, if that was in this boot of the host. No virtual machine outlives its host, so
    /// that a publication of an earlier boot is over.
    pub(super) fn publication<'a>(&self, volume: &'a Volume) -> Option<&'a Publication> {
        volume.publication.as_ref().filter(|publication| publication.boot_id == self.boot_id)
    }

    pub(super) fn published_error(&self, id: VolumeId, publication: &Publication) -> VolumeError {
        VolumeError::Published {
            id,
            holder: publication.pod.as_ref().map_or_else(|| "a pod".to_owned(), |pod| format!("pod {pod}")),
            target: publication.target_path.clone(),
            node: self.node.clone(),
        }
    }

    /// Runs a call of the device provider where it may block.
    pub(super) async fn with_backing<T: Send + 'static>(
        &self,
        call: impl FnOnce(&dyn Backing) -> Result<T, BackingError> + Send + 'static,
    ) -> Result<T, VolumeError> {
        let backing = self.backing.clone();
        blocking(move || Ok(call(backing.as_ref()))).await?.map_err(|source| self.backing_error(source))
    }

    pub(super) fn backing_error(&self, source: BackingError) -> VolumeError {
        VolumeError::Backing { node: self.node.clone(), source }
    }

    /// For a person: where the devices are.
    pub fn location(&self) -> &Path {
        self.backing.location()
    }
}

/// Tells whether a program can do its work.
#[async_trait]
pub trait Probe: Send + Sync + fmt::Debug + 'static {
    /// Looks, and changes nothing.
    ///
    /// # Errors
    /// When it can't, for a person.
    async fn probe(&self) -> Result<(), String>;
}

#[async_trait]
impl Probe for Context {
    async fn probe(&self) -> Result<(), String> {
        match self.with_backing(|backing| backing.look()).await {
            // Another start does not mount a disk, and without one there still are publications to take back.
            Err(VolumeError::Backing { source: BackingError::Gone { .. }, .. }) => Ok(()),
            looked => looked,
        }
        .map_err(|error| format!("the devices at {} can't be reached: {error}", self.location().display()))
    }
}

pub(super) fn deleting(id: VolumeId) -> VolumeError {
    VolumeError::NotReady { id, state: "being deleted", remedy: "let DeleteVolume be repeated until it succeeds" }
}

pub(super) fn device_spec(volume: &Volume) -> DeviceSpec {
    DeviceSpec { id: volume.id, layout: volume.layout(), provisioning: volume.parameters.provisioning }
}

/// Runs what may block off the async threads.
pub(super) async fn blocking<T: Send + 'static>(
    call: impl FnOnce() -> Result<T, VolumeError> + Send + 'static,
) -> Result<T, VolumeError> {
    match tokio::task::spawn_blocking(call).await {
        Ok(result) => result,
        Err(error) => Err(VolumeError::CutShort(error.to_string())),
    }
}

/// Runs work to its end even when the caller hangs up: half of it would be safe, but its lock must be held to the end.
pub(super) async fn to_the_end<T: Send + 'static>(
    work: impl Future<Output = Result<T, VolumeError>> + Send + 'static,
) -> Result<T, VolumeError> {
    match tokio::spawn(work).await {
        Ok(result) => result,
        Err(error) => Err(VolumeError::CutShort(error.to_string())),
    }
}
