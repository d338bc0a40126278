//! One image file: its sizes, its tables, its attribute. Nothing here reads a byte of it.

use std::fs::File;
use std::io;
use std::num::NonZeroU64;
use std::os::unix::fs::{FileExt, MetadataExt};

use rustix::fs::{Advice, FallocateFlags, IFlags, SeekFrom, XattrFlags};
use rustix::io::Errno;
use zpod_volume::{Bytes, DiskLayout, Provisioning, VolumeId, gpt};

use super::STAT_BLOCK;
use super::abilities::is_nocow;
use crate::backing::DeviceSpec;
use crate::crash;

/// Less than any limit leaves beyond a partition.
const LEAST_PIECE: u64 = 256 << 10;

/// Takes an empty file out of copy-on-write.
pub(crate) fn disable_cow(file: &File) -> io::Result<()> {
    let flags = rustix::fs::ioctl_getflags(file)?;
    Ok(rustix::fs::ioctl_setflags(file, flags | IFlags::NOCOW)?)
}

/// Whether any byte in `[from, to)` is backed by written blocks. Blocks that are allocated but were never written count
/// as holes on XFS, btrfs and ext4 (lseek(2), SEEK_DATA) unless they are in the page cache, be it only because somebody
/// has read them, as a guest's kernel does that looks for partitions and labels. So what looks like data is written out
/// and its cache dropped before it is believed; what can't be dropped counts as data.
///
/// tmpfs is its own page cache: there, what was allocated and then read counts as data.
pub(super) fn has_data(file: &File, from: u64, to: u64) -> io::Result<bool> {
    if !seek_data(file, from, to)? {
        return Ok(false);
    }
    settle(file, from, to)?;
    seek_data(file, from, to)
}

/// Writes out what is in the cache and drops it, so that what looks like data is data.
pub(super) fn settle(file: &File, from: u64, to: u64) -> io::Result<()> {
    rustix::fs::fdatasync(file)?;
    Ok(rustix::fs::fadvise(file, from, NonZeroU64::new(to.saturating_sub(from)), Advice::DontNeed)?)
}

fn seek_data(file: &File, from: u64, to: u64) -> io::Result<bool> {
    match rustix::fs::seek(file, SeekFrom::Data(from)) {
        Ok(at) => Ok(at < to),
        Err(Errno::NXIO) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Writes both tables for a disk of `disk` bytes, the spare one first: at any moment one of them is whole.
pub(super) fn write_tables(file: &File, id: VolumeId, partition: Bytes, disk: Bytes) -> io::Result<()> {
    let table = gpt::encode(id, partition, disk);
    file.write_all_at(&table.backup, table.backup_offset)?;
    crash::point("table: backup written");
    rustix::fs::fdatasync(file)?;
    crash::point("table: backup synced");
    file.write_all_at(&table.primary, 0)?;
    crash::point("table: primary written");
    Ok(rustix::fs::fsync(file)?)
}

/// Everything that makes an empty file a device, made durable.
pub(super) fn fill(file: &File, spec: &DeviceSpec, attribute: &str) -> io::Result<()> {
    file.set_len(spec.layout.disk.0)?;
    crash::point("create: length set");
    if spec.provisioning == Provisioning::Thick {
        allocate(file, spec.layout.partition)?;
        crash::point("create: space taken");
    }
    let table = gpt::encode(spec.id, spec.layout.partition, spec.layout.disk);
    file.write_all_at(&table.primary, 0)?;
    file.write_all_at(&table.backup, table.backup_offset)?;
    crash::point("create: tables written");
    set_promise(file, attribute, spec.layout.partition)?;
    crash::point("create: promise recorded");
    Ok(rustix::fs::fsync(file)?)
}

/// Takes the space of a partition and of the guest's journal before it. The tables take theirs by being written.
///
/// XFS refuses a range that is larger than what the disk or the file's limit has left, even where most of it is there
/// already (`xfs_alloc_file_space` reserves before it looks), as it is when a volume grows. What is missing is then
/// taken piece by piece, if there is room for it.
///
/// btrfs counts what a file has taken as free until it commits, up to 30 s later: it would be promised twice. `fsync` only
/// writes its log.
pub(super) fn allocate(file: &File, partition: Bytes) -> io::Result<()> {
    take_space(file, partition)?;
    if is_nocow(file)? {
        rustix::fs::syncfs(file)?;
    }
    Ok(())
}

fn take_space(file: &File, partition: Bytes) -> io::Result<()> {
    let from = DiskLayout::JOURNAL_OFFSET;
    let end = DiskLayout::PARTITION_START.saturating_add(partition.0);
    let take = |at, length| rustix::fs::fallocate(file, FallocateFlags::KEEP_SIZE, at, length);
    let refused = |error| matches!(error, Errno::NOSPC | Errno::DQUOT);
    match take(from, end - from) {
        Err(error) if refused(error) && has_room(file, end - from)? => {}
        result => return Ok(result?),
    }
    let (mut at, mut step) = (from, end - from);
    while at < end {
        step = step.min(end - at);
        match take(at, step) {
            Ok(()) => {
                at += step;
                step = step.saturating_mul(2);
            }
            Err(error) if refused(error) && step > LEAST_PIECE => step /= 2,
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Whether the disk can hold so much of a file, with what it holds of it already.
fn has_room(file: &File, length: u64) -> io::Result<bool> {
    let stat = rustix::fs::fstatvfs(file)?;
    let free = stat.f_bavail.saturating_mul(stat.f_frsize);
    Ok(free.saturating_add(file.metadata()?.blocks() * STAT_BLOCK) >= length)
}

/// Lengthens a disk. On one that was never written, the old spare table is taken out first: it would lie inside a
/// larger partition, and be taken for a pool's data by [`has_data`]. On any other disk nothing is touched.
pub(super) fn lengthen(file: &File, before: u64, after: u64) -> io::Result<()> {
    let tail = before.saturating_sub(DiskLayout::PARTITION_START);
    if tail > DiskLayout::PARTITION_START && !has_data(file, DiskLayout::PARTITION_START, tail)? {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        rustix::fs::fallocate(file, flags, tail, before - tail)?;
        crash::point("grow: old spare table removed");
    }
    file.set_len(after)
}

/// Records the partition that was promised.
pub(super) fn set_promise(file: &File, attribute: &str, partition: Bytes) -> io::Result<()> {
    Ok(rustix::fs::fsetxattr(file, attribute, partition.0.to_string().as_bytes(), XattrFlags::empty())?)
}

/// The partition that was promised. Only the one spelling that [`set_promise`] writes is taken.
pub(super) fn promise(file: &File, attribute: &str) -> io::Result<Bytes> {
    match number(file, attribute)? {
        Some(number) if number > 0 => Ok(Bytes(number)),
        Some(_) => Err(damaged(attribute, "is not a number of bytes")),
        None => Err(damaged(attribute, "is missing")),
    }
}

/// Records how much a file may share with others that count it as theirs.
pub(super) fn set_shared(file: &File, attribute: &str, bytes: u64) -> io::Result<()> {
    Ok(rustix::fs::fsetxattr(file, attribute, bytes.to_string().as_bytes(), XattrFlags::empty())?)
}

/// What [`set_shared`] has recorded; nothing of a file that never shared anything.
pub(super) fn shared(file: &File, attribute: &str) -> io::Result<Option<u64>> {
    number(file, attribute)
}

fn number(file: &File, attribute: &str) -> io::Result<Option<u64>> {
    let mut value = [0; 32];
    let length = match rustix::fs::fgetxattr(file, attribute, &mut value) {
        Ok(length) => length,
        Err(Errno::NODATA) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let text = value.get(..length).and_then(|value| std::str::from_utf8(value).ok());
    let number = text.and_then(|text| text.parse::<u64>().ok().filter(|n| n.to_string() == text));
    number.map(Some).ok_or_else(|| damaged(attribute, "is not a number of bytes"))
}

/// Takes out what was noted for the guest of another volume.
pub(super) fn erase_note(file: &File) -> io::Result<()> {
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    Ok(rustix::fs::fallocate(file, flags, DiskLayout::SPEC_OFFSET, DiskLayout::SPEC_BYTES as u64)?)
}

/// Writes a note for the guest, and nothing of an older one stays.
pub(super) fn write_note(file: &File, note: &[u8]) -> io::Result<()> {
    let mut bytes = vec![0; DiskLayout::SPEC_BYTES];
    let room = bytes.get_mut(..note.len()).ok_or_else(|| {
        let why = format!("a note of {} bytes does not fit into {}", note.len(), DiskLayout::SPEC_BYTES);
        io::Error::new(io::ErrorKind::InvalidInput, why)
    })?;
    room.copy_from_slice(note);
    file.write_all_at(&bytes, DiskLayout::SPEC_OFFSET)?;
    crash::point("note: written");
    Ok(rustix::fs::fdatasync(file)?)
}

fn damaged(attribute: &str, what: &str) -> io::Error {
    let why = format!(
        "its attribute {attribute} {what}, so that nobody knows what was promised; set it to the partition's size in \
         bytes: setfattr -n {attribute} -v BYTES FILE"
    );
    io::Error::new(io::ErrorKind::InvalidData, why)
}
