//! The beginning of a ZFS stream: the one record of it that is looked at.
//!
//! ```text
//! offset  0  type of the record, 0: begin (u32; all numbers are in the sender's byte order)
//!         4  length of what follows the record (u32)
//!         8  magic, 0x2f5bacbac (u64)
//!        16  version: kind of the stream in the two lowest bits, features in the 30 above (u64)
//!        24  time of the snapshot (u64)
//!        32  type of the dataset (u32), flags (u32)
//!        40  GUID of the snapshot (u64)
//!        48  GUID of the snapshot that it is based on, 0 for none (u64)
//!        56  name of the snapshot, 256 bytes
//! ```
//! `struct drr_begin` in OpenZFS's zfs_ioctl.h; a record takes 312 bytes.

/// Bytes of the record.
pub(super) const BYTES: usize = 312;

const MAGIC: u64 = 0x2_F5BA_CBAC;
/// `DMU_SUBSTREAM`: one snapshot, not a package of many.
const SINGLE: u64 = 1;
/// `DMU_BACKUP_FEATURE_RESUMING`, `DMU_BACKUP_FEATURE_RAW`
const RESUMING: u64 = 1 << 20;
const RAW: u64 = 1 << 24;
/// `DMU_OST_ZFS`, `DMU_OST_ZVOL`
const FILE_SYSTEM: u32 = 2;
const VOLUME: u32 = 3;

/// What a stream says of itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Header {
    /// What stands behind the @.
    pub(super) snapshot: String,
    /// Nothing needs to be there for it.
    pub(super) full: bool,
    /// It goes on where an earlier one broke off.
    pub(super) resuming: bool,
    /// Its contents are encrypted.
    pub(super) encrypted: bool,
    /// It is a block device's.
    pub(super) block: bool,
}

/// Bytes that are no stream that can be received here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum HeaderError {
    /// Something else.
    #[error("it is not a ZFS stream")]
    NotAStream,
    /// `zfs send -R`, or a stream of something else than a file system or a block device.
    #[error("it is not the stream of one volume: streams made with zfs send -R, or of pools, are not taken")]
    Package,
    /// A name that was not made by Send.
    #[error("its snapshot is not one that was made by sending a volume of zpod's: the name must begin with zpod-send-")]
    Name,
}

impl Header {
    /// Reads the first [`BYTES`] bytes of a stream.
    pub(super) fn decode(bytes: &[u8]) -> Result<Self, HeaderError> {
        let record: &[u8; BYTES] = bytes.first_chunk().ok_or(HeaderError::NotAStream)?;
        let word = |at: usize| -> [u8; 8] { std::array::from_fn(|index| record[at + index]) };
        let half = |at: usize| -> [u8; 4] { std::array::from_fn(|index| record[at + index]) };
        let little = u64::from_le_bytes(word(8)) == MAGIC;
        if !little && u64::from_be_bytes(word(8)) != MAGIC {
            return Err(HeaderError::NotAStream);
        }
        let long = |at| if little { u64::from_le_bytes(word(at)) } else { u64::from_be_bytes(word(at)) };
        let short = |at| if little { u32::from_le_bytes(half(at)) } else { u32::from_be_bytes(half(at)) };
        if short(0) != 0 {
            return Err(HeaderError::NotAStream);
        }
        let (kind, features, of) = (long(16) & 3, long(16) >> 2, short(32));
        if kind != SINGLE || !matches!(of, FILE_SYSTEM | VOLUME) {
            return Err(HeaderError::Package);
        }
        let name = record[56..].split(|byte| *byte == 0).next().unwrap_or_default();
        let name = std::str::from_utf8(name).ok().and_then(|name| name.split_once('@')).map(|(_, name)| name);
        Ok(Self {
            snapshot: name.filter(|name| super::is_point(name)).ok_or(HeaderError::Name)?.to_owned(),
            full: long(48) == 0,
            resuming: features & RESUMING != 0,
            encrypted: features & RAW != 0,
            block: of == VOLUME,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn record(little: bool, features: u64, kind: u64, of: u32, from: u64, name: &str) -> Vec<u8> {
        let long = |number: u64| if little { number.to_le_bytes() } else { number.to_be_bytes() };
        let short = |number: u32| if little { number.to_le_bytes() } else { number.to_be_bytes() };
        let mut bytes = [short(0), short(0)].concat();
        bytes.extend([long(MAGIC), long(features << 2 | kind), long(7)].concat());
        bytes.extend([short(of), short(0)].concat());
        bytes.extend([long(11), long(from)].concat());
        bytes.extend(name.as_bytes());
        bytes.resize(BYTES, 0);
        bytes
    }

    #[test]
    fn a_stream_tells_what_it_is_in_either_byte_order() {
        for little in [true, false] {
            let full = Header::decode(&record(little, 0, SINGLE, FILE_SYSTEM, 0, "p/data@zpod-send-a")).unwrap();
            let want =
                Header { snapshot: "zpod-send-a".into(), full: true, resuming: false, encrypted: false, block: false };
            assert_eq!(full, want);
            let next = record(little, RAW | RESUMING, SINGLE, VOLUME, 5, "p/data@zpod-send-b");
            let next = Header::decode(&next).unwrap();
            assert!(!next.full && next.resuming && next.encrypted && next.block, "{next:?}");
        }
    }

    #[test]
    fn what_is_no_stream_of_a_volume_is_refused() {
        let package = record(true, 0, 2, FILE_SYSTEM, 0, "p/data@zpod-send-a");
        let pool = record(true, 0, SINGLE, 1, 0, "p/data@zpod-send-a");
        assert_eq!(Header::decode(&package), Err(HeaderError::Package));
        assert_eq!(Header::decode(&pool), Err(HeaderError::Package));
        for name in ["p/data@daily", "p/data", "p/data@zpod-send-", "p/data@zpod-send-A", "p/data@zpod-send-a@b"] {
            assert_eq!(
                Header::decode(&record(true, 0, SINGLE, FILE_SYSTEM, 0, name)),
                Err(HeaderError::Name),
                "{name}"
            );
        }
        assert_eq!(Header::decode(b"PK\x03\x04"), Err(HeaderError::NotAStream));
        assert_eq!(Header::decode(&[0; BYTES]), Err(HeaderError::NotAStream));
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400), at in 0..BYTES) {
            let _ = Header::decode(&bytes);
            let mut sound = record(true, 0, SINGLE, FILE_SYSTEM, 0, "p/data@zpod-send-a");
            let end = (at + bytes.len()).min(BYTES);
            sound[at..end].copy_from_slice(&bytes[..end - at]);
            let _ = Header::decode(&sound);
        }
    }
}
