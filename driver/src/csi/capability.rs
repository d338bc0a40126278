use zpod_proto::csi::VolumeCapability;
use zpod_proto::csi::volume_capability::AccessType;
use zpod_proto::csi::volume_capability::access_mode::Mode;

use crate::volumes::{MountOptions, VolumeError};

/// How a volume is to be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Access {
    /// Mount options; `read_only` as the mode and the flags say.
    pub(super) options: MountOptions,
}

/// Reads one capability.
pub(super) fn parse(capability: Option<&VolumeCapability>) -> Result<Access, VolumeError> {
    let capability = capability.ok_or_else(|| VolumeError::invalid("volume_capability", "is missing"))?;
    let mount = match &capability.access_type {
        Some(AccessType::Mount(mount)) => mount,
        Some(AccessType::Block(_)) => {
            let reason = "volumeMode: Block is not supported yet: a zpod volume is a ZFS dataset mounted in the guest; use \
                          volumeMode: Filesystem";
            return Err(VolumeError::invalid("volume_capability.block", reason));
        }
        None => return Err(VolumeError::invalid("volume_capability.access_type", "is missing; mount is supported")),
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
    let mut options = MountOptions::parse(&mount.fs_type, &mount.mount_flags, &mount.volume_mount_group)?;
    options.read_only |= reads_only;
    Ok(Access { options })
}

/// Reads all capabilities of a volume. There must be one at least.
pub(super) fn parse_all(capabilities: &[VolumeCapability]) -> Result<(), VolumeError> {
    if capabilities.is_empty() {
        return Err(VolumeError::invalid("volume_capabilities", "is missing"));
    }
    capabilities.iter().try_for_each(|capability| parse(Some(capability)).map(drop))
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
    fn what_is_missing_or_a_block_device_is_refused_with_the_reason() {
        let block =
            VolumeCapability { access_type: Some(AccessType::Block(BlockVolume {})), ..mount(Mode::SingleNodeWriter) };
        let no_type = VolumeCapability { access_type: None, ..mount(Mode::SingleNodeWriter) };
        let no_mode = VolumeCapability { access_mode: None, ..mount(Mode::SingleNodeWriter) };
        for (capability, want) in [
            (None, "volume_capability: is missing"),
            (Some(&block), "volumeMode: Block is not supported yet"),
            (Some(&no_type), "access_type: is missing"),
            (Some(&no_mode), "access_mode: is missing"),
        ] {
            let error = parse(capability).unwrap_err().to_string();
            assert!(error.contains(want), "{error}");
        }
        assert!(parse_all(&[]).is_err());
        assert!(parse_all(&[mount(Mode::SingleNodeWriter), block]).is_err());
    }
}
