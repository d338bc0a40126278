use std::collections::BTreeMap;
use std::path::PathBuf;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::{CustomResource, KubeSchema};
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::{Deserialize, Serialize};
use uuid::Uuid;
use zpod_volume::{Half, VolumeParameters};

use crate::Quantity;

/// Which phase may follow which: one that was said stays, until the volume is on its way out. What was ready can't become
/// what was refused, whose record is thrown away.
const PHASES: &str = "!has(oldSelf.status) || !has(oldSelf.status.phase) || (has(self.status) && has(self.status.phase) \
    && (self.status.phase == oldSelf.status.phase || self.status.phase == 'Deleting'))";
/// That there may be data is never forgotten.
const KNOWN: &str = "!has(oldSelf.status) \
    || ((!has(oldSelf.status.initialized) || !oldSelf.status.initialized || (has(self.status) && has(self.status.initialized) && self.status.initialized)) \
    && (!has(oldSelf.status.written) || !oldSelf.status.written || (has(self.status) && has(self.status.written) && self.status.written)))";

/// A volume: what the controller wants of it.
#[derive(CustomResource, KubeSchema, Debug, Clone, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "zpod.storage",
    version = "v1alpha1",
    kind = "ZfsVolume",
    plural = "zfsvolumes",
    singular = "zfsvolume",
    shortname = "zv",
    category = "zpod",
    status = "ZfsVolumeStatus",
    derive = "PartialEq",
    doc = "A ZFS volume whose pool lives inside the Kata guest kernel of the pod that uses it. Made by zpod-controller for a PersistentVolume; its name is the volume handle.",
    selectable = ".spec.nodeName",
    printcolumn(
        name = "Claim",
        type_ = "string",
        json_path = ".spec.claim.name",
        description = "PersistentVolumeClaim"
    ),
    printcolumn(name = "Capacity", type_ = "string", json_path = ".status.capacity", description = "what it holds"),
    printcolumn(
        name = "Used",
        type_ = "string",
        json_path = ".status.pool.used",
        description = "used, as its guest says"
    ),
    printcolumn(
        name = "Snapshots",
        type_ = "string",
        json_path = ".status.pool.usedBySnapshots",
        description = "what ZFS snapshots in its pool alone hold",
        priority = 1
    ),
    printcolumn(
        name = "Ratio",
        type_ = "string",
        json_path = ".status.pool.compressRatio",
        description = "compression ratio"
    ),
    printcolumn(
        name = "Pool",
        type_ = "string",
        json_path = ".status.pool.name",
        description = "name of its pool in the guest",
        priority = 1
    ),
    printcolumn(
        name = "Health",
        type_ = "string",
        json_path = ".status.pool.health",
        description = "health of its pool"
    ),
    printcolumn(
        name = "Phase",
        type_ = "string",
        json_path = ".status.phase",
        description = "how far its device has come",
        priority = 1
    ),
    printcolumn(
        name = "Node",
        type_ = "string",
        json_path = ".spec.nodeName",
        description = "the node that has its device"
    ),
    printcolumn(
        name = "Pod",
        type_ = "string",
        json_path = ".status.publication.pod.name",
        description = "the pod that uses it"
    ),
    printcolumn(
        name = "Namespace",
        type_ = "string",
        json_path = ".spec.claim.namespace",
        description = "of claim and pod",
        priority = 1
    ),
    printcolumn(
        name = "Age",
        type_ = "date",
        json_path = ".metadata.creationTimestamp",
        description = "since it was made"
    )
)]
#[kube(validation = Rule::new("!has(self.status) || !has(self.status.capacity) || quantity(self.spec.capacity).compareTo(quantity(self.status.capacity)) >= 0").message("spec.capacity is less than status.capacity: volumes never shrink"))]
#[kube(validation = Rule::new(PHASES).message("status.phase: it can't come after the one before"))]
#[kube(validation = Rule::new(KNOWN).message("status.initialized and status.written can't be taken back"))]
#[x_kube(validation = Rule::new("!has(oldSelf.destroy) || !oldSelf.destroy || (has(self.destroy) && self.destroy)").message("destroy can't be taken back"))]
#[x_kube(validation = Rule::new("has(oldSelf.claim) == has(self.claim) && (!has(self.claim) || self.claim == oldSelf.claim)").message("claim can't be changed"))]
#[x_kube(validation = Rule::new("has(oldSelf.source) == has(self.source) && (!has(self.source) || self.source == oldSelf.source)").message("source can't be changed"))]
#[x_kube(validation = Rule::new("has(oldSelf.mode) == has(self.mode) && (!has(self.mode) || self.mode == oldSelf.mode)").message("mode can't be changed"))]
#[x_kube(validation = Rule::new("(has(self.ephemeral) && self.ephemeral) == (has(oldSelf.ephemeral) && oldSelf.ephemeral)").message("ephemeral can't be changed"))]
#[x_kube(validation = Rule::new("has(self.adopt) == has(oldSelf.adopt)").message("adopt is set when the object is made, and never after"))]
#[serde(rename_all = "camelCase")]
pub struct ZfsVolumeSpec {
    /// The name CSI gave. One name, one volume.
    #[schemars(length(min = 1, max = 512))]
    #[x_kube(validation = Rule::new("self == oldSelf").message("volumeName can't be changed"))]
    pub volume_name: String,
    /// The node whose backing store holds the device.
    #[schemars(length(min = 1, max = 253))]
    #[x_kube(validation = Rule::new("self == oldSelf").message("nodeName can't be changed: a volume stays on its node"))]
    pub node_name: String,
    /// What it is to hold. Grows only: never less than status.capacity.
    pub capacity: Quantity,
    /// What the StorageClass said.
    #[schemars(schema_with = "parameters")]
    #[x_kube(validation = Rule::new("self == oldSelf").message("parameters can't be changed"))]
    pub parameters: VolumeParameters,
    /// The PersistentVolumeClaim it was made for, where that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub claim: Option<ClaimRef>,
    /// What it is made from: a snapshot or another volume of the same node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<SourceRef>,
    /// A file system (the default) or a block device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<Mode>,
    /// What a VolumeAttributesClass, or `kubectl zpod props set`, has changed: keys and values of docs/parameters.md.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 32))]
    pub attributes: BTreeMap<String, String>,
    /// A scrub is wanted that begins after this time: `kubectl zpod scrub` sets it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scrub_requested_at: Option<Time>,
    /// Made for one pod by its node, and destroyed with the pod.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub ephemeral: bool,
    /// Set by DeleteVolume before it deletes this object, and by nobody else: only then does the node destroy the
    /// device and all data on it. An object deleted without it stays, and so does its data.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub destroy: bool,
    /// What its node had recorded when somebody deleted the object by hand: `kubectl zpod adopt` makes the object anew with
    /// it. The node takes it over into its status, and nothing looks at it afterwards.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub adopt: Option<Box<ZfsVolumeStatus>>,
}

/// What a volume is made from: one of the two.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct SourceRef {
    /// A ZfsSnapshot.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot: Option<String>,
    /// A ZfsVolume.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub volume: Option<String>,
}

/// What a container gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Mode {
    /// A directory.
    Filesystem,
    /// A block device.
    Block,
}

/// Whose contents a disk was copied from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct OriginStatus {
    /// The volume whose pool is on the disk until a guest has made it this volume's own.
    pub volume: String,
    /// The ZFS snapshot to roll back to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mark: Option<String>,
    /// Whether a guest had reported the pool when the copy was made.
    #[serde(default)]
    pub initialized: bool,
    /// Tells the copy from its origin where that had the same name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub copy: Option<Uuid>,
}

/// A PersistentVolumeClaim.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ClaimRef {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its UID, where it could be looked up.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub uid: String,
    /// The PersistentVolume that was made for it.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub persistent_volume: String,
}

/// What is there of a volume, as its node says.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ZfsVolumeStatus {
    /// How far the device has come.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub phase: Option<Phase>,
    /// What it holds; the room for it is promised.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub capacity: Option<Quantity>,
    /// The capacity it was made with: with the headroom it gives the disk's size.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initial_capacity: Option<Quantity>,
    /// The capacity that the partition table on the disk was last written for by the host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub table_capacity: Option<Quantity>,
    /// Whether a guest has ever reported its pool. From then on nothing makes one.
    #[serde(default)]
    pub initialized: bool,
    /// Whether the pool's region was once found written to. From then on a guest may only finish a creation.
    #[serde(default)]
    pub written: bool,
    /// Where it is published.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub publication: Option<PublicationStatus>,
    /// Whose contents the disk was copied from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub origin: Option<OriginStatus>,
    /// Of a mirror: the half, `first` or `second`, that does not have all that the other one has. It is never used alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<String>")]
    pub behind: Option<Half>,
    /// The largest disk that the node's file system can hold, where the headroom asks for a larger one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk_limit: Option<Quantity>,
    /// The last rollback to a snapshot in its pool that was asked for (`kubectl zpod rollback`), and what came of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rollback: Option<RollbackStatus>,
    /// The attributes that the node has taken over: set in the running guest, or to be set at its next start.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub attributes: BTreeMap<String, String>,
    /// The generation of the spec that this speaks of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// Counts the changes of the node's record.
    #[serde(default)]
    #[schemars(range(min = 0))]
    pub revision: i64,
    /// What the guest says of the pool.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pool: Option<PoolStatus>,
    /// `Ready` (the device), `Healthy` (the pool), `Expanded` (the size that was asked for).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "super::conditions")]
    pub conditions: Vec<Condition>,
}

/// A rollback to a snapshot in the volume's pool.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct RollbackStatus {
    /// Tells requests apart.
    pub id: Uuid,
    /// What stands behind the @.
    pub snapshot: String,
    /// Its GUID: one that is taken again under its name is another. Kubernetes has no numbers as large.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub guid: String,
    /// Newer snapshots may be destroyed for it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub destroy_newer: bool,
    /// When it was asked for.
    pub requested_at: Time,
    /// A pod was started with it: its guest may have gone back, and have ended before it was heard.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub given: bool,
    /// `Pending` until its next guest has told what came of it.
    pub state: RollbackState,
    /// When its node heard of that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub end_time: Option<Time>,
    /// Why it was refused.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub message: String,
}

/// How far a rollback is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum RollbackState {
    /// Its next guest is to do it.
    Pending,
    /// The volume has gone back.
    RolledBack,
    /// It could not be done, and the volume is as it was.
    Refused,
}

/// How far the device has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Phase {
    /// There to be used.
    Ready,
    /// The node can't have it; nothing was made. The condition `Ready` says why.
    Refused,
    /// On its way out; the data may be gone already.
    Deleting,
}

/// Where a volume is published.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PublicationStatus {
    /// The CSI target path.
    pub target_path: PathBuf,
    /// SHA-256 of what the pod's guest is told, and shows on the control channel.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token_digest: Option<String>,
    /// Earlier versions wrote what the digest is of. Read, and never written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub token: Option<Uuid>,
    /// Read-only.
    #[serde(default)]
    pub read_only: bool,
    /// The group that owns the volume.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<i64>")]
    pub fs_group: Option<u32>,
    /// The rollback that its guest is told to do.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rollback: Option<Uuid>,
    /// Mount flags.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub mount_flags: Vec<String>,
    /// The pod that uses it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pod: Option<Pod>,
    /// The claim that its PersistentVolume was bound to then. Where it is not that of the spec, a volume that was kept has
    /// got another claim.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub claim: Option<ClaimRef>,
    /// The boot of the host in which it was published.
    pub boot_id: String,
}

/// A pod.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Pod {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its UID.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub uid: String,
}

/// What the guest says of the pool. Bounded and cleaned before it gets here, and still only the guest's word.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PoolStatus {
    /// Its name in the guest.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub name: String,
    /// `Online`, `Degraded`, `Faulted`, `Suspended`, `Unavailable`, `Unknown`, or `Exported` while no pod uses it.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub health: String,
    /// What is wrong and what to do; empty when all is well.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub message: String,
    /// Used bytes as df(1) shows them, rounded up to MiB.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub used: Option<Quantity>,
    /// Available bytes as df(1) shows them, rounded up to MiB.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub available: Option<Quantity>,
    /// Space allocated in the pool, snapshots and metadata included, rounded up to MiB.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub allocated: Option<Quantity>,
    /// Space that ZFS snapshots in the pool alone hold, rounded up to MiB.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub used_by_snapshots: Option<Quantity>,
    /// Space that datasets below the volume's hold, rounded up to MiB.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub used_by_children: Option<Quantity>,
    /// Space that the volume's own contents hold, rounded up to MiB.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub used_by_dataset: Option<Quantity>,
    /// The snapshot in the pool that somebody last had taken or destroyed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_snapshot: Option<LastSnapshot>,
    /// Logical over stored size, such as `1.43x`.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub compress_ratio: String,
    /// Reads that failed.
    #[serde(default)]
    pub read_errors: i64,
    /// Writes that failed.
    #[serde(default)]
    pub write_errors: i64,
    /// Blocks whose checksum was wrong.
    #[serde(default)]
    pub checksum_errors: i64,
    /// Files or objects with permanent damage.
    #[serde(default)]
    pub data_errors: i64,
    /// The last scrub.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_scrub: Option<Scrub>,
}

/// What `kubectl zpod` has had done with a snapshot in the pool. Those of a schedule, and those that a container takes, are
/// not told of here.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct LastSnapshot {
    /// Its name.
    pub name: String,
    /// `Taken` or `Destroyed`.
    pub state: String,
    /// When, by the node's clock.
    pub time: Time,
}

/// A scrub.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Scrub {
    /// `Finished`, `Scanning`, `Paused` or `Canceled`.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub state: String,
    /// When it ended.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub end_time: Option<Time>,
    /// Errors it found.
    #[serde(default)]
    pub errors: i64,
}

/// The schema of [`VolumeParameters`], whose values zpod-volume checks.
fn parameters(_: &mut SchemaGenerator) -> Schema {
    json_schema!({
        "type": "object",
        "description": "What the StorageClass said, complete: later defaults change nothing.",
        "properties": {
            "backing": {"type": "string", "description": "provider of the block device"},
            "provisioning": {"type": "string", "description": "thin or thick"},
            "vdevs": {"type": "string", "description": "mirror-2, or absent for one device"},
            "headroom": {"type": "string", "description": "how far it can grow while its pod runs, such as 8x"},
            "quota": {"type": "string", "description": "refquota, quota or none"},
            "allowCopy": {"type": "boolean", "description": "snapshots may be full copies where blocks can't be shared"},
            "encryption": {"type": "string", "description": "aes-256-gcm, or absent"},
            "scrubInterval": {"type": "integer", "format": "int64", "description": "seconds between scrubs"},
            "zfsAccess": {"type": "string", "description": "volume, or absent where containers get nothing of ZFS"},
            "snapshotSchedule": {"type": "string", "description": "snapshots its guest takes by itself, such as hourly=24 daily=7"},
            "arcMax": {"type": "integer", "format": "int64", "description": "upper bound of the guest's ARC in bytes"},
            "properties": {
                "type": "object", "maxProperties": 64, "description": "ZFS properties that differ from the defaults",
                "additionalProperties": {"type": "string", "maxLength": 256},
            },
        },
        "required": ["backing", "provisioning", "headroom", "quota"],
    })
}
