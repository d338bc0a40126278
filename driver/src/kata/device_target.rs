use std::fs::{self, OpenOptions};
use std::io::ErrorKind;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _};

use rustix::fs::{AtFlags, CWD, StatxAttributes, StatxFlags};
use rustix::mount::UnmountFlags;
use zpod_storage::backing::Outcome;
use zpod_storage::crash;

use super::{KataError, LoopDevice, TargetPath};

/// What is at the target path of a block device.
enum Found {
    Absent,
    /// The empty file that a device's node is mounted on.
    File,
    /// A device's node.
    Device(u64),
    Other(&'static str),
}

/// Target paths of block devices: a file on which the device's node is mounted, as kubelet expects it.
impl TargetPath {
    /// Makes the file and mounts the device's node on it.
    ///
    /// # Errors
    /// [`KataError::Occupied`] when something else is there.
    pub fn mount_device(&self, device: &LoopDevice) -> Result<Outcome, KataError> {
        let (path, node) = (self.as_path(), device.path());
        match OpenOptions::new().write(true).create_new(true).mode(0o600).open(path) {
            Ok(_) => crash::point("device target made"),
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
            Err(error) => return Err(KataError::io("create", path)(error)),
        }
        let number = fs::metadata(node).map_err(KataError::io("stat", node))?.rdev();
        match self.found_device()? {
            Found::Device(found) if found == number => return Ok(Outcome::Unchanged),
            Found::File => {}
            Found::Device(_) => return Err(self.occupied("another device is mounted on it")),
            Found::Absent => return Err(self.occupied("it was removed while it was being made")),
            Found::Other(what) => return Err(self.occupied(what)),
        }
        rustix::mount::mount_bind(node, path).map_err(KataError::os("mount a device on", path))?;
        Ok(Outcome::Changed)
    }

    /// Whether a device's node is mounted.
    ///
    /// # Errors
    /// When the operating system refuses.
    pub fn has_device(&self) -> Result<bool, KataError> {
        Ok(matches!(self.found_device()?, Found::Device(_)))
    }

    /// Unmounts the device's node and removes the file, if it is empty.
    ///
    /// # Errors
    /// [`KataError::Occupied`] when something else is there.
    pub fn remove_device(&self) -> Result<Outcome, KataError> {
        let path = self.as_path();
        match self.found_device()? {
            Found::Absent => return Ok(Outcome::Unchanged),
            Found::File => {}
            Found::Other(what) => return Err(self.occupied(what)),
            Found::Device(_) => {
                rustix::mount::unmount(path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW)
                    .map_err(KataError::os("unmount", path))?;
                crash::point("device unmounted");
            }
        }
        match fs::remove_file(path) {
            Ok(()) => Ok(Outcome::Changed),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(Outcome::Unchanged),
            Err(error) => Err(KataError::io("remove", path)(error)),
        }
    }

    fn found_device(&self) -> Result<Found, KataError> {
        let path = self.as_path();
        let found = match fs::symlink_metadata(path) {
            Ok(found) => found,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Found::Absent),
            Err(error) => return Err(KataError::io("stat", path)(error)),
        };
        let stat = rustix::fs::statx(CWD, path, AtFlags::SYMLINK_NOFOLLOW, StatxFlags::TYPE);
        let mounted = stat.map_err(KataError::os("stat", path))?.stx_attributes.contains(StatxAttributes::MOUNT_ROOT);
        Ok(match (found.file_type(), mounted) {
            (kind, true) if kind.is_block_device() => Found::Device(found.rdev()),
            (_, true) => Found::Other("something else is mounted on it"),
            (kind, false) if kind.is_file() && found.len() == 0 => Found::File,
            (kind, false) if kind.is_file() => Found::Other("it is a file with contents, which zpod never made"),
            (_, false) => Found::Other("it is not a file"),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;

    #[test]
    fn a_device_appears_at_its_target_and_goes_and_what_is_foreign_stays() {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("a-volume-of-the-target-test.img");
        File::create(&image).unwrap().set_len(1 << 20).unwrap();
        let (device, _) = LoopDevice::attach(&image, true).unwrap();
        let target = TargetPath::resolve(&dir.path().join("device")).unwrap();
        // Killed before the mount.
        File::create(target.as_path()).unwrap();
        assert_eq!(target.mount_device(&device).unwrap(), Outcome::Changed);
        assert_eq!(target.mount_device(&device).unwrap(), Outcome::Unchanged);
        assert!(target.has_device().unwrap());
        let node = fs::metadata(target.as_path()).unwrap();
        assert!(node.file_type().is_block_device() && node.rdev() == fs::metadata(device.path()).unwrap().rdev());
        // A directory's way out does not touch it, and the other way round.
        assert!(matches!(target.remove_placeholder(), Err(KataError::Occupied { .. })));
        assert_eq!(target.remove_device().unwrap(), Outcome::Changed);
        assert_eq!(target.remove_device().unwrap(), Outcome::Unchanged);

        fs::write(target.as_path(), "precious").unwrap();
        assert!(matches!(target.mount_device(&device), Err(KataError::Occupied { .. })));
        assert!(matches!(target.remove_device(), Err(KataError::Occupied { .. })));
        assert_eq!(fs::read(target.as_path()).unwrap(), b"precious");
        LoopDevice::detach(&image).unwrap();
    }
}
