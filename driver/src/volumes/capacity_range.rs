use zpod_volume::{Bytes, DiskLayout};

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
    /// The size of a new volume: exactly what is required.
    ///
    /// # Errors
    /// [`VolumeError::OutOfRange`] when it is smaller or larger than a volume can be.
    pub fn choose(self) -> Result<Bytes, VolumeError> {
        let wanted = self.required.unwrap_or_else(|| self.limit.unwrap_or(DEFAULT_CAPACITY).min(DEFAULT_CAPACITY));
        check(wanted)?;
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
            assert_eq!(range(required, limit).choose().unwrap(), Bytes(want), "{required} {limit}");
        }
    }

    #[test]
    fn sizes_that_no_volume_has_are_out_of_range_and_the_message_names_the_bound() {
        for (required, limit, want) in [(1 << 20, 0, "256 MiB"), (0, 1 << 20, "256 MiB"), (1 << 51, 0, "1024 TiB")] {
            let error = range(required, limit).choose().unwrap_err().to_string();
            assert!(error.contains(want), "{error}");
        }
    }
}
