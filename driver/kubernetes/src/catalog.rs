mod kept;
mod snapshots;
mod volumes;

pub use kept::{Head, Kept, Requests};

use std::fmt;

use async_trait::async_trait;
use kube::api::{Api, DeleteParams, ListParams, Patch, PatchParams, PostParams, Preconditions};
use kube::{Client, ResourceExt as _};
use serde_json::json;
use tokio::time::error::Elapsed;
use zpod_storage::catalog::{Catalog, CatalogError, Created, Page, Record};
use zpod_storage::crash;

use crate::crd::{FINALIZER, Manager};
use crate::remark::{Remark, set};
use crate::request::{PATIENCE, flatten, request};

/// How often a write is tried again that another owner of the object came before.
const TRIES: usize = 8;
/// Objects the API server is asked for at once.
const PAGE: u32 = 500;

/// The catalog in Kubernetes: one object for each volume or snapshot.
///
/// # Design
/// Reads go to the API server, not to a cache: what is decided on them is whether data may be written over. A node's
/// record counts its own changes (`status.revision`), so that another owner's write to the same object, such as the
/// usage of the pool, is no conflict.
#[derive(Clone)]
pub struct KubeCatalog<K: Kept> {
    objects: Api<K>,
    /// The node whose records [`Catalog::list`] gives; all where there is none.
    node: Option<String>,
}

impl<K: Kept> fmt::Debug for KubeCatalog<K> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KubeCatalog").field("of", &K::kind(&())).field("node", &self.node).finish_non_exhaustive()
    }
}

impl<K: Kept> KubeCatalog<K> {
    /// What one node has.
    pub fn of_node(client: Client, node: &str) -> Self {
        Self { objects: Api::all(client), node: Some(node.to_owned()) }
    }

    /// All, for the controller.
    pub fn of_cluster(client: Client) -> Self {
        Self { objects: Api::all(client), node: None }
    }

    /// The API it works on.
    pub fn api(&self) -> &Api<K> {
        &self.objects
    }

    /// The object of an id.
    ///
    /// # Errors
    /// When the API server can't be asked.
    pub async fn object(&self, id: <K::Record as Record>::Id) -> Result<Option<K>, CatalogError> {
        request(K::REQUESTS.get, self.objects.get_opt(&id.to_string())).await
    }

    /// A page of objects in the API server's own order and with its own token.
    ///
    /// # Errors
    /// [`CatalogError::Expired`] for a token that is too old or none of the API server's.
    pub async fn page(&self, token: Option<&str>, limit: u32) -> Result<(Vec<K>, Option<String>), CatalogError> {
        let params = ListParams::default().limit(limit);
        let params = self.node.iter().fold(params, |params, node| params.fields(&format!("spec.nodeName={node}")));
        self.page_of(params, token).await
    }

    async fn page_of(&self, params: ListParams, token: Option<&str>) -> Result<(Vec<K>, Option<String>), CatalogError> {
        let params = token.iter().fold(params, |params, token| params.continue_token(token));
        let list = match tokio::time::timeout(PATIENCE, self.objects.list(&params)).await {
            // 410: too old. 400: never was one.
            Ok(Err(kube::Error::Api(status))) if token.is_some() && matches!(status.code, 400 | 410) => {
                return Err(CatalogError::Expired { reason: status.message });
            }
            answer => flatten(K::REQUESTS.list, answer)?,
        };
        Ok((list.items, list.metadata.continue_.filter(|token| !token.is_empty())))
    }

    /// Says that what the object stands for and its data are to be destroyed, and deletes the object; it stays until the
    /// node has done so.
    ///
    /// # Errors
    /// When the API server can't be asked or refuses.
    pub async fn destroy(&self, object: &K) -> Result<(), CatalogError> {
        self.ask(object, |spec| *K::destroy(spec) = true).await?;
        crash::point("cluster delete: destroy set");
        if object.meta().deletion_timestamp.is_none() {
            self.delete(object).await?;
        }
        crash::point("cluster delete: deleted");
        Ok(())
    }

    /// Says something of a volume or snapshot in its conditions, as its node. Changes nothing when it has been said
    /// already.
    ///
    /// # Errors
    /// When the API server can't be asked or refuses.
    pub async fn remark(
        &self,
        id: <K::Record as Record>::Id,
        phase: Option<K::Phase>,
        remark: &Remark,
    ) -> Result<(), CatalogError> {
        self.say(id, |generation, status| {
            let head = K::head(status);
            *head.phase = phase.or(*head.phase);
            set(head.conditions, remark, generation);
        })
        .await
    }

    /// Changes the node's part of the status without a change of its record. An object that is gone is no error.
    async fn say(
        &self,
        id: <K::Record as Record>::Id,
        change: impl Fn(Option<i64>, &mut K::Status) + Send + Sync,
    ) -> Result<(), CatalogError> {
        for _ in 0..TRIES {
            let Some(object) = self.object(id).await? else { return Ok(()) };
            let mut status = object.own_status();
            change(object.meta().generation, &mut status);
            match self.apply_status(&object, status).await {
                Ok(Some(_)) | Err(CatalogError::NotFound(_)) => return Ok(()),
                Ok(None) => {}
                Err(error) => return Err(error),
            }
        }
        Err(CatalogError::conflict::<K::Record>(id))
    }

    /// Deletes an object as it was read, without a word on what it stands for: its node keeps it where there is anything. Whether
    /// it was still so.
    ///
    /// # Errors
    /// When the API server can't be asked or refuses.
    pub async fn discard(&self, object: &K) -> Result<bool, CatalogError> {
        match self.delete_as_of(object, object.meta().resource_version.clone()).await {
            Ok(Err(kube::Error::Api(status))) if matches!(status.code, 404 | 409) => Ok(false),
            answer => flatten(K::REQUESTS.delete, answer).map(|_| true),
        }
    }

    async fn delete(&self, object: &K) -> Result<(), CatalogError> {
        match self.delete_as_of(object, None).await {
            Ok(Err(kube::Error::Api(status))) if status.code == 404 => Ok(()),
            answer => flatten(K::REQUESTS.delete, answer),
        }
    }

    /// Deletes this object and none of its name, as of that version where one is given.
    async fn delete_as_of(&self, object: &K, resource_version: Option<String>) -> Result<kube::Result<()>, Elapsed> {
        let preconditions = Some(Preconditions { uid: object.meta().uid.clone(), resource_version });
        let params = DeleteParams { preconditions, ..DeleteParams::background() };
        let answer = tokio::time::timeout(PATIENCE, self.objects.delete(&object.name_any(), &params)).await?;
        Ok(answer.map(drop))
    }

    /// Changes what is asked for. The node writes to the same object at any time, of which a caller would know nothing to
    /// do but to try again.
    async fn ask(&self, object: &K, change: impl Fn(&mut K::Spec) + Send + Sync) -> Result<K, CatalogError> {
        let id = id_of(object)?;
        let mut object = object.clone();
        for _ in 0..TRIES {
            let mut spec = object.spec().clone();
            change(&mut spec);
            if spec == *object.spec() {
                return Ok(object);
            }
            match self.apply_spec(&object, spec).await {
                Err(CatalogError::Conflict(_)) => {}
                asked => return asked,
            }
            let now = self.object(id).await?.ok_or(CatalogError::not_found::<K::Record>(id))?;
            if now.meta().uid != object.meta().uid {
                break;
            }
            object = now;
        }
        Err(CatalogError::conflict::<K::Record>(id))
    }

    async fn apply_spec(&self, object: &K, spec: K::Spec) -> Result<K, CatalogError> {
        let (name, id) = (object.name_any(), id_of(object)?);
        let mut metadata = json!({"name": name, "resourceVersion": object.meta().resource_version});
        // What an apply leaves out it gives up; and nobody may add a finalizer to an object on its way out.
        if object.meta().deletion_timestamp.is_none() || object.finalizers().iter().any(|each| each == FINALIZER) {
            metadata["finalizers"] = json!([FINALIZER]);
        }
        let body = json!({
            "apiVersion": K::api_version(&()), "kind": K::kind(&()), "metadata": metadata, "spec": spec,
        });
        let params = PatchParams::apply(Manager::Controller.name()).force();
        match tokio::time::timeout(PATIENCE, self.objects.patch(&name, &params, &Patch::Apply(body))).await {
            Ok(Err(kube::Error::Api(status))) if status.code == 409 => Err(CatalogError::conflict::<K::Record>(id)),
            Ok(Err(kube::Error::Api(status))) if status.code == 404 => Err(CatalogError::not_found::<K::Record>(id)),
            answer => flatten(K::REQUESTS.change, answer),
        }
    }

    /// Writes the node's part of the status of the object as it was read; `None` when it has changed since.
    async fn apply_status(&self, object: &K, mut status: K::Status) -> Result<Option<K>, CatalogError> {
        let id = id_of(object)?;
        *K::head(&mut status).observed_generation = object.meta().generation;
        if status == object.own_status() {
            return Ok(Some(object.clone()));
        }
        let (name, version) = (id.to_string(), &object.meta().resource_version);
        let body = json!({
            "apiVersion": K::api_version(&()), "kind": K::kind(&()),
            "metadata": {"name": name, "resourceVersion": version}, "status": status,
        });
        let params = PatchParams::apply(Manager::Node.name()).force();
        match tokio::time::timeout(PATIENCE, self.objects.patch_status(&name, &params, &Patch::Apply(body))).await {
            Ok(Err(kube::Error::Api(status))) if status.code == 409 => Ok(None),
            Ok(Err(kube::Error::Api(status))) if status.code == 404 => Err(CatalogError::not_found::<K::Record>(id)),
            answer => flatten(K::REQUESTS.status, answer).map(Some),
        }
    }
}

#[async_trait]
impl<K: Kept> Catalog<K::Record> for KubeCatalog<K> {
    async fn create(&self, record: K::Record) -> Result<Created<K::Record>, CatalogError> {
        let (id, object) = (record.id(), K::asking_for(&record));
        let params = PostParams { field_manager: Some(Manager::Controller.name().to_owned()), ..PostParams::default() };
        match tokio::time::timeout(PATIENCE, self.objects.create(&params, &object)).await {
            Ok(Err(kube::Error::Api(status))) if status.code == 409 => {
                let existing = self.get(id).await?.ok_or(CatalogError::conflict::<K::Record>(id))?;
                Ok(Created::Existed(existing))
            }
            answer => Ok(Created::Created(flatten(K::REQUESTS.create, answer)?.record()?)),
        }
    }

    async fn get(&self, id: <K::Record as Record>::Id) -> Result<Option<K::Record>, CatalogError> {
        self.object(id).await?.as_ref().map(K::record).transpose()
    }

    async fn update(&self, record: K::Record) -> Result<K::Record, CatalogError> {
        let id = record.id();
        for _ in 0..TRIES {
            let object = self.object(id).await?.ok_or(CatalogError::not_found::<K::Record>(id))?;
            let found = object.record()?;
            if found.revision() != record.revision() {
                return Err(CatalogError::conflict::<K::Record>(id));
            }
            if K::taking_over(record.clone(), &found) == found {
                return Ok(record);
            }
            // Somebody has given it up: what would be made of it now would be nobody's.
            if object.meta().deletion_timestamp.is_some() && !object.is_to_be_destroyed() && object.is_unmade() {
                return Err(CatalogError::not_found::<K::Record>(id));
            }
            if let Some(stored) = self.apply_status(&object, object.status_for(&record)).await? {
                return Ok(K::taking_over(stored.record()?, &record));
            }
        }
        Err(CatalogError::conflict::<K::Record>(id))
    }

    /// Lets the object go. One that nobody has deleted yet, such as that of a volume which a node has made for one pod,
    /// is deleted.
    async fn remove(&self, id: <K::Record as Record>::Id) -> Result<(), CatalogError> {
        for _ in 0..TRIES {
            let Some(object) = self.object(id).await? else { return Ok(()) };
            if !object.finalizers().iter().any(|each| each == FINALIZER) {
                return if object.meta().deletion_timestamp.is_none() { self.delete(&object).await } else { Ok(()) };
            }
            let left: Vec<_> = object.finalizers().iter().filter(|finalizer| *finalizer != FINALIZER).collect();
            let body = json!({"metadata": {"finalizers": left, "resourceVersion": object.meta().resource_version}});
            let params = PatchParams { field_manager: Some(Manager::Node.name().into()), ..PatchParams::default() };
            let (name, body) = (id.to_string(), Patch::Merge(body));
            match tokio::time::timeout(PATIENCE, self.objects.patch(&name, &params, &body)).await {
                Ok(Err(kube::Error::Api(status))) if status.code == 409 => continue,
                Ok(Err(kube::Error::Api(status))) if status.code == 404 => return Ok(()),
                answer => flatten(K::REQUESTS.release, answer)?,
            };
            crash::point("cluster remove: let go");
            return if object.meta().deletion_timestamp.is_none() { self.delete(&object).await } else { Ok(()) };
        }
        Err(CatalogError::conflict::<K::Record>(id))
    }

    async fn list(
        &self,
        from: Option<<K::Record as Record>::Id>,
        limit: usize,
    ) -> Result<Page<K::Record>, CatalogError> {
        // A node has few, and the API server gives names in their order, which is that of the ids.
        let (mut records, mut token) = (Vec::new(), None::<String>);
        loop {
            let (objects, next) = self.page(token.as_deref(), PAGE).await?;
            for object in &objects {
                match object.record() {
                    Ok(record) if from.is_none_or(|from| record.id() >= from) => records.push(record),
                    Ok(_) => {}
                    Err(error) => tracing::warn!("{error}"),
                }
            }
            token = next;
            if token.is_none() || records.len() > limit {
                break;
            }
        }
        let next = records.get(limit).map(Record::id);
        records.truncate(limit);
        Ok(Page { records, next })
    }
}

fn id_of<K: Kept>(object: &K) -> Result<<K::Record as Record>::Id, CatalogError> {
    let name = object.name_any();
    name.parse().map_err(|_| CatalogError::Unreadable {
        what: format!("{} {name}", K::kind(&())),
        reason: "its name is not an id of ours".into(),
    })
}
