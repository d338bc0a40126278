//! What the file system of a backing directory can do: tried, not guessed from its name.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use rustix::fs::{OFlags, XattrFlags};
use rustix::io::Errno;
use zpod_volume::{Bytes, DiskLayout, gpt};

use super::fcntl;
use super::image;
use crate::directory::Directory;

const PROBE: &str = ".zpod-probe";
const PROBE_CLONE: &str = ".zpod-probe-clone";

/// `BTRFS_SUPER_MAGIC` of linux/magic.h.
const BTRFS: u32 = 0x9123_683E;

/// How it is proven that nobody else has a file open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fencing {
    /// By a lease: the kernel itself counts who has the file open.
    Lease,
    /// By a lock on the whole file, for file systems that know no leases. Weaker: it finds only who locks its disks, as
    /// QEMU and Cloud Hypervisor do and Firecracker and Dragonball don't.
    Lock,
}

/// What a file system can do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Abilities {
    /// Whether files can share blocks (XFS, btrfs): snapshots and clones are made at once then.
    pub reflink: bool,
    /// How exclusive use is proven.
    pub fencing: Fencing,
    /// Whether each new file is taken out of copy-on-write (btrfs): overwriting it then takes no new space, so that a
    /// promise holds, and its blocks don't scatter. ZFS has checksums of its own.
    pub nocow: bool,
    /// Whether a guest that writes past its partition is stopped by a limit (XFS mounted with `prjquota`).
    pub quota: bool,
    /// The longest file there can be, in whole MiB; no more than the largest volume needs.
    pub largest_file: Bytes,
    /// The extended attributes of images.
    pub(super) names: Names,
}

/// The names of the extended attributes of images.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Names {
    /// What a volume was promised.
    pub(super) partition: &'static str,
    /// How much a file may share with others.
    pub(super) shared: &'static str,
}

impl Names {
    /// `user.` attributes are where they belong; tmpfs has them since Linux 6.6, and `trusted.` ones, for root, since
    /// ever.
    const ALL: [Self; 2] = [
        Self { partition: "user.zpod.partition", shared: "user.zpod.shared" },
        Self { partition: "trusted.zpod.partition", shared: "trusted.zpod.shared" },
    ];

    /// Those that a file has: for where nothing can be tried.
    pub(super) fn of(file: &File) -> Self {
        let has = |name| rustix::fs::fgetxattr(file, name, &mut [0; 32]).is_ok();
        let [first, ..] = Self::ALL;
        Self::ALL.into_iter().find(|names| has(names.partition) || has(names.shared)).unwrap_or(first)
    }
}

impl fmt::Display for Abilities {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let fencing = match self.fencing {
            Fencing::Lease => "leases",
            Fencing::Lock => "locks only (weaker: the file system knows no leases)",
        };
        let Self { reflink, quota, largest_file, names, .. } = self;
        write!(
            f,
            "reflink {reflink}, fencing by {fencing}, project quota {quota}, files up to {largest_file}, promises in {}",
            names.partition
        )
    }
}

impl Abilities {
    /// Tries it out on a file of its own, which it removes again.
    pub(super) fn probe(directory: &Directory) -> io::Result<Self> {
        let abilities = Self::probe_with(directory);
        for name in [PROBE, PROBE_CLONE] {
            directory.remove(name)?;
        }
        abilities
    }

    fn probe_with(directory: &Directory) -> io::Result<Self> {
        let nocow = is_nocow(directory)?;
        let file = directory.fresh_file(PROBE)?;
        if nocow {
            image::disable_cow(&file)?;
        }
        check_holes(&file)?;
        let names = names(&file)?;
        let clone = directory.fresh_file(PROBE_CLONE)?;
        if nocow {
            image::disable_cow(&clone)?;
        }
        let reflink = rustix::fs::ioctl_ficlone(&clone, &file).is_ok();
        drop((file, clone));
        let file = directory.open_file(PROBE, OFlags::RDWR)?;
        let fencing = Fencing::of(&file)?;
        let largest_file = largest_file(&file)?;
        // Tried apart, for what it needs is kept.
        Ok(Self { reflink, fencing, nocow, quota: false, largest_file, names })
    }
}

impl Fencing {
    /// What there is for a file.
    pub(super) fn of(file: &File) -> io::Result<Self> {
        match fcntl::take_lease(file.as_fd()) {
            Ok(()) => {
                fcntl::give_lease_back(file.as_fd())?;
                Ok(Self::Lease)
            }
            // Leases there are: somebody has the file open at this moment, be it a child between fork and exec.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(Self::Lease),
            // EINVAL: the file system has none, or /proc/sys/fs/leases-enable is 0.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENOLCK | libc::EOPNOTSUPP)) => {
                Ok(Self::Lock)
            }
            Err(error) => Err(error),
        }
    }
}

/// Whether files there have to be taken out of copy-on-write.
pub(crate) fn is_nocow(file: impl AsFd) -> io::Result<bool> {
    Ok(u32::try_from(rustix::fs::fstatfs(file)?.f_type).is_ok_and(|magic| magic == BTRFS))
}

/// How long a file can be made, found by making one so long. ext4 with blocks of 4 KiB ends below 16 TiB; XFS, btrfs and
/// tmpfs hold all that a volume can ask for.
fn largest_file(file: &File) -> io::Result<Bytes> {
    const MIB: u64 = 1 << 20;
    let holds = |mib: u64| match file.set_len(mib * MIB) {
        Ok(()) => Ok(true),
        Err(error) if matches!(error.raw_os_error(), Some(libc::EFBIG | libc::EINVAL | libc::EOVERFLOW)) => Ok(false),
        Err(error) => Err(error),
    };
    let most = DiskLayout::disk_for(DiskLayout::partition_for(DiskLayout::MAX_CAPACITY)).0 / MIB;
    let (mut can, mut cannot) = (0, most);
    if holds(most)? {
        return Ok(Bytes::mib(most));
    }
    while cannot - can > 1 {
        let middle = can + (cannot - can) / 2;
        if holds(middle)? { can = middle } else { cannot = middle }
    }
    Ok(Bytes::mib(can))
}

/// A disk with a table and a guest's journal on it must still count as never written where the pool goes, and as
/// written once the pool's first sector is. Not so where holes aren't known, or only in blocks of more than 512 KiB.
fn check_holes(file: &File) -> io::Result<()> {
    let refuse = || {
        let why = "this file system can't tell written blocks of a file from holes; use XFS, btrfs, ext4 or tmpfs";
        io::Error::new(io::ErrorKind::Unsupported, why)
    };
    let region = DiskLayout::PARTITION_START;
    file.set_len(4 * region)?;
    file.write_all_at(&[1; gpt::PRIMARY_BYTES], 0)?;
    file.write_all_at(&[1; 4096], DiskLayout::JOURNAL_OFFSET)?;
    if image::has_data(file, region, 4 * region)? {
        return Err(refuse());
    }
    file.write_all_at(&[1; 512], 2 * region)?;
    if image::has_data(file, region, 4 * region)? { Ok(()) } else { Err(refuse()) }
}

fn names(file: &File) -> io::Result<Names> {
    let mut last = Errno::OPNOTSUPP;
    for names in Names::ALL {
        match rustix::fs::fsetxattr(file, names.partition, b"0", XattrFlags::empty()) {
            Ok(()) => return Ok(names),
            // No room for one says nothing about whether there are any.
            Err(error @ (Errno::NOSPC | Errno::DQUOT | Errno::ROFS)) => return Err(error.into()),
            Err(error) => last = error,
        }
    }
    let why = format!("this file system keeps no extended attributes ({last}); use XFS, btrfs, ext4 or tmpfs");
    Err(io::Error::new(io::ErrorKind::Unsupported, why))
}
