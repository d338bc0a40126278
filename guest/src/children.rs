//! Mounting a dataset inside another one, whose files are a tenant's.
//!
//! # Design
//! A directory of the volume may be a link, or become one while we look: to mount by its path would be to mount wherever a
//! container says, in the guest's own tree. So the way there is gone by descriptors, step by step, links never followed, and
//! the mount is made on what was reached. A directory that is missing is made.

use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::{Component, Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{MountFlags as Flags, MountPropagationFlags, UnmountFlags};

use crate::machine::{MountFlags, Step};
use crate::mounts;

const DIRECTORY: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

/// Mounts a dataset at a place below a mount point of ours, unless it is mounted there already.
///
/// # Errors
/// Those of mount(2); ELOOP or ENOTDIR where the way there is no directory.
pub fn mount(dataset: &str, base: &Path, place: &Path, flags: MountFlags) -> io::Result<Step> {
    if mounts::is_mounted(dataset, &base.join(place))? {
        return Ok(Step::Unchanged);
    }
    // Unmounting has to reach the copies that the agent's containers keep of it, see `mounts`.
    rustix::mount::mount_change(base, MountPropagationFlags::SHARED)?;
    let directory = walk(base, place)?;
    let bits = mounts::bits(flags);
    match rustix::mount::mount(dataset, by(&directory), "zfs", bits, None) {
        // The file system itself is read-only.
        Err(Errno::BUSY | Errno::ROFS) if flags.read_only => {
            rustix::mount::mount(dataset, by(&directory), "zfs", bits | Flags::RDONLY, None)?;
        }
        mounted => mounted?,
    }
    let settled = || {
        // What was opened lies below the new mount: once more.
        let root = walk(base, place)?;
        if flags.read_only {
            rustix::mount::mount_remount(by(&root), bits | Flags::BIND | Flags::RDONLY, c"")?;
        }
        Ok::<_, io::Error>(rustix::mount::mount_change(by(&root), MountPropagationFlags::SHARED)?)
    };
    settled().inspect_err(|_| {
        if let Ok(root) = walk(base, place) {
            let _ = rustix::mount::unmount(by(&root), UnmountFlags::DETACH);
        }
    })?;
    Ok(Step::Changed)
}

/// The directory there.
fn walk(base: &Path, place: &Path) -> io::Result<OwnedFd> {
    let mut directory = rustix::fs::openat(CWD, base, DIRECTORY, Mode::empty())?;
    for part in place.components() {
        let Component::Normal(name) = part else { return Err(io::ErrorKind::InvalidInput.into()) };
        directory = match rustix::fs::openat(&directory, name, DIRECTORY, Mode::empty()) {
            Err(Errno::NOENT) => {
                match rustix::fs::mkdirat(&directory, name, Mode::from_raw_mode(0o755)) {
                    Ok(()) | Err(Errno::EXIST) => {}
                    Err(error) => return Err(error.into()),
                }
                rustix::fs::openat(&directory, name, DIRECTORY, Mode::empty())?
            }
            opened => opened?,
        };
    }
    Ok(directory)
}

fn by(directory: &OwnedFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", directory.as_raw_fd()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;

    #[test]
    fn the_way_there_is_made_and_never_leads_through_a_link() {
        let root = tempfile::tempdir().unwrap();
        let (base, outside) = (root.path().join("base"), root.path().join("outside"));
        fs::create_dir_all(&base).unwrap();
        fs::create_dir_all(outside.join("x")).unwrap();
        let reached = walk(&base, Path::new("a/b")).unwrap();
        assert_eq!(fs::read_link(by(&reached)).unwrap(), base.join("a/b"));
        symlink(&outside, base.join("link")).unwrap();
        fs::write(base.join("file"), "").unwrap();
        for place in ["link", "link/x", "link/new", "file", "file/x", "../outside", "/etc"] {
            assert!(walk(&base, Path::new(place)).is_err(), "{place}");
        }
        assert!(!outside.join("new").exists());
    }
}
