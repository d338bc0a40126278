//! Where volumes and snapshots are recorded: the only state the driver has.
//!
//! # Design
//! A record is replaced whole, and only if it is still the one that was read ([`Volume::revision`]): two writers can't
//! undo each other. Volumes and snapshots are kept alike ([`Record`]). Records are handed out one at a time or a page at a
//! time; nothing needs all of them at once.

pub mod dir;

use std::collections::BTreeMap;
use std::fmt;
use std::hash::Hash;
use std::path::PathBuf;
use std::str::FromStr;

use async_trait::async_trait;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use uuid::Uuid;
use zpod_volume::{
    Bytes, DiskLayout, Encryption, GroupId, Half, Headroom, Mark, Origin, Rollback, SnapshotId, TokenDigest,
    VolumeAttributes, VolumeId, VolumeMode, VolumeParameters,
};

/// Something that is recorded.
pub trait Record: Clone + fmt::Debug + PartialEq + Serialize + DeserializeOwned + Send + Sync + 'static {
    /// Its id: a UUID.
    type Id: Copy + Ord + Hash + fmt::Display + fmt::Debug + FromStr + Send + Sync + 'static;
    /// What it is, for a person.
    const KIND: &'static str;

    /// Its id.
    fn id(&self) -> Self::Id;

    /// Counts its changes. Zero until it is stored.
    fn revision(&self) -> u64;

    /// The same with another revision.
    #[must_use]
    fn with_revision(self, revision: u64) -> Self;
}

/// What is recorded of a volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Volume {
    /// Its id.
    pub id: VolumeId,
    /// The name CSI gave.
    pub name: String,
    /// What it holds.
    pub capacity: Bytes,
    /// The capacity it was made with: with the headroom it gives the disk's size.
    pub initial_capacity: Bytes,
    /// What the StorageClass said.
    pub parameters: VolumeParameters,
    /// The node whose backing store it is on.
    pub node: String,
    /// How far it has come.
    pub phase: Phase,
    /// Whether a guest has ever reported its pool. Never goes back to false: nothing makes a pool from then on.
    pub initialized: bool,
    /// Whether the region of its pool was once found written to. Never goes back to false: from then on a guest may
    /// only finish a creation that was begun.
    #[serde(default)]
    pub written: bool,
    /// The capacity that the partition table on the disk was last written for by the host.
    pub table_capacity: Bytes,
    /// Where it is published. One pod at a time.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub publication: Option<Publication>,
    /// What a guest last said of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub condition: Option<Condition>,
    /// Labels from the orchestrator, such as the PVC's name and namespace.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
    /// What a VolumeAttributesClass has changed.
    #[serde(default, skip_serializing_if = "VolumeAttributes::is_empty")]
    pub attributes: VolumeAttributes,
    /// A file system, or a block device.
    #[serde(default, skip_serializing_if = "VolumeMode::is_filesystem")]
    pub mode: VolumeMode,
    /// What it was made from, as CSI asked. Never changes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<Source>,
    /// Whose contents its disk was copied from; set with the copy. A guest makes them its own before it reports the
    /// volume for the first time; from then on ([`Volume::initialized`]) this is history.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub origin: Option<Origin>,
    /// Made for one pod, and destroyed with its publication (CSI ephemeral volumes).
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub ephemeral: bool,
    /// Of a mirror: the half that does not have all that the other one has, as far as is known. Recorded before a pod can
    /// start without it, and taken back when a guest says that both have everything. It is never used alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub behind: Option<Half>,
    /// The largest disk that its place can have, where its headroom asks for a larger one: the disk is so large then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_limit: Option<Bytes>,
    /// The last rollback to a snapshot in its pool that was asked for, and what came of it. A copy does not have it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rollback: Option<RollbackRecord>,
    /// Counts the changes of this record. Zero until it is stored.
    pub revision: u64,
}

impl Record for Volume {
    type Id = VolumeId;
    const KIND: &'static str = "volume";

    fn id(&self) -> VolumeId {
        self.id
    }

    fn revision(&self) -> u64 {
        self.revision
    }

    fn with_revision(self, revision: u64) -> Self {
        Self { revision, ..self }
    }
}

/// What a volume is made from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum Source {
    /// A snapshot.
    Snapshot(SnapshotId),
    /// Another volume, as it is.
    Volume(VolumeId),
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Snapshot(id) => write!(f, "snapshot {id}"),
            Self::Volume(id) => write!(f, "volume {id}"),
        }
    }
}

impl Volume {
    /// A volume that is wanted, of which there is nothing yet.
    pub fn wanted(name: &str, capacity: Bytes, parameters: VolumeParameters, node: &str) -> Self {
        Self {
            id: VolumeId::from_name(name),
            name: name.to_owned(),
            capacity,
            initial_capacity: capacity,
            parameters,
            node: node.to_owned(),
            phase: Phase::Creating,
            initialized: false,
            written: false,
            table_capacity: Bytes(0),
            publication: None,
            condition: None,
            labels: BTreeMap::new(),
            attributes: VolumeAttributes::default(),
            mode: VolumeMode::Filesystem,
            source: None,
            origin: None,
            ephemeral: false,
            behind: None,
            disk_limit: None,
            rollback: None,
            revision: 0,
        }
    }

    /// Whose contents a copy of its disk has, made while a guest ran and took `mark`, or while none did. `None` while a
    /// guest may be at making the contents of another volume its own: such a disk can't be copied.
    pub fn origin_of_copy(&self, mark: Option<Mark>) -> Option<Origin> {
        match &self.origin {
            Some(origin) if !self.initialized => self.publication.is_none().then(|| origin.clone()),
            _ => Some(Origin { volume: self.id, mark, initialized: self.initialized, copy: None }),
        }
    }

    /// The rollback that its next guest is to do.
    pub fn pending_rollback(&self) -> Option<&Rollback> {
        self.rollback.as_ref().filter(|rollback| rollback.outcome.is_none()).map(|rollback| &rollback.request)
    }

    /// The one that the guest of its publication was told to do, and has not told of.
    pub fn given_rollback(&self) -> Option<&Rollback> {
        let given = self.publication.as_ref()?.rollback?;
        self.pending_rollback().filter(|rollback| rollback.id == given)
    }

    /// With what came of its rollback, where that is told.
    #[must_use]
    pub fn with_outcome(self, outcome: Option<RollbackOutcome>) -> Self {
        let rollback = match (self.rollback, outcome) {
            (Some(rollback), Some(outcome)) => Some(RollbackRecord { outcome: Some(outcome), ..rollback }),
            (rollback, _) => rollback,
        };
        Self { rollback, ..self }
    }

    /// Whether its pool is a mirror of two devices.
    pub fn is_mirrored(&self) -> bool {
        !self.parameters.vdevs.is_single()
    }

    /// The layout of its disk now, of a mirror that of each half. The disk is as large as it was made, or as a growth
    /// beyond the headroom asked for.
    pub fn layout(&self) -> DiskLayout {
        let made = DiskLayout::new(self.initial_capacity, self.parameters.headroom).disk;
        let made = self.disk_limit.map_or(made, |limit| made.min(limit));
        let now = DiskLayout::new(self.capacity, Headroom::NONE);
        DiskLayout { disk: made.max(now.disk), ..now }
    }

    /// The same in a place that has no disk larger than that: there is as much headroom as there can be.
    #[must_use]
    pub fn within(self, largest: Bytes) -> Self {
        if self.layout().disk > largest { Self { disk_limit: Some(largest), ..self } } else { self }
    }
}

/// A rollback that was asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RollbackRecord {
    /// What its next guest is told.
    pub request: Rollback,
    /// When it was asked for, in seconds since 1970.
    pub requested: u64,
    /// A publication had it once: its guest may have gone back, and have ended before it was heard.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub given: bool,
    /// What came of it; none as long as no guest has told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub outcome: Option<RollbackOutcome>,
}

/// What came of a rollback, as a guest said.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RollbackOutcome {
    /// Why it was refused, where it was. Text from a guest is bounded before it gets here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refused: Option<String>,
    /// When its node heard of it, in seconds since 1970.
    pub at: u64,
}

/// How far a volume has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Phase {
    /// Recorded; its device may not exist yet.
    Creating,
    /// There to be used.
    Ready,
    /// To be removed; its device may be gone already.
    Deleting,
}

/// Where a volume is published.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Publication {
    /// The CSI target path.
    pub target_path: PathBuf,
    /// Of what the pod's guest is told in its VolumeSpec, and shows on the control channel. Records of earlier versions have
    /// that itself, as `token`.
    #[serde(alias = "token")]
    pub token_digest: TokenDigest,
    /// Read-only.
    pub read_only: bool,
    /// The group that owns the volume, if any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fs_group: Option<u32>,
    /// Mount flags as CSI gave them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub mount_flags: Vec<String>,
    /// The id of the rollback that its guest is told to do. One that is asked for later is for the next publication.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rollback: Option<Uuid>,
    /// The pod, where the orchestrator told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod: Option<PodRef>,
    /// The claim that the volume was bound to when it was published, where the orchestrator could be asked.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub claim: Option<ClaimRef>,
    /// The boot of the host in which it was published (`/proc/sys/kernel/random/boot_id`). One of an earlier boot is
    /// over: no virtual machine outlives its host.
    pub boot_id: String,
}

/// A claim that is bound to a volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ClaimRef {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its UID.
    pub uid: String,
}

/// A pod.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PodRef {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its UID; empty where the orchestrator has none.
    #[serde(default)]
    pub uid: String,
}

impl fmt::Display for PodRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.namespace.is_empty() { f.write_str(&self.name) } else { write!(f, "{}/{}", self.namespace, self.name) }
    }
}

/// What a guest last said of a volume. Text from a guest is bounded before it gets here.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Condition {
    /// Something is wrong.
    pub abnormal: bool,
    /// For a person.
    pub message: String,
}

/// What is recorded of a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Snapshot {
    /// Its id.
    pub id: SnapshotId,
    /// The name CSI gave.
    pub name: String,
    /// The volume it is of. That volume may be gone.
    pub volume: VolumeId,
    /// The node that has it: that of the volume.
    pub node: String,
    /// The group it was taken with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<GroupMember>,
    /// How far it has come.
    pub phase: SnapshotPhase,
    /// Whether it may be a full copy where blocks can't be shared.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub allow_copy: bool,
    /// What is in it; set before the copy is made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub contents: Option<Contents>,
    /// Counts the changes of this record. Zero until it is stored.
    pub revision: u64,
}

impl Record for Snapshot {
    type Id = SnapshotId;
    const KIND: &'static str = "snapshot";

    fn id(&self) -> SnapshotId {
        self.id
    }

    fn revision(&self) -> u64 {
        self.revision
    }

    fn with_revision(self, revision: u64) -> Self {
        Self { revision, ..self }
    }
}

/// The group that a snapshot was taken with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct GroupMember {
    /// The group.
    pub id: GroupId,
    /// The name CSI gave it.
    pub name: String,
    /// How many snapshots it has.
    pub size: usize,
}

/// How far a snapshot has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum SnapshotPhase {
    /// Recorded, and nothing more. Taking it begins, or begins again, at the beginning: the instant is not fixed yet.
    Wanted,
    /// The guests of a group have marked the instant; no copy is made before all of them have.
    Marked,
    /// The copy is being made.
    Copying,
    /// There to be restored.
    Ready,
    /// To be removed; its copy may be gone already.
    Deleting,
}

/// What a snapshot shows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Contents {
    /// When it was taken, in seconds since 1970 by the node's clock.
    pub taken: u64,
    /// What its volume held at that time: the least that a restored one has.
    pub capacity: Bytes,
    /// The partition at that time.
    pub partition: Bytes,
    /// Whose contents they are.
    pub origin: Origin,
    /// How they are encrypted: a restored volume has to be the same.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub encryption: Option<Encryption>,
    /// A file system or a block device: a restored volume has to be the same.
    #[serde(default, skip_serializing_if = "VolumeMode::is_filesystem")]
    pub mode: VolumeMode,
}

/// A page of records.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Page<R: Record = Volume> {
    /// In the order of their ids.
    pub records: Vec<R>,
    /// Where the next page begins; `None` at the end.
    pub next: Option<R::Id>,
}

/// Where records of one kind are kept.
#[async_trait]
pub trait Catalog<R: Record = Volume>: Send + Sync + fmt::Debug {
    /// Records something new. Where the id exists already, gives what is recorded, unchanged.
    async fn create(&self, record: R) -> Result<Created<R>, CatalogError>;

    /// A record.
    async fn get(&self, id: R::Id) -> Result<Option<R>, CatalogError>;

    /// Replaces the record whose revision this one has; gives it with its new revision, durable.
    ///
    /// # Errors
    /// [`CatalogError::Conflict`] when it has changed since it was read, [`CatalogError::NotFound`] when it is gone.
    async fn update(&self, record: R) -> Result<R, CatalogError>;

    /// Removes a record. Unknown ids are no error.
    async fn remove(&self, id: R::Id) -> Result<(), CatalogError>;

    /// Up to `limit` records whose id is `from` or behind it. Cost follows the page, not the catalog.
    async fn list(&self, from: Option<R::Id>, limit: usize) -> Result<Page<R>, CatalogError>;
}

/// What [`Catalog::create`] found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Created<R: Record = Volume> {
    /// It is recorded now.
    Created(R),
    /// It was recorded before; this is how.
    Existed(R),
}

impl<R: Record> Created<R> {
    /// The record.
    pub fn into_record(self) -> R {
        match self {
            Self::Created(record) | Self::Existed(record) => record,
        }
    }
}

/// Why the catalog refused or failed.
#[derive(Debug, thiserror::Error)]
pub enum CatalogError {
    /// The record has changed since it was read.
    #[error("{0}: its record was changed by somebody else at the same time; try again")]
    Conflict(String),
    /// There is no such record.
    #[error("{0} is not recorded")]
    NotFound(String),
    /// A record that can't be read. Nothing is done with its volume until a person has looked.
    #[error(
        "the record {path} can't be read: {reason}; nothing is done with it until it is mended: put the file back from a \
         backup; the data is kept"
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The operating system refused.
    #[error("{what} {path}: {source}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        source: std::io::Error,
    },
    /// A record in the cluster that is none of ours, or damaged. Nothing is done with its volume.
    #[error(
        "{what} can't be read: {reason}; nothing is done with it until it is mended: put the object back from a backup; the \
         data is kept"
    )]
    Unreadable {
        /// The object.
        what: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The place in a list is too old, or never was one.
    #[error("the list has to be begun again: {reason}")]
    Expired {
        /// What the API server said.
        reason: String,
    },
    /// The API server could not be asked.
    #[error("{what}: the Kubernetes API server can't be asked now: {reason}")]
    Unavailable {
        /// What was tried.
        what: &'static str,
        /// Why that failed.
        reason: String,
    },
    /// The API server said no.
    #[error("{what}: refused by the Kubernetes API server: {reason}")]
    Forbidden {
        /// What was tried.
        what: &'static str,
        /// What it said.
        reason: String,
    },
    /// Another process has the catalog.
    #[error("the catalog {0} is in use by another zpod process; only one may run on it")]
    Locked(PathBuf),
}

impl CatalogError {
    /// That a record has changed since it was read.
    pub fn conflict<R: Record>(id: R::Id) -> Self {
        Self::Conflict(format!("{} {id}", R::KIND))
    }

    /// That there is no such record.
    pub fn not_found<R: Record>(id: R::Id) -> Self {
        Self::NotFound(format!("{} {id}", R::KIND))
    }
}
