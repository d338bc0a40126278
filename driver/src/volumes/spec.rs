use zpod_storage::catalog::{Publication, Volume};
use zpod_volume::{Create, PropertyKind, Provisioning, VolumeSpec};

use super::mount_options;

/// What the guest of a publication is told about its volume.
pub(super) fn volume_spec(volume: &Volume, publication: &Publication) -> VolumeSpec {
    VolumeSpec {
        quota: volume.parameters.quota,
        read_only: publication.read_only,
        pool_creation_properties: volume.parameters.properties_of(PropertyKind::PoolAtCreation),
        pool_properties: volume.parameters.properties_of(PropertyKind::Pool),
        dataset_properties: volume.parameters.properties_of(PropertyKind::Dataset),
        arc_max: volume.parameters.arc_max,
        fs_group: publication.fs_group,
        mount_flags: mount_options::flags(&publication.mount_flags),
        ..VolumeSpec::new(volume.id, publication.token, create(volume), volume.capacity)
    }
}

/// Create once (DESIGN, rules that keep data).
fn create(volume: &Volume) -> Create {
    match (volume.initialized, volume.written) {
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
