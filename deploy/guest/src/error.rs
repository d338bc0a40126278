//! Why an image could not be built, and what to do about it.

use std::{io, path::PathBuf, time::Duration};

/// The result of every fallible function in this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// Why an image could not be built.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file could not be read, written or renamed.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried, as a verb: "read", "write".
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// A program this build needs is not installed.
    #[error("{0} is not installed: run deploy/setup.sh as root")]
    MissingTool(String),
    /// A program ran and failed.
    #[error("`{command}` failed ({status}):\n{stderr}")]
    Failed {
        /// The command line, for a person to try.
        command: String,
        /// Exit status or signal.
        status: String,
        /// The end of its standard error.
        stderr: String,
    },
    /// A program took too long and was killed.
    #[error("`{command}` was still running after {deadline:?} and was killed")]
    Deadline {
        /// The command line.
        command: String,
        /// How long it was given.
        deadline: Duration,
    },
    /// apt knows no such package in the suite it has to come from.
    #[error(
        "apt knows no package {package} in {suite}: run deploy/setup.sh as root, \
         it enables the suite with the components main and contrib"
    )]
    NoPackage {
        /// The package's name.
        package: String,
        /// The suite it has to come from.
        suite: String,
    },
    /// The machine's apt configuration names no mirror for Debian 12.
    #[error("apt has no source for bookworm main: the guest is built from Debian 12 packages")]
    NoMirror,
    /// Building the chroot mounts file systems and changes owners.
    #[error("the build chroot needs root (mounts, owners): run this as root once, later builds use the cache")]
    NeedsRoot,
    /// A kernel module is neither built in nor among the kernel's files.
    #[error("kernel {release} has no module {module}, neither as a file nor built in")]
    NoModule {
        /// The module's name.
        module: String,
        /// The kernel's release.
        release: String,
    },
    /// A shared library the tools need does not exist in the chroot.
    #[error("{tool} needs {library}, which the build chroot lacks: remove {} and build again", root.display())]
    NoLibrary {
        /// Which tool.
        tool: String,
        /// Which library.
        library: String,
        /// The chroot.
        root: PathBuf,
    },
    /// The build chroot is not what it should be.
    #[error("the build chroot {} is unusable: {reason}; remove it and build again", root.display())]
    BadChroot {
        /// The chroot.
        root: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The guest binary can't run as the guest's first process.
    #[error("{} can't be the guest's init: {reason}", path.display())]
    BadGuestBinary {
        /// Which file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// An archive entry that cpio can't hold, or that would be ambiguous.
    #[error("archive entry {path:?}: {reason}")]
    BadEntry {
        /// The entry's path.
        path: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A file given as an initrd is none.
    #[error("{} is not an initramfs (no cpio, gzip, zstd, xz, lz4, lzma or bzip2 magic)", .0.display())]
    NotAnInitrd(PathBuf),
    /// Output and input are the same file.
    #[error("{} is both input and output: name another output", .0.display())]
    SameFile(PathBuf),
    /// A temporary directory from a killed build still has mounts below it.
    #[error("{} still has something mounted below it ({mount}): unmount that first", path.display())]
    Mounted {
        /// The directory.
        path: PathBuf,
        /// The first mount point found below it.
        mount: String,
    },
    /// The environment says nowhere to keep the cache.
    #[error("no cache directory: set ZPOD_CACHE or HOME")]
    NoCacheDir,
}

impl Error {
    /// Names the file and the action an I/O error happened on.
    pub fn io(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { action, path, source }
    }
}
