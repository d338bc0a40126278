//! The `fcntl` calls that `rustix` has no safe form of: leases and open-file-description locks.
#![allow(unsafe_code)]

use std::io;
use std::mem;
use std::os::fd::{AsRawFd, BorrowedFd};

/// `F_SETSIG` of `asm-generic/fcntl.h`, the same on every architecture; `libc` has it only for some.
const F_SETSIG: libc::c_int = 10;

/// Takes a write lease. The kernel grants it only while no other open file description of the file exists, in whatever
/// process or namespace, and makes later ones wait until it is given back (fcntl(2), "Leases").
///
/// When somebody does open the file, the kernel sends the holder a signal: SIGIO by default, which would end the
/// process. It is made SIGURG here, which is ignored by default, before the lease exists.
pub(super) fn take_lease(fd: BorrowedFd<'_>) -> io::Result<()> {
    call(fd, F_SETSIG, libc::SIGURG)?;
    call(fd, libc::F_SETLEASE, libc::F_WRLCK).map(drop)
}

/// Gives a lease back.
pub(super) fn give_lease_back(fd: BorrowedFd<'_>) -> io::Result<()> {
    call(fd, libc::F_SETLEASE, libc::F_UNLCK).map(drop)
}

/// Whether the lease is still held and nobody waits for it. The kernel takes it away by force from who keeps another
/// waiting longer than `/proc/sys/fs/lease-break-time` (45 s).
pub(super) fn has_lease(fd: BorrowedFd<'_>) -> io::Result<bool> {
    Ok(call(fd, libc::F_GETLEASE, 0)? == libc::F_WRLCK)
}

/// Locks the whole file for writing; it lasts until the descriptor is closed. False when others hold a lock on any byte
/// of it. The file must be open for writing.
pub(super) fn lock_all(fd: BorrowedFd<'_>) -> io::Result<bool> {
    let mut lock = whole_file();
    // SAFETY: `fd` is open for the length of the call and `lock` is a sound `struct flock` with `l_pid` zero, as
    // F_OFD_SETLK asks for; the kernel reads it only.
    let result = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_OFD_SETLK, &raw mut lock) };
    match check(result) {
        Ok(_) => Ok(true),
        Err(error) if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) => Ok(false),
        Err(error) => Err(error),
    }
}

/// The first byte that others hold a lock on, if any. Nobody's data is read: a lock is no part of the file.
pub(super) fn locked_byte(fd: BorrowedFd<'_>) -> io::Result<Option<u64>> {
    let mut lock = whole_file();
    // SAFETY: as in `lock_all`; the kernel writes what it found into `lock`, which outlives the call.
    check(unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_OFD_GETLK, &raw mut lock) })?;
    let locked = lock.l_type != libc::F_UNLCK as libc::c_short;
    Ok(locked.then(|| lock.l_start.unsigned_abs()))
}

fn whole_file() -> libc::flock {
    // SAFETY: `struct flock` is made of integers: all zero is a value of it. Length zero means to the end.
    let mut lock: libc::flock = unsafe { mem::zeroed() };
    lock.l_type = libc::F_WRLCK as libc::c_short;
    lock.l_whence = libc::SEEK_SET as libc::c_short;
    lock
}

fn call(fd: BorrowedFd<'_>, command: libc::c_int, argument: libc::c_int) -> io::Result<libc::c_int> {
    // SAFETY: `fd` is open for the length of the call; the commands passed here take an integer and touch no memory.
    check(unsafe { libc::fcntl(fd.as_raw_fd(), command, argument) })
}

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result == -1 { Err(io::Error::last_os_error()) } else { Ok(result) }
}
