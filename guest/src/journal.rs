//! The creation journal: one block between the partition table and the partition, in which the guest notes how far
//! the making of a pool has come.
//!
//! ```text
//! offset  0  "zpodjrnl"
//!         8  version, 1 (u32, little-endian like all numbers here)
//!        12  state: 1 creating, 2 created, 3 behind, 4 rebuilding
//!        16  the volume's id, 16 bytes
//!        32  CRC-32 of the 32 bytes before
//!        36  zeros up to 4096
//! ```
//!
//! # Design
//! All of it lies within one sector of 512 bytes, which a disk writes whole or not at all. `Creating` means that no
//! container has ever started on the volume: making the pool anew loses nothing. `Created` is on the disk before the
//! first container is.
//!
//! Each half of a mirror has a journal. There `Created` also means that the half has all there is, and may be used without
//! the other one: what is not so says `Behind` or `Rebuilding`.

use zpod_volume::VolumeId;

/// Bytes of the journal.
pub const BYTES: usize = 4096;

const MAGIC: &[u8; 8] = b"zpodjrnl";
const VERSION: u32 = 1;
const USED: usize = 36;

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
    /// Reads a journal of a volume.
    pub fn decode(bytes: &[u8], id: VolumeId) -> Self {
        if bytes.len() == BYTES && bytes.iter().all(|byte| *byte == 0) {
            return Self::Blank;
        }
        [Self::Creating, Self::Created, Self::Behind, Self::Rebuilding]
            .into_iter()
            .find(|journal| journal.encode(id).is_some_and(|block| block == bytes))
            .unwrap_or(Self::Foreign)
    }

    /// The block to be written; `None` for states that are never written.
    pub fn encode(self, id: VolumeId) -> Option<Vec<u8>> {
        let state: u32 = match self {
            Self::Creating => 1,
            Self::Created => 2,
            Self::Behind => 3,
            Self::Rebuilding => 4,
            Self::Blank | Self::Foreign => return None,
        };
        let mut block = Vec::with_capacity(BYTES);
        block.extend_from_slice(MAGIC);
        block.extend_from_slice(&VERSION.to_le_bytes());
        block.extend_from_slice(&state.to_le_bytes());
        block.extend_from_slice(id.uuid().as_bytes());
        block.extend_from_slice(&crc32fast::hash(&block).to_le_bytes());
        debug_assert_eq!(block.len(), USED);
        block.resize(BYTES, 0);
        Some(block)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_is_written_is_read_and_belongs_to_one_volume() {
        let (id, other) = (VolumeId::from_name("a"), VolumeId::from_name("b"));
        for journal in [Journal::Creating, Journal::Created, Journal::Behind, Journal::Rebuilding] {
            let block = journal.encode(id).unwrap();
            assert_eq!(Journal::decode(&block, id), journal);
            assert_eq!(Journal::decode(&block, other), Journal::Foreign);
        }
        assert_eq!(Journal::decode(&[0; BYTES], id), Journal::Blank);
        assert_eq!(Journal::decode(&[], id), Journal::Foreign);
    }

    proptest! {
        #[test]
        fn each_flipped_bit_is_noticed(at in 0..BYTES, bit in 0..8u8) {
            let id = VolumeId::from_name("a");
            let mut block = Journal::Created.encode(id).unwrap();
            block[at] ^= 1 << bit;
            prop_assert_eq!(Journal::decode(&block, id), Journal::Foreign);
        }
    }
}
