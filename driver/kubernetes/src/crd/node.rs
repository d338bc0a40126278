use std::path::PathBuf;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::CustomResource;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::Quantity;

/// A node that keeps volumes. There is nothing to want of it yet.
#[derive(CustomResource, Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[kube(
    group = "zpod.storage",
    version = "v1alpha1",
    kind = "ZfsNode",
    plural = "zfsnodes",
    singular = "zfsnode",
    shortname = "zn",
    category = "zpod",
    status = "ZfsNodeStatus",
    derive = "PartialEq",
    doc = "A node that keeps the devices of ZfsVolumes. Made by zpod-node; its name is the node's.",
    printcolumn(
        name = "Total",
        type_ = "string",
        json_path = ".status.backing.total",
        description = "what volumes may take together"
    ),
    printcolumn(
        name = "Available",
        type_ = "string",
        json_path = ".status.backing.available",
        description = "room for new volumes"
    ),
    printcolumn(
        name = "Ready",
        type_ = "string",
        json_path = ".status.conditions[?(@.type==\"Ready\")].status",
        description = "whether its devices can be reached"
    ),
    printcolumn(name = "Version", type_ = "string", json_path = ".status.version", description = "of zpod-node"),
    printcolumn(
        name = "Location",
        type_ = "string",
        json_path = ".status.backing.location",
        description = "where its devices are",
        priority = 1
    ),
    printcolumn(
        name = "Age",
        type_ = "date",
        json_path = ".metadata.creationTimestamp",
        description = "since it was made"
    )
)]
#[serde(rename_all = "camelCase")]
pub struct ZfsNodeSpec {}

/// What a node has.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ZfsNodeStatus {
    /// Version of zpod-node.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub version: String,
    /// Where the devices are, and what room there is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backing: Option<BackingStatus>,
    /// The same for volumes with two devices (`vdevs: mirror-2`), where there can be any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mirrors: Option<BackingStatus>,
    /// `Ready`: whether the devices can be reached.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(schema_with = "super::conditions")]
    pub conditions: Vec<Condition>,
}

/// A backing store.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct BackingStatus {
    /// For a person: where the devices are.
    pub location: PathBuf,
    /// What the volumes of this node may take together, over-commit included.
    pub total: Quantity,
    /// The capacity that new volumes can have together.
    pub available: Quantity,
    /// The largest capacity that one new volume can have.
    pub largest: Quantity,
}
