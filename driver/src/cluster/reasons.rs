//! Why a node can't do what an object asks for, in a word.

use zpod_storage::backing::BackingError;

use crate::volumes::VolumeError;

/// Room is what is missing. The controller then asks another node.
pub(super) const NO_ROOM: &str = "NoRoom";
/// No file of the node's can be so long. The same, of a new volume; one that is there can't grow so far.
pub(super) const TOO_LARGE: &str = "TooLarge";

/// A full copy is being made.
pub(super) const COPYING: &str = "Copying";

pub(super) fn reason(error: &VolumeError) -> &'static str {
    match error {
        error if error.is_no_room() => NO_ROOM,
        VolumeError::Published { .. } => "Published",
        VolumeError::GuestSilent { .. } => "GuestSilent",
        VolumeError::Guest { .. } => "GuestFailed",
        VolumeError::Copying { .. } => COPYING,
        VolumeError::SourceElsewhere { .. } => "SourceElsewhere",
        VolumeError::NoCopyWhileRunning { .. } => "NoCopyWhileRunning",
        VolumeError::MarkLost { .. } => "MarkLost",
        VolumeError::Invalid { .. } | VolumeError::Parameter(_) => "Invalid",
        VolumeError::Backing { source, .. } => match source {
            BackingError::InUse { .. } => "InUse",
            BackingError::CannotShare { .. } => "CannotShareBlocks",
            BackingError::Stopped => "Stopped",
            BackingError::Missing { .. } | BackingError::SnapshotMissing { .. } => "Missing",
            BackingError::TooLarge { .. } => TOO_LARGE,
            _ => "DeviceFailed",
        },
        VolumeError::OutOfRange { .. } => "OutOfRange",
        _ => "Failed",
    }
}

/// Whether a pod has to end first.
pub(super) fn is_in_use(error: &VolumeError) -> bool {
    matches!(error, VolumeError::Published { .. } | VolumeError::Backing { source: BackingError::InUse { .. }, .. })
}
