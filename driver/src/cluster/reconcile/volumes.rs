use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::runtime::controller::Action;
use kube::{Client, ResourceExt as _};
use tokio::sync::Notify;
use zpod_kubernetes::crd::{Phase, ZfsVolume};
use zpod_kubernetes::{EXPANDED, Kept as _, KubeCatalog, MODIFIED, READY, Remark};
use zpod_storage::backing::BackingError;
use zpod_storage::catalog::CatalogError;
use zpod_volume::{Bytes, VolumeAttributes, VolumeId};

use super::{Work, run, say};
use crate::cluster::PoolStates;
use crate::cluster::answers::condition;
use crate::cluster::reasons::reason;
use crate::volumes::{CapacityRange, NodeVolumes, Provision as _, Provisioner, VolumeError};

/// Room may come back, and nobody tells.
const RETRY_NO_ROOM: Duration = Duration::from_secs(30);
/// How often the progress of a full copy is looked at.
const LOOK_EVERY: Duration = Duration::from_secs(5);
/// A scrub that can't begin is asked for again after this long.
const RETRY_SCRUB: Duration = Duration::from_secs(30);

/// Carries out what the ZfsVolumes of this node ask for, as long as it runs: makes devices, makes room, sets attributes,
/// scrubs, destroys. `changed` is told when room was taken or given back, `states` when an object was made anew.
pub async fn reconcile_volumes(
    client: Client,
    node: String,
    volumes: NodeVolumes,
    provisioner: Provisioner,
    changed: Arc<Notify>,
    states: Arc<PoolStates>,
) {
    let catalog = KubeCatalog::of_node(client.clone(), &node);
    let work =
        Volumes { node: node.clone(), provisioner, volumes, catalog, changed, states, scrubbed: Mutex::default() };
    run(client, node, work).await;
}

struct Volumes {
    node: String,
    provisioner: Provisioner,
    volumes: NodeVolumes,
    catalog: KubeCatalog<ZfsVolume>,
    changed: Arc<Notify>,
    states: Arc<PoolStates>,
    /// The latest request of each volume that a scrub was begun for: the guest's clock is no proof that it ended after it.
    scrubbed: Mutex<HashMap<VolumeId, Time>>,
}

#[async_trait]
impl Work<ZfsVolume> for Volumes {
    fn volume(&self, object: &ZfsVolume) -> String {
        object.name_any()
    }

    fn catalog(&self) -> &KubeCatalog<ZfsVolume> {
        &self.catalog
    }

    async fn carry_out(&self, object: &ZfsVolume, id: VolumeId, leaving: bool) -> Result<Action, VolumeError> {
        let status = object.status.as_ref();
        match status.and_then(|status| status.phase) {
            None if !leaving => return self.make(id).await,
            Some(Phase::Ready) => {}
            _ => return Ok(Action::await_change()),
        }
        let capacity = status.and_then(|status| status.capacity).unwrap_or(object.spec.capacity);
        // What fails does not keep the rest from being done.
        let room = match object.spec.capacity > capacity {
            true => self.make_room(id, object.spec.capacity.0).await,
            false => Ok(None),
        };
        let modified = if wants_attributes(object) { self.modify(object, id).await } else { Ok(()) };
        let scrub = match self.wants_scrub(object, id) {
            Some(asked) => self.scrub(id, asked).await,
            None => None,
        };
        let again = [room?, scrub].into_iter().flatten().min();
        modified?;
        Ok(again.map_or_else(Action::await_change, Action::requeue))
    }

    async fn destroy(&self, id: VolumeId) -> Result<(), VolumeError> {
        self.provisioner.delete(id).await?;
        self.changed.notify_one();
        Ok(())
    }

    async fn find(&self, id: VolumeId) -> Result<(), VolumeError> {
        self.provisioner.find_device(id).await
    }

    async fn adopted(&self, id: VolumeId) -> Result<(), VolumeError> {
        // What the object before said of the guest's pool is gone with it.
        self.states.made_anew(id);
        self.volumes.adopted(id).await
    }

    async fn let_go(&self, object: &ZfsVolume, id: VolumeId) -> Result<bool, VolumeError> {
        Ok(object.is_unmade() && self.provisioner.discard_unmade(id).await?)
    }

    fn keeps(&self, id: VolumeId) -> String {
        format!(
            "ZfsVolume {id} was deleted, but not by DeleteVolume: its device on node {} and all data are kept, and pods go \
             on using it. To undo the deletion: kubectl zpod adopt {id}. To destroy it, delete its PersistentVolumeClaim, or \
             set spec.destroy=true where there is none any more",
            self.node
        )
    }
}

impl Volumes {
    async fn make(&self, id: VolumeId) -> Result<Action, VolumeError> {
        let made = self.provisioner.finish(id).await;
        self.changed.notify_one();
        let error = match made {
            Ok(volume) => {
                tracing::info!(volume = %id, name = volume.name, capacity = %volume.capacity, "volume made");
                return Ok(Action::await_change());
            }
            Err(VolumeError::Catalog(CatalogError::NotFound(_))) => return Ok(Action::await_change()),
            Err(VolumeError::NotFound { id: gone, .. }) if gone == id.to_string() => return Ok(Action::await_change()),
            Err(error) => error,
        };
        // Only where it is certain that nothing was made is the volume given back.
        let refused = error.is_refusal().then_some(Phase::Refused);
        say(&self.catalog, id, refused, READY, reason(&error), error.to_string()).await?;
        match error {
            _ if refused.is_some() => Ok(Action::await_change()),
            error if error.is_under_way() => Ok(Action::requeue(LOOK_EVERY)),
            error => Err(error),
        }
    }

    /// Makes room; says when it is to be tried again.
    async fn make_room(&self, id: VolumeId, wanted: Bytes) -> Result<Option<Duration>, VolumeError> {
        let range = CapacityRange { required: Some(wanted), limit: None };
        let grown = self.provisioner.expand(id, range).await;
        self.changed.notify_one();
        let Err(error) = grown else { return Ok(None) };
        say(&self.catalog, id, None, EXPANDED, reason(&error), error.to_string()).await?;
        match error {
            error if error.is_no_room() => Ok(Some(RETRY_NO_ROOM)),
            // Nothing but another size helps.
            VolumeError::OutOfRange { .. } | VolumeError::Backing { source: BackingError::TooLarge { .. }, .. } => {
                Ok(None)
            }
            error => Err(error),
        }
    }

    async fn modify(&self, object: &ZfsVolume, id: VolumeId) -> Result<(), VolumeError> {
        let pairs = object.spec.attributes.iter().map(|(key, value)| (key.as_str(), value.as_str()));
        let modified = match VolumeAttributes::parse(pairs) {
            Ok(attributes) => self.provisioner.modify(id, attributes).await.map(drop),
            Err(error) => Err(error.into()),
        };
        let (holds, reason, message) = match &modified {
            Ok(()) => (true, "TakenOver", "the attributes that were asked for are set".to_owned()),
            Err(error) => (false, reason(error), error.to_string()),
        };
        self.catalog.remark(id, None, &Remark { kind: MODIFIED, holds, reason, message }).await?;
        match modified {
            // Nothing but another spec makes it valid.
            Err(VolumeError::Invalid { .. } | VolumeError::Parameter(_)) => Ok(()),
            modified => modified,
        }
    }

    /// The request for a scrub that no scrub was begun for yet.
    fn wants_scrub(&self, object: &ZfsVolume, id: VolumeId) -> Option<Time> {
        let asked = object.spec.scrub_requested_at.clone()?;
        let status = object.status.as_ref()?;
        let ended = status.pool.as_ref().and_then(|pool| pool.last_scrub.as_ref()?.end_time.clone());
        let begun = self.scrubbed.lock().unwrap_or_else(PoisonError::into_inner).get(&id).cloned();
        let done = ended.is_some_and(|ended| ended.0 >= asked.0) || begun.is_some_and(|begun| begun.0 >= asked.0);
        (status.publication.is_some() && !done).then_some(asked)
    }

    /// Begins a scrub, or has it wait for its turn. A guest that can't be asked now is asked again.
    async fn scrub(&self, id: VolumeId, asked: Time) -> Option<Duration> {
        match self.volumes.scrub(id).await {
            Ok(start) => {
                tracing::info!(volume = %id, ?start, "scrub, as was asked for");
                self.scrubbed.lock().unwrap_or_else(PoisonError::into_inner).insert(id, asked);
                None
            }
            Err(error) => {
                tracing::info!("scrub not begun yet: {error}");
                Some(RETRY_SCRUB)
            }
        }
    }
}

/// Whether attributes are asked for that the node has not taken over, or could not set in the guest.
fn wants_attributes(object: &ZfsVolume) -> bool {
    let none = Default::default();
    let taken_over = object.status.as_ref().map_or(&none, |status| &status.attributes);
    let differs = object.spec.attributes.iter().any(|(key, value)| taken_over.get(key) != Some(value));
    let said = condition(object, MODIFIED).filter(|said| said.status == "False");
    let hopeless = |said: &k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition| {
        said.reason == "Invalid" && said.observed_generation >= object.metadata.generation
    };
    (differs || said.is_some()) && !said.as_ref().is_some_and(hopeless)
}
