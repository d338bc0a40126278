use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1::Node;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{OwnerReference, Time};
use k8s_openapi::jiff::Timestamp;
use kube::api::{Api, Patch, PatchParams};
use kube::{Client, Resource as _};
use serde_json::json;
use tokio::sync::Notify;
use tokio::time::Instant;
use zpod_kubernetes::crd::{BackingStatus, Manager, ZfsNode, ZfsNodeStatus};
use zpod_kubernetes::{Quantity, READY};
use zpod_volume::{Bytes, Vdevs};

use crate::volumes::{Context, Provisioner, Room};

/// Room is looked at this often, and at once when a volume is made, grown or destroyed.
const LOOK_EVERY: Duration = Duration::from_secs(10);
/// Smaller changes of room are not worth a write.
const STEP: Bytes = Bytes::mib(16);
/// Writes come no faster than this, whatever happens.
const PACE: Duration = Duration::from_millis(500);

/// The object is made again this often, in case somebody has deleted it.
const REPEAT: Duration = Duration::from_secs(600);

/// Keeps the `ZfsNode` of this node true.
#[derive(Debug)]
pub struct NodeReporter {
    /// The node and its devices.
    pub context: Arc<Context>,
    /// Told when room was taken or given back.
    pub changed: Arc<Notify>,
}

/// Runs until it is dropped.
pub async fn report_node(client: Client, reporter: NodeReporter) {
    let nodes: Api<ZfsNode> = Api::all(client.clone());
    let provisioner = Provisioner::new(reporter.context.clone());
    let name = reporter.context.node();
    let mut written: Option<ZfsNodeStatus> = None;
    let mut at = Instant::now();
    loop {
        if at.elapsed() > REPEAT {
            written = None;
        }
        let status = status(&reporter.context, &provisioner, written.as_ref()).await;
        if written.as_ref().is_none_or(|written| is_news(written, &status)) {
            match write(&client, &nodes, name, &status, written.is_none()).await {
                Ok(()) => {
                    written = Some(status);
                    at = Instant::now();
                }
                Err(error) => tracing::warn!("ZfsNode {name} can't be written now: {error}"),
            }
        }
        tokio::time::sleep(PACE).await;
        let _ = tokio::time::timeout(LOOK_EVERY, reporter.changed.notified()).await;
    }
}

async fn status(context: &Context, provisioner: &Provisioner, before: Option<&ZfsNodeStatus>) -> ZfsNodeStatus {
    let backing = |location: &Path, (room, total): (Room, Bytes)| BackingStatus {
        location: location.to_owned(),
        total: Quantity(total),
        available: Quantity(room.available),
        largest: Quantity(room.largest),
    };
    let mirrors = match context.mirror_location() {
        // One that can't be told now has no room.
        Some(location) => provisioner.capacity(Vdevs::Mirror2).await.ok().map(|found| backing(&location, found)),
        None => None,
    };
    let (ready, reason, message, backing) = match provisioner.capacity(Vdevs::Single).await {
        Ok(found) => {
            let backing = backing(context.location(), found);
            ("True", "Reachable", "the devices can be reached".to_owned(), Some(backing))
        }
        Err(error) => ("False", "Unreachable", error.to_string(), None),
    };
    let before = before.and_then(|status| status.conditions.first());
    let since = before.filter(|condition| condition.status == ready);
    let condition = Condition {
        type_: READY.into(),
        status: ready.into(),
        reason: reason.into(),
        message,
        last_transition_time: since.map_or_else(|| Time(Timestamp::now()), |since| since.last_transition_time.clone()),
        observed_generation: None,
    };
    ZfsNodeStatus { version: env!("CARGO_PKG_VERSION").into(), backing, mirrors, conditions: vec![condition] }
}

fn is_news(written: &ZfsNodeStatus, now: &ZfsNodeStatus) -> bool {
    let differs = |a: Quantity, b: Quantity| a.0.0.abs_diff(b.0.0) >= STEP.0;
    let moved = |written: &Option<BackingStatus>, now: &Option<BackingStatus>| match (written, now) {
        (Some(a), Some(b)) => {
            differs(a.available, b.available)
                || differs(a.largest, b.largest)
                || differs(a.total, b.total)
                || a.location != b.location
        }
        (None, None) => false,
        _ => true,
    };
    moved(&written.backing, &now.backing)
        || moved(&written.mirrors, &now.mirrors)
        || written.conditions != now.conditions
        || written.version != now.version
}

async fn write(
    client: &Client,
    nodes: &Api<ZfsNode>,
    name: &str,
    status: &ZfsNodeStatus,
    first: bool,
) -> Result<(), kube::Error> {
    let params = PatchParams::apply(Manager::Node.name()).force();
    let head = json!({"apiVersion": ZfsNode::api_version(&()), "kind": ZfsNode::kind(&())});
    if first {
        let mut object = head.clone();
        object["metadata"] = json!({"name": name});
        object["spec"] = json!({});
        // Goes with the node. Its volumes stay: their devices may be there still when the machine comes back.
        if let Some(node) = Api::<Node>::all(client.clone()).get_opt(name).await? {
            let owner = OwnerReference {
                api_version: Node::api_version(&()).into(),
                kind: Node::kind(&()).into(),
                name: name.into(),
                uid: node.metadata.uid.unwrap_or_default(),
                ..OwnerReference::default()
            };
            object["metadata"]["ownerReferences"] = json!([owner]);
        }
        nodes.patch(name, &params, &Patch::Apply(object)).await?;
    }
    let mut object = head;
    object["metadata"] = json!({"name": name});
    object["status"] = json!(status);
    nodes.patch_status(name, &params, &Patch::Apply(object)).await.map(drop)
}
