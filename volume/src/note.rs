//! The note that the host leaves on the disk of a block device: its [`VolumeSpec`].
//!
//! ```text
//! offset  0  "zpodnote"
//!         8  version, 1 (u32, little-endian like all numbers here)
//!        12  length of the JSON, in bytes (u32)
//!        16  CRC-32 of the 16 bytes before and of the JSON
//!        20  the JSON of the spec
//! ```
//!
//! # Design
//! A directory's spec travels as a mount option; a device has none. So the node writes it at
//! [`DiskLayout::SPEC_OFFSET`], blind like the partition table, while nobody has the disk, and the guest reads it. It is
//! written anew at each publication: the token in it is the publication's. What is not whole is no note.

use crate::{DecodeSpecError, DiskLayout, VolumeSpec};

const MAGIC: &[u8; 8] = b"zpodnote";
const VERSION: u32 = 1;
const SUMMED: usize = 16;
const HEADER: usize = 20;

/// A note that does not parse.
#[derive(Debug, thiserror::Error)]
pub enum DecodeNoteError {
    /// There is none: zeros, or something else.
    #[error("there is no note of a node plugin on the disk")]
    Absent,
    /// Another version of it.
    #[error(
        "the note on the disk has version {0}, {VERSION} is known here; the guest image must match the node plugin"
    )]
    Version(u32),
    /// Longer than the room for it, or cut off.
    #[error("the note on the disk claims {0} bytes, at most {max} are allowed", max = DiskLayout::SPEC_BYTES - HEADER)]
    TooLong(u32),
    /// Written in part, or damaged.
    #[error("the note on the disk is damaged: its checksum does not fit")]
    Damaged,
    /// Whole, and not a spec that a node plugin writes.
    #[error("the note on the disk: {0}")]
    Spec(#[from] DecodeSpecError),
}

/// A spec that is too large for a note.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the VolumeSpec takes {0} bytes, a note has room for {max}", max = DiskLayout::SPEC_BYTES - HEADER)]
pub struct EncodeNoteError(usize);

/// The note to be written: [`DiskLayout::SPEC_BYTES`] bytes, with zeros behind it.
///
/// # Errors
/// When the spec is longer than the room for it, which takes properties by the hundred.
pub fn encode(spec: &VolumeSpec) -> Result<Vec<u8>, EncodeNoteError> {
    let json = spec.to_json();
    let length = u32::try_from(json.len()).ok().filter(|_| json.len() <= DiskLayout::SPEC_BYTES - HEADER);
    let length = length.ok_or(EncodeNoteError(json.len()))?;
    let mut note = Vec::with_capacity(DiskLayout::SPEC_BYTES);
    note.extend_from_slice(MAGIC);
    note.extend_from_slice(&VERSION.to_le_bytes());
    note.extend_from_slice(&length.to_le_bytes());
    note.extend_from_slice(&checksum(&note, &json).to_le_bytes());
    note.extend_from_slice(&json);
    note.resize(DiskLayout::SPEC_BYTES, 0);
    Ok(note)
}

/// Reads a note: the bytes of the disk from [`DiskLayout::SPEC_OFFSET`] on. What stands behind it is not looked at.
///
/// # Errors
/// When it is not a whole note of this version with a spec that could have come from a node plugin.
pub fn decode(bytes: &[u8]) -> Result<VolumeSpec, DecodeNoteError> {
    let header: &[u8; HEADER] = bytes.first_chunk().ok_or(DecodeNoteError::Absent)?;
    let number = |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
    if &header[..MAGIC.len()] != MAGIC {
        return Err(DecodeNoteError::Absent);
    }
    if number(8) != VERSION {
        return Err(DecodeNoteError::Version(number(8)));
    }
    let length = number(12);
    let room = bytes.get(HEADER..bytes.len().min(DiskLayout::SPEC_BYTES)).unwrap_or_default();
    let json = room.get(..length as usize).ok_or(DecodeNoteError::TooLong(length))?;
    if checksum(&header[..SUMMED], json) != number(SUMMED) {
        return Err(DecodeNoteError::Damaged);
    }
    Ok(VolumeSpec::from_json(json)?)
}

fn checksum(header: &[u8], json: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(header);
    hasher.update(json);
    hasher.finalize()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Bytes, Create, VolumeId, VolumeMode};
    use proptest::prelude::*;

    fn spec() -> VolumeSpec {
        let id = VolumeId::from_name("pvc-1");
        let spec = VolumeSpec::new(id, uuid::Uuid::from_u128(7), Create::Fresh, Bytes::gib(1));
        VolumeSpec { mode: VolumeMode::Block, ..spec }
    }

    #[test]
    fn a_spec_survives_on_the_disk() {
        let note = encode(&spec()).unwrap();
        assert_eq!(note.len(), DiskLayout::SPEC_BYTES);
        assert_eq!(decode(&note).unwrap(), spec());
    }

    #[test]
    fn a_note_lies_between_the_table_and_the_journal() {
        const { assert!(DiskLayout::SPEC_OFFSET >= 64 << 10) };
        const { assert!(DiskLayout::SPEC_OFFSET + DiskLayout::SPEC_BYTES as u64 <= DiskLayout::JOURNAL_OFFSET) };
    }

    #[test]
    fn what_is_no_note_is_told_from_what_is_a_broken_one() {
        let note = encode(&spec()).unwrap();
        assert!(matches!(decode(&[]), Err(DecodeNoteError::Absent)));
        assert!(matches!(decode(&vec![0; DiskLayout::SPEC_BYTES]), Err(DecodeNoteError::Absent)));
        assert!(matches!(decode(&note[..HEADER + 10]), Err(DecodeNoteError::TooLong(_))));
        let mut other = note.clone();
        other[8] = 2;
        assert!(matches!(decode(&other), Err(DecodeNoteError::Version(2))));
        let mut longer = note;
        longer[14] = 1;
        assert!(matches!(decode(&longer), Err(DecodeNoteError::TooLong(_))));
    }

    #[test]
    fn a_spec_without_end_is_not_written() {
        let fill = "x".repeat(DiskLayout::SPEC_BYTES);
        let spec = VolumeSpec { dataset_properties: [("a".to_owned(), fill)].into(), ..spec() };
        assert!(encode(&spec).is_err());
    }

    proptest! {
        #[test]
        fn each_flipped_bit_is_noticed(at in 0usize..1 << 16, bit in 0..8u8) {
            let mut note = encode(&spec()).unwrap();
            let at = at % (HEADER + spec().to_json().len());
            note[at] ^= 1 << bit;
            prop_assert!(decode(&note).is_err());
        }

        #[test]
        fn no_bytes_make_the_parser_panic(start in any::<bool>(), bytes in any::<Vec<u8>>()) {
            let note = if start { [&MAGIC[..], &VERSION.to_le_bytes(), &bytes].concat() } else { bytes };
            let _ = decode(&note);
        }
    }
}
