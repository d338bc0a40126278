//! A directory that is written to so that a crash leaves either the old state or the new one.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{AtFlags, FlockOperation, Mode, OFlags, RenameFlags, Stat, Statx, StatxFlags};
use rustix::io::Errno;
use zpod_volume::VolumeId;

/// How long a lock is waited for: a process that was just killed, or one between fork and exec, may still hold it.
const LOCK_TRIES: u32 = 5;
const LOCK_PAUSE: Duration = Duration::from_millis(20);

/// An open directory. Everything in it is reached through the descriptor, so that a mount over its path can't make two
/// calls see two directories.
#[derive(Debug)]
pub(crate) struct Directory {
    path: PathBuf,
    fd: OwnedFd,
}

impl Directory {
    /// Opens a directory that exists.
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(Self { path: path.to_owned(), fd: rustix::fs::open(path, flags, Mode::empty())? })
    }

    /// Where it was when it was opened.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The path of something in it, for messages and for other processes.
    pub(crate) fn join(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// Opens a file in it. Never follows a link, never waits for somebody else's lease.
    pub(crate) fn open_file(&self, name: &str, flags: OFlags) -> io::Result<File> {
        let flags = flags | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
        Ok(rustix::fs::openat(&self.fd, name, flags, Mode::RUSR | Mode::WUSR)?.into())
    }

    /// A new, empty file of that name; what was left there by a crash is removed first.
    pub(crate) fn fresh_file(&self, name: &str) -> io::Result<File> {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL;
        match self.open_file(name, flags) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                self.remove(name)?;
                self.open_file(name, flags)
            }
            result => result,
        }
    }

    /// What `stat` says of a name in it, or nothing where there is none.
    pub(crate) fn stat(&self, name: &str) -> io::Result<Option<Stat>> {
        match rustix::fs::statat(&self.fd, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => Ok(Some(stat)),
            Err(Errno::NOENT) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// The same with what only `statx` tells, such as when it was made.
    pub(crate) fn stat_more(&self, name: &str) -> io::Result<Option<Statx>> {
        let wanted = StatxFlags::BASIC_STATS | StatxFlags::BTIME;
        match rustix::fs::statx(&self.fd, name, AtFlags::SYMLINK_NOFOLLOW, wanted) {
            Ok(stat) => Ok(Some(stat)),
            Err(Errno::NOENT) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Another description of it, that shares no lock with this one.
    pub(crate) fn reopen(&self) -> io::Result<OwnedFd> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(rustix::fs::openat(&self.fd, ".", flags, Mode::empty())?)
    }

    /// Lets two files change their names. Needs no room: neither inode goes, and no name is added.
    pub(crate) fn exchange(&self, one: &str, other: &str) -> io::Result<()> {
        Ok(rustix::fs::renameat_with(&self.fd, one, &self.fd, other, RenameFlags::EXCHANGE)?)
    }

    /// Puts a file in the place of another.
    pub(crate) fn replace(&self, from: &str, to: &str) -> io::Result<()> {
        Ok(rustix::fs::renameat(&self.fd, from, &self.fd, to)?)
    }

    /// Gives a file a name that nothing has. Where something has it, nothing changes.
    pub(crate) fn rename_new(&self, from: &str, to: &str) -> io::Result<()> {
        Ok(rustix::fs::renameat_with(&self.fd, from, &self.fd, to, RenameFlags::NOREPLACE)?)
    }

    /// Removes a name; says whether there was one.
    pub(crate) fn remove(&self, name: &str) -> io::Result<bool> {
        match rustix::fs::unlinkat(&self.fd, name, AtFlags::empty()) {
            Ok(()) => Ok(true),
            Err(Errno::NOENT) => Ok(false),
            // Said before it is looked whether there is anything of that name.
            Err(Errno::ROFS) if matches!(self.stat(name), Ok(None)) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Makes names durable.
    pub(crate) fn sync(&self) -> io::Result<()> {
        Ok(rustix::fs::fsync(&self.fd)?)
    }

    /// Calls `each` with every name in it that is UTF-8; ours all are.
    pub(crate) fn each_name(&self, mut each: impl FnMut(&str) -> io::Result<()>) -> io::Result<()> {
        for entry in rustix::fs::Dir::read_from(&self.fd)? {
            if let Ok(name) = entry?.file_name().to_str() {
                each(name)?;
            }
        }
        Ok(())
    }
}

impl AsFd for Directory {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// The name a file has while it is being made. No other program makes names like this: what is found under one was left
/// by a crash, and nothing was ever promised about it.
pub(crate) fn temporary_name(id: impl std::fmt::Display) -> String {
    format!(".{id}.tmp")
}

/// Whether a name is one that [`temporary_name`] gives.
pub(crate) fn is_temporary(name: &str) -> bool {
    let id = name.strip_prefix('.').and_then(|rest| rest.strip_suffix(".tmp"));
    id.is_some_and(|id| id.parse::<VolumeId>().is_ok())
}

/// Takes the lock of an open file or directory; it lasts until the descriptor is closed. False when another process has
/// it.
pub(crate) fn lock(fd: impl AsFd) -> io::Result<bool> {
    for attempt in 1..=LOCK_TRIES {
        match rustix::fs::flock(&fd, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Ok(true),
            Err(Errno::WOULDBLOCK) if attempt < LOCK_TRIES => std::thread::sleep(LOCK_PAUSE),
            Err(Errno::WOULDBLOCK) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_of_ours_are_taken_for_leftovers() {
        assert!(is_temporary(&temporary_name(VolumeId::from_name("a"))));
        for name in [".tmp", "..tmp", ".x.tmp", "3addcb02-4c3d-8797-93a0-17e4b2d2bb49.img", ".bashrc", ".a.tmp.img"] {
            assert!(!is_temporary(name), "{name}");
        }
    }

    #[test]
    fn a_new_name_never_replaces_anything() {
        let dir = tempfile::tempdir().unwrap();
        let directory = Directory::open(dir.path()).unwrap();
        std::fs::write(dir.path().join("old"), "old").unwrap();
        std::fs::write(dir.path().join("new"), "new").unwrap();
        let error = directory.rename_new("new", "old").unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(std::fs::read(dir.path().join("old")).unwrap(), b"old");
    }

    #[test]
    fn a_link_is_not_followed() {
        let dir = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("/etc/passwd", dir.path().join("link")).unwrap();
        let directory = Directory::open(dir.path()).unwrap();
        assert!(directory.open_file("link", OFlags::RDONLY).is_err());
    }
}
