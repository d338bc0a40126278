use zpod_storage::backing::BackingError;
use zpod_storage::catalog::Volume;
use zpod_storage::crash;
use zpod_volume::{Property, PropertyKind, VolumeAttributes, VolumeId, VolumeMode};

use super::publish::NodeVolumes;
use super::published::Heard;
use super::spec::properties;
use super::{Context, VolumeError};
use crate::guest::{Changes, GuestError};

/// That a volume of this mode can have these attributes.
///
/// # Errors
/// [`VolumeError::Invalid`] for one that block devices don't have.
pub(crate) fn check(mode: VolumeMode, attributes: &VolumeAttributes) -> Result<(), VolumeError> {
    // A block device has its size, and no quota.
    let of_files = |key: &str| key == "quota" || Property::named(key).is_some_and(|property| !property.block);
    match attributes.iter().find(|(key, _)| mode == VolumeMode::Block && of_files(key)) {
        None => Ok(()),
        Some((key, _)) => {
            let reason = format!("{key:?} is of file systems, and this volume is a block device (volumeMode: Block)");
            Err(VolumeError::invalid("mutable_parameters", reason))
        }
    }
}

/// Changes the attributes of a volume: in its record, in what its next guest is told, and in the guest that runs.
pub(super) async fn modify(
    context: &Context,
    node: Option<&NodeVolumes>,
    id: VolumeId,
    changes: VolumeAttributes,
) -> Result<Volume, VolumeError> {
    let _lock = context.lock(id).await;
    let volume = context.ready(id).await?;
    check(volume.mode, &changes)?;
    let heard = match node {
        Some(node) => node.who_runs(&volume).await?,
        None => None,
    };
    let before = volume.attributes.clone();
    let attributes = before.with(&changes);
    crash::point("modify: begin");
    let volume =
        if attributes == before { volume } else { context.catalog.update(Volume { attributes, ..volume }).await? };
    context.published.refresh(&volume);
    crash::point("modify: recorded");
    let Some(node) = node else { return Ok(volume) };
    match node.take_over(&volume, heard).await {
        Ok(()) => {
            tracing::info!(volume = %id, "attributes changed");
            Ok(volume)
        }
        // It will not do so at the next start either, and must not keep a pod from starting then.
        Err(error @ VolumeError::Guest { source: GuestError::Refused { .. }, .. }) if volume.attributes != before => {
            let volume = context.catalog.update(Volume { attributes: before, ..volume }).await?;
            crash::point("modify: taken back");
            node.refresh_entry(&volume).await?;
            Err(error)
        }
        Err(error) => Err(error),
    }
}

impl NodeVolumes {
    /// The guest that is to be told of changes; `None` where no virtual machine has the volume.
    ///
    /// # Errors
    /// [`VolumeError::GuestSilent`] while one has it whose guest is not heard: nobody would tell it later.
    async fn who_runs(&self, volume: &Volume) -> Result<Option<Heard>, VolumeError> {
        let id = volume.id;
        let heard = self.context.published.heard(id);
        if heard.is_some() || self.context.publication(volume).is_none() {
            return Ok(heard);
        }
        match self.prove_exclusive(volume).await {
            Err(VolumeError::Backing { source: BackingError::InUse { .. }, .. }) => {
                Err(VolumeError::GuestSilent { id, node: self.context.node.clone() })
            }
            proof => proof.map(|_| None),
        }
    }

    /// Tells the next guest of a volume, and the one that runs, how it is to be now. Under the volume's lock.
    async fn take_over(&self, volume: &Volume, heard: Option<Heard>) -> Result<(), VolumeError> {
        let id = volume.id;
        self.refresh_entry(volume).await?;
        crash::point("modify: entry");
        let Some(heard) = heard else { return Ok(()) };
        let changes = Changes {
            dataset: properties(volume, PropertyKind::Dataset),
            pool: properties(volume, PropertyKind::Pool),
            quota: (volume.mode == VolumeMode::Filesystem).then(|| volume.attributes.quota(&volume.parameters)),
            reservation: volume.attributes.reservation(volume.capacity).unwrap_or_default(),
            schedule: volume.attributes.snapshot_schedule(&volume.parameters),
        };
        let set = heard.guest.set_properties(id, changes).await;
        if matches!(set, Ok(()) | Err(GuestError::Refused { .. })) {
            self.context.published.told(id, heard.guest.sandbox());
        }
        set.map_err(|source| VolumeError::Guest { id, source })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_block_device_does_not_have_is_refused_and_what_both_have_is_not() {
        let check = |mode, key, value| check(mode, &VolumeAttributes::parse([(key, value)]).unwrap());
        for (key, value, block) in [
            ("quota", "quota", false),
            ("recordsize", "16K", false),
            ("compression", "zstd", true),
            ("reservation", "1Gi", true),
            ("snapshotSchedule", "hourly=24", true),
            ("snapdir", "visible", false),
        ] {
            assert!(check(VolumeMode::Filesystem, key, value).is_ok(), "{key}");
            match check(VolumeMode::Block, key, value) {
                Ok(()) => assert!(block, "{key}"),
                Err(error) => {
                    let text = error.to_string();
                    assert!(!block && text.contains(key) && text.contains("volumeMode: Block"), "{text}");
                }
            }
        }
    }
}
