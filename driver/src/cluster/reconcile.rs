//! What the objects of a node ask for, carried out by that node.
//!
//! # Design
//! A kind of object has its [`Work`]. What all have in common is here: only the node's own objects are touched, and an
//! object's end means the end of the data only where it says so (`spec.destroy`). How long something takes is a tenant's
//! affair as well, so nothing is waited for at a place that others need: see [`queues::Queues`].

mod queues;
mod snapshots;
mod volumes;

pub use snapshots::reconcile_snapshots;
pub use volumes::reconcile_volumes;

use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures_util::StreamExt as _;
use kube::runtime::controller::{Action, Config};
use kube::runtime::{Controller, watcher};
use kube::{Api, Client, ResourceExt as _};
use zpod_kubernetes::{DESTROYED, Kept, KubeCatalog, READY, Remark};
use zpod_storage::catalog::Record;

use queues::{Queues, Version};

use super::reasons::{is_in_use, reason};
use crate::volumes::VolumeError;

/// Objects of a kind looked at at the same time. What takes longer than a moment goes on without a place.
const CONCURRENCY: u16 = 16;
/// What can't be done now is tried again after this long ...
const RETRY: Duration = Duration::from_secs(2);
/// ... and where a pod has to end first, after this.
const RETRY_IN_USE: Duration = Duration::from_secs(5);
/// What is not found is looked for again after this long: its disk may come back.
const RETRY_MISSING: Duration = Duration::from_secs(30);
/// An object that was deleted by hand is looked at again after this long.
const RETRY_BLOCKED: Duration = Duration::from_secs(300);

type Id<K> = <<K as Kept>::Record as Record>::Id;

/// What is done for the objects of a kind.
#[async_trait]
trait Work<K: Kept>: Send + Sync + 'static {
    /// The volume that an object is of.
    fn volume(&self, object: &K) -> String;

    /// The objects.
    fn catalog(&self) -> &KubeCatalog<K>;

    /// Does what the spec asks for, if it isn't done yet. `leaving`: somebody has deleted the object by hand, and what it
    /// stands for is in use as before.
    async fn carry_out(&self, object: &K, id: Id<K>, leaving: bool) -> Result<Action, VolumeError>;

    /// Destroys what the object stands for, and lets it go.
    async fn destroy(&self, id: Id<K>) -> Result<(), VolumeError>;

    /// That what the object stands for is on this node.
    async fn find(&self, id: Id<K>) -> Result<(), VolumeError>;

    /// Takes up what the object stands for, now that it was made anew.
    async fn adopted(&self, id: Id<K>) -> Result<(), VolumeError>;

    /// Lets an object go that somebody has deleted, where nothing was ever made of what it asks for. Whether it did.
    async fn let_go(&self, object: &K, id: Id<K>) -> Result<bool, VolumeError>;

    /// What is said of an object that somebody has deleted by hand.
    fn keeps(&self, id: Id<K>) -> String;
}

/// Works for ever.
async fn run<K: Kept, W: Work<K>>(client: Client, node: String, work: W) {
    let config = watcher::Config::default().fields(&format!("spec.nodeName={node}"));
    let context = Arc::new(Looking { node, work: Arc::new(work), queues: Arc::default() });
    Controller::new(Api::<K>::all(client), config)
        .with_config(Config::default().concurrency(CONCURRENCY))
        .run(
            async |object, context| look(object, context).await,
            |_, error, _| {
                tracing::warn!("{error}");
                Action::requeue(RETRY)
            },
            context,
        )
        .for_each(|done| async move {
            if let Err(error) = done {
                tracing::debug!("reconcile: {error}");
            }
        })
        .await;
}

/// What is needed to look at an object.
struct Looking<W> {
    node: String,
    work: Arc<W>,
    queues: Arc<Queues>,
}

async fn look<K: Kept, W: Work<K>>(object: Arc<K>, context: Arc<Looking<W>>) -> Result<Action, VolumeError> {
    if object.node() != context.node {
        return Ok(Action::await_change());
    }
    let name = object.name_any();
    let Ok(id) = name.parse::<Id<K>>() else {
        tracing::warn!("{} {name} is none of ours: its name is not an id", K::kind(&()));
        return Ok(Action::await_change());
    };
    let (work, volume) = (context.work.clone(), context.work.volume(&object));
    let version = Version { name, generation: object.meta().generation };
    context.queues.work(volume, version, async move { carry_out(work.as_ref(), &object, id).await }).await
}

async fn carry_out<K: Kept, W: Work<K>>(work: &W, object: &K, id: Id<K>) -> Result<Action, VolumeError> {
    let leaving = object.meta().deletion_timestamp.is_some();
    if leaving && object.is_to_be_destroyed() {
        return destroy(work, id).await;
    }
    if leaving {
        if work.let_go(object, id).await? {
            return Ok(Action::await_change());
        }
        say(work.catalog(), id, None, DESTROYED, "NotAskedFor", work.keeps(id)).await?;
    } else if object.is_to_be_adopted() {
        return adopt(work, object, id).await;
    }
    let action = work.carry_out(object, id, leaving).await?;
    Ok(if leaving && action == Action::await_change() { Action::requeue(RETRY_BLOCKED) } else { action })
}

/// Takes over what this node had recorded before somebody deleted the object, which was then made anew. Nothing is made: data
/// that can't be found is missed, and not replaced by an empty device.
async fn adopt<K: Kept, W: Work<K>>(work: &W, object: &K, id: Id<K>) -> Result<Action, VolumeError> {
    let kind = K::Record::KIND;
    if let Err(error) = work.find(id).await {
        say(work.catalog(), id, None, READY, reason(&error), error.to_string()).await?;
        tracing::warn!(%id, "{kind} made anew, but what it stands for is not found: {error}");
        return Ok(Action::requeue(RETRY_MISSING));
    }
    work.adopted(id).await?;
    let message = format!("it is on node {}, as it was before the object was deleted and made anew", object.node());
    work.catalog().remark(id, None, &Remark { kind: READY, holds: true, reason: "Adopted", message }).await?;
    tracing::info!(%id, "{kind} made anew, and taken over");
    Ok(Action::await_change())
}

async fn destroy<K: Kept, W: Work<K>>(work: &W, id: Id<K>) -> Result<Action, VolumeError> {
    let kind = K::Record::KIND;
    let Err(error) = work.destroy(id).await else {
        tracing::info!(%id, "{kind} destroyed, as was asked for");
        return Ok(Action::await_change());
    };
    say(work.catalog(), id, None, DESTROYED, reason(&error), error.to_string()).await?;
    if is_in_use(&error) { Ok(Action::requeue(RETRY_IN_USE)) } else { Err(error) }
}

/// Says that something does not hold, and why.
async fn say<K: Kept>(
    catalog: &KubeCatalog<K>,
    id: Id<K>,
    phase: Option<K::Phase>,
    kind: &'static str,
    reason: &'static str,
    message: String,
) -> Result<(), VolumeError> {
    Ok(catalog.remark(id, phase, &Remark { kind, holds: false, reason, message }).await?)
}
