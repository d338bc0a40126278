//! Project ids of files and the limits on them: the system calls that neither `rustix` nor `libc` has.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd};

use rustix::ioctl::{Getter, Opcode, Setter, ioctl, opcode};

/// `PRJQUOTA` of linux/quota.h.
const PROJECT: libc::c_int = 2;
/// `QIF_DQBLKSIZE` of linux/quota.h: what limits are counted in, whatever the file system's own blocks are.
const LIMIT_BLOCK: u64 = 1024;

/// `struct fsxattr` of linux/fs.h.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
struct Attributes {
    xflags: u32,
    extsize: u32,
    nextents: u32,
    projid: u32,
    cowextsize: u32,
    pad: [u8; 8],
}

const GET: Opcode = opcode::read::<Attributes>(b'X', 31);
const SET: Opcode = opcode::write::<Attributes>(b'X', 32);

/// What the files of a project take together, and may take.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Usage {
    /// Bytes; metadata of the files included.
    pub(super) bytes: u64,
    /// Files and directories.
    pub(super) inodes: u64,
    /// The hard limit in bytes; zero is none.
    pub(super) limit: u64,
}

/// The project that a file belongs to.
pub(super) fn project(file: &File) -> io::Result<u32> {
    Ok(attributes(file)?.projid)
}

/// Moves a file into a project, with the blocks it has. Its other attributes stay.
pub(super) fn set_project(file: &File, project: u32) -> io::Result<()> {
    let attributes = Attributes { projid: project, ..attributes(file)? };
    // SAFETY: FS_IOC_FSSETXATTR reads one `struct fsxattr`, which `Attributes` is laid out as; the kernel checks it.
    Ok(unsafe { ioctl(file, Setter::<SET, Attributes>::new(attributes)) }?)
}

fn attributes(file: &File) -> io::Result<Attributes> {
    // SAFETY: FS_IOC_FSGETXATTR writes one `struct fsxattr`, which `Attributes` is laid out as, and nothing else.
    Ok(unsafe { ioctl(file, Getter::<GET, Attributes>::new()) }?)
}

/// What a project takes, in the file system that `of` is a file of.
pub(super) fn usage(of: impl AsFd, project: u32) -> io::Result<Usage> {
    let mut quota = nothing();
    match call(of, libc::Q_GETQUOTA, project, &mut quota) {
        Ok(()) => Ok(Usage {
            bytes: quota.dqb_curspace,
            inodes: quota.dqb_curinodes,
            limit: quota.dqb_bhardlimit.saturating_mul(LIMIT_BLOCK),
        }),
        // XFS, of a project that never had anything.
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(Usage::default()),
        Err(error) => Err(error),
    }
}

/// Sets the hard limit of a project, rounded up to whole KiB; zero lifts it. Nothing else of the project changes.
pub(super) fn set_limit(of: impl AsFd, project: u32, bytes: u64) -> io::Result<()> {
    let mut quota = nothing();
    quota.dqb_bhardlimit = bytes.div_ceil(LIMIT_BLOCK);
    quota.dqb_valid = libc::QIF_BLIMITS;
    call(of, libc::Q_SETQUOTA, project, &mut quota)
}

fn nothing() -> libc::dqblk {
    // SAFETY: `struct dqblk` is made of integers: all zero is a value of it.
    unsafe { std::mem::zeroed() }
}

/// quotactl_fd(2), Linux 5.14. The generic commands do on XFS as well.
fn call(of: impl AsFd, command: libc::c_int, project: u32, quota: &mut libc::dqblk) -> io::Result<()> {
    let (of, command) = (of.as_fd(), libc::QCMD(command, PROJECT));
    // SAFETY: `of` is open for the length of the call. The kernel reads or writes one `struct if_dqblk`, as libc's
    // `dqblk` is laid out, and `quota` outlives the call.
    let result = unsafe {
        libc::syscall(libc::SYS_quotactl_fd, of.as_raw_fd(), command, libc::c_ulong::from(project), &raw mut *quota)
    };
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
