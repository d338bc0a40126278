//! What can go wrong on a node, and what a person does about it.

use std::io;
use std::path::{Path, PathBuf};

use rustix::io::Errno;

/// The result of every fallible function in this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why the guest is not on the node.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// `--host-root` names no directory.
    #[error("{} is not a directory: the node's root file system is not mounted there", .0.display())]
    NoHostRoot(PathBuf),
    /// In a pod, the directory to install into belongs to the container.
    #[error("{} is the container's own directory, not one of the node: what is put there would be lost with it", .0.display())]
    NotMounted(PathBuf),
    /// The kernel has no openat2(2), which came with Linux 5.6.
    #[error("this kernel has no openat2: paths of the node can't be followed safely")]
    OldKernel,
    /// A Kata initrd is nowhere to be found.
    #[error("Kata is not on this node: there is none of {}", list(.looked_at))]
    NoKata {
        /// Where it was looked for, and what was found instead.
        looked_at: Vec<String>,
    },
    /// Kata is there, its initrd is not.
    #[error("Kata has a guest image ({}) but no initrd: there is none of {}", .image.display(), list(.looked_at))]
    OnlyImage {
        /// Its image.
        image: PathBuf,
        /// Where its initrd was looked for, and what was found instead.
        looked_at: Vec<String>,
    },
    /// Kata's initrd changed while it was read, or ends too early.
    #[error("Kata's initrd {} is not whole: {reason}", path.display())]
    Unfinished {
        /// Which file.
        path: PathBuf,
        /// How that shows.
        reason: String,
    },
    /// Kata is older than what works.
    #[error("Kata {found} is too old: {minimum} or later is needed")]
    TooOld {
        /// Its version.
        found: String,
        /// The oldest that works.
        minimum: String,
    },
    /// Kata or its initrd is for another kind of machine than our kernel.
    #[error("{} is for {found}, our guest's kernel is for {wanted}", path.display())]
    Architecture {
        /// Which file says so.
        path: PathBuf,
        /// What it is for.
        found: String,
        /// What the kernel is for.
        wanted: &'static str,
    },
    /// The file is no initrd that could be extended.
    #[error("{} can't be used as Kata's initrd: {reason}", path.display())]
    BadInitrd {
        /// Which file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// Kernel or overlay are not in `--guest-dir`, or are not what they should be.
    #[error("the guest in {} can't be used: {reason}", path.display())]
    BadGuest {
        /// Which file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// Something that the installer didn't make is where it has to put something.
    #[error("{} is in the way: {reason}", path.display())]
    InTheWay {
        /// Which path, on the node.
        path: PathBuf,
        /// What it is.
        reason: String,
    },
    /// There is no room.
    #[error("the disk with {} is full: {reason}", path.display())]
    DiskFull {
        /// Which path, on the node.
        path: PathBuf,
        /// How that shows.
        reason: String,
    },
    /// The file system can't be written to.
    #[error("{} is on a read-only file system", .0.display())]
    ReadOnly(PathBuf),
    /// The installer may not.
    #[error("cannot {action} {}: {source}", path.display())]
    Denied {
        /// What was tried, as a verb.
        action: &'static str,
        /// On which path.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// Another installer has been at work for too long.
    #[error("another zpod-installer has been working in {} for {seconds} s", path.display())]
    Busy {
        /// The directory that it holds.
        path: PathBuf,
        /// How long this one waited.
        seconds: u64,
    },
    /// Anything else that the kernel refused.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried, as a verb.
        action: &'static str,
        /// On which path.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
}

impl Error {
    /// Turns what the kernel said into what that means for the node.
    pub(crate) fn at<E: Into<io::Error>>(action: &'static str, path: &Path) -> impl FnOnce(E) -> Self {
        let path = path.to_owned();
        move |source| {
            let source = source.into();
            match Errno::from_io_error(&source) {
                Some(Errno::ROFS) => Self::ReadOnly(path),
                Some(Errno::NOSPC | Errno::DQUOT) => Self::DiskFull { path, reason: source.to_string() },
                Some(Errno::ACCESS | Errno::PERM) => Self::Denied { action, path, source },
                Some(Errno::NOSYS) => Self::OldKernel,
                _ => Self::Io { action, path, source },
            }
        }
    }

    /// Its name: for programs, and for the `reason` of the termination message.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::NoHostRoot(_) => "HostRootMissing",
            Self::NotMounted(_) => "InstallDirNotMounted",
            Self::OldKernel => "KernelTooOld",
            Self::NoKata { .. } => "KataMissing",
            Self::OnlyImage { .. } => "KataInitrdMissing",
            Self::Unfinished { .. } => "KataUnfinished",
            Self::TooOld { .. } => "KataTooOld",
            Self::Architecture { .. } => "WrongArchitecture",
            Self::BadInitrd { .. } => "KataInitrdUnusable",
            Self::BadGuest { .. } => "GuestUnusable",
            Self::InTheWay { .. } => "PathOccupied",
            Self::DiskFull { .. } => "DiskFull",
            Self::ReadOnly(_) => "ReadOnlyFileSystem",
            Self::Denied { .. } => "PermissionDenied",
            Self::Busy { .. } => "Busy",
            Self::Io { .. } => "InputOutputError",
        }
    }

    /// The exit code: see the table in README.md.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Io { .. } | Self::Busy { .. } => 1,
            Self::NoKata { .. } | Self::OnlyImage { .. } | Self::Unfinished { .. } => 3,
            Self::TooOld { .. } | Self::Architecture { .. } | Self::BadInitrd { .. } => 4,
            Self::NoHostRoot(_)
            | Self::NotMounted(_)
            | Self::OldKernel
            | Self::InTheWay { .. }
            | Self::DiskFull { .. }
            | Self::ReadOnly(_)
            | Self::Denied { .. } => 5,
            Self::BadGuest { .. } => 6,
        }
    }

    /// What to do about it.
    #[must_use]
    pub fn remedy(&self) -> String {
        let text = match self {
            Self::NoHostRoot(_) => {
                "mount the node's directories below it (hostPath volumes), or name another --host-root"
            }
            Self::NotMounted(path) => {
                return format!("mount the node's directory at {} (a hostPath volume, writable)", path.display());
            }
            Self::OldKernel => "the node needs Linux 5.6 or later",
            Self::NoKata { .. } => {
                "install Kata Containers on the node, for example by its Helm chart kata-deploy; \
                 if it is elsewhere, name its directory with --kata-dir, or its initrd with --kata-initrd, \
                 and mount that into this container. This is tried again by itself"
            }
            Self::OnlyImage { .. } => {
                "kata-deploy brings an initrd with its shims qemu, qemu-runtime-rs, clh and clh-runtime-rs on x86_64; \
                 with another installation, build one of the same version by osbuilder and name it with --kata-initrd"
            }
            Self::Unfinished { .. } => {
                "Kata is probably being installed at this moment, and this is tried again by itself; \
                 if it stays, install Kata again"
            }
            Self::TooOld { minimum, .. } => {
                return format!(
                    "upgrade Kata on this node to {minimum} or later, for example by its Helm chart kata-deploy"
                );
            }
            Self::Architecture { wanted, .. } => {
                return format!("keep zpod's node plugin off this node with a nodeSelector: it runs on {wanted} only");
            }
            Self::BadInitrd { .. } => {
                "name the initrd that came with Kata with --kata-initrd, or install Kata again; an initrd has to be \
                 uncompressed cpio or compressed by gzip, zstd, xz, lz4, lzma or bzip2, and to hold Kata's agent"
            }
            Self::BadGuest { .. } => {
                "--guest-dir has to hold vmlinuz and overlay.cpio.zst as `zpod-image build` makes them: \
                 build the image zpod-guest again"
            }
            Self::InTheWay { path, .. } => {
                return format!("look what {} is, and move it away or choose another --install-dir", path.display());
            }
            Self::DiskFull { .. } => {
                "make room on the node (old container images, logs); this is tried again by itself"
            }
            Self::ReadOnly(_) => {
                "mount it writable (readOnly: false in the volumeMount); if the node itself is read-only there, choose \
                 another --install-dir, and change `kernel` and `initrd` in Kata's drop-in to match"
            }
            Self::Denied { .. } => {
                "run the container as root (runAsUser: 0) with the capability DAC_OVERRIDE if the directories are not \
                 root's own, and with an SELinux type that may write hostPath volumes (spc_t)"
            }
            Self::Busy { .. } => "end the other one: `fuser` on the directory names its process",
            Self::Io { .. } => "see the kernel's log of the node (dmesg) for errors of its disk",
        };
        text.to_owned()
    }
}

fn list(items: &[String]) -> String {
    items.join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_says_becomes_what_it_means_for_the_node() {
        for (errno, name, code) in [
            (Errno::ROFS, "ReadOnlyFileSystem", 5),
            (Errno::NOSPC, "DiskFull", 5),
            (Errno::DQUOT, "DiskFull", 5),
            (Errno::ACCESS, "PermissionDenied", 5),
            (Errno::NOSYS, "KernelTooOld", 5),
            (Errno::IO, "InputOutputError", 1),
        ] {
            let error = Error::at("write", Path::new("/opt/zpod"))(errno);
            assert_eq!((error.name(), error.exit_code()), (name, code), "{errno}");
            assert!(!error.remedy().is_empty());
        }
    }
}
