use std::fmt;
use std::path::Path;

use async_trait::async_trait;
use zpod_storage::catalog::{ClaimRef, PodRef, Volume};
use zpod_volume::VolumeId;

use super::{Observed, VolumeError};

/// Whether a pod can use a volume at all: asked before anything is done to publish it there.
#[async_trait]
pub trait PodCheck: Send + Sync + fmt::Debug {
    /// Looks the pod up, and the claim that the volume is bound to, where that can be asked. `None` where the orchestrator
    /// did not say which pod it is; `target` is where the volume is to appear.
    ///
    /// # Errors
    /// [`VolumeError::PodRefused`] with what to write in the pod's specification instead, [`VolumeError::PodUnknown`]
    /// while the pod can't be looked up.
    async fn check(
        &self,
        pod: Option<&PodRef>,
        volume: &Volume,
        target: &Path,
    ) -> Result<Option<ClaimRef>, VolumeError>;

    /// Whether a container of a pod runs that mounts a volume, which is never so where nobody can be asked.
    ///
    /// # Errors
    /// While who could be asked does not answer.
    async fn runs_with(&self, volume: &Observed, pod: &PodRef) -> Result<bool, VolumeError> {
        let _ = (volume, pod);
        Ok(false)
    }

    /// Whether it is certain that there is no such pod any more, which is never so where nobody can be asked.
    ///
    /// # Errors
    /// While who could be asked does not answer.
    async fn is_gone(&self, volume: VolumeId, pod: &PodRef) -> Result<bool, VolumeError> {
        let _ = (volume, pod);
        Ok(false)
    }
}

/// Takes every pod: for orchestrators that can't be asked.
#[derive(Debug, Clone, Copy, Default)]
pub struct AnyPod;

#[async_trait]
impl PodCheck for AnyPod {
    async fn check(&self, _: Option<&PodRef>, _: &Volume, _: &Path) -> Result<Option<ClaimRef>, VolumeError> {
        Ok(None)
    }
}
