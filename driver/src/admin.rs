//! The admin endpoint: what people ask of a node and of running guests through `kubectl zpod`.
//!
//! # Design
//! What can be said in objects is said there; here is what can't: streams of a volume's contents ([`transfer`]), what
//! only the guest knows, and what only the node sees ([`Doctor`]). Streams pass through with a few hundred KiB of
//! memory each, at the pace of the slower end.
//!
//! In a cluster it is HTTPS on a port of the pod, with a certificate made at the start: the API server's proxy, through
//! which it is reached, checks none. Whoever asks shows a token that was made for this call, volume and node alone
//! ([`Tokens`]), before anything of the request but its path is looked at. On one machine it is a unix socket that root alone can open.
//!
//! # Limitations
//! Who may make tokens of the ServiceAccount `zpod-admin` can read and replace the contents of every volume. An
//! encrypted volume is sent as it is on the disk, and is no use without its key.

mod answer;
mod doctor;
mod server;
mod tls;
mod tokens;
mod transfer;

use std::sync::Arc;

use uuid::Uuid;
use zpod_admin::{
    Check, NewSnapshotName, PoolSnapshots, Properties, Removed, RollbackPlan, RollbackQuery, RollbackRequested,
    SendName, SendPoints, SnapshotName, Taken,
};
use zpod_volume::VolumeId;

pub use answer::AdminError;
pub use doctor::{Doctor, Places};
pub use server::AdminServer;
pub use tokens::{Refused, Tokens};

use crate::guest::GuestClient;
use crate::volumes::{NodeVolumes, Presence, SnapshotChange, VolumeError};

/// What is asked of.
#[derive(Debug)]
pub struct Admin {
    volumes: NodeVolumes,
    doctor: Doctor,
}

impl Admin {
    /// Of this node.
    pub fn new(volumes: NodeVolumes, doctor: Doctor) -> Arc<Self> {
        Arc::new(Self { volumes, doctor })
    }

    async fn doctor(&self) -> Vec<Check> {
        self.doctor.look(&self.volumes).await
    }

    async fn properties(&self, id: VolumeId) -> Result<Properties, AdminError> {
        Ok(self.guest(id).await?.properties(id).await?)
    }

    async fn send_points(&self, id: VolumeId) -> Result<SendPoints, AdminError> {
        Ok(self.guest(id).await?.send_points(id).await?)
    }

    async fn remove_send_point(&self, id: VolumeId, point: &SendName) -> Result<Removed, AdminError> {
        self.guest(id).await?.remove_send_point(id, point).await?;
        tracing::info!(volume = %id, %point, "send point removed, as was asked for");
        self.volumes.snapshot_changed(id, &SnapshotChange::Destroyed(point.clone().into()));
        Ok(Removed { snapshot: point.to_string() })
    }

    async fn snapshots(&self, id: VolumeId) -> Result<PoolSnapshots, AdminError> {
        Ok(self.guest(id).await?.snapshots(id).await?)
    }

    async fn take_snapshot(&self, id: VolumeId, name: &NewSnapshotName) -> Result<Taken, AdminError> {
        self.guest(id).await?.take_snapshot(id, name).await?;
        tracing::info!(volume = %id, snapshot = %name, "snapshot taken, as was asked for");
        self.volumes.snapshot_changed(id, &SnapshotChange::Taken(name.clone().into()));
        Ok(Taken { snapshot: name.to_string() })
    }

    async fn destroy_snapshot(&self, id: VolumeId, name: &SnapshotName) -> Result<Removed, AdminError> {
        self.guest(id).await?.destroy_snapshot(id, name).await?;
        tracing::info!(volume = %id, snapshot = %name, "snapshot destroyed, as was asked for");
        self.volumes.snapshot_changed(id, &SnapshotChange::Destroyed(name.clone()));
        Ok(Removed { snapshot: name.to_string() })
    }

    async fn rollback_plan(&self, id: VolumeId, query: &RollbackQuery) -> Result<RollbackPlan, AdminError> {
        Ok(self.guest(id).await?.check_rollback(id, &query.snapshot, query.destroy_newer).await?.0)
    }

    async fn rollback(&self, id: VolumeId, query: RollbackQuery) -> Result<RollbackRequested, AdminError> {
        // Without one there is another remedy than to wait for it.
        self.guest(id).await?;
        match self.volumes.request_rollback(id, query).await {
            Err(VolumeError::Guest { source, .. }) => Err(AdminError::Guest(source)),
            requested => Ok(requested?),
        }
    }

    async fn cancel_rollback(&self, id: VolumeId, one: Option<Uuid>) -> Result<RollbackRequested, AdminError> {
        Ok(self.volumes.cancel_rollback(id, one).await?)
    }

    /// The guest that runs a volume.
    async fn guest(&self, id: VolumeId) -> Result<GuestClient, AdminError> {
        let node = self.volumes.node().to_owned();
        match self.volumes.presence(id).await? {
            Presence::Heard(guest) => Ok(*guest),
            Presence::Silent => Err(AdminError::Silent { id, node }),
            Presence::Unpublished => Err(AdminError::NotRunning { id, node }),
        }
    }
}
