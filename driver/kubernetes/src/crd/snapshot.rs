use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::Quantity;

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
#[x_kube(validation = Rule::new("!has(oldSelf.destroy) || !oldSelf.destroy || (has(self.destroy) && self.destroy)").message("destroy can't be taken back"))]
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
    /// Set by DeleteSnapshot before it deletes this object, and by nobody else.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub destroy: bool,
}

/// What is there of a snapshot, as its node says.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ZfsSnapshotStatus {
    /// Whether it can be restored.
    #[serde(default)]
    pub ready_to_use: bool,
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
