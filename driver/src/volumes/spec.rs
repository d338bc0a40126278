use zpod_storage::catalog::{Publication, Volume};
use zpod_volume::{PoolName, PropertyKind, Provisioning, Version, VolumeSpec};

use super::mount_options;

/// What the guest of a publication is told about its volume.
pub(super) fn volume_spec(volume: &Volume, publication: &Publication) -> VolumeSpec {
    let layout = volume.layout();
    VolumeSpec {
        v: Version,
        id: volume.id,
        token: publication.token,
        pool: PoolName::for_volume(volume.id),
        // Create once: never again when a guest has reported the pool or anything was ever written where it lies.
        create: !volume.initialized,
        capacity: layout.capacity,
        partition: layout.partition,
        quota: volume.parameters.quota,
        read_only: publication.read_only,
        pool_creation_properties: volume.parameters.properties_of(PropertyKind::PoolAtCreation),
        pool_properties: volume.parameters.properties_of(PropertyKind::Pool),
        dataset_properties: volume.parameters.properties_of(PropertyKind::Dataset),
        arc_max: volume.parameters.arc_max,
        fs_group: publication.fs_group,
        mount_flags: mount_options::flags(&publication.mount_flags),
    }
}

/// Whether discards may reach the host. Not from a thick volume: they would punch holes into what was promised to be
/// there.
pub(super) fn discard(volume: &Volume) -> bool {
    volume.parameters.provisioning == Provisioning::Thin
}
