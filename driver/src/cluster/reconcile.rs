use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt as _;
use kube::runtime::controller::{Action, Config};
use kube::runtime::{Controller, watcher};
use kube::{Api, Client};
use tokio::sync::Notify;
use zpod_kubernetes::crd::{Phase, ZfsVolume};
use zpod_kubernetes::{DESTROYED, EXPANDED, KubeCatalog, READY, Remark};
use zpod_storage::backing::BackingError;
use zpod_storage::catalog::CatalogError;
use zpod_volume::VolumeId;

use crate::volumes::{CapacityRange, Provision as _, Provisioner, VolumeError};

/// The reason of a condition when room is what is missing. The controller then asks another node.
pub(super) const NO_ROOM: &str = "NoRoom";
/// Volumes worked on at the same time: each waits for the disk most of the time.
const CONCURRENCY: u16 = 16;
/// What can't be done now is tried again after this long ...
const RETRY: Duration = Duration::from_secs(2);
/// ... and where a pod has to end first, after this.
const RETRY_IN_USE: Duration = Duration::from_secs(5);
/// Room may come back, and nobody tells.
const RETRY_NO_ROOM: Duration = Duration::from_secs(30);
/// An object that was deleted by hand is looked at again after this long.
const RETRY_BLOCKED: Duration = Duration::from_secs(300);

/// What carrying out an object takes.
struct Work {
    node: String,
    provisioner: Provisioner,
    catalog: KubeCatalog<ZfsVolume>,
    changed: Arc<Notify>,
}

/// Carries out what the objects of this node ask for, as long as it runs: makes devices, makes room, destroys.
/// `changed` is told when room was taken or given back.
pub async fn reconcile(client: Client, node: String, provisioner: Provisioner, changed: Arc<Notify>) {
    let config = watcher::Config::default().fields(&format!("spec.nodeName={node}"));
    let catalog = KubeCatalog::of_node(client.clone(), &node);
    let work = Arc::new(Work { node, provisioner, catalog, changed });
    Controller::new(Api::<ZfsVolume>::all(client), config)
        .with_config(Config::default().concurrency(CONCURRENCY))
        .run(carry_out, |_, error, _| again(error), work)
        .for_each(|done| async move {
            if let Err(error) = done {
                tracing::debug!("reconcile: {error}");
            }
        })
        .await;
}

fn again(error: &VolumeError) -> Action {
    tracing::warn!("{error}");
    Action::requeue(RETRY)
}

async fn carry_out(object: Arc<ZfsVolume>, work: Arc<Work>) -> Result<Action, VolumeError> {
    let name = object.metadata.name.as_deref().unwrap_or_default();
    if object.spec.node_name != work.node {
        return Ok(Action::await_change());
    }
    let Ok(id) = name.parse::<VolumeId>() else {
        tracing::warn!("ZfsVolume {name} is none of ours: its name is not a volume's id");
        return Ok(Action::await_change());
    };
    let status = object.status.as_ref();
    let phase = status.and_then(|status| status.phase);
    let deleted = object.metadata.deletion_timestamp.is_some();
    if deleted && object.spec.destroy {
        return work.destroy(id).await;
    }
    if deleted {
        work.keep(id).await?;
    }
    if phase.is_none() && !deleted {
        return work.make(id).await;
    }
    let capacity = status.and_then(|status| status.capacity).unwrap_or(object.spec.capacity);
    if phase == Some(Phase::Ready) && object.spec.capacity > capacity {
        return work.make_room(id, object.spec.capacity.0).await;
    }
    Ok(if deleted { Action::requeue(RETRY_BLOCKED) } else { Action::await_change() })
}

impl Work {
    async fn make(&self, id: VolumeId) -> Result<Action, VolumeError> {
        let made = self.provisioner.finish(id).await;
        self.changed.notify_one();
        let error = match made {
            Ok(volume) => {
                tracing::info!(volume = %id, name = volume.name, capacity = %volume.capacity, "volume made");
                return Ok(Action::await_change());
            }
            Err(VolumeError::Catalog(CatalogError::NotFound(_)) | VolumeError::NotFound { .. }) => {
                return Ok(Action::await_change());
            }
            Err(error) => error,
        };
        // Only where it is certain that nothing was made is the volume given back.
        let refused = error.is_no_room().then_some(Phase::Refused);
        self.say(id, refused, READY, reason(&error), error.to_string()).await?;
        if refused.is_some() { Ok(Action::await_change()) } else { Err(error) }
    }

    async fn make_room(&self, id: VolumeId, wanted: zpod_volume::Bytes) -> Result<Action, VolumeError> {
        let range = CapacityRange { required: Some(wanted), limit: None };
        let grown = self.provisioner.expand(id, range).await;
        self.changed.notify_one();
        match grown {
            Ok(_) => Ok(Action::await_change()),
            Err(error) => {
                let no_room = error.is_no_room();
                self.say(id, None, EXPANDED, reason(&error), error.to_string()).await?;
                if no_room { Ok(Action::requeue(RETRY_NO_ROOM)) } else { Err(error) }
            }
        }
    }

    async fn destroy(&self, id: VolumeId) -> Result<Action, VolumeError> {
        let error = match self.provisioner.delete(id).await {
            Ok(_) => {
                tracing::info!(volume = %id, "volume destroyed, as DeleteVolume asked");
                self.changed.notify_one();
                return Ok(Action::await_change());
            }
            Err(error) => error,
        };
        let in_use = matches!(
            error,
            VolumeError::Published { .. } | VolumeError::Backing { source: BackingError::InUse { .. }, .. }
        );
        self.say(id, None, DESTROYED, reason(&error), error.to_string()).await?;
        if in_use { Ok(Action::requeue(RETRY_IN_USE)) } else { Err(error) }
    }

    /// Says of an object that somebody deleted by hand that its data is kept.
    async fn keep(&self, id: VolumeId) -> Result<(), VolumeError> {
        let message = format!(
            "ZfsVolume {id} was deleted, but not by DeleteVolume: its device on node {} and all data are kept, and pods go \
             on using it. To destroy it, delete its PersistentVolumeClaim, or set spec.destroy=true where there is none any \
             more",
            self.node
        );
        self.say(id, None, DESTROYED, "NotAskedFor", message).await
    }

    async fn say(
        &self,
        id: VolumeId,
        phase: Option<Phase>,
        kind: &'static str,
        reason: &'static str,
        message: String,
    ) -> Result<(), VolumeError> {
        Ok(self.catalog.remark(id, phase, &Remark { kind, holds: false, reason, message }).await?)
    }
}

fn reason(error: &VolumeError) -> &'static str {
    match error {
        error if error.is_no_room() => NO_ROOM,
        VolumeError::Published { .. } => "Published",
        VolumeError::Backing { source: BackingError::InUse { .. }, .. } => "InUse",
        VolumeError::Backing { .. } => "DeviceFailed",
        VolumeError::OutOfRange { .. } => "OutOfRange",
        _ => "Failed",
    }
}
