use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use k8s_openapi::api::core::v1::PersistentVolumeClaim;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::runtime::wait::{Condition as Wait, await_condition};
use kube::{Api, Client};
use tokio::time::Instant;
use zpod_kubernetes::crd::{Phase, ZfsVolume};
use zpod_kubernetes::{CLAIM_UID, DESTROYED, EXPANDED, Kept as _, KubeCatalog, READY};
use zpod_storage::backing::Outcome;
use zpod_storage::catalog::{Catalog as _, CatalogError, Created, Phase as RecordPhase, Volume};
use zpod_storage::crash;
use zpod_volume::{Bytes, VolumeId};

use super::Nodes;
use crate::volumes::{
    CLAIM_NAME, CLAIM_NAMESPACE, CapacityRange, CreateRequest, Probe, Provision, Room, VolumeError, VolumePage, same,
};

/// Makes, deletes, grows and lists volumes by their objects, which the nodes carry out.
#[derive(Clone)]
pub struct ClusterProvisioner {
    client: Client,
    catalog: KubeCatalog<ZfsVolume>,
    nodes: Arc<Nodes>,
    /// How long a node is waited for. Less than the sidecars' deadline, so that they hear why.
    patience: Duration,
}

impl fmt::Debug for ClusterProvisioner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClusterProvisioner").field("nodes", &self.nodes).finish_non_exhaustive()
    }
}

impl ClusterProvisioner {
    /// A provisioner of this cluster.
    pub fn new(client: Client, nodes: Arc<Nodes>, patience: Duration) -> Self {
        Self { catalog: KubeCatalog::of_cluster(client.clone()), client, nodes, patience }
    }

    /// The object of a volume that exists.
    async fn find(&self, id: VolumeId) -> Result<ZfsVolume, VolumeError> {
        self.catalog.object(id).await?.ok_or_else(|| self.not_found(&id.to_string()))
    }

    /// Waits until the object is as wanted, or gone; `None` for gone.
    async fn wait(
        &self,
        id: VolumeId,
        node: &str,
        what: &'static str,
        done: impl Wait<ZfsVolume>,
    ) -> Result<Option<ZfsVolume>, VolumeError> {
        let begun = Instant::now();
        let name = id.to_string();
        let waiting = await_condition(self.catalog.api().clone(), &name, done);
        match tokio::time::timeout(self.patience, waiting).await {
            Ok(Ok(object)) => Ok(object),
            Ok(Err(error)) => {
                Err(CatalogError::Unavailable { what: "watch ZfsVolume", reason: error.to_string() }.into())
            }
            Err(_) => Err(VolumeError::NodeSilent { id, node: node.to_owned(), what, waited: begun.elapsed() }),
        }
    }

    /// The UID of the claim, for the events on it. A claim that is gone, or can't be looked up, gets none.
    async fn claim_uid(&self, request: &CreateRequest) -> Option<String> {
        let (namespace, name) = (request.labels.get(CLAIM_NAMESPACE)?, request.labels.get(CLAIM_NAME)?);
        let claims: Api<PersistentVolumeClaim> = Api::namespaced(self.client.clone(), namespace);
        let asked = tokio::time::timeout(Duration::from_secs(5), claims.get_metadata_opt(name)).await.ok()?;
        asked.inspect_err(|error| tracing::info!("claim {namespace}/{name}: {error}")).ok()??.metadata.uid
    }

    async fn record(&self, request: &CreateRequest, capacity: Bytes) -> Result<Volume, VolumeError> {
        let id = VolumeId::from_name(&request.name);
        if let Some(object) = self.catalog.object(id).await? {
            return same(usable(&object)?, request);
        }
        self.nodes.listed().await.map_err(VolumeError::CutShort)?;
        let node = self
            .nodes
            .choose(request.nodes.as_deref(), capacity)
            .map_err(|reason| VolumeError::NoNode { name: request.name.clone(), reason })?;
        let mut labels = request.labels.clone();
        if let Some(uid) = self.claim_uid(request).await {
            labels.insert(CLAIM_UID.to_owned(), uid);
        }
        let volume = Volume { labels, ..Volume::wanted(&request.name, capacity, request.parameters.clone(), &node) };
        crash::point("cluster create: begin");
        match self.catalog.create(volume).await? {
            Created::Created(volume) => Ok(volume),
            Created::Existed(volume) => same(volume, request),
        }
    }
}

#[async_trait]
impl Provision for ClusterProvisioner {
    async fn create(&self, request: CreateRequest) -> Result<Volume, VolumeError> {
        let capacity = request.range.choose()?;
        let volume = self.record(&request, capacity).await?;
        if volume.phase == RecordPhase::Ready {
            return Ok(volume);
        }
        crash::point("cluster create: recorded");
        let (id, node) = (volume.id, volume.node);
        let answered = |object: Option<&ZfsVolume>| match object {
            None => true,
            Some(object) => object.metadata.deletion_timestamp.is_some() || phase(object).is_some(),
        };
        let Some(object) = self.wait(id, &node, "made", answered).await? else {
            return Err(CatalogError::not_found::<Volume>(id).into());
        };
        if phase(&object) == Some(Phase::Refused) {
            // Nothing was made there: the name is free for another node.
            self.catalog.destroy(&object).await?;
            return Err(refusal(&object, READY, &node));
        }
        same(usable(&object)?, &request)
    }

    async fn delete(&self, id: VolumeId) -> Result<Outcome, VolumeError> {
        let Some(object) = self.catalog.object(id).await? else { return Ok(Outcome::Unchanged) };
        crash::point("cluster delete: begin");
        self.catalog.destroy(&object).await?;
        let node = object.spec.node_name.clone();
        let answered = |object: Option<&ZfsVolume>| {
            object.is_none_or(|object| said_since(object, DESTROYED, object.metadata.generation))
        };
        match self.wait(id, &node, "destroyed", answered).await? {
            None => Ok(Outcome::Changed),
            Some(object) => Err(refusal(&object, DESTROYED, &node)),
        }
    }

    async fn expand(&self, id: VolumeId, range: CapacityRange) -> Result<Volume, VolumeError> {
        let mut object = self.find(id).await?;
        let volume = object.record()?;
        if volume.phase != RecordPhase::Ready {
            return Err(VolumeError::NotReady {
                id,
                state: "not finished yet",
                remedy: "let CreateVolume be repeated",
            });
        }
        let wanted = range.required.unwrap_or(volume.capacity);
        if range.limit.is_some_and(|limit| limit < volume.capacity) {
            let reason = format!("volume {id} holds {} already, and volumes never shrink", volume.capacity);
            return Err(VolumeError::OutOfRange { reason });
        }
        if wanted > volume.capacity {
            let wanted = CapacityRange { required: Some(wanted), ..range }.choose()?;
            object = self.catalog.want_capacity(&object, wanted).await?;
            crash::point("cluster expand: asked");
            let generation = object.metadata.generation;
            let answered = move |object: Option<&ZfsVolume>| {
                object.is_none_or(|object| holds(object, wanted) || said_since(object, EXPANDED, generation))
            };
            object = self
                .wait(id, &volume.node, "given more room", answered)
                .await?
                .ok_or_else(|| self.not_found(&id.to_string()))?;
            if !holds(&object, wanted) {
                return Err(refusal(&object, EXPANDED, &volume.node));
            }
        }
        Ok(object.record()?)
    }

    async fn modify(&self, _: VolumeId, _: zpod_volume::VolumeAttributes) -> Result<Volume, VolumeError> {
        let reason = "attributes can't be changed through the cluster yet";
        Err(VolumeError::invalid("mutable_parameters", reason))
    }

    async fn get(&self, id: VolumeId) -> Result<Volume, VolumeError> {
        Ok(self.find(id).await?.record()?)
    }

    async fn list(&self, from: Option<String>, limit: usize) -> Result<VolumePage, VolumeError> {
        let (objects, next) = self.catalog.page(from.as_deref(), u32::try_from(limit).unwrap_or(u32::MAX)).await?;
        let mut volumes = Vec::with_capacity(objects.len());
        for object in &objects {
            match object.record() {
                Ok(volume) if volume.phase != RecordPhase::Creating => volumes.push(volume),
                Ok(_) => {}
                Err(error) => tracing::warn!("left out of a list: {error}"),
            }
        }
        Ok(VolumePage { volumes, next })
    }

    async fn room(&self, node: Option<&str>) -> Result<Room, VolumeError> {
        self.nodes.listed().await.map_err(VolumeError::CutShort)?;
        Ok(self.nodes.room(node))
    }

    fn not_found(&self, id: &str) -> VolumeError {
        VolumeError::NotFound { id: crate::guest::clean(id, 128), node: "any (there is no such ZfsVolume)".into() }
    }
}

#[async_trait]
impl Probe for ClusterProvisioner {
    async fn probe(&self) -> Result<(), String> {
        // Not whether the API server answers now: restarting this process would not help it.
        Ok(())
    }
}

fn phase(object: &ZfsVolume) -> Option<Phase> {
    object.status.as_ref()?.phase
}

fn condition<'a>(object: &'a ZfsVolume, kind: &str) -> Option<&'a Condition> {
    object.status.as_ref()?.conditions.iter().find(|condition| condition.type_ == kind)
}

/// The record of a volume that is there or is being made.
fn usable(object: &ZfsVolume) -> Result<Volume, VolumeError> {
    let volume = object.record()?;
    if object.metadata.deletion_timestamp.is_none() {
        return Ok(volume);
    }
    let remedy = if object.spec.destroy {
        "let DeleteVolume be repeated until it succeeds"
    } else {
        "somebody deleted its ZfsVolume by hand: `kubectl describe zfsvolume` says what can be done"
    };
    Err(VolumeError::NotReady { id: volume.id, state: "being deleted", remedy })
}

/// Whether the node has said no to this generation of the spec or a later one.
fn said_since(object: &ZfsVolume, kind: &str, generation: Option<i64>) -> bool {
    condition(object, kind)
        .is_some_and(|condition| condition.status == "False" && condition.observed_generation >= generation)
}

fn holds(object: &ZfsVolume, wanted: Bytes) -> bool {
    object.status.as_ref().and_then(|status| status.capacity).is_some_and(|capacity| capacity.0 >= wanted)
}

/// What the node said, as an error.
fn refusal(object: &ZfsVolume, kind: &str, node: &str) -> VolumeError {
    match condition(object, kind) {
        Some(condition) => VolumeError::NodeRefused {
            reason: condition.message.clone(),
            no_room: condition.reason == super::reconcile::NO_ROOM,
        },
        None => {
            VolumeError::NodeRefused { reason: format!("node {node} refused, and did not say why"), no_room: false }
        }
    }
}
