//! Who may have ZFS itself in its containers (`zfsAccess`): those whose StorageClass asks for it, where the operator allows
//! it.

use zpod_volume::{VolumeMode, VolumeParameters, ZfsAccess};

use super::VolumeError;

/// Whether a volume can be made that asks for access to ZFS, or not.
///
/// # Errors
/// [`VolumeError::Invalid`] for a block device that asks for it, [`VolumeError::AccessForbidden`] where it is not allowed.
/// `what` is the volume, for people.
pub(crate) fn check_access(
    parameters: &VolumeParameters,
    mode: VolumeMode,
    allowed: bool,
    what: impl FnOnce() -> String,
) -> Result<(), VolumeError> {
    match parameters.zfs_access {
        ZfsAccess::None => Ok(()),
        ZfsAccess::Volume if !mode.is_filesystem() => {
            let reason = "zfsAccess: \"volume\" is for file systems, and a block device (volumeMode: Block) was asked for; \
                          allowed is: none: take a StorageClass without it, or volumeMode: Filesystem";
            Err(VolumeError::invalid("parameters", reason))
        }
        ZfsAccess::Volume if allowed => Ok(()),
        ZfsAccess::Volume => Err(VolumeError::AccessForbidden { what: what() }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::csi::to_status;
    use tonic::Code;

    fn check(word: &str, mode: VolumeMode, allowed: bool) -> Result<(), tonic::Status> {
        let parameters = VolumeParameters::parse([("zfsAccess", word)]).unwrap();
        check_access(&parameters, mode, allowed, || "volume pvc-1".to_owned()).map_err(|error| to_status(&error))
    }

    #[test]
    fn access_is_had_where_it_is_asked_for_and_allowed() {
        for mode in [VolumeMode::Filesystem, VolumeMode::Block] {
            for allowed in [false, true] {
                check("none", mode, allowed).unwrap();
            }
        }
        check("volume", VolumeMode::Filesystem, true).unwrap();
        let forbidden = check("volume", VolumeMode::Filesystem, false).unwrap_err();
        assert_eq!(forbidden.code(), Code::FailedPrecondition);
        for word in ["volume pvc-1", "zfsAccess: \"volume\"", "allowed is: none", "zfsAccess.allowed"] {
            assert!(forbidden.message().contains(word), "{forbidden}");
        }
        for allowed in [false, true] {
            let block = check("volume", VolumeMode::Block, allowed).unwrap_err();
            assert_eq!(block.code(), Code::InvalidArgument);
            for word in ["zfsAccess: \"volume\"", "volumeMode: Block", "allowed is: none"] {
                assert!(block.message().contains(word), "{block}");
            }
        }
    }
}
