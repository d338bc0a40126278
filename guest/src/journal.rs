//! The creation journal: one block between the partition table and the partition, in which the guest notes how far
//! the making of a pool has come.
//!
//! ```text
//! offset  0  "zpodjrnl"
//!         8  version, 1 or 2 (u32, little-endian like all numbers here)
//!        12  state: 1 creating, 2 created, 3 behind, 4 rebuilding
//!        16  the volume's id, 16 bytes
//!        32  version 2: the copy's nonce, 16 bytes
//!    32, 48  CRC-32 of the bytes before
//!    36, 52  zeros up to 4096
//! ```
//!
//! # Design
//! All of it lies within one sector of 512 bytes, which a disk writes whole or not at all. `Creating` means that no
//! container has ever started on the volume: making the pool anew loses nothing. `Created` is on the disk before the
//! first container is.
//!
//! A volume that was made again under its own name from a snapshot of itself has the journal of the first one on its disk,
//! for the same id. There the nonce tells whether the journal was written for this copy ([`is_of_copy`]).
//!
//! Each half of a mirror has a journal. There `Created` also means that the half has all there is, and may be used without
//! the other one: what is not so says `Behind` or `Rebuilding`.

use uuid::Uuid;
use zpod_volume::VolumeId;

/// Bytes of the journal.
pub const BYTES: usize = 4096;

const MAGIC: &[u8; 8] = b"zpodjrnl";
/// Of a volume that its id alone tells from what it was made from.
const PLAIN: u32 = 1;
/// With the nonce of a copy.
const OF_COPY: u32 = 2;
const NONCE: std::ops::Range<usize> = 32..48;

/// What the journal says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Journal {
    /// Nothing was ever written.
    Blank,
    /// The pool is being made, and no container has started on it.
    Creating,
    /// The pool was made.
    Created,
    /// Half of a mirror, which lacks some of what the other one has.
    Behind,
    /// Half of a mirror, which was blank and is given what the other one has. What it holds is nobody's only copy.
    Rebuilding,
    /// Something else: damage, another version, another volume's. Nothing is ever made over it.
    Foreign,
}

impl Journal {
    /// Reads a journal of a volume, whichever copy of it wrote it.
    pub fn decode(bytes: &[u8], id: VolumeId) -> Self {
        if bytes.len() == BYTES && bytes.iter().all(|byte| *byte == 0) {
            return Self::Blank;
        }
        [Self::Creating, Self::Created, Self::Behind, Self::Rebuilding]
            .into_iter()
            .find(|journal| {
                [None, nonce(bytes)].iter().any(|copy| journal.encode(id, *copy).is_some_and(|block| block == bytes))
            })
            .unwrap_or(Self::Foreign)
    }

    /// The block to be written, with the nonce of a copy where it has one; `None` for states that are never written.
    pub fn encode(self, id: VolumeId, copy: Option<Uuid>) -> Option<Vec<u8>> {
        let state: u32 = match self {
            Self::Creating => 1,
            Self::Created => 2,
            Self::Behind => 3,
            Self::Rebuilding => 4,
            Self::Blank | Self::Foreign => return None,
        };
        let mut block = Vec::with_capacity(BYTES);
        block.extend_from_slice(MAGIC);
        let version = if copy.is_some() { OF_COPY } else { PLAIN };
        block.extend_from_slice(&version.to_le_bytes());
        block.extend_from_slice(&state.to_le_bytes());
        block.extend_from_slice(id.uuid().as_bytes());
        if let Some(copy) = copy {
            block.extend_from_slice(copy.as_bytes());
        }
        block.extend_from_slice(&crc32fast::hash(&block).to_le_bytes());
        block.resize(BYTES, 0);
        Some(block)
    }
}

/// Whether a journal, as [`Journal::decode`] took it, was written for the copy with this nonce.
pub fn is_of_copy(bytes: &[u8], copy: Uuid) -> bool {
    bytes.get(8..12) == Some(&OF_COPY.to_le_bytes()) && nonce(bytes) == Some(copy)
}

fn nonce(bytes: &[u8]) -> Option<Uuid> {
    Uuid::from_slice(bytes.get(NONCE)?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_is_written_is_read_and_belongs_to_one_volume() {
        let (id, other) = (VolumeId::from_name("a"), VolumeId::from_name("b"));
        for journal in [Journal::Creating, Journal::Created, Journal::Behind, Journal::Rebuilding] {
            for copy in [None, Some(Uuid::from_u128(7))] {
                let block = journal.encode(id, copy).unwrap();
                assert_eq!(Journal::decode(&block, id), journal);
                assert_eq!(Journal::decode(&block, other), Journal::Foreign);
                assert_eq!(is_of_copy(&block, Uuid::from_u128(7)), copy.is_some());
                assert!(!is_of_copy(&block, Uuid::from_u128(8)) && !is_of_copy(&block, Uuid::nil()));
            }
        }
        assert_eq!(Journal::decode(&[0; BYTES], id), Journal::Blank);
        assert_eq!(Journal::decode(&[], id), Journal::Foreign);
    }

    proptest! {
        #[test]
        fn each_flipped_bit_is_noticed(at in 0..BYTES, bit in 0..8u8, copy: bool) {
            let id = VolumeId::from_name("a");
            let mut block = Journal::Created.encode(id, copy.then_some(Uuid::from_u128(7))).unwrap();
            block[at] ^= 1 << bit;
            prop_assert_eq!(Journal::decode(&block, id), Journal::Foreign);
        }
    }
}
