//! The directory on the node that is ours.
//!
//! # Design
//! ```text
//! /opt/zpod/
//!   guest -> versions/0123456789abcdef      what Kata's drop-in names: guest/vmlinuz, guest/initrd
//!   versions/0123456789abcdef/{vmlinuz,initrd,manifest.json}
//!   versions/.staging/                      one in the making
//! ```
//! Kernel and initrd have to match, so both change in one step: the link `guest` is replaced by rename(2). Kata's shims
//! resolve links when they read their configuration and hand QEMU the real paths a moment later; the version before is
//! kept until there is another, so those stay good. A running virtual machine has read both files long ago.
//!
//! A version is made aside, and gets its name when it is whole and on disk. Whoever is killed leaves `.staging` or
//! `.guest`, which the next one removes. The directory is locked (flock(2)) while anybody works in it.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{AtFlags, FlockOperation, Mode, OFlags};
use rustix::io::Errno;
use zpod_image::manifest::Output;

use crate::digest;
use crate::error::{Error, Result};
use crate::root::HostRoot;
use crate::stamp::Stamp;

/// The link that Kata's drop-in goes through.
pub const LINK: &str = "guest";
/// Our kernel's name in a version.
pub const KERNEL: &str = "vmlinuz";
/// The initrd's name in a version.
pub const INITRD: &str = "initrd";
/// The stamp's name in a version. Removed last: while it is there, the rest is known to be ours.
pub const MANIFEST: &str = "manifest.json";
const FILES: [&str; 3] = [KERNEL, INITRD, MANIFEST];
const VERSIONS: &str = "versions";
const STAGING: &str = ".staging";
const NEW_LINK: &str = ".guest";
/// A stamp has a kilobyte or two.
const LARGEST_STAMP: u64 = 1 << 20;
const LOCK_RETRY: Duration = Duration::from_millis(100);

/// How closely to look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Depth {
    /// Are the files there, and as large as they should be?
    Size,
    /// Are they the very bytes?
    Hash,
}

/// The directory, locked for as long as this lives.
#[derive(Debug)]
pub struct InstallDir {
    dir: OwnedFd,
    path: PathBuf,
}

impl InstallDir {
    /// Opens and locks it, and makes it if it isn't there. In a pod it has to be a mount from the node.
    ///
    /// # Errors
    /// It can't be made, isn't the node's, or another installer holds it for longer than `wait`.
    pub fn create(root: &HostRoot, path: &Path, wait: Duration) -> Result<Self> {
        let dir = root.make_dir(path).map_err(Error::at("create", path))?;
        if in_a_pod() && root.is_of_this_container(&dir) {
            return Err(Error::NotMounted(root.shown(path)));
        }
        Self { dir, path: path.to_owned() }.locked(wait)
    }

    /// Opens and locks it, if it is there.
    ///
    /// # Errors
    /// It can't be opened, or another installer holds it for longer than `wait`.
    pub fn open(root: &HostRoot, path: &Path, wait: Duration) -> Result<Option<Self>> {
        match root.dir(path) {
            Ok(dir) => Self { dir, path: path.to_owned() }.locked(wait).map(Some),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(Error::at("open", path)(error)),
        }
    }

    fn locked(self, wait: Duration) -> Result<Self> {
        let end = Instant::now() + wait;
        loop {
            match rustix::fs::flock(&self.dir, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => return Ok(self),
                Err(Errno::AGAIN | Errno::INTR) if Instant::now() < end => std::thread::sleep(LOCK_RETRY),
                Err(Errno::AGAIN) => return Err(Error::Busy { path: self.path, seconds: wait.as_secs() }),
                Err(error) => return Err(Error::at("lock", &self.path)(error)),
            }
        }
    }

    /// Where it is on the node.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The name of the version in use.
    ///
    /// # Errors
    /// [`Error::InTheWay`] if `guest` is not a link of ours.
    pub fn current(&self) -> Result<Option<String>> {
        let in_the_way = |reason: String| Error::InTheWay { path: self.path.join(LINK), reason };
        let target = match rustix::fs::readlinkat(&self.dir, LINK, Vec::new()) {
            Ok(target) => target.to_string_lossy().into_owned(),
            Err(Errno::NOENT) => return Ok(None),
            Err(Errno::INVAL) => return Err(in_the_way("it is not a link that this installer made".to_owned())),
            Err(error) => return Err(Error::at("read", &self.path.join(LINK))(error)),
        };
        let id = target.strip_prefix("versions/").filter(|id| is_id(id));
        id.map(|id| Some(id.to_owned())).ok_or_else(|| in_the_way(format!("it is a link to {target}")))
    }

    /// What a version was made of.
    ///
    /// # Errors
    /// A sentence that says why that can't be known.
    pub fn stamp(&self, id: &str) -> Result<Stamp, String> {
        let file = self.open_file(id, MANIFEST).map_err(|error| format!("{MANIFEST}: {error}"))?;
        let mut text = Vec::new();
        io::Read::read_to_end(&mut io::Read::take(file, LARGEST_STAMP), &mut text)
            .map_err(|error| format!("{MANIFEST}: {error}"))?;
        let stamp = Stamp::parse(&text).map_err(|error| format!("{MANIFEST}: {error}"))?;
        if stamp.id() == id { Ok(stamp) } else { Err(format!("{MANIFEST} is of another version")) }
    }

    /// Whether a version's files are what its stamp says.
    ///
    /// # Errors
    /// A sentence that says what is wrong with them.
    pub fn verify(&self, id: &str, stamp: &Stamp, depth: Depth) -> Result<(), String> {
        for name in [KERNEL, INITRD] {
            let wanted = stamp.files.get(name).ok_or_else(|| format!("{MANIFEST} doesn't name {name}"))?;
            let file = self.open_file(id, name).map_err(|error| format!("{name}: {error}"))?;
            let bytes = file.metadata().map_err(|error| format!("{name}: {error}"))?.len();
            if bytes != wanted.bytes {
                return Err(format!("{name} has {bytes} bytes instead of {}", wanted.bytes));
            }
            if depth == Depth::Hash && digest::of(file).map_err(|error| format!("{name}: {error}"))? != *wanted {
                return Err(format!("{name} has been altered"));
            }
        }
        Ok(())
    }

    fn open_file(&self, id: &str, name: &str) -> io::Result<File> {
        let version = open_dir(&open_dir(&self.dir, VERSIONS)?, id)?;
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        Ok(File::from(rustix::fs::openat(version, name, flags, Mode::empty())?))
    }

    /// Bytes that may still be written.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn free(&self) -> Result<u64> {
        let status = rustix::fs::fstatvfs(&self.dir).map_err(Error::at("stat", &self.path))?;
        Ok(status.f_bavail.saturating_mul(status.f_frsize))
    }

    /// Removes what a killed installer left.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn clear_leftovers(&self) -> Result<()> {
        self.clear().map_err(Error::at("clear", &self.path))
    }

    fn clear(&self) -> io::Result<()> {
        absent_is_fine(rustix::fs::unlinkat(&self.dir, NEW_LINK, AtFlags::empty()))?;
        match open_dir(&self.dir, VERSIONS) {
            Ok(versions) => remove_version(&versions, STAGING).map(|_| ()),
            Err(Errno::NOENT) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Makes a place for a new version.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn stage(&self) -> Result<Staging> {
        self.clear_leftovers()?;
        let make = || -> io::Result<Staging> {
            let versions = make_dir(&self.dir, VERSIONS)?;
            let dir = make_dir(&versions, STAGING)?;
            Ok(Staging { versions, dir, path: self.path.join(VERSIONS).join(STAGING), files: BTreeMap::new() })
        };
        make().map_err(Error::at("create", &self.path.join(VERSIONS).join(STAGING)))
    }

    /// Puts a version in use, in one step, and removes all but that one and the one before.
    ///
    /// # Errors
    /// What the kernel says; what was in use still is, then.
    pub fn switch_to(&self, id: &str) -> Result<()> {
        let before = self.current()?;
        let link = self.path.join(LINK);
        if before.as_deref() != Some(id) {
            let switch = || -> io::Result<()> {
                rustix::fs::symlinkat(format!("{VERSIONS}/{id}"), &self.dir, NEW_LINK)?;
                rustix::fs::renameat(&self.dir, NEW_LINK, &self.dir, LINK)?;
                Ok(rustix::fs::fsync(&self.dir)?)
            };
            switch().map_err(Error::at("replace", &link))?;
            let keep = [Some(id.to_owned()), before];
            for old in self.versions()?.into_iter().filter(|old| !keep.contains(&Some(old.clone()))) {
                self.remove(&old)?;
            }
        }
        Ok(())
    }

    /// Removes what one that was killed after it had switched left: all but the version in use and the latest other.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn prune(&self, id: &str) -> Result<()> {
        let mut others = self.versions()?;
        others.retain(|other| other != id);
        if others.len() < 2 {
            return Ok(());
        }
        let list = || -> io::Result<Vec<(i64, i64, String)>> {
            let versions = open_dir(&self.dir, VERSIONS)?;
            let made = |name: String| -> io::Result<_> {
                let status = rustix::fs::statat(&versions, &name, AtFlags::SYMLINK_NOFOLLOW)?;
                Ok((status.st_mtime, status.st_mtime_nsec.try_into().unwrap_or(0), name))
            };
            others.into_iter().map(made).collect()
        };
        let mut others = list().map_err(Error::at("list", &self.path.join(VERSIONS)))?;
        others.sort();
        others.pop();
        others.iter().try_for_each(|(.., old)| self.remove(old))
    }

    /// The names of all versions that are there, whole or not.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn versions(&self) -> Result<Vec<String>> {
        let list = || -> io::Result<Vec<String>> {
            let versions = match open_dir(&self.dir, VERSIONS) {
                Err(Errno::NOENT) => return Ok(Vec::new()),
                versions => versions?,
            };
            let mut names: Vec<_> = entries(&versions)?.into_iter().filter(|name| is_id(name)).collect();
            names.sort();
            Ok(names)
        };
        list().map_err(Error::at("list", &self.path.join(VERSIONS)))
    }

    /// Removes one version; what else lies in its directory stays.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn remove(&self, id: &str) -> Result<()> {
        let remove = || remove_version(&open_dir(&self.dir, VERSIONS)?, id);
        remove().map_err(Error::at("remove", &self.path.join(VERSIONS).join(id)))
    }

    /// Takes the link away, if it is ours.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn unlink(&self) -> Result<()> {
        let unlink = || -> io::Result<()> {
            absent_is_fine(rustix::fs::unlinkat(&self.dir, LINK, AtFlags::empty()))?;
            Ok(rustix::fs::fsync(&self.dir)?)
        };
        unlink().map_err(Error::at("remove", &self.path.join(LINK)))
    }

    /// Removes the directories that are empty now, and names what is left in the way of that.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn remove_if_empty(self, root: &HostRoot) -> Result<Vec<PathBuf>> {
        let mut left = Vec::new();
        if let Ok(versions) = open_dir(&self.dir, VERSIONS) {
            let names = entries(&versions).map_err(Error::at("list", &self.path.join(VERSIONS)))?;
            left.extend(names.into_iter().map(|name| self.path.join(VERSIONS).join(name)));
            let _ = rustix::fs::unlinkat(&self.dir, VERSIONS, AtFlags::REMOVEDIR);
        }
        let names = entries(&self.dir).map_err(Error::at("list", &self.path))?;
        left.extend(names.into_iter().filter(|name| name != VERSIONS).map(|name| self.path.join(name)));
        if left.is_empty() {
            // Best effort: as a mount point of this container it has to stay.
            if let (Some(parent), Some(name)) = (self.path.parent(), self.path.file_name())
                && let Ok(parent) = root.dir(parent)
            {
                let _ = rustix::fs::unlinkat(parent, name, AtFlags::REMOVEDIR);
            }
        }
        Ok(left)
    }
}

/// A version in the making.
#[derive(Debug)]
pub struct Staging {
    versions: OwnedFd,
    dir: OwnedFd,
    path: PathBuf,
    /// What is in it so far.
    pub files: BTreeMap<String, Output>,
}

impl Staging {
    /// Adds a file: `fill` writes it, and may read it again before it counts.
    ///
    /// # Errors
    /// That of `fill`, or what the kernel says.
    pub fn add<T>(&mut self, name: &str, fill: impl FnOnce(&mut File, &Path) -> Result<(T, Output)>) -> Result<T> {
        let path = self.path.join(name);
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let created = rustix::fs::openat(&self.dir, name, flags, Mode::from_raw_mode(0o600));
        let mut file = File::from(created.map_err(Error::at("create", &path))?);
        let (value, output) = fill(&mut file, &path)?;
        // Kata may run QEMU as another user; and the umask is not ours to know.
        rustix::fs::fchmod(&file, Mode::from_raw_mode(0o644)).map_err(Error::at("chmod", &path))?;
        file.sync_all().map_err(Error::at("sync", &path))?;
        self.files.insert(name.to_owned(), output);
        Ok(value)
    }

    /// Gives the version its name. If one of that name is there, those of its files that were added are replaced.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn finish(mut self, stamp: &Stamp) -> Result<()> {
        let path = self.path.join(MANIFEST);
        let text =
            serde_json::to_vec_pretty(stamp).map_err(|error| Error::at("write", &path)(io::Error::from(error)))?;
        self.add(MANIFEST, |file, path| {
            io::Write::write_all(file, &text).map_err(Error::at("write", path))?;
            Ok(((), Output::of(&text)))
        })?;
        self.rename(&stamp.id()).map_err(Error::at("rename", &self.path))
    }

    fn rename(&self, id: &str) -> io::Result<()> {
        rustix::fs::fsync(&self.dir)?;
        match open_dir(&self.versions, id) {
            Err(Errno::NOENT) => rustix::fs::renameat(&self.versions, STAGING, &self.versions, id)?,
            found => {
                let found = found?;
                for name in self.files.keys() {
                    rustix::fs::renameat(&self.dir, name, &found, name)?;
                }
                rustix::fs::fsync(&found)?;
                rustix::fs::unlinkat(&self.versions, STAGING, AtFlags::REMOVEDIR)?;
            }
        }
        Ok(rustix::fs::fsync(&self.versions)?)
    }

    /// Takes it away again. Best effort: the next one does it, too.
    pub fn abandon(self) {
        let _ = remove_version(&self.versions, STAGING);
    }
}

/// Kubernetes puts this into every container.
fn in_a_pod() -> bool {
    std::env::var_os("KUBERNETES_SERVICE_HOST").is_some()
}

/// The start of a SHA-256, as `zpod_image::cache::key` makes it.
fn is_id(name: &str) -> bool {
    name.len() == 16 && name.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

fn open_dir(at: &OwnedFd, name: &str) -> rustix::io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    rustix::fs::openat(at, name, flags, Mode::empty())
}

fn make_dir(at: &OwnedFd, name: &str) -> rustix::io::Result<OwnedFd> {
    match rustix::fs::mkdirat(at, name, Mode::from_raw_mode(0o755)) {
        Ok(()) => rustix::fs::chmodat(at, name, Mode::from_raw_mode(0o755), AtFlags::empty())?,
        Err(Errno::EXIST) => {}
        Err(error) => return Err(error),
    }
    open_dir(at, name)
}

fn entries(dir: &OwnedFd) -> io::Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in rustix::fs::Dir::read_from(dir)? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if name != "." && name != ".." {
            names.push(name);
        }
    }
    Ok(names)
}

/// The stamp last: a removal that was killed can still be seen to be one.
fn remove_version(versions: &OwnedFd, name: &str) -> io::Result<()> {
    let dir = match open_dir(versions, name) {
        Err(Errno::NOENT) => return Ok(()),
        dir => dir?,
    };
    for file in FILES {
        absent_is_fine(rustix::fs::unlinkat(&dir, file, AtFlags::empty()))?;
    }
    match rustix::fs::unlinkat(versions, name, AtFlags::REMOVEDIR) {
        // Somebody put something there: theirs.
        Ok(()) | Err(Errno::NOTEMPTY | Errno::EXIST) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

fn absent_is_fine(done: rustix::io::Result<()>) -> rustix::io::Result<()> {
    match done {
        Err(Errno::NOENT) => Ok(()),
        done => done,
    }
}
