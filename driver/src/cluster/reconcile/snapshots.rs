use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use kube::Client;
use kube::runtime::controller::Action;
use tokio::sync::Notify;
use zpod_kubernetes::crd::{SnapshotPhase, ZfsSnapshot};
use zpod_kubernetes::{Kept as _, KubeCatalog, READY};
use zpod_storage::catalog::{CatalogError, SnapshotPhase as RecordPhase};
use zpod_volume::SnapshotId;

use super::{Work, run, say};
use crate::cluster::reasons::reason;
use crate::volumes::{Snapshotter, VolumeError};

/// What could not be taken is tried again after this long, if nobody has given it up by then.
const RETRY: Duration = Duration::from_secs(10);
/// How often the progress of a full copy is looked at.
const LOOK_EVERY: Duration = Duration::from_secs(2);

/// Carries out what the ZfsSnapshots of this node ask for, as long as it runs: marks, copies, destroys. `changed` is told
/// when room was taken or given back.
pub async fn reconcile_snapshots(client: Client, node: String, snapshotter: Snapshotter, changed: Arc<Notify>) {
    let catalog = KubeCatalog::of_node(client.clone(), &node);
    let work = Taking { node: node.clone(), snapshotter, catalog, changed };
    run(client, node, work).await;
}

struct Taking {
    node: String,
    snapshotter: Snapshotter,
    catalog: KubeCatalog<ZfsSnapshot>,
    changed: Arc<Notify>,
}

#[async_trait]
impl Work<ZfsSnapshot> for Taking {
    fn volume(&self, object: &ZfsSnapshot) -> String {
        object.spec.volume.clone()
    }

    fn catalog(&self) -> &KubeCatalog<ZfsSnapshot> {
        &self.catalog
    }

    async fn carry_out(&self, object: &ZfsSnapshot, id: SnapshotId, leaving: bool) -> Result<Action, VolumeError> {
        let phase = object.status.as_ref().and_then(|status| status.phase);
        let spec = &object.spec;
        let done = match (phase, leaving) {
            (None, false) if spec.group.is_some() => self.snapshotter.mark(id).await,
            (None, false) | (Some(SnapshotPhase::Copying), _) => self.snapshotter.copy(id).await,
            (Some(SnapshotPhase::Marked), false) if spec.copy => self.snapshotter.copy(id).await,
            _ => return Ok(Action::await_change()),
        };
        self.changed.notify_one();
        match done {
            Ok(snapshot) if snapshot.phase == RecordPhase::Copying => {
                let percent = self.snapshotter.progress(id).map_or(0, |progress| progress.percent());
                self.catalog.progress(id, percent).await?;
                Ok(Action::requeue(LOOK_EVERY))
            }
            Ok(_) | Err(VolumeError::Catalog(CatalogError::NotFound(_)) | VolumeError::SnapshotNotFound { .. }) => {
                Ok(Action::await_change())
            }
            Err(error) => {
                tracing::warn!(snapshot = %id, "not taken: {error}");
                say(&self.catalog, id, None, READY, reason(&error), error.to_string()).await?;
                Ok(Action::requeue(RETRY))
            }
        }
    }

    async fn destroy(&self, id: SnapshotId) -> Result<(), VolumeError> {
        self.snapshotter.destroy(id).await?;
        self.changed.notify_one();
        Ok(())
    }

    async fn find(&self, id: SnapshotId) -> Result<(), VolumeError> {
        self.snapshotter.find_copy(id).await
    }

    async fn adopted(&self, _: SnapshotId) -> Result<(), VolumeError> {
        Ok(())
    }

    async fn let_go(&self, object: &ZfsSnapshot, id: SnapshotId) -> Result<bool, VolumeError> {
        Ok(object.is_unmade() && self.snapshotter.discard_unmade(id).await?)
    }

    fn keeps(&self, id: SnapshotId) -> String {
        format!(
            "ZfsSnapshot {id} was deleted, but not by DeleteSnapshot: its copy on node {} is kept. To undo the deletion: \
             kubectl zpod adopt {id}. To destroy it, delete its VolumeSnapshot, or set spec.destroy=true where there is none any \
             more",
            self.node
        )
    }
}
