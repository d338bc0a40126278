//! Volumes for the life of one pod (CSI ephemeral inline volumes). Kubelet asks the node alone for them: they are made when
//! they are published, and destroyed when they are unpublished.

use std::collections::HashSet;
use std::time::Duration;

use zpod_storage::backing::Outcome;
use zpod_storage::catalog::{Phase, Volume};
use zpod_storage::crash;
use zpod_volume::{Bytes, VolumeId, VolumeMode, VolumeParameters};

use super::context::to_the_end;
use super::provision::{CreateRequest, Provision as _, Provisioner};
use super::publish::{NodeVolumes, PublishRequest};
use super::{CapacityRange, DEFAULT_CAPACITY, VolumeError};

/// How often is looked for volumes whose pods are gone.
const LOOK_EVERY: Duration = Duration::from_secs(600);
/// Records are read this many at a time for that.
const PAGE: usize = 256;

/// What a pod says of its inline volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EphemeralVolume {
    /// Kubelet's name for it: one for each pod and volume.
    pub handle: String,
    /// What it is to hold; 1 GiB where the pod does not say.
    pub size: Option<Bytes>,
    /// Everything else.
    pub parameters: VolumeParameters,
}

impl NodeVolumes {
    /// Makes a volume and publishes it to its pod. Repeated as [`NodeVolumes::publish`] is.
    ///
    /// # Errors
    /// When it is larger than such volumes may be here, or can't be made or published. What was made for nothing is gone
    /// again.
    pub async fn publish_ephemeral(
        &self,
        wanted: EphemeralVolume,
        request: PublishRequest,
    ) -> Result<Outcome, VolumeError> {
        if self.context.published.observed(request.id).is_some() {
            return self.publish(request).await;
        }
        let (id, size) = (request.id, wanted.size.unwrap_or(DEFAULT_CAPACITY));
        let there = match self.context.catalog.get(id).await? {
            // Its end was cut short, as after a publication that failed: nobody else comes for it.
            Some(volume) if volume.ephemeral && volume.phase == Phase::Deleting => {
                self.end_ephemeral(id).await?;
                false
            }
            volume => volume.is_some(),
        };
        if !there {
            self.check_size(size)?;
        }
        let range = CapacityRange { required: Some(size), limit: None };
        let capacity = range.choose(VolumeMode::Filesystem)?;
        let volume = Volume {
            id,
            ephemeral: true,
            ..Volume::wanted(&wanted.handle, capacity, wanted.parameters.clone(), &self.context.node)
        };
        let node = self.clone();
        to_the_end(async move {
            // Nothing is made for a pod that can't have it: kubelet unpublishes only what it has seen published.
            node.pods.check(request.pod.as_ref(), &volume, &request.target).await?;
            let total = node.context.with_backing(|backing| backing.capacity()).await?.total;
            let asked = (capacity, request.pod.as_ref());
            node.inline.take(&node.context.node, &volume.name, id, asked, total)?;
            let published = node.make_and_publish(volume, range, request).await;
            if published.as_ref().is_err_and(|error| !matches!(error, VolumeError::Exists { .. }))
                && let Err(error) = node.end_unused(id).await
            {
                tracing::warn!(volume = %id, "what was made for a pod that did not get it is still there: {error}");
            }
            published
        })
        .await
    }

    async fn make_and_publish(
        &self,
        volume: Volume,
        range: CapacityRange,
        request: PublishRequest,
    ) -> Result<Outcome, VolumeError> {
        let create = CreateRequest {
            inline: Some(volume.id),
            name: volume.name,
            range,
            parameters: volume.parameters,
            ..CreateRequest::default()
        };
        Provisioner::new(self.context.clone()).create(create).await?;
        crash::point("publish: ephemeral volume made");
        self.publish(request).await
    }

    /// The id of the inline volume that kubelet calls so: that which it has here, or the one it is to have.
    pub fn inline_id(&self, handle: &str) -> VolumeId {
        self.inline.id(handle).unwrap_or_else(|| self.context.new_inline_id(handle))
    }

    fn check_size(&self, size: Bytes) -> Result<(), VolumeError> {
        let largest = self.inline.limits.largest;
        if size <= largest {
            return Ok(());
        }
        let node = &self.context.node;
        let claim = "use a PersistentVolumeClaim, or a generic ephemeral volume (spec.volumes[].ephemeral)";
        let reason = match largest {
            Bytes(0) => {
                format!("inline volumes are switched off on node {node} (chart value node.ephemeralMaxSize): {claim}")
            }
            most => format!(
                "size: {size} was asked for, and inline volumes on node {node} have {most} at most (chart value \
                 node.ephemeralMaxSize): {claim}, which quotas of the namespace count"
            ),
        };
        Err(VolumeError::invalid("volume_context", reason))
    }

    /// Destroys a volume whose pod has given it back.
    pub(super) async fn end_ephemeral(&self, id: VolumeId) -> Result<Outcome, VolumeError> {
        {
            // Waits for a virtual machine that is on its way out; whether it has gone is looked at again.
            let _lock = self.context.lock(id).await;
            if let Some(volume) = self.context.catalog.get(id).await? {
                let _ = self.prove_exclusive(&volume).await;
            }
        }
        crash::point("unpublish: ephemeral volume ends");
        let ended = Provisioner::new(self.context.clone()).delete(id).await?;
        self.inline.give_back(id);
        Ok(ended)
    }

    /// Destroys a volume that no guest has ever had.
    async fn end_unused(&self, id: VolumeId) -> Result<(), VolumeError> {
        let volume = self.context.catalog.get(id).await?;
        let unused = |volume: &Volume| {
            volume.ephemeral && volume.phase != Phase::Deleting && !volume.initialized && volume.publication.is_none()
        };
        match volume {
            None => self.inline.give_back(id),
            Some(volume) if unused(&volume) => drop(self.end_ephemeral(id).await?),
            Some(_) => {}
        }
        Ok(())
    }

    /// Destroys ephemeral volumes whose pods are gone and that nobody came to unpublish, such as after a node lost
    /// kubelet's files. For ever.
    pub async fn keep_ending_abandoned(self) {
        let mut idle = HashSet::new();
        loop {
            tokio::time::sleep(LOOK_EVERY).await;
            match self.end_abandoned(&idle).await {
                Ok(still) => idle = still,
                Err(error) => tracing::info!("volumes of pods that are gone could not be looked for: {error}"),
            }
        }
    }

    /// One look. `idle` are those that had no publication at the last one; gives those that have none now.
    ///
    /// # Errors
    /// When records or pods can't be looked up.
    pub async fn end_abandoned(&self, idle: &HashSet<VolumeId>) -> Result<HashSet<VolumeId>, VolumeError> {
        let (mut from, mut still) = (None, HashSet::new());
        loop {
            let page = self.context.catalog.list(from, PAGE).await?;
            for volume in page.records.into_iter().filter(|volume| volume.ephemeral) {
                let id = volume.id;
                let ended = match volume.publication {
                    // Between being made and being published, or between being unpublished and destroyed.
                    None if !idle.contains(&id) => {
                        still.insert(id);
                        continue;
                    }
                    None => self.end_ephemeral(id).await,
                    Some(publication) => match publication.pod {
                        Some(pod) if self.pods.is_gone(id, &pod).await? => {
                            self.unpublish(id, publication.target_path).await
                        }
                        _ => continue,
                    },
                };
                match ended {
                    Ok(_) => tracing::info!(volume = %id, "its pod is gone: the volume was destroyed"),
                    Err(error) => tracing::warn!(volume = %id, "its pod is gone, and the volume still there: {error}"),
                }
            }
            from = match page.next {
                Some(next) => Some(next),
                None => return Ok(still),
            };
        }
    }
}
