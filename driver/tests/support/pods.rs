use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use zpod_driver::volumes::{PodCheck, VolumeError};
use zpod_storage::catalog::{ClaimRef, PodRef, Volume};
use zpod_volume::VolumeId;

/// The API server, which knows all pods or none.
#[derive(Debug, Default)]
pub(crate) struct Pods {
    pub(crate) gone: AtomicBool,
}

#[async_trait::async_trait]
impl PodCheck for Pods {
    async fn check(&self, _: Option<&PodRef>, _: &Volume, _: &Path) -> Result<Option<ClaimRef>, VolumeError> {
        Ok(None)
    }

    async fn is_gone(&self, _: VolumeId, _: &PodRef) -> Result<bool, VolumeError> {
        Ok(self.gone.load(Ordering::SeqCst))
    }
}
