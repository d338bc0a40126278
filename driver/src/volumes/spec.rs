use std::collections::BTreeMap;

use uuid::Uuid;
use zpod_storage::catalog::{Publication, Volume};
use zpod_volume::{Create, Mirror, Property, PropertyKind, Provisioning, VolumeMode, VolumeSpec};

use super::mount_options;

/// What the guest of a publication is told about its volume. The token is told to it alone.
pub(super) fn volume_spec(volume: &Volume, publication: &Publication, token: Uuid) -> VolumeSpec {
    let block = volume.mode == VolumeMode::Block;
    VolumeSpec {
        quota: volume.attributes.quota(&volume.parameters),
        read_only: publication.read_only,
        pool_creation_properties: properties(volume, PropertyKind::PoolAtCreation),
        pool_properties: properties(volume, PropertyKind::Pool),
        dataset_properties: properties(volume, PropertyKind::Dataset),
        volume_creation_properties: if block {
            properties(volume, PropertyKind::VolumeAtCreation)
        } else {
            BTreeMap::new()
        },
        arc_max: volume.parameters.arc_max,
        fs_group: publication.fs_group,
        mount_flags: mount_options::flags(&publication.mount_flags),
        mode: volume.mode,
        reservation: volume.attributes.reservation(volume.capacity),
        encryption: volume.parameters.encryption,
        // Until its guest has made it its own: then the record says so, and what it was made from may be long gone.
        origin: volume.origin.clone().filter(|_| !volume.initialized),
        zfs_access: volume.parameters.zfs_access,
        snapshot_schedule: volume.attributes.snapshot_schedule(&volume.parameters),
        rollback: volume.pending_rollback().filter(|rollback| publication.rollback == Some(rollback.id)).cloned(),
        mirror: volume.is_mirrored().then_some(Mirror { behind: volume.behind }),
        ..VolumeSpec::new(volume.id, token, create(volume), volume.capacity)
    }
}

/// The properties of one kind that a volume has by its class and its attributes. A class may be used for file systems and
/// for block devices: each gets what it can have.
pub(super) fn properties(volume: &Volume, kind: PropertyKind) -> BTreeMap<String, String> {
    let mut properties = volume.attributes.properties_of(&volume.parameters, kind);
    properties.retain(|key, _| {
        volume.mode == VolumeMode::Filesystem || Property::named(key).is_some_and(|property| property.block)
    });
    properties
}

/// Create once (DESIGN, rules that keep data).
fn create(volume: &Volume) -> Create {
    let copied = volume.origin.as_ref().is_some_and(|origin| origin.initialized);
    match (volume.initialized || copied, volume.written) {
        (true, _) => Create::Never,
        (false, true) => Create::Resume,
        (false, false) => Create::Fresh,
    }
}

/// Whether discards may reach the host. Not from a thick volume: they would punch holes into what was promised to be
/// there.
pub(super) fn discard(volume: &Volume) -> bool {
    volume.parameters.provisioning == Provisioning::Thin
}
