//! Records as they are in the custom resources, there and back.

mod snapshot;
mod volume;

pub use volume::CLAIM_UID;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use zpod_volume::{Origin, VolumeMode};

use crate::crd::{FINALIZER, Mode, OriginStatus};

/// The condition that says whether the device or the copy is there.
pub const READY: &str = "Ready";
/// The condition that says whether the size that was asked for is there.
pub const EXPANDED: &str = "Expanded";
/// The condition that says whether the attributes that were asked for are taken over.
pub const MODIFIED: &str = "Modified";
/// The condition that says whether the device can be destroyed as asked.
pub const DESTROYED: &str = "Destroyed";
/// The condition that says how the pool is, by the guest's word. Of another owner: `Manager::State`.
pub const HEALTHY: &str = "Healthy";

fn origin_of(status: &OriginStatus) -> Option<Origin> {
    let mark = status.mark.as_deref().map(str::parse).transpose().ok()?;
    Some(Origin { volume: status.volume.parse().ok()?, mark, initialized: status.initialized, copy: status.copy })
}

fn origin_status(origin: &Origin) -> OriginStatus {
    OriginStatus {
        volume: origin.volume.to_string(),
        mark: origin.mark.as_ref().map(ToString::to_string),
        initialized: origin.initialized,
        copy: origin.copy,
    }
}

/// What an object has that takes the place of this one.
fn successor(of: &ObjectMeta) -> ObjectMeta {
    let (name, labels) = (of.name.clone(), of.labels.clone());
    ObjectMeta { name, labels, finalizers: Some(vec![FINALIZER.to_owned()]), ..ObjectMeta::default() }
}

fn mode_of(mode: Option<Mode>) -> VolumeMode {
    if mode == Some(Mode::Block) { VolumeMode::Block } else { VolumeMode::Filesystem }
}

fn mode_status(mode: VolumeMode) -> Option<Mode> {
    (mode == VolumeMode::Block).then_some(Mode::Block)
}
