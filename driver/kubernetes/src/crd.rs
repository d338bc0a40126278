//! The custom resources of `zpod.storage/v1alpha1`, cluster scoped.
//!
//! # Design
//! Each field has one owner, by server-side apply: the controller says in `spec` what is wanted, the node says in
//! `status` what is there ([`Manager`]). What the guest says of its pool is a third owner's, so that a change of usage
//! never touches what data depends on.

// The derives of kube make copies of the specs inside functions; and clippy takes its attributes for repeated ones.
#![allow(unreachable_pub, clippy::duplicated_attributes)]

mod node;
mod snapshot;
mod volume;

pub use node::{BackingStatus, ZfsNode, ZfsNodeSpec, ZfsNodeStatus};
pub use snapshot::{GroupRef, SnapshotPhase, ZfsSnapshot, ZfsSnapshotSpec, ZfsSnapshotStatus};
pub use volume::{
    ClaimRef, LastSnapshot, Mode, OriginStatus, Phase, Pod, PoolStatus, PublicationStatus, RollbackState,
    RollbackStatus, Scrub, SourceRef, ZfsVolume, ZfsVolumeSpec, ZfsVolumeStatus,
};

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::CustomResourceExt;

/// The group of all of them.
pub const GROUP: &str = "zpod.storage";
/// Keeps an object until its node has done what its end asks for.
pub const FINALIZER: &str = "zpod.storage/device";

/// Who owns a field.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Manager {
    /// zpod-controller: `spec`.
    Controller,
    /// zpod-node: `status`, less `status.pool`.
    Node,
    /// zpod-node, for what it hears from guests: `status.pool` and the condition `Healthy`.
    State,
}

impl Manager {
    /// Its name as a field manager.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Controller => "zpod-controller",
            Self::Node => "zpod-node",
            Self::State => "zpod-node-state",
        }
    }
}

/// All definitions, as the chart installs them.
pub fn definitions() -> Vec<CustomResourceDefinition> {
    let mut all = vec![ZfsVolume::crd(), ZfsSnapshot::crd(), ZfsNode::crd()];
    for definition in &mut all {
        // Removing a definition removes its objects. Helm must never do that: volumes outlive the chart.
        let annotations = definition.metadata.annotations.get_or_insert_default();
        annotations.insert("helm.sh/resource-policy".into(), "keep".into());
    }
    all
}

/// The schema of a list of `metav1.Condition`, merged by type.
fn conditions(generator: &mut schemars::SchemaGenerator) -> schemars::Schema {
    let mut schema = generator.subschema_for::<Vec<k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition>>();
    schema.insert("x-kubernetes-list-type".into(), "map".into());
    schema.insert("x-kubernetes-list-map-keys".into(), serde_json::json!(["type"]));
    schema
}
