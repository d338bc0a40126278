//! Where volumes are recorded: the only state the driver has.
//!
//! # Design
//! A record is replaced whole, and only if it is still the one that was read ([`Volume::revision`]): two writers can't
//! undo each other. Records are handed out one at a time or a page at a time; nothing needs all of them at once.

pub mod dir;

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use uuid::Uuid;
use zpod_volume::{Bytes, DiskLayout, Headroom, VolumeId, VolumeParameters};

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
    /// Counts the changes of this record. Zero until it is stored.
    pub revision: u64,
}

impl Volume {
    /// The layout of its disk now. The disk is as large as it was made, or as a growth beyond the headroom asked for.
    pub fn layout(&self) -> DiskLayout {
        let made = DiskLayout::new(self.initial_capacity, self.parameters.headroom);
        let now = DiskLayout::new(self.capacity, Headroom::NONE);
        DiskLayout { disk: made.disk.max(now.disk), ..now }
    }
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
    /// Told to the pod's guest in its VolumeSpec and expected back from it on the control channel.
    pub token: Uuid,
    /// Read-only.
    pub read_only: bool,
    /// The group that owns the volume, if any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fs_group: Option<u32>,
    /// Mount flags as CSI gave them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub mount_flags: Vec<String>,
    /// The pod, where the orchestrator told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod: Option<PodRef>,
    /// The boot of the host in which it was published (`/proc/sys/kernel/random/boot_id`). One of an earlier boot is
    /// over: no virtual machine outlives its host.
    pub boot_id: String,
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

/// A page of records.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Page {
    /// In the order of their ids.
    pub volumes: Vec<Volume>,
    /// Where the next page begins; `None` at the end.
    pub next: Option<VolumeId>,
}

/// Where volumes are recorded.
#[async_trait]
pub trait Catalog: Send + Sync + fmt::Debug {
    /// Records a new volume. Where the id exists already, gives what is recorded, unchanged.
    async fn create(&self, volume: Volume) -> Result<Created, CatalogError>;

    /// The record of a volume.
    async fn get(&self, id: VolumeId) -> Result<Option<Volume>, CatalogError>;

    /// Replaces the record whose revision this one has; gives it with its new revision, durable.
    ///
    /// # Errors
    /// [`CatalogError::Conflict`] when it has changed since it was read, [`CatalogError::NotFound`] when it is gone.
    async fn update(&self, volume: Volume) -> Result<Volume, CatalogError>;

    /// Removes a record. Unknown ids are no error.
    async fn remove(&self, id: VolumeId) -> Result<(), CatalogError>;

    /// Up to `limit` records whose id is `from` or behind it. Cost follows the page, not the catalog.
    async fn list(&self, from: Option<VolumeId>, limit: usize) -> Result<Page, CatalogError>;
}

/// What [`Catalog::create`] found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Created {
    /// It is recorded now.
    Created(Volume),
    /// It was recorded before; this is how.
    Existed(Volume),
}

impl Created {
    /// The record.
    pub fn into_volume(self) -> Volume {
        match self {
            Self::Created(volume) | Self::Existed(volume) => volume,
        }
    }
}

/// Why the catalog refused or failed.
#[derive(Debug, thiserror::Error)]
pub enum CatalogError {
    /// The record has changed since it was read.
    #[error("volume {0}: its record was changed by somebody else at the same time; try again")]
    Conflict(VolumeId),
    /// There is no such record.
    #[error("volume {0} is not recorded")]
    NotFound(VolumeId),
    /// A record that can't be read. Nothing is done with its volume until a person has looked.
    #[error("the record {path} can't be read: {reason}; nothing is done with this volume until it is mended")]
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
    #[error("{what} can't be read: {reason}; nothing is done with this volume until it is mended")]
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
