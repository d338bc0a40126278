//! The GUID partition table of a volume's disk: one partition, of type Solaris/ZFS, whose disk GUID is the volume's id.
//!
//! # Design
//! The host writes tables and never reads one, since a guest can put anything there. The guest reads the primary
//! header of each disk to find its volume by GUID, and rewrites the table to grow. Layout: UEFI 2.10, section 5.3.

use uuid::Uuid;

use crate::{Bytes, DiskLayout, SECTOR, VolumeId};

/// Partition type `6A898CC3-1DD2-11B2-99A6-080020736631`: Solaris /usr, which ZFS on Linux uses for its own.
pub const TYPE_ZFS: Uuid = Uuid::from_u128(0x6A89_8CC3_1DD2_11B2_99A6_0800_2073_6631);

/// Sectors of one table: a header and 32 sectors of entries.
const TABLE_SECTORS: u64 = 33;
const ENTRIES: usize = 128;
const ENTRY_BYTES: usize = 128;
const HEADER_BYTES: usize = 92;
const SECTOR_BYTES: usize = SECTOR as usize;

/// Bytes of [`Table::primary`].
pub const PRIMARY_BYTES: usize = (1 + TABLE_SECTORS as usize) * SECTOR_BYTES;

/// A table as bytes, and where they go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Table {
    /// Protective MBR, header and entries: goes to offset 0.
    pub primary: Vec<u8>,
    /// Entries and header: goes to [`Table::backup_offset`].
    pub backup: Vec<u8>,
    /// Where the backup goes, in bytes.
    pub backup_offset: u64,
}

/// What a primary header and its first entry say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Header {
    /// GUID of the disk.
    pub disk_guid: Uuid,
    /// Offset of the first partition in bytes.
    pub partition_start: u64,
    /// Size of the first partition in bytes.
    pub partition_bytes: u64,
}

/// Bytes that are not a sound table of ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// Fewer bytes than a table has.
    #[error("shorter than a partition table")]
    Short,
    /// No GPT at all.
    #[error("no GPT signature")]
    NoSignature,
    /// A header that does not match its own checksum, or of a shape that is not ours.
    #[error("the GPT header is damaged")]
    Header,
    /// Entries that don't match the header's checksum.
    #[error("the GPT entries are damaged")]
    Entries,
    /// No first partition, or one that runs backwards.
    #[error("no first partition")]
    NoPartition,
}

/// The table of a volume's disk. `partition` is at most [`DiskLayout::largest_partition`] of `disk`; what is larger is
/// cut to it.
pub fn encode(id: VolumeId, partition: Bytes, disk: Bytes) -> Table {
    let last_sector = (disk.0 / SECTOR).saturating_sub(1);
    let partition = partition.min(DiskLayout::largest_partition(disk)).round_down(SECTOR);
    let entries = entries(id, partition);
    let crc = crc32fast::hash(&entries);
    let table = |own: u64, other: u64, entries_at: u64| header(id, own, other, entries_at, last_sector, crc);

    let mut primary = protective_mbr(last_sector);
    primary.extend_from_slice(&table(1, last_sector, 2));
    primary.extend_from_slice(&entries);

    let backup_start = last_sector.saturating_sub(TABLE_SECTORS - 1);
    let mut backup = entries;
    backup.extend_from_slice(&table(last_sector, 1, backup_start));
    Table { primary, backup, backup_offset: backup_start * SECTOR }
}

/// Reads the first [`PRIMARY_BYTES`] bytes of a disk.
///
/// # Errors
/// When there is no sound table with a first partition.
pub fn decode(bytes: &[u8]) -> Result<Header, DecodeError> {
    let header = bytes.get(SECTOR_BYTES..2 * SECTOR_BYTES).ok_or(DecodeError::Short)?;
    if &header[..8] != b"EFI PART" {
        return Err(DecodeError::NoSignature);
    }
    let mut unsigned = header[..HEADER_BYTES].to_vec();
    unsigned[16..20].fill(0);
    let ours = u32_at(header, 12) == HEADER_BYTES as u32
        && u64_at(header, 24) == 1
        && u64_at(header, 72) == 2
        && u32_at(header, 80) == ENTRIES as u32
        && u32_at(header, 84) == ENTRY_BYTES as u32;
    if !ours || crc32fast::hash(&unsigned) != u32_at(header, 16) {
        return Err(DecodeError::Header);
    }
    let entries = bytes.get(2 * SECTOR_BYTES..PRIMARY_BYTES).ok_or(DecodeError::Short)?;
    if crc32fast::hash(entries) != u32_at(header, 88) {
        return Err(DecodeError::Entries);
    }
    let (first, last) = (u64_at(entries, 32), u64_at(entries, 40));
    let sectors = last.checked_sub(first).and_then(|n| n.checked_add(1)).ok_or(DecodeError::NoPartition)?;
    let present = entries[..16].iter().any(|b| *b != 0);
    match (present, first.checked_mul(SECTOR), sectors.checked_mul(SECTOR)) {
        (true, Some(partition_start), Some(partition_bytes)) => {
            Ok(Header { disk_guid: guid_at(header, 56), partition_start, partition_bytes })
        }
        _ => Err(DecodeError::NoPartition),
    }
}

fn entries(id: VolumeId, partition: Bytes) -> Vec<u8> {
    let first = DiskLayout::PARTITION_START / SECTOR;
    let last = (first + partition.0 / SECTOR).saturating_sub(1);
    let mut entries = vec![0; ENTRIES * ENTRY_BYTES];
    entries[..16].copy_from_slice(&TYPE_ZFS.to_bytes_le());
    entries[16..32].copy_from_slice(&partition_guid(id).to_bytes_le());
    entries[32..40].copy_from_slice(&first.to_le_bytes());
    entries[40..48].copy_from_slice(&last.to_le_bytes());
    for (at, unit) in "zpod".encode_utf16().enumerate() {
        entries[56 + 2 * at..58 + 2 * at].copy_from_slice(&unit.to_le_bytes());
    }
    entries
}

/// The partition's own GUID: the volume's id with the last bit turned, so that it is another one and always the same.
fn partition_guid(id: VolumeId) -> Uuid {
    Uuid::from_u128(id.uuid().as_u128() ^ 1)
}

fn header(id: VolumeId, own: u64, other: u64, entries_at: u64, last_sector: u64, entries_crc: u32) -> Vec<u8> {
    let mut header = vec![0; SECTOR_BYTES];
    header[..8].copy_from_slice(b"EFI PART");
    header[8..12].copy_from_slice(&0x0001_0000u32.to_le_bytes());
    header[12..16].copy_from_slice(&(HEADER_BYTES as u32).to_le_bytes());
    header[24..32].copy_from_slice(&own.to_le_bytes());
    header[32..40].copy_from_slice(&other.to_le_bytes());
    header[40..48].copy_from_slice(&(1 + TABLE_SECTORS).to_le_bytes());
    header[48..56].copy_from_slice(&last_sector.saturating_sub(TABLE_SECTORS).to_le_bytes());
    header[56..72].copy_from_slice(&id.uuid().to_bytes_le());
    header[72..80].copy_from_slice(&entries_at.to_le_bytes());
    header[80..84].copy_from_slice(&(ENTRIES as u32).to_le_bytes());
    header[84..88].copy_from_slice(&(ENTRY_BYTES as u32).to_le_bytes());
    header[88..92].copy_from_slice(&entries_crc.to_le_bytes());
    let crc = crc32fast::hash(&header[..HEADER_BYTES]);
    header[16..20].copy_from_slice(&crc.to_le_bytes());
    header
}

fn protective_mbr(last_sector: u64) -> Vec<u8> {
    let mut mbr = vec![0; SECTOR_BYTES];
    let sectors = u32::try_from(last_sector).unwrap_or(u32::MAX);
    mbr[446..462].copy_from_slice(&[0, 0, 2, 0, 0xEE, 0xFF, 0xFF, 0xFF, 1, 0, 0, 0, 0, 0, 0, 0]);
    mbr[458..462].copy_from_slice(&sectors.to_le_bytes());
    mbr[510..512].copy_from_slice(&[0x55, 0xAA]);
    mbr
}

// The callers have checked that the slice is long enough.
fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}

fn guid_at(bytes: &[u8], at: usize) -> Uuid {
    let mut guid = [0; 16];
    guid.copy_from_slice(&bytes[at..at + 16]);
    Uuid::from_bytes_le(guid)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Headroom;
    use proptest::prelude::*;

    fn table() -> (VolumeId, DiskLayout, Table) {
        let id = VolumeId::from_name("pvc-1");
        let layout = DiskLayout::new(Bytes::gib(1), Headroom::default());
        (id, layout, encode(id, layout.partition, layout.disk))
    }

    #[test]
    fn what_the_host_writes_the_guest_reads() {
        let (id, layout, table) = table();
        let header = decode(&table.primary).unwrap();
        assert_eq!(header.disk_guid, id.uuid());
        assert_eq!(header.partition_start, DiskLayout::PARTITION_START);
        assert_eq!(header.partition_bytes, layout.partition.0);
        assert_eq!(table.primary.len(), PRIMARY_BYTES);
        assert_eq!(table.backup_offset + table.backup.len() as u64, layout.disk.0);
        assert!(table.backup_offset >= DiskLayout::PARTITION_START + layout.partition.0);
        assert!((PRIMARY_BYTES as u64) < DiskLayout::JOURNAL_OFFSET);
    }

    #[test]
    fn each_flipped_byte_of_the_header_or_its_entries_is_noticed() {
        let (_, _, table) = table();
        for at in (SECTOR_BYTES..SECTOR_BYTES + HEADER_BYTES).chain(2 * SECTOR_BYTES..PRIMARY_BYTES) {
            let mut bytes = table.primary.clone();
            bytes[at] ^= 0x10;
            assert!(decode(&bytes).is_err(), "byte {at}");
        }
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_parser_panic(mut bytes in any::<Vec<u8>>(), signed in any::<bool>()) {
            if signed && bytes.len() > SECTOR_BYTES + 8 {
                bytes[SECTOR_BYTES..SECTOR_BYTES + 8].copy_from_slice(b"EFI PART");
            }
            let _ = decode(&bytes);
        }
    }
}
