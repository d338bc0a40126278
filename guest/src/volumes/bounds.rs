//! What bounds a volume, and what is kept for it.
//!
//! # Design
//! A file system is bounded by `refquota` or `quota`, a block device by its own size (`volsize`). Bounds are only ever
//! raised: the spec may be older than what the volume was grown to while it ran. A bound that the contents exceed already
//! is not set, which ZFS would refuse too; then the one before it stays.
//!
//! What is kept is `refreservation`: it holds room for the volume's own contents against the snapshots beside them.
//! `reservation` would count those in, and in a pool with one dataset hold room against nobody.

use zpod_volume::{Bytes, QuotaMode, VolumeSpec};

use crate::machine::Properties;

const REFQUOTA: &str = "refquota";
const QUOTAS: [&str; 2] = [REFQUOTA, "quota"];
const KEPT: &str = "refreservation";

/// What bounds a volume, and what is kept for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Bounds {
    key: Option<&'static str>,
    capacity: u64,
    kept: u64,
}

/// What is to be set, and what the bound is then.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Changes {
    /// What can be set in any order.
    pub(super) first: Vec<(String, String)>,
    /// What is kept is raised once it is known to be within the bound. It takes room that may not be there.
    pub(super) then: Option<(String, String)>,
    /// Why the bound can't be set, for a person.
    pub(super) refused: Option<String>,
    /// The bound; 0 for none.
    pub(super) bound: u64,
}

impl Bounds {
    /// Those of a spec.
    pub(super) fn of(spec: &VolumeSpec) -> Self {
        let key = match spec.quota {
            _ if !spec.mode.is_filesystem() => Some("volsize"),
            QuotaMode::Refquota => Some("refquota"),
            QuotaMode::Quota => Some("quota"),
            QuotaMode::None => None,
        };
        let kept = spec.reservation.map_or(0, |kept| kept.0).min(spec.capacity.0);
        Self { key, capacity: spec.capacity.0, kept }
    }

    /// The bound; 0 for none.
    pub(super) fn bound(&self) -> u64 {
        self.key.map_or(0, |_| self.capacity)
    }

    /// The property that bounds it.
    pub(super) const fn key(&self) -> Option<&'static str> {
        self.key
    }

    /// What is in the way of going back to a snapshot, and is set aside for it. ZFS wants all that is kept to be free for a
    /// moment (`dsl_dataset_clone_swap_check_impl`), and what the snapshot refers to within `refquota`, which a full volume may
    /// have exceeded a little, and its owner may have lowered since. That is only raised: without any, it could not be set
    /// again.
    pub(super) fn out_of_the_way(now: &Properties, referenced: u64) -> Vec<(String, String)> {
        let bound = number(now, REFQUOTA);
        let raised = (1..referenced).contains(&bound).then(|| (REFQUOTA.to_owned(), referenced.to_string()));
        (number(now, KEPT) > 0).then(Self::nothing_kept).into_iter().chain(raised).collect()
    }

    /// What is set for nothing to be kept.
    pub(super) fn nothing_kept() -> (String, String) {
        (KEPT.to_owned(), "none".to_owned())
    }

    /// What a dataset is made with. The size of a block device is no property at its creation.
    pub(super) fn at_creation(&self) -> Vec<(String, String)> {
        let quota = self.key.filter(|key| QUOTAS.contains(key)).map(|key| (key, self.capacity));
        let kept = (self.kept > 0).then_some((KEPT, self.kept));
        quota.into_iter().chain(kept).map(|(key, bytes)| (key.to_owned(), bytes.to_string())).collect()
    }

    /// What has to be set where these are the properties now.
    pub(super) fn changes(&self, now: &Properties) -> Changes {
        let set = |key: &str, bytes: u64| (key.to_owned(), bytes.to_string());
        let others = || QUOTAS.into_iter().filter(|other| Some(*other) != self.key && number(now, other) != 0);
        let clear = || others().map(|other| (other.to_owned(), "none".to_owned()));
        let mut changes = Changes::default();
        match self.key {
            None => changes.first.extend(clear()),
            Some(key) => {
                // The mode may have changed since the volume was grown.
                let before = others().map(|other| number(now, other)).max().unwrap_or(0);
                let (at, wanted) = (number(now, key), self.capacity.max(before));
                let held = number(now, if key == "quota" { "used" } else { "referenced" });
                changes.bound = at.max(wanted);
                if at == 0 && held > wanted {
                    changes.bound = before;
                    changes.refused = Some(format!(
                        "its {key} can't be set to {}: it holds {} already; grow it, or remove something from it",
                        Bytes(wanted),
                        Bytes(held)
                    ));
                } else {
                    changes.first.extend((at < wanted).then(|| set(key, wanted)));
                    changes.first.extend(clear());
                }
            }
        }
        let kept = number(now, KEPT);
        if kept > self.kept {
            changes.first.push(match self.kept {
                0 => Self::nothing_kept(),
                kept => set(KEPT, kept),
            });
        }
        changes.then = (kept < self.kept).then(|| set(KEPT, self.kept));
        changes
    }
}

fn number(properties: &Properties, key: &str) -> u64 {
    properties.get(key).and_then(|value| value.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use uuid::Uuid;
    use zpod_volume::{Create, VolumeId, VolumeMode};

    fn bounds(quota: QuotaMode, kept: Option<u64>) -> Bounds {
        let new = VolumeSpec::new(VolumeId::from_name("a"), Uuid::nil(), Create::Never, Bytes::gib(1));
        Bounds::of(&VolumeSpec { quota, reservation: kept.map(Bytes::mib), ..new })
    }

    fn properties(all: &[(&str, u64)]) -> Properties {
        all.iter().map(|(key, mib)| ((*key).to_owned(), (mib << 20).to_string())).collect()
    }

    #[test]
    fn a_bound_is_raised_and_never_lowered_and_moves_with_the_mode() {
        let (gib, none) = ((1u64 << 30).to_string(), "none".to_owned());
        let pair = |key: &str, value: &String| (key.to_owned(), value.clone());
        for (mode, now, first, bound) in [
            (QuotaMode::Refquota, &[("refquota", 1024)][..], vec![], 1024),
            (QuotaMode::Refquota, &[("refquota", 512)], vec![pair("refquota", &gib)], 1024),
            (QuotaMode::Refquota, &[("refquota", 4096)], vec![], 4096),
            (QuotaMode::Quota, &[("refquota", 1024)], vec![pair("quota", &gib), pair("refquota", &none)], 1024),
            (QuotaMode::None, &[("refquota", 1024)], vec![pair("refquota", &none)], 0),
            (QuotaMode::Refquota, &[("referenced", 100)], vec![pair("refquota", &gib)], 1024),
            // More is in it than the spec, which may be old, lets be.
            (QuotaMode::Refquota, &[("referenced", 2000)], vec![], 0),
            (QuotaMode::Quota, &[("refquota", 1024), ("used", 1100)], vec![], 1024),
        ] {
            let changes = bounds(mode, None).changes(&properties(now));
            assert_eq!((changes.first, changes.bound), (first.clone(), bound << 20), "{mode:?} {now:?}");
            let refused = first.is_empty() && now.iter().any(|(key, mib)| key.starts_with('r') && *mib == 2000);
            assert!(!refused || changes.refused.is_some_and(|text| text.contains("1 GiB")));
        }
        // What it was grown to is not lost when the mode changes.
        let grown = bounds(QuotaMode::Quota, None).changes(&properties(&[("refquota", 4096)]));
        assert_eq!((grown.bound, grown.first[0].1.as_str()), (4 << 30, "4294967296"));
    }

    #[test]
    fn what_is_kept_goes_down_first_and_up_last() {
        let now = properties(&[("refquota", 1024), ("refreservation", 512)]);
        let less = bounds(QuotaMode::Refquota, Some(256)).changes(&now);
        assert_eq!((less.first, less.then), (vec![("refreservation".into(), (256 << 20).to_string())], None));
        let nothing = bounds(QuotaMode::Refquota, None).changes(&now);
        assert_eq!(nothing.first, [("refreservation".to_owned(), "none".to_owned())]);
        let more = bounds(QuotaMode::Refquota, Some(768)).changes(&now);
        assert_eq!((more.first, more.then.unwrap().1), (vec![], (768 << 20).to_string()));
        let too_much = bounds(QuotaMode::Refquota, Some(9999)).changes(&now);
        assert_eq!(too_much.then.unwrap().1, (1u64 << 30).to_string());
    }

    #[test]
    fn what_is_in_the_way_of_a_snapshot_is_set_aside_and_nothing_else() {
        let none = ("refreservation".to_owned(), "none".to_owned());
        let raised = ("refquota".to_owned(), (200u64 << 20).to_string());
        for (now, want) in [
            (&[("refquota", 200), ("quota", 1)][..], vec![]),
            (&[("refquota", 0)], vec![]),
            (&[("refquota", 199)], vec![raised.clone()]),
            (&[("refquota", 100), ("refreservation", 100)], vec![none, raised]),
        ] {
            assert_eq!(Bounds::out_of_the_way(&properties(now), 200 << 20), want, "{now:?}");
        }
    }

    #[test]
    fn a_block_device_has_a_size_and_no_quota() {
        let new = VolumeSpec::new(VolumeId::from_name("a"), Uuid::nil(), Create::Never, Bytes::gib(1));
        let block = Bounds::of(&VolumeSpec { mode: VolumeMode::Block, ..new });
        assert_eq!(block.at_creation(), []);
        let changes = block.changes(&properties(&[("volsize", 512), ("referenced", 700)]));
        assert_eq!((changes.first, changes.bound), (vec![("volsize".into(), (1u64 << 30).to_string())], 1 << 30));
    }
}
