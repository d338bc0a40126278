//! What nodes say in the objects' status, and waiting for it.

use std::time::Duration;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::ResourceExt as _;
use kube::runtime::wait::{Condition as Wait, await_condition};
use tokio::time::Instant;
use zpod_kubernetes::{Kept, KubeCatalog};
use zpod_storage::catalog::{CatalogError, Record};

use crate::guest::clean;
use crate::volumes::VolumeError;

/// Characters of a node's words that are passed on.
const MAX_WORDS: usize = 1024;

/// Where something was looked for that is nowhere.
pub(super) const ANY_NODE: &str = "any (there is no such object)";

/// What a node is waited for.
#[derive(Debug, Clone, Copy)]
pub(super) struct Wanted<'a> {
    /// The node.
    pub(super) node: &'a str,
    /// What it is to do, as a participle.
    pub(super) what: &'static str,
    /// How long it may take.
    pub(super) within: Duration,
}

/// Waits until the object is as wanted, or gone; `None` for gone.
pub(super) async fn wait<K: Kept>(
    catalog: &KubeCatalog<K>,
    id: <K::Record as Record>::Id,
    wanted: Wanted<'_>,
    done: impl Wait<K>,
) -> Result<Option<K>, VolumeError> {
    let begun = Instant::now();
    let name = id.to_string();
    let waiting = await_condition(catalog.api().clone(), &name, done);
    match tokio::time::timeout(wanted.within, waiting).await {
        Ok(Ok(object)) => Ok(object),
        Ok(Err(error)) => Err(CatalogError::Unavailable { what: "watch objects", reason: error.to_string() }.into()),
        Err(_) => Err(VolumeError::NodeSilent {
            kind: K::Record::KIND,
            id: name,
            node: wanted.node.to_owned(),
            what: wanted.what,
            waited: begun.elapsed(),
        }),
    }
}

pub(super) fn condition<K: Kept>(object: &K, kind: &str) -> Option<Condition> {
    let mut status = object.status()?.clone();
    K::head(&mut status).conditions.iter().find(|condition| condition.type_ == kind).cloned()
}

/// Whether the node has said no to this generation of the spec or a later one.
pub(super) fn said_since<K: Kept>(object: &K, kind: &str, generation: Option<i64>) -> bool {
    condition(object, kind)
        .is_some_and(|condition| condition.status == "False" && condition.observed_generation >= generation)
}

/// Whether it has said no to the spec as it is.
pub(super) fn said_now<K: Kept>(object: &K, kind: &str) -> bool {
    said_since(object, kind, object.meta().generation)
}

/// A node's words, as far as they are passed on: into answers, and from there into events and claims of tenants.
pub(super) fn words(condition: &Condition) -> String {
    clean(&condition.message, MAX_WORDS)
}

/// What the node said, as an error.
pub(super) fn refusal<K: Kept>(object: &K, kind: &str, node: &str) -> VolumeError {
    match condition(object, kind) {
        Some(condition) => {
            // Another node may have the room, or a file system that holds larger files.
            let elsewhere = [super::reasons::NO_ROOM, super::reasons::TOO_LARGE];
            let no_room = elsewhere.contains(&condition.reason.as_str());
            VolumeError::NodeRefused { no_room, reason: words(&condition) }
        }
        None => VolumeError::NodeRefused {
            reason: format!("node {node} refused {}, and did not say why", object.name_any()),
            no_room: false,
        },
    }
}
