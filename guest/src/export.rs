//! The last clean export of a pool, noted on its disk: one sector between the journal and the partition.
//!
//! ```text
//! offset  0  "zpodexpt"
//!         8  version, 1 (u32, little-endian like all numbers here)
//!        12  zeros (u32)
//!        16  the volume's id, 16 bytes
//!        32  GUID of the pool (u64)
//!        40  transaction group of the label that says that it was exported (u64)
//!        48  CRC-32 of the 48 bytes before
//!        52  zeros up to 512
//! ```
//!
//! # Design
//! On a read-only disk ZFS shows a pool as its last transaction group left it and replays no log: what was fsynced since
//! would be missing, and nobody would be told. So a pool is opened there only where nothing can be missing: its label says
//! that it was exported, and the guest that did so has noted this very export, having had the dataset's log replayed.
//!
//! The label alone is not enough: a pool is exported too where its dataset was never opened, such as for want of its key,
//! and then the log still waits. The note alone is not enough either: a guest may have had the pool since. That shows in
//! the label, which each writable import writes with a later transaction group before it returns (`spa_config_update` in
//! `spa_import`, spa.c).

use zpod_volume::VolumeId;

use crate::machine::Label;

/// Bytes of the note.
pub const BYTES: usize = 512;

const MAGIC: &[u8; 8] = b"zpodexpt";
const VERSION: u32 = 1;
const USED: usize = 52;

/// The note for the export of a volume's pool that a label tells of.
pub fn encode(id: VolumeId, label: &Label) -> Vec<u8> {
    let mut block = Vec::with_capacity(BYTES);
    block.extend_from_slice(MAGIC);
    block.extend_from_slice(&VERSION.to_le_bytes());
    block.extend_from_slice(&[0; 4]);
    block.extend_from_slice(id.uuid().as_bytes());
    block.extend_from_slice(&label.guid.to_le_bytes());
    block.extend_from_slice(&label.txg.to_le_bytes());
    block.extend_from_slice(&crc32fast::hash(&block).to_le_bytes());
    debug_assert_eq!(block.len(), USED);
    block.resize(BYTES, 0);
    block
}

/// Whether a note is of the export that a label tells of, and nobody has had the pool since.
pub fn is_last(block: &[u8], id: VolumeId, label: &Label) -> bool {
    label.exported && block == encode(id, label)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_note_is_of_one_export_of_one_volume() {
        let (id, label) = (VolumeId::from_name("a"), Label { guid: 7, txg: 100, exported: true, ..Label::default() });
        let note = encode(id, &label);
        assert!(is_last(&note, id, &label));
        for (other, label) in [
            (VolumeId::from_name("b"), label.clone()),
            (id, Label { exported: false, ..label.clone() }),
            (id, Label { txg: 101, ..label.clone() }),
            (id, Label { guid: 8, ..label.clone() }),
        ] {
            assert!(!is_last(&note, other, &label), "{label:?}");
        }
        assert!(!is_last(&[0; BYTES], id, &label));
        assert!(!is_last(&[], id, &label));
    }
}
