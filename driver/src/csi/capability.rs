use std::collections::BTreeSet;

use zpod_proto::csi::VolumeCapability;
use zpod_proto::csi::volume_capability::AccessType;
use zpod_proto::csi::volume_capability::access_mode::Mode;
use zpod_volume::VolumeMode;

use crate::volumes::{MountOptions, VolumeError};

/// How a volume is to be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Access {
    /// A file system or a block device.
    pub(super) mode: VolumeMode,
    /// Mount options; `read_only` as the mode and the flags say. A block device has none but that.
    pub(super) options: MountOptions,
}

/// Reads one capability.
pub(super) fn parse(capability: Option<&VolumeCapability>) -> Result<Access, VolumeError> {
    let capability = capability.ok_or_else(|| VolumeError::invalid("volume_capability", "is missing"))?;
    let (volume_mode, mut options) = match &capability.access_type {
        Some(AccessType::Mount(mount)) => {
            let options = MountOptions::parse(&mount.fs_type, &mount.mount_flags, &mount.volume_mount_group)?;
            (VolumeMode::Filesystem, options)
        }
        Some(AccessType::Block(_)) => (VolumeMode::Block, MountOptions::default()),
        None => {
            return Err(VolumeError::invalid(
                "volume_capability.access_type",
                "is missing; mount and block are supported",
            ));
        }
    };
    let field = "volume_capability.access_mode";
    let mode = capability.access_mode.as_ref().ok_or_else(|| VolumeError::invalid(field, "is missing"))?.mode();
    let reads_only = match mode {
        Mode::SingleNodeWriter | Mode::SingleNodeSingleWriter | Mode::SingleNodeMultiWriter => false,
        Mode::SingleNodeReaderOnly => true,
        Mode::Unknown | Mode::MultiNodeReaderOnly | Mode::MultiNodeSingleWriter | Mode::MultiNodeMultiWriter => {
            let reason = format!(
                "{} is not possible: a pool lives in one kernel, so a volume is on one node; use ReadWriteOnce or \
                 ReadWriteOncePod",
                mode.as_str_name()
            );
            return Err(VolumeError::invalid(field, reason));
        }
    };
    options.read_only |= reads_only;
    Ok(Access { mode: volume_mode, options })
}

/// Reads all capabilities of a volume, of which there must be one at least: what it is to be.
pub(super) fn parse_all(capabilities: &[VolumeCapability]) -> Result<VolumeMode, VolumeError> {
    let mut modes = BTreeSet::new();
    for capability in capabilities {
        modes.insert(parse(Some(capability))?.mode == VolumeMode::Block);
    }
    match (modes.pop_first(), modes.pop_first()) {
        (None, _) => Err(VolumeError::invalid("volume_capabilities", "is missing")),
        (Some(block), None) => Ok(if block { VolumeMode::Block } else { VolumeMode::Filesystem }),
        (Some(_), Some(_)) => {
            let reason = "ask for mount and for block; a volume is made as one or the other";
            Err(VolumeError::invalid("volume_capabilities", reason))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use zpod_proto::csi::volume_capability::{AccessMode, BlockVolume, MountVolume};

    fn mount(mode: Mode) -> VolumeCapability {
        VolumeCapability {
            access_type: Some(AccessType::Mount(MountVolume::default())),
            access_mode: Some(AccessMode { mode: mode.into() }),
        }
    }

    #[test]
    fn modes_of_one_node_are_taken_and_the_others_refused() {
        for (mode, read_only) in [
            (Mode::SingleNodeWriter, false),
            (Mode::SingleNodeSingleWriter, false),
            (Mode::SingleNodeMultiWriter, false),
            (Mode::SingleNodeReaderOnly, true),
        ] {
            assert_eq!(parse(Some(&mount(mode))).unwrap().options.read_only, read_only, "{mode:?}");
        }
        for mode in [Mode::Unknown, Mode::MultiNodeReaderOnly, Mode::MultiNodeSingleWriter, Mode::MultiNodeMultiWriter]
        {
            assert!(parse(Some(&mount(mode))).is_err(), "{mode:?}");
        }
    }

    #[test]
    fn what_is_missing_is_refused_with_the_reason_and_a_volume_is_one_thing_only() {
        let block = VolumeCapability {
            access_type: Some(AccessType::Block(BlockVolume {})),
            ..mount(Mode::SingleNodeReaderOnly)
        };
        let no_type = VolumeCapability { access_type: None, ..mount(Mode::SingleNodeWriter) };
        let no_mode = VolumeCapability { access_mode: None, ..mount(Mode::SingleNodeWriter) };
        for (capability, want) in [
            (None, "volume_capability: is missing"),
            (Some(&no_type), "access_type: is missing"),
            (Some(&no_mode), "access_mode: is missing"),
        ] {
            let error = parse(capability).unwrap_err().to_string();
            assert!(error.contains(want), "{error}");
        }
        assert!(parse_all(&[]).is_err());
        assert!(parse(Some(&block)).unwrap().options.read_only);
        assert_eq!(parse_all(&[block.clone(), block.clone()]).unwrap(), VolumeMode::Block);
        assert!(parse_all(&[mount(Mode::SingleNodeWriter), block]).is_err());
    }
}
