use std::sync::Arc;

use zpod_volume::VolumeId;

use super::observer::{Observed, SnapshotChange};
use super::publish::NodeVolumes;
use super::{Context, VolumeError};
use crate::guest::{GuestClient, VolumeReport};

/// Whether somebody can be asked about a volume's contents.
#[derive(Debug, Clone)]
pub enum Presence {
    /// It is published nowhere.
    Unpublished,
    /// It is published, and its guest has not been heard, or not lately.
    Silent,
    /// The guest that has it, believed by the token of the publication.
    Heard(Box<GuestClient>),
}

/// A published volume, and what its guest said last, if anything.
#[derive(Debug, Clone)]
pub struct Look {
    /// The volume.
    pub volume: Arc<Observed>,
    /// The sandbox and its words.
    pub heard: Option<(String, VolumeReport)>,
}

impl NodeVolumes {
    /// Who can be asked about a volume's contents.
    ///
    /// # Errors
    /// When the volume does not exist here, or is not ready.
    pub async fn presence(&self, id: VolumeId) -> Result<Presence, VolumeError> {
        let volume = self.context.ready(id).await?;
        if self.context.publication(&volume).is_none() {
            return Ok(Presence::Unpublished);
        }
        Ok(self.context.published.heard(id).map_or(Presence::Silent, |heard| Presence::Heard(Box::new(heard.guest))))
    }

    /// All volumes that are published here.
    pub fn looks(&self) -> Vec<Look> {
        self.context.published.looks()
    }

    /// Tells the observers of a snapshot that was asked for. Of a volume that is not published any more nobody is told.
    pub fn snapshot_changed(&self, id: VolumeId, change: &SnapshotChange) {
        if let Some((volume, _)) = self.context.published.observed(id) {
            self.observer.snapshot_changed(&volume, change);
        }
    }

    /// What it works on, to be shared.
    pub fn context_shared(&self) -> Arc<Context> {
        self.context.clone()
    }
}
