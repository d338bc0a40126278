//! What takes space in a backing store: devices, and the copies that snapshots keep of them.

use std::fmt;

use zpod_volume::{SnapshotId, VolumeId};

/// A device or a copy of one, and the name of its file. Devices come first in the order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Kept {
    /// The device of a volume.
    Volume(VolumeId),
    /// The copy of a snapshot.
    Snapshot(SnapshotId),
}

impl Kept {
    /// What a file name stands for; nothing where it is none of ours.
    pub(super) fn of_name(name: &str) -> Option<Self> {
        match name.split_once('.')? {
            (id, "img") => id.parse().ok().map(Self::Volume),
            (id, "snap") => id.parse().ok().map(Self::Snapshot),
            _ => None,
        }
    }

    /// The name of its file.
    pub(super) fn name(self) -> String {
        match self {
            Self::Volume(id) => format!("{id}.img"),
            Self::Snapshot(id) => format!("{id}.snap"),
        }
    }

    /// The name of its file while it is being made.
    pub(super) fn temporary_name(self) -> String {
        match self {
            Self::Volume(id) => crate::directory::temporary_name(id),
            Self::Snapshot(id) => crate::directory::temporary_name(id),
        }
    }
}

impl From<VolumeId> for Kept {
    fn from(id: VolumeId) -> Self {
        Self::Volume(id)
    }
}

impl From<SnapshotId> for Kept {
    fn from(id: SnapshotId) -> Self {
        Self::Snapshot(id)
    }
}

impl fmt::Display for Kept {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Volume(id) => write!(f, "volume {id}"),
            Self::Snapshot(id) => write!(f, "snapshot {id}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_stands_for_one_thing_and_a_strangers_for_none() {
        let (volume, snapshot) = (Kept::from(VolumeId::from_name("a")), Kept::from(SnapshotId::from_name("a")));
        assert_ne!(volume.name(), snapshot.name());
        assert_ne!(volume.temporary_name(), snapshot.temporary_name());
        for kept in [volume, snapshot] {
            assert_eq!(Kept::of_name(&kept.name()), Some(kept));
            assert!(crate::directory::is_temporary(&kept.temporary_name()));
            for name in [format!("x{}", kept.name()), format!("{}.old", kept.name()), kept.temporary_name()] {
                assert_eq!(Kept::of_name(&name), None, "{name}");
            }
        }
        for name in ["", ".", "..", "img", ".img", "b.img", "notes.txt"] {
            assert_eq!(Kept::of_name(name), None, "{name}");
        }
    }
}
