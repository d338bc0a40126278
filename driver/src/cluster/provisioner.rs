use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use k8s_openapi::api::core::v1::PersistentVolumeClaim;
use kube::runtime::wait::Condition as Wait;
use kube::{Api, Client};
use zpod_kubernetes::crd::{Phase, ZfsSnapshot, ZfsVolume};
use zpod_kubernetes::{CLAIM_UID, DESTROYED, EXPANDED, Kept as _, KubeCatalog, MODIFIED, READY};
use zpod_storage::backing::Outcome;
use zpod_storage::catalog::{Catalog as _, CatalogError, Created, Phase as RecordPhase, SnapshotPhase, Source, Volume};
use zpod_storage::crash;
use zpod_volume::{Bytes, Vdevs, VolumeAttributes, VolumeId};

use super::Nodes;
use super::answers::{ANY_NODE, Wanted, condition, refusal, said_now, said_since, wait, words};
use super::reasons::TOO_LARGE;
use crate::volumes::{
    Bounds, CLAIM_NAME, CLAIM_NAMESPACE, CapacityRange, CreateRequest, Probe, Provision, Room, VolumeError, VolumePage,
    check_access, check_attributes, same,
};

/// Makes, deletes, grows and lists volumes by their objects, which the nodes carry out.
#[derive(Clone)]
pub struct ClusterProvisioner {
    client: Client,
    catalog: KubeCatalog<ZfsVolume>,
    snapshots: KubeCatalog<ZfsSnapshot>,
    nodes: Arc<Nodes>,
    /// How long a node is waited for. Less than the sidecars' deadline, so that they hear why.
    patience: Duration,
    /// Whether containers may have ZFS itself.
    access: bool,
}

impl fmt::Debug for ClusterProvisioner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClusterProvisioner").field("nodes", &self.nodes).finish_non_exhaustive()
    }
}

impl ClusterProvisioner {
    /// A provisioner of this cluster.
    pub fn new(client: Client, nodes: Arc<Nodes>, patience: Duration) -> Self {
        let (catalog, snapshots) = (KubeCatalog::of_cluster(client.clone()), KubeCatalog::of_cluster(client.clone()));
        Self { catalog, snapshots, client, nodes, patience, access: false }
    }

    /// Allows volumes with `zfsAccess: volume`, or forbids them, as it is at first.
    #[must_use]
    pub fn allowing_zfs_access(self, allowed: bool) -> Self {
        Self { access: allowed, ..self }
    }

    /// The object of a volume that exists.
    async fn find(&self, id: VolumeId) -> Result<ZfsVolume, VolumeError> {
        self.catalog.object(id).await?.ok_or_else(|| self.not_found(&id.to_string()))
    }

    async fn wait(
        &self,
        id: VolumeId,
        node: &str,
        what: &'static str,
        done: impl Wait<ZfsVolume>,
    ) -> Result<Option<ZfsVolume>, VolumeError> {
        wait(&self.catalog, id, Wanted { node, what, within: self.patience }, done).await
    }

    /// What the node says of a volume that it has not made yet.
    async fn not_yet(&self, id: VolumeId) -> Option<VolumeError> {
        let object = self.catalog.object(id).await.ok()??;
        let said = condition(&object, READY).filter(|_| said_now(&object, READY))?;
        Some(VolumeError::NodeAtWork { reason: words(&said) })
    }

    /// What is asked of a volume made from a source.
    async fn bounds(&self, source: Source) -> Result<Bounds, VolumeError> {
        match source {
            Source::Snapshot(id) => {
                let not_found = || VolumeError::SnapshotNotFound { id: id.to_string(), node: ANY_NODE.into() };
                let object = self.snapshots.object(id).await?.ok_or_else(not_found)?;
                let snapshot = object.record()?;
                let ready = snapshot.phase == SnapshotPhase::Ready && object.metadata.deletion_timestamp.is_none();
                let contents = snapshot.contents.filter(|_| ready).ok_or(VolumeError::SnapshotNotReady {
                    id,
                    state: "not there yet, or not any more",
                    remedy: "wait until it is ready to use",
                })?;
                Ok(Bounds {
                    capacity: contents.capacity,
                    node: snapshot.node,
                    encryption: contents.encryption,
                    mode: contents.mode,
                })
            }
            Source::Volume(id) => {
                let volume = usable(&self.find(id).await?)?;
                if volume.phase != RecordPhase::Ready {
                    let (state, remedy) = ("not finished yet", "wait until it is there");
                    return Err(VolumeError::NotReady { id, state, remedy });
                }
                Ok(Bounds {
                    capacity: volume.capacity,
                    node: volume.node,
                    encryption: volume.parameters.encryption,
                    mode: volume.mode,
                })
            }
        }
    }

    /// The size of a new volume and where it may be.
    async fn place(&self, request: &CreateRequest) -> Result<(Bytes, Option<Vec<String>>), VolumeError> {
        let Some(source) = request.source else {
            return Ok((request.range.choose(request.mode)?, request.nodes.clone()));
        };
        let bounds = self.bounds(source).await?;
        let capacity = bounds.choose(request, source)?;
        if request.nodes.as_ref().is_some_and(|nodes| !nodes.contains(&bounds.node)) {
            let (name, source_name) = (request.name.clone(), source.to_string());
            return Err(VolumeError::SourceElsewhere { name, source_name, home: bounds.node });
        }
        Ok((capacity, Some(vec![bounds.node])))
    }

    /// The UID of the claim, where it is the one that the volume is made for: external-provisioner names the volume after
    /// it. A claim that is gone, has another in its place, or can't be looked up, gets none.
    async fn claim_uid(&self, request: &CreateRequest) -> Option<String> {
        let (namespace, name) = (request.labels.get(CLAIM_NAMESPACE)?, request.labels.get(CLAIM_NAME)?);
        let claims: Api<PersistentVolumeClaim> = Api::namespaced(self.client.clone(), namespace);
        let asked = tokio::time::timeout(Duration::from_secs(5), claims.get_metadata_opt(name)).await.ok()?;
        let found = asked.inspect_err(|error| tracing::info!("claim {namespace}/{name}: {error}")).ok()??;
        found.metadata.uid.filter(|uid| !uid.is_empty() && request.name.ends_with(uid.as_str()))
    }

    async fn record(&self, request: &CreateRequest) -> Result<Volume, VolumeError> {
        let id = VolumeId::from_name(&request.name);
        if let Some(object) = self.catalog.object(id).await? {
            return same(usable(&object)?, request);
        }
        let (capacity, nodes) = self.place(request).await?;
        self.nodes.listed().await.map_err(VolumeError::CutShort)?;
        let node = self
            .nodes
            .choose(nodes.as_deref(), capacity, request.parameters.vdevs)
            .map_err(|reason| VolumeError::NoNode { name: request.name.clone(), reason })?;
        let mut labels = request.labels.clone();
        if let Some(uid) = self.claim_uid(request).await {
            labels.insert(CLAIM_UID.to_owned(), uid);
        }
        let volume = Volume {
            labels,
            attributes: request.attributes.clone(),
            mode: request.mode,
            source: request.source,
            ..Volume::wanted(&request.name, capacity, request.parameters.clone(), &node)
        };
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
        check_attributes(request.mode, &request.attributes)?;
        check_access(&request.parameters, request.mode, self.access, || format!("volume {:?}", request.name))?;
        let volume = self.record(&request).await?;
        if volume.phase == RecordPhase::Ready {
            return Ok(volume);
        }
        crash::point("cluster create: recorded");
        let (id, node) = (volume.id, volume.node);
        let answered = |object: Option<&ZfsVolume>| match object {
            None => true,
            Some(object) => object.metadata.deletion_timestamp.is_some() || phase(object).is_some(),
        };
        let made = match self.wait(id, &node, "made", answered).await {
            Err(silent @ VolumeError::NodeSilent { .. }) => return Err(self.not_yet(id).await.unwrap_or(silent)),
            made => made?,
        };
        let object = made.ok_or_else(|| CatalogError::not_found::<Volume>(id))?;
        if phase(&object) == Some(Phase::Refused) {
            // Nothing was made there: the name is free for another node. Were there anything, the node would keep it.
            self.catalog.discard(&object).await?;
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
            let wanted = CapacityRange { required: Some(wanted), ..range }.choose(volume.mode)?;
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
                let too_large = condition(&object, EXPANDED).filter(|said| said.reason == TOO_LARGE);
                return Err(match too_large {
                    // It can't go elsewhere.
                    Some(said) => VolumeError::OutOfRange { reason: said.message },
                    None => refusal(&object, EXPANDED, &volume.node),
                });
            }
        }
        Ok(object.record()?)
    }

    async fn modify(&self, id: VolumeId, changes: VolumeAttributes) -> Result<Volume, VolumeError> {
        let object = self.find(id).await?;
        let volume = usable(&object)?;
        check_attributes(volume.mode, &changes)?;
        if volume.phase != RecordPhase::Ready {
            return Err(VolumeError::NotReady {
                id,
                state: "not finished yet",
                remedy: "let CreateVolume be repeated",
            });
        }
        let object = self.catalog.want_attributes(&object, &changes).await?;
        crash::point("cluster modify: asked");
        if has_taken_over(&object, &changes, None) {
            return Ok(object.record()?);
        }
        let (generation, wanted) = (object.metadata.generation, changes.clone());
        let answered = move |object: Option<&ZfsVolume>| {
            object.is_none_or(|object| {
                has_taken_over(object, &wanted, generation) || said_since(object, MODIFIED, generation)
            })
        };
        let object =
            self.wait(id, &volume.node, "modified", answered).await?.ok_or_else(|| self.not_found(&id.to_string()))?;
        if said_since(&object, MODIFIED, generation) {
            return Err(refusal(&object, MODIFIED, &volume.node));
        }
        Ok(object.record()?)
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

    async fn room(&self, node: Option<&str>, vdevs: Vdevs) -> Result<Room, VolumeError> {
        self.nodes.listed().await.map_err(VolumeError::CutShort)?;
        Ok(self.nodes.room(node, vdevs))
    }

    fn not_found(&self, id: &str) -> VolumeError {
        VolumeError::NotFound { id: crate::guest::clean(id, 128), node: ANY_NODE.into() }
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

/// The record of a volume that is there or is being made.
fn usable(object: &ZfsVolume) -> Result<Volume, VolumeError> {
    let volume = object.record()?;
    if object.metadata.deletion_timestamp.is_none() {
        return Ok(volume);
    }
    let remedy = if object.spec.destroy {
        "let DeleteVolume be repeated until it succeeds"
    } else if object.is_unmade() {
        "it was never made, and its record is on its way out: repeat the call"
    } else {
        "somebody deleted its ZfsVolume by hand: `kubectl zpod adopt` undoes that"
    };
    Err(VolumeError::NotReady { id: volume.id, state: "being deleted", remedy })
}

/// Whether the node has taken over these attributes, and has said so of this generation of the spec or a later one. Before
/// anything was asked for (`None`), it may have said nothing.
fn has_taken_over(object: &ZfsVolume, changes: &VolumeAttributes, since: Option<i64>) -> bool {
    let taken = object.status.as_ref().is_some_and(|status| {
        changes.iter().all(|(key, value)| status.attributes.get(key).is_some_and(|taken| taken == value))
    });
    let said = match condition(object, MODIFIED) {
        Some(said) => said.status == "True" && said.observed_generation >= since,
        None => since.is_none(),
    };
    taken && said
}

fn holds(object: &ZfsVolume, wanted: Bytes) -> bool {
    object.status.as_ref().and_then(|status| status.capacity).is_some_and(|capacity| capacity.0 >= wanted)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::fake::{Answers, volume};
    use crate::csi::to_status;
    use serde_json::{Value, json};

    const KIND: &str = "/apis/zpod.storage/v1alpha1/zfsvolumes";

    /// A volume that is asked for, of which its node says this.
    fn asked_for(status: Value) -> (Volume, Answers, ClusterProvisioner) {
        let wanted = volume("data");
        let object = json!({
            "apiVersion": "zpod.storage/v1alpha1", "kind": "ZfsVolume",
            "metadata": {"name": wanted.id.to_string(), "generation": 1, "resourceVersion": "1", "uid": "u"},
            "spec": {"volumeName": wanted.name, "nodeName": "n1", "capacity": "1Gi", "parameters": wanted.parameters},
            "status": status,
        });
        let list = json!({"apiVersion": "zpod.storage/v1alpha1", "kind": "ZfsVolumeList",
                          "metadata": {"resourceVersion": "1"}, "items": [object.clone()]});
        let api = Answers::default().with(KIND, list).with(&format!("{KIND}/{}", wanted.id), object);
        let nodes = Arc::new(Nodes::watch(api.client()));
        let provisioner = ClusterProvisioner::new(api.client(), nodes, Duration::from_secs(8));
        (wanted, api, provisioner)
    }

    /// What CreateVolume says of a volume that is not made in time.
    async fn create(said: Value) -> (tonic::Code, String) {
        let (wanted, _, provisioner) = asked_for(json!({"conditions": said}));
        let request = CreateRequest {
            name: wanted.name,
            range: CapacityRange { required: Some(Bytes::gib(1)), limit: None },
            parameters: wanted.parameters,
            nodes: None,
            labels: Default::default(),
            attributes: Default::default(),
            mode: Default::default(),
            source: None,
            inline: None,
        };
        let status = to_status(&provisioner.create(request).await.unwrap_err());
        (status.code(), status.message().to_owned())
    }

    fn ready(status: &str, generation: i64, message: &str) -> Value {
        json!([{"type": "Ready", "status": status, "reason": "Copying", "message": message, "observedGeneration": generation,
                "lastTransitionTime": "2026-01-01T00:00:00Z"}])
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_not_made_in_time_is_answered_with_what_its_node_says_of_it() {
        let message = "volume x is being copied in full: 3 GiB of 9 GiB are done";
        let (code, text) = create(ready("False", 1, message)).await;
        // Not final: external-provisioner asks again, and forgets nothing.
        assert_eq!((code, text.as_str()), (tonic::Code::Aborted, message));
        for said in [json!([]), ready("False", 0, "of an earlier time")] {
            let (code, text) = create(said).await;
            assert!(code == tonic::Code::DeadlineExceeded && text.contains("node n1 has not answered"), "{text}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_a_node_writes_at_the_same_time_makes_no_request_fail() {
        let (volume, api, provisioner) = asked_for(json!({"phase": "Ready", "capacity": "1Gi", "revision": 1}));
        let silent = |error: VolumeError| assert!(matches!(error, VolumeError::NodeSilent { .. }), "{error}");
        let more = CapacityRange { required: Some(Bytes::gib(2)), limit: None };
        api.conflict(2);
        silent(provisioner.expand(volume.id, more).await.unwrap_err());
        let written: Vec<_> = api.writes().iter().map(|asked| asked.body["spec"]["capacity"].clone()).collect();
        assert_eq!(written, ["2Gi", "2Gi", "2Gi"]);

        api.conflict(1);
        let changes = VolumeAttributes::parse([("compression", "zstd")]).unwrap();
        silent(provisioner.modify(volume.id, changes).await.unwrap_err());
        let written: Vec<_> =
            api.writes().iter().map(|asked| asked.body["spec"]["attributes"]["compression"].clone()).collect();
        assert_eq!(written, ["zstd", "zstd"]);

        // Somebody who never lets it be.
        api.conflict(usize::MAX);
        let error = to_status(&provisioner.expand(volume.id, more).await.unwrap_err());
        assert_eq!(error.code(), tonic::Code::Aborted);
    }
}
