//! The calls of loop devices, which nothing has a safe form of: `include/uapi/linux/loop.h`.
#![allow(unsafe_code)]

use std::ffi::c_void;
use std::os::fd::{AsFd, AsRawFd as _};
use std::ptr;

use rustix::io::{Errno, Result};
use rustix::ioctl::{IntegerSetter, Ioctl, IoctlOutput, NoArg, Opcode, Setter, Updater, ioctl};

const LOOP_CLR_FD: Opcode = 0x4C01;
const LOOP_SET_STATUS64: Opcode = 0x4C04;
const LOOP_GET_STATUS64: Opcode = 0x4C05;
const LOOP_CONFIGURE: Opcode = 0x4C0A;
const LOOP_CTL_REMOVE: Opcode = 0x4C81;
const LOOP_CTL_GET_FREE: Opcode = 0x4C82;

const LO_FLAGS_AUTOCLEAR: u32 = 4;
const LO_FLAGS_DIRECT_IO: u32 = 16;

/// What the tables on the disk count in, whatever the file system below prefers.
const BLOCK_BYTES: u32 = 512;

/// `struct loop_info64`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct Status {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    size_limit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

/// `struct loop_config`.
#[repr(C)]
struct Config {
    fd: u32,
    block_size: u32,
    info: Status,
    reserved: [u64; 8],
}

const _: () = assert!(size_of::<Status>() == 232 && size_of::<Config>() == 304);

impl Status {
    const fn empty() -> Self {
        Self {
            device: 0,
            inode: 0,
            rdevice: 0,
            offset: 0,
            size_limit: 0,
            number: 0,
            encrypt_type: 0,
            encrypt_key_size: 0,
            flags: 0,
            file_name: [0; 64],
            crypt_name: [0; 64],
            encrypt_key: [0; 32],
            init: [0; 2],
        }
    }

    /// Whether it is the device of this file. The kernel gives the number of the file's device as `stat` does.
    pub(super) fn is_of(&self, device: u64, inode: u64) -> bool {
        self.device == device && self.inode == inode
    }

    /// Whether it goes with its last user.
    pub(super) fn autoclear(&self) -> bool {
        self.flags & LO_FLAGS_AUTOCLEAR != 0
    }
}

/// `LOOP_CTL_GET_FREE`: the number is the call's return value.
struct GetFree;

// SAFETY: the opcode takes no argument and writes to no memory.
unsafe impl Ioctl for GetFree {
    type Output = i32;
    const IS_MUTATING: bool = false;

    fn opcode(&self) -> Opcode {
        LOOP_CTL_GET_FREE
    }

    fn as_ptr(&mut self) -> *mut c_void {
        ptr::null_mut()
    }

    unsafe fn output_from_ptr(output: IoctlOutput, _: *mut c_void) -> Result<i32> {
        Ok(output)
    }
}

/// The number of a device that has no file. It may have one a moment later.
pub(super) fn free(control: impl AsFd) -> Result<i32> {
    // SAFETY: as `GetFree` says.
    unsafe { ioctl(control, GetFree) }
}

/// Forgets a device that has no file and that nobody has open.
pub(super) fn remove(control: impl AsFd, number: i32) -> Result<()> {
    let number = usize::try_from(number).map_err(|_| Errno::INVAL)?;
    // SAFETY: the opcode takes the number as it is, and reads and writes no memory.
    unsafe { ioctl(control, IntegerSetter::<LOOP_CTL_REMOVE>::new_usize(number)) }
}

/// Attaches a file. Direct I/O is left out by the kernel where the file can't have it.
pub(super) fn configure(device: impl AsFd, file: impl AsFd) -> Result<()> {
    let fd = u32::try_from(file.as_fd().as_raw_fd()).map_err(|_| Errno::BADF)?;
    let info = Status { flags: LO_FLAGS_DIRECT_IO, ..Status::empty() };
    let config = Config { fd, block_size: BLOCK_BYTES, info, reserved: [0; 8] };
    // SAFETY: the opcode reads a `struct loop_config`, which `Config` is, and takes a reference of its own to the file.
    unsafe { ioctl(device, Setter::<LOOP_CONFIGURE, Config>::new(config)) }
}

/// What a device has. `ENXIO` where it has no file.
pub(super) fn status(device: impl AsFd) -> Result<Status> {
    let mut status = Status::empty();
    // SAFETY: the opcode writes a `struct loop_info64`, which `Status` is: numbers only, so that any bytes are sound.
    unsafe { ioctl(device, Updater::<LOOP_GET_STATUS64, Status>::new(&mut status)) }?;
    Ok(status)
}

/// Keeps a device that was to go with its last user.
pub(super) fn stay(device: impl AsFd, status: Status) -> Result<()> {
    let status = Status { flags: status.flags & !LO_FLAGS_AUTOCLEAR, ..status };
    // SAFETY: the opcode reads a `struct loop_info64`, which `Status` is.
    unsafe { ioctl(device, Setter::<LOOP_SET_STATUS64, Status>::new(status)) }
}

/// Detaches the file: now, or when nobody has the device open any more.
pub(super) fn detach(device: impl AsFd) -> Result<()> {
    // SAFETY: the opcode takes no argument.
    unsafe { ioctl(device, NoArg::<LOOP_CLR_FD>::new()) }
}
