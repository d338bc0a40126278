use zpod_volume::{Bytes, DiskLayout, VolumeMode};

use super::VolumeError;

/// What a volume gets where nobody says how large it is to be.
pub const DEFAULT_CAPACITY: Bytes = Bytes::gib(1);

/// How large a volume is to be: at least `required`, at most `limit`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CapacityRange {
    /// At least this; `None` leaves it to us.
    pub required: Option<Bytes>,
    /// At most this; `None` for no bound.
    pub limit: Option<Bytes>,
}

impl CapacityRange {
    /// The size of a volume: exactly what is required. A block device then has the next whole multiple of
    /// [`DiskLayout::BLOCK_DEVICE_UNIT`], which is within the limit too.
    ///
    /// # Errors
    /// [`VolumeError::OutOfRange`] when it is smaller or larger than a volume can be, or no size of a block device is
    /// within the limit.
    pub fn choose(self, mode: VolumeMode) -> Result<Bytes, VolumeError> {
        let unit = if mode == VolumeMode::Block { DiskLayout::BLOCK_DEVICE_UNIT } else { 1 };
        let open = || self.limit.unwrap_or(DEFAULT_CAPACITY).min(DEFAULT_CAPACITY).round_down(unit);
        let wanted = self.required.unwrap_or_else(open);
        check(wanted)?;
        let device = wanted.round_up(unit);
        if let Some(limit) = self.limit.filter(|limit| mode == VolumeMode::Block && *limit < device) {
            let reason = format!(
                "limit_bytes is {}, and a block device of at least {} bytes has {}, since it is a whole multiple of {}: \
                 ask for such a size, or raise the limit",
                limit.0,
                wanted.0,
                device.0,
                Bytes(unit),
            );
            return Err(VolumeError::OutOfRange { reason });
        }
        Ok(wanted)
    }

    /// Whether an existing size answers the request.
    pub fn accepts(self, size: Bytes) -> bool {
        self.required.is_none_or(|required| size >= required) && self.limit.is_none_or(|limit| size <= limit)
    }
}

fn check(wanted: Bytes) -> Result<(), VolumeError> {
    if wanted < DiskLayout::MIN_CAPACITY {
        let reason = format!(
            "{wanted} was asked for, {} is the smallest volume: a smaller pool is mostly ZFS's own metadata",
            DiskLayout::MIN_CAPACITY
        );
        return Err(VolumeError::OutOfRange { reason });
    }
    if wanted > DiskLayout::MAX_CAPACITY {
        let reason = format!("{wanted} was asked for, {} is the largest volume", DiskLayout::MAX_CAPACITY);
        return Err(VolumeError::OutOfRange { reason });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(required: u64, limit: u64) -> CapacityRange {
        let some = |n| Some(Bytes(n)).filter(|bytes| bytes.0 > 0);
        CapacityRange { required: some(required), limit: some(limit) }
    }

    #[test]
    fn a_volume_is_exactly_as_large_as_was_asked_for() {
        let (mib, gib) = (1 << 20, 1 << 30);
        for (required, limit, want) in [
            (0, 0, gib),
            (0, 300 * mib, 300 * mib),
            (0, 5 * gib, gib),
            (gib + 1, 0, gib + 1),
            (256 * mib, 256 * mib, 256 * mib),
        ] {
            assert_eq!(
                range(required, limit).choose(VolumeMode::Filesystem).unwrap(),
                Bytes(want),
                "{required} {limit}"
            );
        }
    }

    #[test]
    fn a_block_device_has_whole_blocks_within_the_limit() {
        let (unit, mib, gib) = (128 << 10, 1 << 20, 1 << 30);
        for (required, limit, want) in [
            (0, 0, gib),
            (gib, gib, gib),
            (gib + 1, 0, gib + 1),
            (gib + 1, gib + unit, gib + 1),
            (0, 300 * mib + 1, 300 * mib),
        ] {
            assert_eq!(range(required, limit).choose(VolumeMode::Block).unwrap(), Bytes(want), "{required} {limit}");
        }
        let error = range(268_435_457, 268_435_457).choose(VolumeMode::Block).unwrap_err();
        assert!(matches!(error, VolumeError::OutOfRange { .. }));
        for part in ["capacity_range", "limit_bytes is 268435457", "has 268566528", "128 KiB"] {
            assert!(error.to_string().contains(part), "{part:?} in {error}");
        }
        assert!(range(268_435_457, 268_435_457).choose(VolumeMode::Filesystem).is_ok());
    }

    #[test]
    fn sizes_that_no_volume_has_are_out_of_range_and_the_message_names_the_bound() {
        for (required, limit, want) in [(1 << 20, 0, "256 MiB"), (0, 1 << 20, "256 MiB"), (1 << 51, 0, "1024 TiB")] {
            let error = range(required, limit).choose(VolumeMode::Filesystem).unwrap_err().to_string();
            assert!(error.contains(want), "{error}");
        }
    }
}
