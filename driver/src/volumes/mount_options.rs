use zpod_volume::{Excerpt, MountFlag};

use super::VolumeError;

const FLAGS: [(&str, MountFlag); 4] = [
    ("noatime", MountFlag::Noatime),
    ("nodev", MountFlag::Nodev),
    ("noexec", MountFlag::Noexec),
    ("nosuid", MountFlag::Nosuid),
];
/// `ro` and `rw` decide on one thing, the flags on others.
const ALLOWED: &str = "noatime, nodev, noexec, nosuid, ro, rw";

/// What a mount capability may ask for, and does.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct MountOptions {
    /// Mount flags, sorted, each once.
    pub flags: Vec<MountFlag>,
    /// `ro` was among the flags.
    pub read_only: bool,
    /// The group that owns the volume.
    pub fs_group: Option<u32>,
}

impl MountOptions {
    /// Reads `fs_type`, `mount_flags` and `volume_mount_group` of a capability.
    ///
    /// # Errors
    /// [`VolumeError::Invalid`] with what is allowed.
    pub fn parse(fs_type: &str, flags: &[String], group: &str) -> Result<Self, VolumeError> {
        if !matches!(fs_type, "" | "zfs") {
            return Err(VolumeError::invalid(
                "volume_capability.mount.fs_type",
                format!(
                    "{} is not what a zpod volume holds; allowed is zfs: set csi.storage.k8s.io/fstype: zfs in the \
                     StorageClass, or start the external-provisioner without --default-fstype",
                    Excerpt(fs_type)
                ),
            ));
        }
        let mut options = Self { fs_group: parse_group(group)?, ..Self::default() };
        let mut writable = false;
        for given in flags {
            match (given.as_str(), FLAGS.iter().find(|(name, _)| name == given)) {
                ("ro", _) => options.read_only = true,
                ("rw", _) => writable = true,
                (_, Some((_, flag))) => options.flags.push(*flag),
                (unknown, None) => {
                    let reason = format!("{} is not allowed; allowed are {ALLOWED}", Excerpt(unknown));
                    return Err(VolumeError::invalid("volume_capability.mount.mount_flags", reason));
                }
            }
        }
        if options.read_only && writable {
            let reason = "ro and rw exclude each other".to_owned();
            return Err(VolumeError::invalid("volume_capability.mount.mount_flags", reason));
        }
        options.flags.sort_unstable();
        options.flags.dedup();
        Ok(options)
    }
}

/// The names of these flags, for the record.
pub(super) fn names(flags: &[MountFlag]) -> Vec<String> {
    FLAGS.iter().filter(|(_, flag)| flags.contains(flag)).map(|(name, _)| (*name).to_owned()).collect()
}

/// The flags of these names. Names that are none don't occur: they were written by [`names`].
pub(super) fn flags(names: &[String]) -> Vec<MountFlag> {
    FLAGS.iter().filter(|(name, _)| names.iter().any(|given| given == name)).map(|(_, flag)| *flag).collect()
}

fn parse_group(group: &str) -> Result<Option<u32>, VolumeError> {
    if group.is_empty() {
        return Ok(None);
    }
    // u32::MAX is (gid_t)-1: "no change" to chown(2).
    let gid = group.parse().ok().filter(|gid| *gid != u32::MAX && group.bytes().all(|b| b.is_ascii_digit()));
    gid.map(Some).ok_or_else(|| {
        let reason = format!(
            "{} is not a group id; a number is allowed, since the guest has no names for groups",
            Excerpt(group)
        );
        VolumeError::invalid("volume_capability.mount.volume_mount_group", reason)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(fs_type: &str, flags: &[&str], group: &str) -> Result<MountOptions, VolumeError> {
        let flags: Vec<_> = flags.iter().map(|flag| (*flag).to_owned()).collect();
        MountOptions::parse(fs_type, &flags, group)
    }

    #[test]
    fn what_is_allowed_is_taken_in_any_order() {
        let options = parse("zfs", &["nosuid", "ro", "noatime", "nosuid"], "2000").unwrap();
        assert_eq!(options, parse("", &["noatime", "nosuid", "ro"], "2000").unwrap());
        assert!(options.read_only);
        assert_eq!(options.fs_group, Some(2000));
        assert_eq!(flags(&names(&options.flags)), [MountFlag::Noatime, MountFlag::Nosuid]);
    }

    #[test]
    fn what_is_refused_names_the_field_and_what_is_allowed() {
        for (fs_type, flags, group, want) in [
            ("ext4", &[][..], "", "--default-fstype"),
            ("zfs", &["discard"], "", "allowed are noatime"),
            ("zfs", &["ro", "rw"], "", "exclude each other"),
            ("zfs", &[], "staff", "volume_mount_group"),
            ("zfs", &[], "-1", "volume_mount_group"),
            ("zfs", &[], "4294967295", "volume_mount_group"),
        ] {
            let error = parse(fs_type, flags, group).unwrap_err().to_string();
            assert!(error.contains(want), "{error}");
        }
    }
}
