use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use k8s_openapi::jiff::Timestamp;
use zpod_kubernetes::crd::{LastSnapshot, PoolStatus, Scrub, ZfsVolumeStatus};
use zpod_kubernetes::{HEALTHY, Quantity};
use zpod_volume::{Bytes, PoolName, VolumeId};

use crate::guest::{self, Health, ScrubState, VolumeReport};
use crate::volumes::condition_of;

/// The word for the pool of a volume that no pod uses, and that of the condition.
const EXPORTED: &str = "Exported";
const NOT_IN_USE: &str = "NotInUse";
/// Smaller changes of usage are not worth a write.
const STEP: u64 = 16 << 20;
/// Nor is a smaller change of the ratio.
const RATIO_STEP: f64 = 0.1;

/// What is said of a pool in the status of its ZfsVolume.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Said {
    /// Nothing where nobody has ever known anything of it: there may be none.
    pub(super) pool: Option<PoolStatus>,
    pub(super) healthy: Healthy,
}

/// The condition `Healthy`, without its time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Healthy {
    pub(super) status: String,
    pub(super) reason: String,
    pub(super) message: String,
}

impl Said {
    /// What a report amounts to.
    pub(super) fn of(report: &VolumeReport) -> Self {
        let condition = condition_of(report);
        let (status, reason) = match report.health {
            _ if report.awaits_key => ("Unknown", "AwaitingKey"),
            _ if report.refusal.is_some() => ("False", "VolumeRefused"),
            Health::Unknown => ("Unknown", "PoolUnknown"),
            Health::Online if report.data_errors > 0 => ("False", "DataErrors"),
            Health::Online if report.unmounted.is_some() => ("False", "DatasetNotMounted"),
            Health::Online if report.paused.is_some() => ("False", "SnapshotsPaused"),
            Health::Online => ("True", "PoolOnline"),
            Health::Degraded => ("False", "PoolDegraded"),
            Health::Faulted => ("False", "PoolFaulted"),
            Health::Suspended => ("False", "PoolSuspended"),
            Health::Unavailable => ("False", "PoolUnavailable"),
        };
        // What the node itself knows to be wrong, where the guest tells of nothing.
        let (status, reason) = match &report.trouble {
            Some(_) if status != "False" => ("False", "KeyTrouble"),
            _ => (status, reason),
        };
        // A pool that does not answer has no usage to tell.
        let known = (report.bytes.total > 0).then_some(report.bytes);
        let size = |bytes: u64| Some(Quantity::rounded(Bytes(bytes)));
        let count = |number: u64| i64::try_from(number).unwrap_or(i64::MAX);
        let pool = PoolStatus {
            // Ours, not the guest's word for it.
            name: PoolName::for_volume(report.id).to_string(),
            health: report.health.name().to_owned(),
            message: report.message.clone(),
            used: known.and_then(|usage| size(usage.used)),
            available: known.and_then(|usage| size(usage.available)),
            allocated: known.and_then(|_| size(report.allocated.0)),
            used_by_snapshots: known.and_then(|_| size(report.snapshots.0)),
            used_by_children: known.and_then(|_| size(report.children.0)),
            used_by_dataset: known.and_then(|_| size(report.dataset.0)),
            last_snapshot: None,
            compress_ratio: known.map_or_else(String::new, |_| format!("{:.2}x", report.compress_ratio)),
            read_errors: count(report.errors.read),
            write_errors: count(report.errors.write),
            checksum_errors: count(report.errors.checksum),
            data_errors: count(report.data_errors),
            last_scrub: report.scrub.map(scrub),
        };
        let healthy = Healthy { status: status.to_owned(), reason: reason.to_owned(), message: condition.message };
        Self { pool: Some(pool), healthy }
    }

    /// Of a volume that a container mounts and no guest speaks of: the node's own word, and nothing of the pool.
    pub(super) fn unheard(id: VolumeId, reason: &str) -> Self {
        let (name, health) = (PoolName::for_volume(id).to_string(), Health::Unknown.name().to_owned());
        let healthy =
            Healthy { status: "False".into(), reason: "VolumeNotPluggedIn".into(), message: reason.to_owned() };
        Self { pool: Some(PoolStatus { name, health, ..PoolStatus::default() }), healthy }
    }

    /// What an object says already.
    pub(super) fn found(status: &ZfsVolumeStatus) -> Option<(Self, Time)> {
        let condition = status.conditions.iter().find(|condition| condition.type_ == HEALTHY)?;
        let Condition { status: holds, reason, message, last_transition_time, .. } = condition.clone();
        let said = Self { pool: status.pool.clone(), healthy: Healthy { status: holds, reason, message } };
        Some((said, last_transition_time))
    }

    /// The same once no pod uses the volume any more.
    pub(super) fn exported(self) -> Self {
        let healthy = Healthy {
            status: "Unknown".into(),
            reason: NOT_IN_USE.into(),
            message: "no pod uses the volume; its pool is looked at by the next guest".into(),
        };
        // Only the name of one that no guest has told anything of was written: there may be none.
        let known = self.pool.filter(|pool| pool.health != Health::Unknown.name() || pool.used.is_some());
        let pool = known.map(|pool| PoolStatus { health: EXPORTED.into(), message: String::new(), ..pool });
        Self { pool, healthy }
    }

    /// Whether that is what is said once no pod uses the volume any more.
    pub(super) fn is_over(&self) -> bool {
        self.healthy.reason == NOT_IN_USE
    }

    /// With the usage that was known before, where there is none now.
    pub(super) fn or_usage_of(self, before: Option<&Self>) -> Self {
        let unknown = self.pool.as_ref().is_some_and(|pool| pool.used.is_none());
        match before {
            Some(before) if unknown => self.with_usage_of(before),
            _ => self,
        }
    }

    /// With all of the pool that was known before, but for how it is.
    pub(super) fn or_pool_of(self, before: Option<&Self>) -> Self {
        let known = before.and_then(|before| before.pool.clone());
        let pool = match (self.pool, known) {
            (Some(pool), Some(known)) => Some(PoolStatus { health: pool.health, message: pool.message, ..known }),
            (pool, _) => pool,
        };
        Self { pool, ..self }
    }

    /// With what was last done with a snapshot, or what stands there of it.
    pub(super) fn with_snapshot(mut self, last: Option<&LastSnapshot>, written: Option<&Self>) -> Self {
        if let Some(pool) = &mut self.pool {
            let before = || written?.pool.as_ref()?.last_snapshot.as_ref();
            pool.last_snapshot = last.or_else(before).cloned();
        }
        self
    }

    fn with_usage_of(mut self, other: &Self) -> Self {
        if let (Some(pool), Some(other)) = (&mut self.pool, &other.pool) {
            (pool.used, pool.available, pool.allocated) = (other.used, other.available, other.allocated);
            (pool.used_by_snapshots, pool.used_by_children) = (other.used_by_snapshots, other.used_by_children);
            pool.used_by_dataset = other.used_by_dataset;
            pool.compress_ratio.clone_from(&other.compress_ratio);
        }
        self
    }

    /// Whether more than usage differs.
    pub(super) fn is_news(&self, written: &Self) -> bool {
        self.healthy != written.healthy || self.clone().with_usage_of(written).pool != written.pool
    }

    /// Whether usage has moved far enough.
    pub(super) fn has_moved(&self, written: &Self, capacity: Bytes) -> bool {
        let step = STEP.max(capacity.0 / 100);
        let moved = |now: Option<Quantity>, then: Option<Quantity>| match (now, then) {
            (Some(now), Some(then)) => now.0.0.abs_diff(then.0.0) >= step,
            (now, then) => now != then,
        };
        let ratio = |pool: &PoolStatus| pool.compress_ratio.trim_end_matches('x').parse::<f64>().unwrap_or(0.0);
        let (Some(now), Some(then)) = (&self.pool, &written.pool) else { return false };
        moved(now.used, then.used)
            || moved(now.available, then.available)
            || moved(now.allocated, then.allocated)
            || moved(now.used_by_snapshots, then.used_by_snapshots)
            || moved(now.used_by_children, then.used_by_children)
            || (ratio(now) - ratio(then)).abs() >= RATIO_STEP
    }
}

fn scrub(scrub: guest::Scrub) -> Scrub {
    let state = match scrub.state {
        ScrubState::Running => "Scanning",
        ScrubState::Paused => "Paused",
        ScrubState::Finished => "Finished",
        ScrubState::Canceled => "Canceled",
    };
    let ended = scrub.ended.and_then(|at| Timestamp::from_second(i64::try_from(at).ok()?).ok()).map(Time);
    Scrub { state: state.to_owned(), end_time: ended, errors: i64::try_from(scrub.errors).unwrap_or(i64::MAX) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::Paused;
    use zpod_volume::VolumeId;

    const HEALTHS: [Health; 6] =
        [Health::Unknown, Health::Online, Health::Degraded, Health::Faulted, Health::Suspended, Health::Unavailable];

    fn online() -> VolumeReport {
        VolumeReport::online(VolumeId::from_name("data"))
    }

    #[test]
    fn a_key_that_is_waited_for_is_no_fault_and_one_that_was_not_taken_is() {
        let waits = VolumeReport { health: Health::Unavailable, awaits_key: true, ..online() };
        let no =
            |report: &VolumeReport| VolumeReport { trouble: Some("its key was not taken".into()), ..report.clone() };
        for (report, status, reason) in [
            (waits.clone(), "Unknown", "AwaitingKey"),
            (no(&waits), "False", "KeyTrouble"),
            (no(&online()), "False", "KeyTrouble"),
            (no(&VolumeReport { health: Health::Faulted, ..online() }), "False", "PoolFaulted"),
        ] {
            let healthy = Said::of(&report).healthy;
            assert_eq!((healthy.status.as_str(), healthy.reason.as_str()), (status, reason), "{report:?}");
            assert_eq!(report.trouble.is_some(), healthy.message.contains("its key was not taken"), "{healthy:?}");
        }
    }

    #[test]
    fn healthy_is_false_exactly_where_the_condition_is_abnormal() {
        for health in HEALTHS {
            for bits in 0..32_u64 {
                let some = |bit: u64, text: &str| (bits & bit > 0).then(|| text.to_owned());
                let report = VolumeReport {
                    health,
                    refusal: some(1, "no disk"),
                    trouble: some(2, "its key was not taken"),
                    awaits_key: bits & 4 > 0,
                    data_errors: bits >> 3 & 1,
                    paused: (bits & 16 > 0).then_some(Paused::NoRoom),
                    ..online()
                };
                let healthy = Said::of(&report).healthy;
                assert_eq!(healthy.status == "False", condition_of(&report).abnormal, "{healthy:?} of {report:?}");
            }
        }
    }
}
