use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::{DirBuilderExt, MetadataExt as _};
use std::path::{Component, Path, PathBuf};

use rustix::fs::{AtFlags, CWD, StatVfsMountFlags, StatxAttributes, StatxFlags};
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags};
use zpod_storage::backing::Outcome;

use super::KataError;

/// The longest target path that Kata can use: its base64 form, with padding, is the name of one directory, and a name
/// has at most 255 bytes.
pub const MAX_TARGET_BYTES: usize = 189;

/// `statfs(2)`: the magic number of tmpfs.
const TMPFS_MAGIC: u64 = 0x0102_1994;

/// A CSI target path as the container runtime will name it: absolute, with the symbolic links of its parent resolved,
/// since containerd resolves them before Kata looks the path up.
///
/// What is mounted there is a read-only, empty tmpfs: where Kata does not take the path for a direct volume (another
/// runtime, a subPath, a damaged entry), the container gets EROFS and not the host's disk.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct TargetPath(PathBuf);

impl TargetPath {
    /// Checks and resolves a target path. Its parent must exist, as the CSI specification promises.
    ///
    /// # Errors
    /// [`KataError::Target`] for a path that can't be used, [`KataError::Io`] when its parent can't be resolved.
    pub fn resolve(given: &Path) -> Result<Self, KataError> {
        let refuse = |reason: String| KataError::Target { path: given.to_owned(), reason };
        let plain = given.components().all(|part| matches!(part, Component::RootDir | Component::Normal(_)));
        let (Some(parent), Some(name)) = (given.parent(), given.file_name()) else {
            return Err(refuse("an absolute path below the root is needed".into()));
        };
        if !given.is_absolute() || !plain {
            return Err(refuse("an absolute path without '..' is needed".into()));
        }
        let path = parent.canonicalize().map_err(KataError::io("resolve the parent of the target path", parent))?;
        let path = path.join(name);
        let bytes = path.as_os_str().len();
        if bytes > MAX_TARGET_BYTES {
            return Err(refuse(format!(
                "it is {bytes} bytes long with symbolic links resolved, at most {MAX_TARGET_BYTES} are allowed, because \
                 Kata uses its base64 form as the name of a directory; use a shorter volume name or kubelet directory"
            )));
        }
        Ok(Self(path))
    }

    /// Whether this is the place of another target path, by whatever name that was given: the same name in the same
    /// directory, which may be reached through symbolic links and by bind mounts. Of a directory that is gone, what is
    /// left of the way to it is compared.
    pub fn is_at(&self, other: &Path) -> bool {
        is_same_place(&self.0, other)
    }

    /// A target path whose parent is gone, as it was given.
    pub fn unresolved(given: &Path) -> Self {
        Self(given.to_owned())
    }

    /// The path.
    pub fn as_path(&self) -> &Path {
        &self.0
    }

    /// Makes the directory and mounts the read-only placeholder on it.
    ///
    /// # Errors
    /// [`KataError::Occupied`] when something else is there.
    pub fn mount_placeholder(&self) -> Result<Outcome, KataError> {
        let path = &self.0;
        match fs::DirBuilder::new().mode(0o750).create(path) {
            Ok(()) => {}
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
            Err(error) => return Err(KataError::io("create", path)(error)),
        }
        match self.found()? {
            Found::Placeholder => return Ok(Outcome::Unchanged),
            Found::Directory => {}
            Found::Absent => return Err(self.occupied("it was removed while it was being made")),
            Found::OtherMount => return Err(self.occupied("something else is mounted on it")),
            Found::NoDirectory => return Err(self.occupied("it is not a directory")),
        }
        let flags = MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
        // A single inode, the root: even remounted for writing, nothing could be put here.
        rustix::mount::mount("zpod", path, "tmpfs", flags, c"size=4k,nr_inodes=1,mode=0555")
            .map_err(KataError::os("mount a read-only tmpfs on", path))?;
        Ok(Outcome::Changed)
    }

    /// Whether the placeholder is mounted.
    ///
    /// # Errors
    /// When the operating system refuses.
    pub fn has_placeholder(&self) -> Result<bool, KataError> {
        Ok(matches!(self.found()?, Found::Placeholder))
    }

    /// Unmounts the placeholder and removes the directory, if it is empty. Nothing is ever removed recursively.
    ///
    /// # Errors
    /// [`KataError::Occupied`] when something else is mounted there, or files are in the directory.
    pub fn remove_placeholder(&self) -> Result<Outcome, KataError> {
        let path = &self.0;
        match self.found()? {
            Found::Absent => return Ok(Outcome::Unchanged),
            Found::OtherMount => return Err(self.occupied("something else is mounted on it")),
            Found::NoDirectory => return Err(self.occupied("it is not a directory")),
            Found::Directory => {}
            Found::Placeholder => {
                // The container's own mount namespace may still hold a copy: that one is the container's affair.
                rustix::mount::unmount(path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW)
                    .map_err(KataError::os("unmount", path))?;
                zpod_storage::crash::point("target unmounted");
            }
        }
        match fs::remove_dir(path) {
            Ok(()) => Ok(Outcome::Changed),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(Outcome::Unchanged),
            Err(error) if error.kind() == ErrorKind::DirectoryNotEmpty => Err(self.occupied(
                "there are files in the directory, which zpod never put there; look at them, then remove them",
            )),
            Err(error) => Err(KataError::io("remove", path)(error)),
        }
    }

    pub(super) fn occupied(&self, reason: &'static str) -> KataError {
        KataError::Occupied { path: self.0.clone(), reason }
    }

    fn found(&self) -> Result<Found, KataError> {
        let path = &self.0;
        let stat = match rustix::fs::statx(CWD, path, AtFlags::SYMLINK_NOFOLLOW, StatxFlags::TYPE) {
            Ok(stat) => stat,
            Err(Errno::NOENT) => return Ok(Found::Absent),
            Err(errno) => return Err(KataError::os("stat", path)(errno)),
        };
        if rustix::fs::FileType::from_raw_mode(stat.stx_mode.into()) != rustix::fs::FileType::Directory {
            return Ok(Found::NoDirectory);
        }
        if !stat.stx_attributes.contains(StatxAttributes::MOUNT_ROOT) {
            return Ok(Found::Directory);
        }
        let kind = rustix::fs::statfs(path).map_err(KataError::os("statfs", path))?.f_type as u64;
        let flags = rustix::fs::statvfs(path).map_err(KataError::os("statvfs", path))?.f_flag;
        let ours = kind == TMPFS_MAGIC && flags.contains(StatVfsMountFlags::RDONLY);
        Ok(if ours { Found::Placeholder } else { Found::OtherMount })
    }
}

/// Whether two paths are one place; see [`TargetPath::is_at`].
pub fn is_same_place(one: &Path, other: &Path) -> bool {
    one == other || Place::of(one).is_some_and(|place| Place::of(other) == Some(place))
}

/// A target path as what it is: a directory, by device and inode, and the way on from there.
#[derive(Debug, PartialEq, Eq)]
struct Place {
    directory: (u64, u64),
    rest: PathBuf,
}

impl Place {
    /// `None` for what can't be looked up.
    fn of(path: &Path) -> Option<Self> {
        // The last name is never followed: something may be mounted there.
        let mut rest = PathBuf::from(path.file_name()?);
        for directory in path.parent()?.ancestors() {
            match fs::metadata(directory) {
                Ok(found) => return Some(Self { directory: (found.dev(), found.ino()), rest }),
                Err(error) if error.kind() == ErrorKind::NotFound => {
                    rest = Path::new(directory.file_name()?).join(rest);
                }
                Err(_) => return None,
            }
        }
        None
    }
}

/// What is at a target path.
enum Found {
    Absent,
    NoDirectory,
    Directory,
    Placeholder,
    OtherMount,
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn paths_that_kata_cannot_use_are_refused_with_the_reason() {
        let dir = tempfile::tempdir().unwrap();
        let long = dir.path().join("x".repeat(MAX_TARGET_BYTES));
        for (path, want) in [
            (Path::new("relative/path"), "absolute"),
            (Path::new("/"), "below the root"),
            (Path::new("/tmp/../etc/x"), "without '..'"),
            (long.as_path(), "at most 189"),
        ] {
            let error = TargetPath::resolve(path).unwrap_err().to_string();
            assert!(error.contains(want), "{error}");
        }
    }

    #[test]
    fn symbolic_links_in_the_parent_are_resolved_as_containerd_does() {
        let dir = tempfile::tempdir().unwrap();
        let real = dir.path().canonicalize().unwrap().join("real");
        fs::create_dir(&real).unwrap();
        symlink(&real, dir.path().join("link")).unwrap();
        let target = TargetPath::resolve(&dir.path().join("link/mount")).unwrap();
        assert_eq!(target.as_path(), real.join("mount"));
    }

    #[test]
    fn one_place_is_known_by_all_its_names() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        for name in ["real/pods", "bound", "other/pods"] {
            fs::create_dir_all(at(name)).unwrap();
        }
        symlink(at("real"), at("link")).unwrap();
        rustix::mount::mount_bind(at("real"), at("bound")).unwrap();
        let target = TargetPath::resolve(&at("real/pods/mount")).unwrap();
        let names = ["real/pods/mount", "link/pods/mount", "bound/pods/mount", "link/./pods//mount"];
        let known = || names.map(|name| target.is_at(&at(name)));
        let others = || ["real/pods/other", "other/pods/mount", "bound/mount"].map(|name| target.is_at(&at(name)));
        assert_eq!((known(), others()), ([true; 4], [false; 3]));
        target.mount_placeholder().unwrap();
        assert_eq!((known(), others()), ([true; 4], [false; 3]));
        target.remove_placeholder().unwrap();
        fs::remove_dir(at("real/pods")).unwrap();
        assert_eq!((known(), others()), ([true; 4], [false; 3]), "its directory is gone");
        rustix::mount::unmount(at("bound"), UnmountFlags::DETACH).unwrap();
    }

    #[test]
    fn nothing_falls_through_to_the_host() {
        let dir = tempfile::tempdir().unwrap();
        let target = TargetPath::resolve(&dir.path().join("mount")).unwrap();
        assert_eq!(target.mount_placeholder().unwrap(), Outcome::Changed);
        assert_eq!(target.mount_placeholder().unwrap(), Outcome::Unchanged);
        let error = fs::write(target.as_path().join("file"), "x").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ReadOnlyFilesystem);
        assert_eq!(fs::read_dir(target.as_path()).unwrap().count(), 0);
        assert_eq!(target.remove_placeholder().unwrap(), Outcome::Changed);
        assert_eq!(target.remove_placeholder().unwrap(), Outcome::Unchanged);
    }

    #[test]
    fn a_target_with_files_or_a_foreign_mount_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let target = TargetPath::resolve(&dir.path().join("mount")).unwrap();
        fs::create_dir(target.as_path()).unwrap();
        fs::write(target.as_path().join("precious"), "x").unwrap();
        assert!(matches!(target.remove_placeholder(), Err(KataError::Occupied { .. })));
        assert!(target.as_path().join("precious").exists());

        rustix::mount::mount("other", target.as_path(), "tmpfs", MountFlags::empty(), None).unwrap();
        assert!(matches!(target.mount_placeholder(), Err(KataError::Occupied { .. })));
        assert!(matches!(target.remove_placeholder(), Err(KataError::Occupied { .. })));
        rustix::mount::unmount(target.as_path(), UnmountFlags::empty()).unwrap();

        let file = TargetPath::resolve(&target.as_path().join("precious")).unwrap();
        assert!(matches!(file.mount_placeholder(), Err(KataError::Occupied { .. })));
        assert!(matches!(file.remove_placeholder(), Err(KataError::Occupied { .. })));
    }
}
