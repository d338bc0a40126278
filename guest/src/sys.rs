//! The one module with unsafe code: calls of the kernel that no crate wraps.

#![allow(unsafe_code)]

use std::ffi::{c_int, c_longlong, c_void};
use std::fs::File;
use std::io;

use rustix::ioctl::{Getter, Opcode, Setter, ioctl, opcode};
use rustix::mount::MountPropagationFlags;
use tokio::process::Command;
use zpod_volume::Bytes;

/// `BLKPG`, `_IO(0x12, 105)` (include/uapi/linux/blkpg.h).
const BLKPG: Opcode = opcode::none(0x12, 105);

/// What is done to the kernel's idea of a partition. The disk itself is not written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(i32)]
pub enum PartitionChange {
    /// `BLKPG_ADD_PARTITION`
    Add = 1,
    /// `BLKPG_RESIZE_PARTITION`; works while the partition is in use.
    Resize = 3,
}

/// `struct blkpg_ioctl_arg`
#[repr(C)]
struct Argument {
    op: c_int,
    flags: c_int,
    length: c_int,
    data: *const c_void,
}

/// `struct blkpg_partition`
#[repr(C)]
struct Partition {
    start: c_longlong,
    length: c_longlong,
    number: c_int,
    device_name: [u8; 64],
    volume_name: [u8; 64],
}

/// Tells the kernel of partition `number` of a disk.
///
/// # Errors
/// Those of the ioctl: EBUSY where it overlaps another one, EINVAL where it does not lie on the disk.
pub fn change_partition(disk: &File, change: PartitionChange, number: u32, start: u64, size: Bytes) -> io::Result<()> {
    let too_large = |_: std::num::TryFromIntError| io::Error::from(io::ErrorKind::InvalidInput);
    let partition = Partition {
        start: start.try_into().map_err(too_large)?,
        length: size.0.try_into().map_err(too_large)?,
        number: number.try_into().map_err(too_large)?,
        device_name: [0; 64],
        volume_name: [0; 64],
    };
    let argument = Argument {
        op: change as c_int,
        flags: 0,
        length: size_of::<Partition>() as c_int,
        data: (&raw const partition).cast(),
    };
    // SAFETY: BLKPG takes a `struct blkpg_ioctl_arg`, whose `data` points to a `struct blkpg_partition` of `length`
    // bytes; both have the kernel's layout (repr(C), the types of the header) and outlive the call. The kernel only
    // reads them for the two operations that `PartitionChange` can name.
    unsafe { ioctl(disk, Setter::<BLKPG, Argument>::new(argument)) }?;
    Ok(())
}

/// Longest name of a dataset, with its end (`ZFS_MAX_DATASET_NAME_LEN`).
const DATASET_NAME: usize = 256;

/// `BLKZNAME`, `_IOR(0x12, 125, char[ZFS_MAX_DATASET_NAME_LEN])` (sys/fs/zfs.h in OpenZFS).
const BLKZNAME: Opcode = opcode::read::<[u8; DATASET_NAME]>(0x12, 125);

/// The dataset that a block device of ZFS's (`zd`) belongs to, by its name now.
///
/// # Errors
/// Those of the ioctl: ENOTTY where it is no such device.
pub fn dataset_of(device: &File) -> io::Result<String> {
    // SAFETY: BLKZNAME fills in a buffer of DATASET_NAME bytes, which is what `Getter` gives it; any bytes make a
    // sound `[u8; _]`.
    let name = unsafe { ioctl(device, Getter::<BLKZNAME, [u8; DATASET_NAME]>::new()) }?;
    let length = name.iter().position(|byte| *byte == 0).unwrap_or(name.len());
    String::from_utf8(name[..length].to_vec()).map_err(|_| io::ErrorKind::InvalidData.into())
}

/// Gives a program mounts of its own: those there are, followed when they go, while its own changes stay its own.
pub fn with_own_mounts(command: &mut Command) {
    let alone = || {
        // SAFETY: between fork and exec there is one thread, and it gives up nothing that others rely on: the
        // descriptors stay shared with nobody.
        unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNS) }?;
        let slaves = MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC;
        rustix::mount::mount_change(c"/", slaves)?;
        Ok(())
    };
    // SAFETY: `alone` makes two system calls on constants; it takes no lock and allocates nothing.
    unsafe { command.pre_exec(alone) };
}
