//! The node's root file system, seen from a container.
//!
//! # Design
//! A path of the node is followed as the node itself would follow it: symbolic links, absolute ones too, are resolved
//! inside `--host-root` by the kernel (`openat2` with `RESOLVE_IN_ROOT`), so none of them leads into the container. The
//! directories below may be mounts of their own; it doesn't have to be the whole root.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd as _, OwnedFd};
use std::path::{Component, Path, PathBuf};

use rustix::fs::{AtFlags, Mode, OFlags, ResolveFlags, StatxFlags};
use rustix::io::Errno;

use crate::error::{Error, Result};

/// openat2 says EAGAIN when something was renamed meanwhile: openat2(2).
const RETRIES: usize = 32;

/// An open directory that stands for `/` of the node.
#[derive(Debug)]
pub struct HostRoot {
    fd: OwnedFd,
    path: PathBuf,
}

impl HostRoot {
    /// Opens it.
    ///
    /// # Errors
    /// [`Error::NoHostRoot`] unless it is a directory.
    pub fn open(path: &Path) -> Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd = rustix::fs::open(path, flags, Mode::empty()).map_err(|error| match error {
            Errno::NOENT | Errno::NOTDIR => Error::NoHostRoot(path.to_owned()),
            other => Error::at("open", path)(other),
        })?;
        Ok(Self { fd, path: path.to_owned() })
    }

    /// A regular file of the node, to read.
    ///
    /// # Errors
    /// `NotFound`, or what else the kernel says; `InvalidInput` for what is no regular file.
    pub fn file(&self, path: &Path) -> io::Result<File> {
        // Not to hang on a FIFO.
        let file = File::from(self.openat2(path, OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY)?);
        if !file.metadata()?.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is not a regular file"));
        }
        Ok(file)
    }

    /// A directory of the node.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn dir(&self, path: &Path) -> io::Result<OwnedFd> {
        Ok(self.openat2(path, OFlags::RDONLY | OFlags::DIRECTORY)?)
    }

    /// A directory of the node, made with its parents if it is not there.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn make_dir(&self, path: &Path) -> io::Result<OwnedFd> {
        let mut inside = PathBuf::from("/");
        let mut dir = self.dir(&inside)?;
        for part in path.components() {
            let Component::Normal(name) = part else { continue };
            inside.push(name);
            let next = match self.dir(&inside) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {
                    match rustix::fs::mkdirat(&dir, name, Mode::from_raw_mode(0o755)) {
                        // Another installer came first. What is there must be a directory all the same.
                        Ok(()) | Err(Errno::EXIST) => {}
                        Err(error) => return Err(error.into()),
                    }
                    rustix::fs::fsync(&dir)?;
                    self.dir(&inside)
                }
                found => found,
            };
            dir = next?;
        }
        Ok(dir)
    }

    /// Where something that was opened really is, as the node names it; nothing if /proc can't say.
    pub fn real_path(&self, opened: impl AsFd) -> Option<PathBuf> {
        let link = |fd: std::os::fd::RawFd| std::fs::read_link(format!("/proc/self/fd/{fd}")).ok();
        let real = link(opened.as_fd().as_raw_fd())?;
        let inside = real.strip_prefix(link(self.fd.as_raw_fd())?).ok()?.to_owned();
        Some(Path::new("/").join(inside))
    }

    /// Whether a directory is on the same mount as this process's own root: in a container, that it isn't the node's.
    pub fn is_of_this_container(&self, dir: impl AsFd) -> bool {
        let own = rustix::fs::open("/", OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).ok();
        let (own, other) = (own.and_then(mount_id), mount_id(dir));
        self.path != Path::new("/") && own.is_some() && own == other
    }

    /// A path of the node, for a message: with the host root before it.
    #[must_use]
    pub fn shown(&self, path: &Path) -> PathBuf {
        self.path.join(path.strip_prefix("/").unwrap_or(path))
    }

    fn openat2(&self, path: &Path, flags: OFlags) -> rustix::io::Result<OwnedFd> {
        let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        let mut last = Errno::AGAIN;
        for _ in 0..RETRIES {
            match rustix::fs::openat2(&self.fd, path, flags | OFlags::CLOEXEC, Mode::empty(), resolve) {
                Err(error @ (Errno::AGAIN | Errno::INTR)) => last = error,
                done => return done,
            }
        }
        Err(last)
    }
}

/// Known since Linux 5.8.
fn mount_id(fd: impl AsFd) -> Option<u64> {
    let status = rustix::fs::statx(fd, "", AtFlags::EMPTY_PATH, StatxFlags::MNT_ID).ok()?;
    (status.stx_mask & StatxFlags::MNT_ID.bits() != 0).then_some(status.stx_mnt_id)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::io::Read as _;
    use std::os::unix::fs::symlink;

    fn read(root: &HostRoot, path: &str) -> io::Result<String> {
        let mut text = String::new();
        root.file(Path::new(path))?.read_to_string(&mut text)?;
        Ok(text)
    }

    #[test]
    fn links_of_the_node_lead_to_files_of_the_node() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("opt/kata")).unwrap();
        fs::write(dir.path().join("opt/kata/real"), "node").unwrap();
        symlink("real", dir.path().join("opt/kata/relative")).unwrap();
        symlink("/opt/kata/real", dir.path().join("opt/kata/absolute")).unwrap();
        symlink("../../../../../../../opt/kata/real", dir.path().join("opt/kata/climbing")).unwrap();
        let root = HostRoot::open(dir.path()).unwrap();
        for name in ["real", "relative", "absolute", "climbing"] {
            assert_eq!(read(&root, &format!("/opt/kata/{name}")).unwrap(), "node", "{name}");
        }
        let opened = root.file(Path::new("/opt/kata/absolute")).unwrap();
        assert_eq!(root.real_path(&opened).unwrap(), Path::new("/opt/kata/real"));
    }

    #[test]
    fn no_link_leads_out_of_the_node() {
        let (dir, outside) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let secret = outside.path().join("secret");
        fs::write(&secret, "container").unwrap();
        symlink(&secret, dir.path().join("absolute")).unwrap();
        symlink(format!("../../../../..{}", secret.display()), dir.path().join("climbing")).unwrap();
        let root = HostRoot::open(dir.path()).unwrap();
        for name in ["/absolute", "/climbing"] {
            assert_eq!(read(&root, name).unwrap_err().kind(), io::ErrorKind::NotFound, "{name}");
        }
        symlink(outside.path(), dir.path().join("opt")).unwrap();
        assert!(root.make_dir(Path::new("/opt/zpod")).is_err());
        assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 1);
    }

    #[test]
    fn what_is_no_regular_file_is_not_read() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("dir")).unwrap();
        rustix::fs::mkfifoat(rustix::fs::CWD, dir.path().join("fifo"), Mode::from_raw_mode(0o600)).unwrap();
        let root = HostRoot::open(dir.path()).unwrap();
        for name in ["/dir", "/fifo"] {
            assert!(read(&root, name).is_err(), "{name}");
        }
    }

    #[test]
    fn a_directory_is_made_with_its_parents_and_through_links() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("var/opt")).unwrap();
        symlink("/var/opt", dir.path().join("opt")).unwrap();
        let root = HostRoot::open(dir.path()).unwrap();
        root.make_dir(Path::new("/opt/zpod/deep")).unwrap();
        root.make_dir(Path::new("/opt/zpod/deep")).unwrap();
        assert!(dir.path().join("var/opt/zpod/deep").is_dir());
    }

    #[test]
    fn a_host_root_that_is_not_mounted_is_named() {
        let missing = Path::new("/nonexistent/host");
        assert!(matches!(HostRoot::open(missing), Err(Error::NoHostRoot(path)) if path == missing));
    }
}
