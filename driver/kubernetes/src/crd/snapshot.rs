use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::Quantity;

/// Which phase may follow which. What is there to be restored can't become what is thrown away as never finished.
const PHASES: &str = "!has(oldSelf.status) || !has(oldSelf.status.phase) || (has(self.status) && has(self.status.phase) && (\
    self.status.phase == oldSelf.status.phase || self.status.phase == 'Deleting' \
    || (oldSelf.status.phase == 'Marked' && self.status.phase == 'Copying') \
    || (oldSelf.status.phase == 'Copying' && self.status.phase == 'Ready')))";

/// A snapshot of a volume: what the controller wants of it.
#[derive(CustomResource, KubeSchema, Debug, Clone, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "zpod.storage",
    version = "v1alpha1",
    kind = "ZfsSnapshot",
    plural = "zfssnapshots",
    singular = "zfssnapshot",
    shortname = "zsnap",
    category = "zpod",
    status = "ZfsSnapshotStatus",
    derive = "PartialEq",
    doc = "A snapshot of a ZfsVolume, on the node of that volume. Its name is the snapshot handle.",
    selectable = ".spec.nodeName",
    selectable = ".spec.volume",
    selectable = ".spec.group.id",
    printcolumn(
        name = "Volume",
        type_ = "string",
        json_path = ".spec.volume",
        description = "the ZfsVolume it was taken of"
    ),
    printcolumn(
        name = "Ready",
        type_ = "boolean",
        json_path = ".status.readyToUse",
        description = "whether it can be restored"
    ),
    printcolumn(
        name = "Size",
        type_ = "string",
        json_path = ".status.restoreSize",
        description = "the least a restored volume has"
    ),
    printcolumn(name = "Node", type_ = "string", json_path = ".spec.nodeName", description = "the node that has it"),
    printcolumn(
        name = "Age",
        type_ = "date",
        json_path = ".metadata.creationTimestamp",
        description = "since it was asked for"
    )
)]
#[kube(validation = Rule::new(PHASES).message("status.phase: it can't come after the one before"))]
#[x_kube(validation = Rule::new("!has(oldSelf.destroy) || !oldSelf.destroy || (has(self.destroy) && self.destroy)").message("destroy can't be taken back"))]
#[x_kube(validation = Rule::new("!has(oldSelf.copy) || !oldSelf.copy || (has(self.copy) && self.copy)").message("copy can't be taken back"))]
#[x_kube(validation = Rule::new("!has(oldSelf.complete) || !oldSelf.complete || (has(self.complete) && self.complete)").message("complete can't be taken back"))]
#[x_kube(validation = Rule::new("!has(self.complete) || !self.complete || has(self.group)").message("only a snapshot of a group can be complete"))]
#[x_kube(validation = Rule::new("(has(self.allowCopy) && self.allowCopy) == (has(oldSelf.allowCopy) && oldSelf.allowCopy)").message("allowCopy can't be changed"))]
#[x_kube(validation = Rule::new("has(oldSelf.group) == has(self.group) && (!has(self.group) || self.group == oldSelf.group)").message("group can't be changed"))]
#[x_kube(validation = Rule::new("has(self.adopt) == has(oldSelf.adopt)").message("adopt is set when the object is made, and never after"))]
#[serde(rename_all = "camelCase")]
pub struct ZfsSnapshotSpec {
    /// The name CSI gave. One name, one snapshot.
    #[schemars(length(min = 1, max = 512))]
    #[x_kube(validation = Rule::new("self == oldSelf").message("snapshotName can't be changed"))]
    pub snapshot_name: String,
    /// The ZfsVolume.
    #[schemars(length(min = 1, max = 253))]
    #[x_kube(validation = Rule::new("self == oldSelf").message("volume can't be changed"))]
    pub volume: String,
    /// The node of that volume.
    #[schemars(length(min = 1, max = 253))]
    #[x_kube(validation = Rule::new("self == oldSelf").message("nodeName can't be changed"))]
    pub node_name: String,
    /// The group it is taken with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<GroupRef>,
    /// Of a group: every guest has marked the instant, the copies may be made. Set by the controller.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub copy: bool,
    /// Of a group: it was answered for as a whole. Set by the controller on each member, and never taken back. From then on
    /// the group ends with DeleteVolumeGroupSnapshot, whatever nodes say of its members.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub complete: bool,
    /// It may be a full copy where blocks can't be shared.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub allow_copy: bool,
    /// Set by DeleteSnapshot before it deletes this object, and by nobody else.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub destroy: bool,
    /// What its node had recorded when somebody deleted the object by hand: `kubectl zpod adopt` makes the object anew with
    /// it. The node takes it over into its status, and nothing looks at it afterwards.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub adopt: Option<Box<ZfsSnapshotStatus>>,
}

/// The group that a snapshot is taken with.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct GroupRef {
    /// The group's id.
    pub id: String,
    /// The name CSI gave it.
    pub name: String,
    /// How many snapshots it has.
    pub size: i64,
}

/// How far a snapshot has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum SnapshotPhase {
    /// The guest has marked the instant; the other members of the group are waited for.
    Marked,
    /// The copy is being made.
    Copying,
    /// There to be restored.
    Ready,
    /// It can't be taken; nothing was made. The condition `Ready` says why.
    Refused,
    /// On its way out.
    Deleting,
}

/// What is there of a snapshot, as its node says.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ZfsSnapshotStatus {
    /// Whether it can be restored.
    #[serde(default)]
    pub ready_to_use: bool,
    /// How far it has come.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub phase: Option<SnapshotPhase>,
    /// How far a full copy is, in percent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub progress: Option<i64>,
    /// The volume's partition at that time, in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub partition: Option<Quantity>,
    /// Whose contents it has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub origin: Option<super::OriginStatus>,
    /// How they are encrypted.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub encryption: String,
    /// A file system (the default) or a block device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<super::Mode>,
    /// Counts the changes of the node's record.
    #[serde(default)]
    #[schemars(range(min = 0))]
    pub revision: i64,
    /// The generation of the spec that this speaks of.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub observed_generation: Option<i64>,
    /// When it was taken.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub creation_time: Option<Time>,
    /// The least that a volume restored from it has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub restore_size: Option<Quantity>,
    /// `Ready`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "super::conditions")]
    pub conditions: Vec<Condition>,
}
