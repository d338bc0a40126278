//! Where a file's blocks are, and files that share them: the system calls that `rustix` has no safe form of.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd};

use rustix::ioctl::{Opcode, Setter, Updater, ioctl, opcode};

/// `FIEMAP_EXTENT_LAST` of linux/fiemap.h.
const LAST: u32 = 0x1;
/// `FIEMAP_EXTENT_SHARED`.
const SHARED: u32 = 0x2000;
/// `FIEMAP_EXTENT_UNKNOWN`, `_DELALLOC`, `_ENCODED`: the physical address says nothing.
const NOWHERE: u32 = 0x2 | 0x4 | 0x8;

/// How many extents are asked for at a time: so many are looked up while the file system holds on to the file.
pub(super) const BATCH: usize = 128;

/// `struct file_clone_range` of linux/fs.h.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct CloneRange {
    from: i64,
    from_offset: u64,
    length: u64,
    to_offset: u64,
}

/// `struct fiemap_extent`.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
struct Extent {
    logical: u64,
    physical: u64,
    length: u64,
    reserved: [u64; 2],
    flags: u32,
    reserved_too: [u32; 3],
}

/// `struct fiemap` without the extents behind it.
#[derive(Debug, Clone, Copy, Default)]
#[repr(C)]
struct Header {
    start: u64,
    length: u64,
    flags: u32,
    mapped: u32,
    count: u32,
    reserved: u32,
}

/// `struct fiemap` with them.
#[repr(C)]
struct Map {
    header: Header,
    extents: [Extent; BATCH],
}

const CLONE_RANGE: Opcode = opcode::write::<CloneRange>(0x94, 13);
const MAP: Opcode = opcode::read_write::<Header>(b'f', 11);

/// Lets the first `length` bytes of an empty file be those of another, blocks shared (FICLONERANGE). Both ends lie on
/// boundaries of blocks.
pub(super) fn share(from: &File, to: &File, length: u64) -> io::Result<()> {
    let range = CloneRange { from: from.as_fd().as_raw_fd().into(), from_offset: 0, length, to_offset: 0 };
    // SAFETY: FICLONERANGE reads one `struct file_clone_range`, which `CloneRange` is laid out as, and writes no memory;
    // `from` is open for the length of the call.
    Ok(unsafe { ioctl(to, Setter::<CLONE_RANGE, CloneRange>::new(range)) }?)
}

/// A piece of a file that other files have, too.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Shared {
    /// Where it is on the disk; nothing where the file system does not say.
    pub(super) at: Option<u64>,
    /// Its length in bytes.
    pub(super) length: u64,
}

/// A bounded piece of the map of a file.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Part {
    /// What of it others have, too.
    pub(super) shared: Vec<Shared>,
    /// How many extents it has, shared or not.
    pub(super) extents: usize,
    /// Where the next one begins; nothing at the end of the file.
    pub(super) next: Option<u64>,
}

/// Looks at up to [`BATCH`] extents from `start` on; no data is read.
pub(super) fn part(file: &File, start: u64) -> io::Result<Part> {
    #[cfg(test)]
    LOOKS.with(|looks| looks.set(looks.get() + 1));
    let mut map = Box::new(Map { header: Header::default(), extents: [Extent::default(); BATCH] });
    map.header = Header { start, length: u64::MAX - start, count: BATCH as u32, ..Header::default() };
    // SAFETY: FS_IOC_FIEMAP reads and writes one `struct fiemap` with as many extents behind it as `count` says;
    // `Map` is laid out as that with `BATCH` of them, and outlives the call.
    unsafe { ioctl(file, Updater::<MAP, Map>::new(&mut map)) }?;
    let found = map.extents.get(..map.header.mapped as usize).unwrap_or_default();
    let shared = found
        .iter()
        .filter(|extent| extent.flags & SHARED != 0)
        .map(|extent| Shared { at: (extent.flags & NOWHERE == 0).then_some(extent.physical), length: extent.length });
    let next = found.last().filter(|last| last.flags & LAST == 0).map(|last| last.logical.saturating_add(last.length));
    if next.is_some_and(|next| next <= start) {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "the map of its extents does not advance"));
    }
    Ok(Part { shared: shared.collect(), extents: found.len(), next })
}

#[cfg(test)]
thread_local! {
    /// How often this thread has looked.
    pub(super) static LOOKS: std::cell::Cell<u64> = const { std::cell::Cell::new(0) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_structures_have_the_sizes_of_linux() {
        assert_eq!((size_of::<Header>(), size_of::<Extent>(), size_of::<CloneRange>()), (32, 56, 32));
        assert_eq!(size_of::<Map>(), 32 + BATCH * 56);
    }

    #[test]
    fn a_file_that_shares_nothing_has_no_shared_extents() {
        let file = tempfile::tempfile().unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, &[1; 4096], 0).unwrap();
        // Not every file system has such maps.
        if let Ok(part) = part(&file, 0) {
            assert_eq!((part.shared, part.next), (vec![], None));
        }
    }
}
