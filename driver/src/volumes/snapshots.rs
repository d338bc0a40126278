mod groups;
mod local;
pub(super) mod steps;

use std::fmt;

use async_trait::async_trait;
use zpod_storage::backing::Outcome;
use zpod_storage::catalog::Snapshot;
use zpod_volume::{GroupId, SnapshotId, VolumeId};

use super::VolumeError;
pub(crate) use groups::{member_name, wanted_member};
pub use local::Snapshotter;
pub use steps::MarkBounds;

/// Takes, removes and lists snapshots: in this process, or through the cluster.
#[async_trait]
pub trait Snapshots: Send + Sync + fmt::Debug + 'static {
    /// Takes a snapshot, or goes on with one that was begun. What it gives may still be copied
    /// ([`zpod_storage::catalog::SnapshotPhase::Copying`]): asked again it tells how that goes.
    ///
    /// # Errors
    /// When it can't be taken, or differs from what is there under that name.
    async fn create(&self, request: SnapshotRequest) -> Result<Snapshot, VolumeError>;

    /// Removes a snapshot. One that does not exist is removed already.
    ///
    /// # Errors
    /// When it belongs to a group (CSI: only the group is deleted then), or its copy can't be removed.
    async fn delete(&self, id: SnapshotId) -> Result<Outcome, VolumeError>;

    /// A snapshot.
    ///
    /// # Errors
    /// When it does not exist.
    async fn get(&self, id: SnapshotId) -> Result<Snapshot, VolumeError>;

    /// A page of snapshots, of one volume or of all, from where an earlier page said the next one begins. Those without
    /// contents yet are left out.
    ///
    /// # Errors
    /// When the catalog can't be read, or the token is none of ours.
    async fn list(&self, of: Option<VolumeId>, from: Option<String>, limit: usize)
    -> Result<SnapshotPage, VolumeError>;

    /// Takes snapshots of several volumes: every guest has written out and marked an instant of its own before the first
    /// copy is made. Each is whole in itself; no write is held up in between, so that the order of writes to different
    /// volumes is not kept. All or none.
    ///
    /// # Errors
    /// When one of them can't be taken; then none is there.
    async fn create_group(&self, request: GroupRequest) -> Result<Vec<Snapshot>, VolumeError>;

    /// The snapshots of a group.
    ///
    /// # Errors
    /// When there is no such group.
    async fn group(&self, id: GroupId) -> Result<Vec<Snapshot>, VolumeError>;

    /// Removes a group and its snapshots. One that does not exist is removed already.
    ///
    /// # Errors
    /// When a copy can't be removed; the others are.
    async fn delete_group(&self, id: GroupId) -> Result<Outcome, VolumeError>;
}

/// A snapshot that is wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SnapshotRequest {
    /// Its name: one name, one snapshot.
    pub name: String,
    /// The volume.
    pub volume: VolumeId,
    /// Whether it may be a full copy where blocks can't be shared.
    pub allow_copy: bool,
}

/// A group of snapshots that is wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GroupRequest {
    /// Its name: one name, one group.
    pub name: String,
    /// The volumes, each once.
    pub volumes: Vec<VolumeId>,
    /// Whether they may be full copies where blocks can't be shared.
    pub allow_copy: bool,
}

/// A page of snapshots.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SnapshotPage {
    /// The snapshots.
    pub snapshots: Vec<Snapshot>,
    /// Where the next page begins; `None` at the end.
    pub next: Option<String>,
}
