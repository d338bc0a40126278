//! fsGroup: giving a volume's files to a group.
//!
//! # Design
//! As kubelet does it under `OnRootMismatch`: nothing is touched when the root already is the group's. The root is done
//! last, so that work that was cut short is done again. Directories are walked by descriptor and links never followed:
//! another container of the pod may change the tree meanwhile. The walk runs on our own mount of the dataset, which has
//! no other file system in it.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Instant;

use rustix::fs::{AtFlags, CWD, Dir, FileType, Gid, Mode, OFlags, Stat};
use rustix::io::{Errno, Result};

use crate::machine::Step;

/// Deepest directory that is walked into; each level holds one descriptor.
const DEPTH: usize = 400;

/// Where ZFS shows the snapshots of a file system, in its root alone. They can't be changed.
const SNAPSHOTS: &[u8] = b".zfs";

const DIRECTORY: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

/// What the group may do with a directory, and set-group-id so that new files are the group's too.
const DIRECTORY_MODE: Mode = Mode::RWXG.union(Mode::SGID);
const FILE_MODE: Mode = Mode::RGRP.union(Mode::WGRP);

/// Gives all below `root` to the group, where `root` is not the group's already.
///
/// # Errors
/// Those of the system; ETIME past the deadline, ELOOP where directories lie too deep.
pub fn own(root: &Path, group: u32, deadline: Instant) -> Result<Step> {
    let group = Gid::from_raw(group);
    let directory = rustix::fs::openat(CWD, root, DIRECTORY, Mode::empty())?;
    let stat = rustix::fs::fstat(&directory)?;
    if stat.st_gid == group.as_raw() && Mode::from_raw_mode(stat.st_mode).contains(DIRECTORY_MODE) {
        return Ok(Step::Unchanged);
    }
    let mut open = vec![Dir::new(rustix::io::fcntl_dupfd_cloexec(&directory, 0)?)?];
    while let Some(depth) = open.len().checked_sub(1) {
        let Some(top) = open.last_mut() else { break };
        if Instant::now() >= deadline {
            return Err(Errno::TIME);
        }
        let Some(entry) = top.read() else {
            open.pop();
            continue;
        };
        let entry = entry?;
        let name = entry.file_name();
        let snapshots = depth == 0 && name.to_bytes() == SNAPSHOTS;
        if snapshots || matches!(name.to_bytes(), b"." | b"..") {
            continue;
        }
        let parent = top.fd()?;
        let Some(stat) = gone_is_none(rustix::fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW))? else { continue };
        let below = match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => gone_is_none(rustix::fs::openat(parent, name, DIRECTORY, Mode::empty()))?,
            FileType::RegularFile => {
                let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
                if let Some(file) = gone_is_none(rustix::fs::openat(parent, name, flags, Mode::empty()))? {
                    give(&file, &rustix::fs::fstat(&file)?, group, FILE_MODE)?;
                }
                None
            }
            // Links, devices, sockets: the group, and not what they lead to.
            _ => {
                gone_is_none(rustix::fs::chownat(parent, name, None, Some(group), AtFlags::SYMLINK_NOFOLLOW))?;
                None
            }
        };
        if let Some(below) = below {
            if open.len() >= DEPTH {
                return Err(Errno::LOOP);
            }
            give(&below, &rustix::fs::fstat(&below)?, group, DIRECTORY_MODE)?;
            open.push(Dir::new(below)?);
        }
    }
    give(&directory, &stat, group, DIRECTORY_MODE)?;
    Ok(Step::Changed)
}

/// Changes the group first: that clears set-group-id.
fn give(file: &OwnedFd, stat: &Stat, group: Gid, add: Mode) -> Result<()> {
    let mode = Mode::from_raw_mode(stat.st_mode);
    if stat.st_gid != group.as_raw() {
        rustix::fs::fchown(file, None, Some(group))?;
    }
    if stat.st_gid != group.as_raw() || !mode.contains(add) {
        rustix::fs::fchmod(file, mode | add)?;
    }
    Ok(())
}

/// Something that was removed, or replaced by something else, since it was listed.
fn gone_is_none<T>(result: Result<T>) -> Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(Errno::NOENT | Errno::LOOP | Errno::NOTDIR) => Ok(None),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};
    use std::time::Duration;

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(10)
    }

    fn mode(path: &Path) -> u32 {
        fs::symlink_metadata(path).unwrap().permissions().mode() & 0o7777
    }

    /// A group that the test may give files to: any for root, else its own.
    fn group() -> u32 {
        if rustix::process::geteuid().is_root() { 2000 } else { rustix::process::getegid().as_raw() }
    }

    #[test]
    fn a_tree_becomes_the_groups_and_links_are_not_followed() {
        let outside = tempfile::NamedTempFile::new().unwrap();
        fs::set_permissions(outside.path(), fs::Permissions::from_mode(0o600)).unwrap();
        let before = fs::metadata(outside.path()).unwrap().gid();
        let root = tempfile::tempdir().unwrap();
        fs::set_permissions(root.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let (deep, file) = (root.path().join("a/b"), root.path().join("a/b/file"));
        fs::create_dir_all(&deep).unwrap();
        fs::write(&file, "x").unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o4711)).unwrap();
        symlink(outside.path(), root.path().join("link")).unwrap();

        assert_eq!(own(root.path(), group(), soon()), Ok(Step::Changed));
        for (path, want) in [(root.path(), 0o2775), (&deep, 0o2775), (&file, 0o4771)] {
            assert_eq!(mode(path), want, "{path:?}");
            assert_eq!(fs::metadata(path).unwrap().gid(), group());
        }
        assert_eq!((mode(outside.path()), fs::metadata(outside.path()).unwrap().gid()), (0o600, before));
        assert_eq!(own(root.path(), group(), soon()), Ok(Step::Unchanged));
    }

    #[test]
    fn work_that_is_cut_short_is_done_again() {
        let root = tempfile::tempdir().unwrap();
        fs::set_permissions(root.path(), fs::Permissions::from_mode(0o755)).unwrap();
        fs::write(root.path().join("file"), "x").unwrap();
        assert_eq!(own(root.path(), group(), Instant::now()), Err(Errno::TIME));
        assert_eq!(own(root.path(), group(), soon()), Ok(Step::Changed));
    }

    #[test]
    fn a_tree_deeper_than_there_are_descriptors_is_an_error_and_no_crash() {
        let root = tempfile::tempdir().unwrap();
        fs::set_permissions(root.path(), fs::Permissions::from_mode(0o755)).unwrap();
        fs::create_dir_all(root.path().join("d/".repeat(DEPTH + 1))).unwrap();
        assert_eq!(own(root.path(), group(), soon()), Err(Errno::LOOP));
    }
}
