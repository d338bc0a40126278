use std::time::Duration;

use tokio::time::Instant;
use zpod_storage::backing::BackingError;
use zpod_storage::catalog::Volume;
use zpod_storage::crash;
use zpod_volume::{Bytes, DiskLayout, QuotaMode, TokenDigest, VolumeId};

use super::context::{device_spec, to_the_end};
use super::publish::NodeVolumes;
use super::published::Heard;
use super::{CapacityRange, VolumeError};
use crate::guest::{GuestError, VolumeReport};

/// How long a guest that is not heard yet is waited for. kubelet gives up after two minutes, and the first reason why a
/// volume did not grow stays in its claim's conditions whatever is said later (`MergeResizeConditionOnPVC` of Kubernetes
/// 1.37): that of a guest which is merely slow to boot would hide that the pod has to be restarted.
const HEARD: Duration = Duration::from_secs(60);
const HEARD_STEP: Duration = Duration::from_millis(500);

impl NodeVolumes {
    /// Carries out on this node what [`super::Provisioner::expand`] has promised: in the running guest, or on the
    /// device while nobody has it.
    ///
    /// # Errors
    /// [`VolumeError::BeyondHeadroom`] when only a new start of the pod can do it, [`VolumeError::GuestSilent`] when the
    /// guest can't be asked in a minute.
    pub async fn expand(&self, id: VolumeId, range: CapacityRange) -> Result<Bytes, VolumeError> {
        let (begun, mut told) = (Instant::now(), false);
        loop {
            let node = self.clone();
            match to_the_end(async move { node.expand_now(id, range).await }).await {
                // Not under the volume's lock: its pod may end meanwhile.
                Err(silent @ VolumeError::GuestSilent { .. }) if begun.elapsed() < HEARD => {
                    if !std::mem::replace(&mut told, true) {
                        tracing::info!(volume = %id, "expand waits for the guest to be heard, up to {HEARD:?}");
                    }
                    tokio::select! {
                        () = tokio::time::sleep(HEARD_STEP) => {}
                        // kubelet asks the next process.
                        () = self.context.ending() => return Err(silent),
                    }
                }
                expanded => return expanded,
            }
        }
    }

    async fn expand_now(&self, id: VolumeId, range: CapacityRange) -> Result<Bytes, VolumeError> {
        let _lock = self.context.lock(id).await;
        let volume = self.context.ready(id).await?;
        self.context.published.refresh(&volume);
        if !range.accepts(volume.capacity) {
            let reason = format!(
                "volume {id} holds {} by its record; ControllerExpandVolume decides on the size, and comes first",
                volume.capacity
            );
            return Err(VolumeError::OutOfRange { reason });
        }
        let capacity = volume.capacity;
        match self.context.published.heard(id) {
            Some(heard) => self.expand_in_guest(&volume, heard).await?,
            None => self.expand_on_device(volume).await?,
        }
        Ok(capacity)
    }

    async fn expand_in_guest(&self, volume: &Volume, heard: Heard) -> Result<(), VolumeError> {
        let (id, layout) = (volume.id, volume.layout());
        let fresh = heard.guest.status().await.ok();
        let token = TokenDigest::of(heard.report.token);
        let report = fresh.as_ref().and_then(|report| report.volume(id, token)).unwrap_or(&heard.report);
        let largest = DiskLayout::largest_partition(report.disk);
        if report.disk.0 > 0 && largest < layout.partition {
            return Err(self.beyond_headroom(volume, largest));
        }
        if !is_grown(volume, report) {
            crash::point("node expand: guest");
            match heard.guest.grow(id, layout.capacity, layout.partition).await {
                Ok(()) => tracing::info!(volume = %id, capacity = %layout.capacity, "guest has grown the volume"),
                Err(GuestError::DiskTooSmall { .. }) => return Err(self.beyond_headroom(volume, largest)),
                Err(source) => return Err(VolumeError::Guest { id, source }),
            }
        }
        crash::point("node expand: grown");
        self.refresh_entry(volume).await
    }

    async fn expand_on_device(&self, volume: Volume) -> Result<(), VolumeError> {
        if volume.table_capacity == volume.capacity {
            return self.refresh_entry(&volume).await;
        }
        let (id, spec) = (volume.id, device_spec(&volume));
        let published = self.context.publication(&volume).is_some();
        let proof = match self.prove_exclusive(&volume).await {
            Err(VolumeError::Backing { source: BackingError::InUse { .. }, .. }) if published => {
                return Err(VolumeError::GuestSilent { id, node: self.context.node.clone() });
            }
            proof => proof?,
        };
        crash::point("node expand: table");
        let write = move |backing: &dyn zpod_storage::backing::Backing| {
            backing.write_table(&spec, proof.as_ref())?;
            Ok(proof)
        };
        let proof = self.context.with_device(&volume, write).await?;
        crash::point("node expand: table written");
        let table_capacity = volume.capacity;
        let volume = self.context.catalog.update(Volume { table_capacity, ..volume }).await?;
        crash::point("node expand: recorded");
        // Under the proof still: no virtual machine can start on a table and an entry that don't agree.
        self.refresh_entry(&volume).await?;
        drop(proof);
        Ok(())
    }

    fn beyond_headroom(&self, volume: &Volume, largest: Bytes) -> VolumeError {
        VolumeError::BeyondHeadroom {
            id: volume.id,
            capacity: volume.capacity,
            largest: DiskLayout::capacity_for(largest),
            node: self.context.node.clone(),
        }
    }
}

/// Whether the guest has the size of the record already.
fn is_grown(volume: &Volume, report: &VolumeReport) -> bool {
    let quota = volume.attributes.quota(&volume.parameters) == QuotaMode::None || report.quota >= volume.capacity;
    quota && report.partition >= volume.layout().partition
}

#[cfg(test)]
mod tests {
    use super::*;
    use zpod_volume::{VolumeAttributes, VolumeParameters};

    #[test]
    fn whether_a_quota_is_to_be_raised_is_what_the_volume_has_now_and_not_what_its_class_said() {
        for (class, attribute, quota, want) in [
            ("refquota", None, 0, false),
            ("refquota", None, 1, true),
            ("refquota", Some("none"), 0, true),
            ("none", None, 0, true),
            ("none", Some("quota"), 0, false),
            ("none", Some("quota"), 1, true),
        ] {
            let parameters = VolumeParameters::parse([("quota", class)]).unwrap();
            let attributes = VolumeAttributes::parse(attribute.map(|value| ("quota", value))).unwrap();
            let volume = Volume { attributes, ..Volume::wanted("a", Bytes::gib(1), parameters, "n1") };
            let (partition, quota) = (volume.layout().partition, Bytes::gib(quota));
            let report = VolumeReport { partition, quota, ..VolumeReport::online(volume.id) };
            assert_eq!(is_grown(&volume, &report), want, "{class} {attribute:?} {quota}");
        }
    }
}
