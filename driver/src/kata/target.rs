use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::{DirBuilderExt, MetadataExt as _, PermissionsExt as _};
use std::path::{Component, Path, PathBuf};

use rustix::fs::{AtFlags, CWD, StatVfsMountFlags, StatxAttributes, StatxFlags};
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags};
use zpod_storage::backing::Outcome;

use super::KataError;

/// The longest target path that Kata can use: its base64 form, with padding, is the name of one directory, and a name
/// has at most 255 bytes.
pub const MAX_TARGET_BYTES: usize = 189;

/// The only file in a placeholder.
const NOTE: &str = "README-zpod";

/// What it says: shorter than a page.
const NOTE_TEXT: &str = "\
This is not the volume: its data is not here.

The volume is a ZFS pool inside its pod's own guest kernel (zpod, csi.zpod.storage). The node has this read-only placeholder in
its place.

If you see this in a backup, the backup has nothing of the volume. Use CSI snapshots, `kubectl zpod send`, or a backup that
runs in the pod, and leave the volume out of file-system backups (Velero: annotate the pod with
backup.velero.io/backup-volumes-excludes). See docs/limitations.md, \"Backups by file copy\".

If you see this in a container, its runtime did not plug the volume in: use a runtimeClassName that `kubectl get
runtimeclass` shows for zpod, and no subPath.
";

/// Nothing in it is run or means a device.
const FLAGS: MountFlags = MountFlags::NOSUID.union(MountFlags::NODEV).union(MountFlags::NOEXEC);
/// What the file system is made with. Root and note are its inodes and the note's text its page: even remounted for
/// writing, nothing could be put here.
const OPTIONS: &std::ffi::CStr = c"size=4k,nr_inodes=2,mode=0755";

/// `statfs(2)`: the magic number of tmpfs.
const TMPFS_MAGIC: u64 = 0x0102_1994;

/// A CSI target path as the container runtime will name it: absolute, with the symbolic links of its parent resolved,
/// since containerd resolves them before Kata looks the path up.
///
/// What is mounted there is a read-only tmpfs with nothing but a note, `README-zpod`: where Kata does not take the path for a direct
/// volume (another runtime, a subPath, a damaged entry), the container gets EROFS and not the host's disk. Who reads the
/// host's path, such as a backup of files, finds the note in the place of the volume's data.
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
            Found::Unfinished => {
                self.finish_placeholder()?;
                return Ok(Outcome::Changed);
            }
            Found::Directory => {}
            Found::Absent => return Err(self.occupied("it was removed while it was being made")),
            Found::OtherMount => return Err(self.occupied("something else is mounted on it")),
            Found::NoDirectory => return Err(self.occupied("it is not a directory")),
        }
        rustix::mount::mount("zpod", path, "tmpfs", FLAGS, OPTIONS).map_err(KataError::os("mount a tmpfs on", path))?;
        zpod_storage::crash::point("target mounted for its note");
        self.finish_placeholder()?;
        Ok(Outcome::Changed)
    }

    /// Writes the note into a placeholder that was just mounted, and makes it read-only. Kubelet has not been answered, and
    /// there is no entry of Kata: nobody looks at it yet.
    fn finish_placeholder(&self) -> Result<(), KataError> {
        let note = self.0.join(NOTE);
        // zpod-node has no capability to write where the mode forbids it, and one that was cut short may have set it.
        let mode = |path: &Path, mode| {
            fs::set_permissions(path, fs::Permissions::from_mode(mode))
                .map_err(KataError::io("change the mode of", path))
        };
        mode(&self.0, 0o755)?;
        match fs::remove_file(&note) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(KataError::io("remove", &note)(error)),
            _ => {}
        }
        fs::write(&note, NOTE_TEXT).map_err(KataError::io("write", &note))?;
        mode(&note, 0o444)?;
        mode(&self.0, 0o555)?;
        zpod_storage::crash::point("target's note written");
        rustix::mount::mount_remount(&self.0, FLAGS | MountFlags::RDONLY, OPTIONS)
            .map_err(KataError::os("make read-only the tmpfs on", &self.0))
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
            Found::Placeholder | Found::Unfinished => {
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
        let room = rustix::fs::statvfs(path).map_err(KataError::os("statvfs", path))?;
        if kind != TMPFS_MAGIC {
            return Ok(Found::OtherMount);
        }
        if room.f_flag.contains(StatVfsMountFlags::RDONLY) {
            return Ok(Found::Placeholder);
        }
        // One page and two inodes: nobody else makes one of that size.
        let ours = room.f_files == 2 && room.f_blocks == 1;
        Ok(if ours { Found::Unfinished } else { Found::OtherMount })
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
    /// The placeholder, whose making was cut short before it was read-only.
    Unfinished,
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
        let names: Vec<_> = fs::read_dir(target.as_path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(names, [NOTE]);
        let note = fs::read_to_string(target.as_path().join(NOTE)).unwrap();
        assert!(note.contains("the backup has nothing of the volume"), "{note}");
        rustix::mount::mount_remount(target.as_path(), FLAGS, OPTIONS).unwrap();
        let error = fs::write(target.as_path().join("file"), "x").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::StorageFull, "remounted for writing");
        rustix::mount::mount_remount(target.as_path(), FLAGS | MountFlags::RDONLY, OPTIONS).unwrap();
        assert_eq!(target.remove_placeholder().unwrap(), Outcome::Changed);
        assert_eq!(target.remove_placeholder().unwrap(), Outcome::Unchanged);
    }

    #[test]
    fn a_placeholder_that_was_cut_short_is_finished_or_removed() {
        let dir = tempfile::tempdir().unwrap();
        let target = TargetPath::resolve(&dir.path().join("mount")).unwrap();
        // Before the note was written, in the middle of it, and after.
        for written in [None, Some(&NOTE_TEXT[..9]), Some(NOTE_TEXT)] {
            for finish in [true, false] {
                fs::create_dir(target.as_path()).unwrap();
                rustix::mount::mount("zpod", target.as_path(), "tmpfs", FLAGS, OPTIONS).unwrap();
                if let Some(text) = written {
                    fs::write(target.as_path().join(NOTE), text).unwrap();
                }
                assert!(!target.has_placeholder().unwrap());
                if finish {
                    assert_eq!(target.mount_placeholder().unwrap(), Outcome::Changed);
                    assert!(target.has_placeholder().unwrap());
                    assert_eq!(fs::read_to_string(target.as_path().join(NOTE)).unwrap(), NOTE_TEXT);
                }
                assert_eq!(target.remove_placeholder().unwrap(), Outcome::Changed);
                assert!(!target.as_path().exists());
            }
        }
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
