use std::fmt;
use std::future::Future;
use std::time::Duration;

use async_trait::async_trait;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition as KubeCondition, Time};
use k8s_openapi::jiff::Timestamp;
use kube::api::{Api, DeleteParams, ListParams, Patch, PatchParams, PostParams};
use kube::{Client, Resource as _, ResourceExt as _};
use serde_json::json;
use zpod_storage::catalog::{Catalog, CatalogError, Created, Page, Volume};
use zpod_storage::crash;
use zpod_volume::{Bytes, VolumeId};

use crate::Quantity;
use crate::crd::{FINALIZER, Manager, Phase, ZfsVolume, ZfsVolumeStatus};
use crate::record::{conditions_of_node, node_status, spec_of, volume_of};

/// How long one request may take.
pub(crate) const PATIENCE: Duration = Duration::from_secs(10);
/// How often a write is tried again that another owner of the object came before.
const TRIES: usize = 8;
/// Objects the API server is asked for at once.
const PAGE: u32 = 500;

/// The catalog in Kubernetes: one [`ZfsVolume`] for each volume.
///
/// # Design
/// Reads go to the API server, not to a cache: what is decided on them is whether data may be written over. A node's
/// record counts its own changes (`status.revision`), so that another owner's write to the same object, such as the
/// usage of the pool, is no conflict.
#[derive(Clone)]
pub struct KubeCatalog {
    volumes: Api<ZfsVolume>,
    /// The node whose volumes [`Catalog::list`] gives; all where there is none.
    node: Option<String>,
}

impl fmt::Debug for KubeCatalog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KubeCatalog").field("node", &self.node).finish_non_exhaustive()
    }
}

/// What a node says of itself and a volume besides its record, for people and for the controller.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Remark {
    /// The condition's type.
    pub kind: &'static str,
    /// Whether it holds.
    pub holds: bool,
    /// A word in CamelCase.
    pub reason: &'static str,
    /// For a person.
    pub message: String,
}

impl KubeCatalog {
    /// The volumes of one node.
    pub fn of_node(client: Client, node: &str) -> Self {
        Self { volumes: Api::all(client), node: Some(node.to_owned()) }
    }

    /// All volumes, for the controller.
    pub fn of_cluster(client: Client) -> Self {
        Self { volumes: Api::all(client), node: None }
    }

    /// The API it works on.
    pub fn api(&self) -> &Api<ZfsVolume> {
        &self.volumes
    }

    /// The object of a volume.
    ///
    /// # Errors
    /// When the API server can't be asked.
    pub async fn object(&self, id: VolumeId) -> Result<Option<ZfsVolume>, CatalogError> {
        request("get ZfsVolume", self.volumes.get_opt(&id.to_string())).await
    }

    /// A page of objects in the API server's own order and with its own token.
    ///
    /// # Errors
    /// [`CatalogError::Expired`] for a token that is too old or none of the API server's.
    pub async fn page(
        &self,
        token: Option<&str>,
        limit: u32,
    ) -> Result<(Vec<ZfsVolume>, Option<String>), CatalogError> {
        let mut params = ListParams::default().limit(limit);
        if let Some(token) = token {
            params = params.continue_token(token);
        }
        if let Some(node) = &self.node {
            params = params.fields(&format!("spec.nodeName={node}"));
        }
        let list = match tokio::time::timeout(PATIENCE, self.volumes.list(&params)).await {
            // 410: too old. 400: never was one.
            Ok(Err(kube::Error::Api(status))) if token.is_some() && matches!(status.code, 400 | 410) => {
                return Err(CatalogError::Expired { reason: status.message });
            }
            answer => flatten("list ZfsVolumes", answer)?,
        };
        Ok((list.items, list.metadata.continue_.filter(|token| !token.is_empty())))
    }

    /// Asks for another capacity. The node then finds the room, or says in the condition `Expanded` why it can't.
    ///
    /// # Errors
    /// When the API server can't be asked or refuses.
    pub async fn want_capacity(&self, object: &ZfsVolume, capacity: Bytes) -> Result<ZfsVolume, CatalogError> {
        let spec = crate::crd::ZfsVolumeSpec { capacity: Quantity(capacity), ..object.spec.clone() };
        self.apply_spec(object, spec).await
    }

    /// Says that the device and its data are to be destroyed, and deletes the object; it stays until the node has done
    /// so.
    ///
    /// # Errors
    /// When the API server can't be asked or refuses.
    pub async fn destroy(&self, object: &ZfsVolume) -> Result<(), CatalogError> {
        let name = object.metadata.name.as_deref().unwrap_or_default();
        if !object.spec.destroy {
            let spec = crate::crd::ZfsVolumeSpec { destroy: true, ..object.spec.clone() };
            self.apply_spec(object, spec).await?;
        }
        crash::point("cluster delete: destroy set");
        if object.metadata.deletion_timestamp.is_none() {
            let uid = object.metadata.uid.clone();
            let preconditions = Some(kube::api::Preconditions { uid, resource_version: None });
            let params = DeleteParams { preconditions, ..DeleteParams::background() };
            match tokio::time::timeout(PATIENCE, self.volumes.delete(name, &params)).await {
                Ok(Err(kube::Error::Api(status))) if status.code == 404 => {}
                answer => drop(flatten("delete ZfsVolume", answer)?),
            }
        }
        crash::point("cluster delete: deleted");
        Ok(())
    }

    /// Says something of a volume in its conditions, as its node. Changes nothing when it has been said already.
    ///
    /// # Errors
    /// When the API server can't be asked or refuses.
    pub async fn remark(&self, id: VolumeId, phase: Option<Phase>, remark: &Remark) -> Result<(), CatalogError> {
        for _ in 0..TRIES {
            let Some(object) = self.object(id).await? else { return Ok(()) };
            let mut status = own_part(&object);
            status.phase = phase.or(status.phase);
            set(&mut status.conditions, remark, object.metadata.generation);
            if self.apply_status(&object, status).await?.is_some() {
                return Ok(());
            }
        }
        Err(CatalogError::conflict::<Volume>(id))
    }

    async fn apply_spec(&self, object: &ZfsVolume, spec: crate::crd::ZfsVolumeSpec) -> Result<ZfsVolume, CatalogError> {
        let name = object.metadata.name.as_deref().unwrap_or_default();
        let id = id_of(object)?;
        let mut metadata = json!({"name": name, "resourceVersion": object.metadata.resource_version});
        // What an apply leaves out it gives up; and nobody may add a finalizer to an object on its way out.
        if object.metadata.deletion_timestamp.is_none() || object.finalizers().iter().any(|each| each == FINALIZER) {
            metadata["finalizers"] = json!([FINALIZER]);
        }
        let body = json!({
            "apiVersion": ZfsVolume::api_version(&()), "kind": ZfsVolume::kind(&()), "metadata": metadata, "spec": spec,
        });
        let params = PatchParams::apply(Manager::Controller.name()).force();
        match tokio::time::timeout(PATIENCE, self.volumes.patch(name, &params, &Patch::Apply(body))).await {
            Ok(Err(kube::Error::Api(status))) if status.code == 409 => Err(CatalogError::conflict::<Volume>(id)),
            Ok(Err(kube::Error::Api(status))) if status.code == 404 => Err(CatalogError::not_found::<Volume>(id)),
            answer => flatten("change ZfsVolume", answer),
        }
    }

    /// Writes the node's part of the status of the object as it was read; `None` when it has changed since.
    async fn apply_status(
        &self,
        object: &ZfsVolume,
        mut status: ZfsVolumeStatus,
    ) -> Result<Option<ZfsVolume>, CatalogError> {
        let id = id_of(object)?;
        status.observed_generation = object.metadata.generation;
        if status == own_part(object) {
            return Ok(Some(object.clone()));
        }
        let (name, version) = (id.to_string(), &object.metadata.resource_version);
        let body = json!({
            "apiVersion": ZfsVolume::api_version(&()), "kind": ZfsVolume::kind(&()),
            "metadata": {"name": name, "resourceVersion": version}, "status": status,
        });
        let params = PatchParams::apply(Manager::Node.name()).force();
        match tokio::time::timeout(PATIENCE, self.volumes.patch_status(&name, &params, &Patch::Apply(body))).await {
            Ok(Err(kube::Error::Api(status))) if status.code == 409 => Ok(None),
            Ok(Err(kube::Error::Api(status))) if status.code == 404 => Err(CatalogError::not_found::<Volume>(id)),
            answer => flatten("write the status of ZfsVolume", answer).map(Some),
        }
    }
}

#[async_trait]
impl Catalog for KubeCatalog {
    async fn create(&self, volume: Volume) -> Result<Created, CatalogError> {
        let id = volume.id;
        let mut object = ZfsVolume::new(&id.to_string(), spec_of(&volume));
        object.metadata.finalizers = Some(vec![FINALIZER.to_owned()]);
        let params = PostParams { field_manager: Some(Manager::Controller.name().to_owned()), ..PostParams::default() };
        match tokio::time::timeout(PATIENCE, self.volumes.create(&params, &object)).await {
            Ok(Err(kube::Error::Api(status))) if status.code == 409 => {
                let existing = self.get(id).await?.ok_or(CatalogError::conflict::<Volume>(id))?;
                Ok(Created::Existed(existing))
            }
            answer => Ok(Created::Created(volume_of(&flatten("create ZfsVolume", answer)?)?)),
        }
    }

    async fn get(&self, id: VolumeId) -> Result<Option<Volume>, CatalogError> {
        self.object(id).await?.as_ref().map(volume_of).transpose()
    }

    async fn update(&self, volume: Volume) -> Result<Volume, CatalogError> {
        for _ in 0..TRIES {
            let object = self.object(volume.id).await?.ok_or(CatalogError::not_found::<Volume>(volume.id))?;
            let found = volume_of(&object)?;
            if found.revision != volume.revision {
                return Err(CatalogError::conflict::<Volume>(volume.id));
            }
            // What guests say has another owner (`Manager::State`), and what was asked for another still.
            if (Volume { condition: None, labels: found.labels.clone(), ..volume.clone() })
                == (Volume { condition: None, ..found.clone() })
            {
                return Ok(Volume { condition: volume.condition, ..found });
            }
            let status = node_status(&object, &volume);
            if let Some(stored) = self.apply_status(&object, status).await? {
                return Ok(Volume { condition: volume.condition, ..volume_of(&stored)? });
            }
        }
        Err(CatalogError::conflict::<Volume>(volume.id))
    }

    async fn remove(&self, id: VolumeId) -> Result<(), CatalogError> {
        for _ in 0..TRIES {
            let Some(object) = self.object(id).await? else { return Ok(()) };
            let Some(finalizers) = object.metadata.finalizers else { return Ok(()) };
            let left: Vec<_> = finalizers.iter().filter(|finalizer| *finalizer != FINALIZER).collect();
            let body = json!({"metadata": {"finalizers": left, "resourceVersion": object.metadata.resource_version}});
            let params = PatchParams { field_manager: Some(Manager::Node.name().into()), ..PatchParams::default() };
            let (name, body) = (id.to_string(), Patch::Merge(body));
            let patch = self.volumes.patch(&name, &params, &body);
            match tokio::time::timeout(PATIENCE, patch).await {
                Ok(Err(kube::Error::Api(status))) if status.code == 409 => {}
                Ok(Err(kube::Error::Api(status))) if status.code == 404 => return Ok(()),
                answer => return flatten("let ZfsVolume go", answer).map(drop),
            }
        }
        Err(CatalogError::conflict::<Volume>(id))
    }

    async fn list(&self, from: Option<VolumeId>, limit: usize) -> Result<Page, CatalogError> {
        // A node has few, and the API server gives names in their order, which is that of the ids.
        let (mut volumes, mut token) = (Vec::new(), None::<String>);
        loop {
            let (objects, next) = self.page(token.as_deref(), PAGE).await?;
            for object in &objects {
                match volume_of(object) {
                    Ok(volume) if from.is_none_or(|from| volume.id >= from) => volumes.push(volume),
                    Ok(_) => {}
                    Err(error) => tracing::warn!("{error}"),
                }
            }
            token = next;
            if token.is_none() || volumes.len() > limit {
                break;
            }
        }
        let next = volumes.get(limit).map(|volume| volume.id);
        volumes.truncate(limit);
        Ok(Page { records: volumes, next })
    }
}

/// The part of the status that the node owns.
fn own_part(object: &ZfsVolume) -> ZfsVolumeStatus {
    let mut status = object.status.clone().unwrap_or_default();
    status.pool = None;
    status.conditions = conditions_of_node(&status.conditions);
    status
}

/// Sets a condition; its time changes only when it does.
pub(crate) fn set(conditions: &mut Vec<KubeCondition>, remark: &Remark, generation: Option<i64>) {
    let status = if remark.holds { "True" } else { "False" };
    let existing = conditions.iter().position(|condition| condition.type_ == remark.kind);
    let since = existing
        .and_then(|index| conditions.get(index))
        .filter(|condition| condition.status == status)
        .map_or_else(|| Time(Timestamp::now()), |condition| condition.last_transition_time.clone());
    let condition = KubeCondition {
        type_: remark.kind.to_owned(),
        status: status.to_owned(),
        reason: remark.reason.to_owned(),
        // metav1.Condition: at most 32768 characters.
        message: remark.message.chars().take(2048).collect(),
        last_transition_time: since,
        observed_generation: generation,
    };
    match existing.and_then(|index| conditions.get_mut(index)) {
        Some(place) => *place = condition,
        None => conditions.push(condition),
    }
}

fn id_of(object: &ZfsVolume) -> Result<VolumeId, CatalogError> {
    let name = object.metadata.name.as_deref().unwrap_or_default();
    name.parse().map_err(|_| CatalogError::Unreadable {
        what: format!("ZfsVolume {name}"),
        reason: "its name is not a volume's id".into(),
    })
}

/// Whether an HTTP status says no to the request, and asking again won't help. 429 asks for patience only.
pub fn is_refusal(code: u16) -> bool {
    matches!(code, 400..=428 | 430..=499)
}

/// Sends a request, and waits no longer than [`PATIENCE`].
pub(crate) async fn request<T>(
    what: &'static str,
    call: impl Future<Output = Result<T, kube::Error>>,
) -> Result<T, CatalogError> {
    flatten(what, tokio::time::timeout(PATIENCE, call).await)
}

fn flatten<T>(
    what: &'static str,
    answer: Result<Result<T, kube::Error>, tokio::time::error::Elapsed>,
) -> Result<T, CatalogError> {
    match answer {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(kube::Error::Api(status))) if is_refusal(status.code) => {
            Err(CatalogError::Forbidden { what, reason: format!("{} ({})", status.message, status.code) })
        }
        Ok(Err(error)) => Err(CatalogError::Unavailable { what, reason: error.to_string() }),
        Err(_) => Err(CatalogError::Unavailable { what, reason: format!("no answer in {PATIENCE:?}") }),
    }
}
