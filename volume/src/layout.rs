use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::Bytes;

/// Bytes in a sector of the virtual disk.
pub const SECTOR: u64 = 512;

const MIB: u64 = 1 << 20;

/// Labels and boot block of a device: `VDEV_LABEL_START_SIZE` and `VDEV_LABEL_END_SIZE` (vdev_impl.h).
const LABELS: u64 = (4 << 20) + (512 << 10);
/// Room for a pool's own metadata, which no quota counts: space maps, the meta-objset, history.
const METADATA: u64 = 16 << 20;
/// One part in so many of the capacity, for the same.
const METADATA_SHARE: u64 = 256;

/// What the datasets of a pool on a partition can hold together.
///
/// A pool uses whole metaslabs; with 64 of them or more one is kept for the intent log (`zfs_embedded_slog_min_ms`).
/// Of the rest 1/32 is held back, at least 128 MiB, at most half, at most 128 GiB, less what the log has
/// (`spa_get_slop_space` in OpenZFS 2.3).
fn usable(partition: Bytes) -> u64 {
    let asize = partition.0.saturating_sub(LABELS);
    let metaslab = metaslab(asize);
    let count = asize / metaslab;
    let log = if count >= 64 { metaslab } else { 0 };
    let space = count * metaslab - log;
    let slop = (space >> 5).min(128 << 30);
    let slop = (slop - log.min(slop / 2)).max((space / 2).min(128 << 20));
    space - slop
}

/// Size of a new pool's metaslabs: about 16 below 8 GiB, 512 MiB each below 100 GiB, about 200 above
/// (`vdev_metaslab_set_size` in OpenZFS 2.3). A pool that grows keeps the smaller ones it was made with.
fn metaslab(asize: u64) -> u64 {
    let count = asize >> 29;
    // `highbit64` counts from one: what is no power of two is rounded up.
    let shift = if count < 16 {
        64 - (asize / 16).leading_zeros()
    } else if count > 200 {
        64 - (asize / 200).leading_zeros()
    } else {
        29
    };
    // At least the largest block, at most 16 GiB.
    1 << shift.clamp(24, 34)
}

/// How the virtual disk of a volume is laid out.
///
/// ```text
/// 0           1 MiB                                     partition end        disk end
/// | GPT |jrnl| partition: the pool                      | headroom, sparse ... | GPT |
/// ```
///
/// # Design
/// The **quota** of the dataset is the volume's capacity, so that `df` in the container shows what the PVC says. ZFS
/// needs room of its own beside that: labels, metadata, whole metaslabs, and the slop space it holds back (1/32 of the
/// pool, at least 128 MiB). The **partition** is the capacity plus that room, and bounds what a guest that keeps to its
/// partition can ever take from the host. The **disk** is larger by the headroom, sparse, and costs nothing: growing
/// inside it needs no hypervisor.
///
/// The space before the partition holds the guest's creation journal ([`DiskLayout::JOURNAL_OFFSET`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiskLayout {
    /// What the volume holds: the quota.
    pub capacity: Bytes,
    /// Size of the partition that bounds the pool.
    pub partition: Bytes,
    /// Size of the virtual disk.
    pub disk: Bytes,
}

impl DiskLayout {
    /// Where the partition begins, in bytes.
    pub const PARTITION_START: u64 = MIB;
    /// Where the guest's creation journal lies, in bytes from the start of the disk: one 4 KiB block behind the GPT
    /// and before the partition. The host never reads or writes it.
    pub const JOURNAL_OFFSET: u64 = MIB / 2;
    /// Where the guest notes which export of the pool was the last one: one sector behind the journal. The host never reads
    /// or writes it.
    pub const EXPORT_OFFSET: u64 = MIB / 8 * 5;
    /// Where the guest writes what tells two views of one image from two images: one sector behind that. What is there
    /// means nothing.
    pub const NONCE_OFFSET: u64 = MIB / 4 * 3;
    /// Where the host leaves the [`VolumeSpec`](crate::VolumeSpec) of a block device, in bytes from the start of the
    /// disk: behind the GPT and before the journal. Kata passes no options along with a device.
    pub const SPEC_OFFSET: u64 = MIB / 4;
    /// Room for it, its header included.
    pub const SPEC_BYTES: usize = 32 << 10;
    /// The smallest capacity of a volume.
    pub const MIN_CAPACITY: Bytes = Bytes::mib(256);
    /// The largest capacity of a volume: 1 PiB, far below what GPT and ZFS can address, so that sums don't overflow.
    pub const MAX_CAPACITY: Bytes = Bytes(1 << 50);
    /// A block device is a whole multiple of so many bytes: of ZFS's largest block for one (`volblocksize`).
    pub const BLOCK_DEVICE_UNIT: u64 = 128 << 10;
    /// Behind the partition: the backup GPT, rounded up.
    const TAIL: u64 = MIB;

    /// The layout of a volume of `capacity` on a disk with room to grow to `capacity * headroom`.
    pub fn new(capacity: Bytes, headroom: Headroom) -> Self {
        let largest = Bytes(capacity.0.saturating_mul(u64::from(headroom.0))).min(Self::MAX_CAPACITY).max(capacity);
        Self { capacity, partition: Self::partition_for(capacity), disk: Self::disk_for(Self::partition_for(largest)) }
    }

    /// The partition a pool needs to hold `capacity`: the smallest that does.
    pub fn partition_for(capacity: Bytes) -> Bytes {
        let needed = capacity.0.saturating_add(capacity.0 / METADATA_SHARE + METADATA);
        let mut partition = Bytes(needed).round_up(MIB);
        // What a pool can hold changes where another metaslab fits: few steps, since it needs little more than it holds.
        while usable(partition) < needed {
            let asize = partition.0.saturating_sub(LABELS);
            let metaslab = metaslab(asize);
            let next = Bytes((asize / metaslab + 1) * metaslab + LABELS).round_up(MIB);
            partition = next.max(Bytes(partition.0 + MIB));
        }
        partition
    }

    /// A capacity whose partition is not larger than `partition`; zero where there is none.
    pub fn capacity_for(partition: Bytes) -> Bytes {
        let room = u128::from(usable(partition).saturating_sub(METADATA));
        Bytes((room * u128::from(METADATA_SHARE) / u128::from(METADATA_SHARE + 1)) as u64).round_down(MIB)
    }

    /// The disk that holds a partition of that size.
    pub fn disk_for(partition: Bytes) -> Bytes {
        Bytes(partition.0.saturating_add(Self::PARTITION_START + Self::TAIL))
    }

    /// The largest partition on a disk of that size.
    pub fn largest_partition(disk: Bytes) -> Bytes {
        Bytes(disk.0.saturating_sub(Self::PARTITION_START + Self::TAIL)).round_down(MIB)
    }
}

/// How many times its capacity a volume can grow without a restart of its pod. `1x` is none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Headroom(u32);

impl Default for Headroom {
    fn default() -> Self {
        Self(8)
    }
}

impl Headroom {
    /// No headroom: the disk is as large as the volume.
    pub const NONE: Self = Self(1);
}

/// A headroom that does not parse.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("allowed is 1x (none) to 1000x, such as 8x")]
pub struct ParseHeadroomError;

impl FromStr for Headroom {
    type Err = ParseHeadroomError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let digits = text.strip_suffix('x').unwrap_or(text);
        let plain = !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit());
        let times = if plain { digits.parse().ok() } else { None };
        times.filter(|n| (1..=1000).contains(n)).map(Self).ok_or(ParseHeadroomError)
    }
}

impl fmt::Display for Headroom {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}x", self.0)
    }
}

impl TryFrom<String> for Headroom {
    type Error = ParseHeadroomError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<Headroom> for String {
    fn from(headroom: Headroom) -> Self {
        headroom.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn capacity_and_partition_are_each_others_inverse(mib in 256u64..(1 << 30), odd in 0u64..MIB) {
            let capacity = Bytes(mib * MIB + odd);
            let partition = DiskLayout::partition_for(capacity);
            prop_assert!(partition.0.is_multiple_of(MIB));
            prop_assert!(partition.0 >= capacity.0 + 128 * MIB + LABELS);
            prop_assert!(partition.0 <= capacity.0 + capacity.0 / 8 + 384 * MIB, "{capacity:?} takes {partition:?}");
            prop_assert!(usable(partition) >= capacity.0);
            prop_assert!(usable(Bytes(partition.0 - MIB)) < capacity.0 + capacity.0 / METADATA_SHARE + METADATA);
            let back = DiskLayout::capacity_for(partition);
            prop_assert!(DiskLayout::partition_for(back) <= partition);
            prop_assert!(back.0 + 2 * MIB > capacity.0, "{capacity:?} came back as {back:?}");
        }

        #[test]
        fn the_disk_always_holds_its_partition(bytes in (256 * MIB)..(1 << 50), times in 1u32..1000) {
            let layout = DiskLayout::new(Bytes(bytes), Headroom(times));
            prop_assert!(DiskLayout::largest_partition(layout.disk) >= layout.partition);
            prop_assert!(layout.disk.0.is_multiple_of(SECTOR));
        }
    }

    #[test]
    fn a_pool_holds_what_openzfs_was_measured_to_let_it_hold() {
        // 704 MiB made ten metaslabs of 64 MiB, of which 128 MiB are held back: 512 MiB, less the metadata.
        assert_eq!(usable(Bytes::mib(704)), 512 * MIB);
    }

    #[test]
    fn a_larger_capacity_never_has_a_smaller_partition() {
        let sizes: Vec<_> = (256..20_000).step_by(7).map(|mib| DiskLayout::partition_for(Bytes::mib(mib))).collect();
        assert!(sizes.is_sorted());
    }

    #[test]
    fn headroom_is_a_whole_number_of_times() {
        assert_eq!("8x".parse(), Ok(Headroom(8)));
        assert_eq!("1".parse(), Ok(Headroom::NONE));
        for text in ["", "x", "0x", "1001x", "-1x", "1.5x", "8xx"] {
            assert!(text.parse::<Headroom>().is_err(), "{text}");
        }
    }
}
