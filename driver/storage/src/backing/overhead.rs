//! What a file system needs to keep track of where a volume's blocks are.
//!
//! Such blocks are the volume's: quotas count them and `stat` shows them. The worst that a guest can do within its
//! partition is to have each block lie by itself, as it does that writes a thick volume at random: then XFS has a record
//! of 16 bytes for each block (`struct xfs_bmbt_rec`), in a tree whose blocks have a header of 72
//! (`struct xfs_btree_block`) and are at least half full: 125 records in 4 KiB, 0.8 % of the volume. ext4 needs less.

use zpod_volume::Bytes;

const RECORD: u64 = 16;
const HEADER: u64 = 72;
/// XFS asks for the blocks that a new record might need before it writes, a few for each level of the tree, and it puts
/// an attribute that is too long for the inode into a block.
const FIXED_BLOCKS: u64 = 16;

/// What is kept for a volume beside its own blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Overhead {
    block: u64,
}

impl Overhead {
    /// Nothing is kept.
    pub(super) const NONE: Self = Self { block: 0 };

    /// In a file system with blocks of so many bytes.
    pub(super) fn in_blocks_of(block: u64) -> Self {
        Self { block: block.clamp(512, 1 << 16) }
    }

    /// Blocks that one block of metadata has to do for: the least it has records for, less one, which makes up for the
    /// levels above the leaves.
    fn each(self) -> u64 {
        ((self.block - HEADER) / RECORD / 2 - 1).max(1)
    }

    /// For a volume of that size.
    pub(super) fn of(self, size: Bytes) -> u64 {
        if self.block == 0 {
            return 0;
        }
        let blocks = size.0.div_ceil(self.block);
        blocks.div_ceil(self.each()).saturating_add(FIXED_BLOCKS).saturating_mul(self.block)
    }

    /// The largest size, in whole MiB, that fits into so much space together with what is kept for it.
    pub(super) fn largest(self, space: u64) -> Bytes {
        if self.block == 0 {
            return Bytes(space).round_down(1 << 20);
        }
        // One block more for each of the two roundings.
        let space = u128::from(space.saturating_sub((FIXED_BLOCKS + 2) * self.block));
        let each = u128::from(self.each());
        // Smaller than `space`.
        Bytes((space * each / (each + 1)) as u64).round_down(1 << 20)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn in_blocks_of_4_kib_it_is_less_than_a_hundredth() {
        let overhead = Overhead::in_blocks_of(4096);
        assert_eq!(overhead.each(), 124);
        assert!(overhead.of(Bytes::gib(100)) < Bytes::gib(1).0);
        assert_eq!(Overhead::NONE.of(Bytes::gib(100)), 0);
    }

    #[test]
    fn a_tree_of_half_full_blocks_fits() {
        for block in [512_u64, 1024, 4096, 65536] {
            let least = (block - HEADER) / RECORD / 2;
            for size in [Bytes::mib(1), Bytes::mib(256), Bytes::gib(10), Bytes(1 << 50)] {
                // Blocks of each level, until one holds all.
                let mut level = size.0 / block;
                let mut tree = 0;
                while level > 1 {
                    level = level.div_ceil(least);
                    tree += level;
                }
                assert!(tree * block <= Overhead::in_blocks_of(block).of(size), "{size} in {block}");
            }
        }
    }

    proptest! {
        #[test]
        fn the_largest_fits_and_not_much_more_would(space in 0u64..1 << 50, block in 9u32..17, none: bool) {
            let overhead = if none { Overhead::NONE } else { Overhead::in_blocks_of(1 << block) };
            let largest = overhead.largest(space);
            prop_assert!(largest.0 == 0 || largest.0 + overhead.of(largest) <= space);
            let more = Bytes(largest.0 + (4 << 20));
            prop_assert!(more.0 + overhead.of(more) > space);
        }
    }
}
