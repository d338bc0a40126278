//! Disks that go bad under running pools, in real guests: what ZFS makes of it, and what zpod tells.

mod corruption;
mod errors;
mod full;
mod image;

use zpod_proto::csi::{NodeGetVolumeStatsResponse, VolumeCondition};

/// How the volume is, by its node.
fn condition(stats: &NodeGetVolumeStatsResponse) -> VolumeCondition {
    stats.volume_condition.clone().unwrap_or_default()
}
