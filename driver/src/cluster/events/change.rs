use crate::guest::{Health, Paused, VolumeReport};
use crate::volumes::{CLAIM_NAME, Observed, SnapshotChange};
use zpod_storage::catalog::RollbackOutcome;
use zpod_volume::{Bytes, Rollback};

/// Marks of usage in percent, and how far below one it must fall before it counts again.
const FILLING: u64 = 80;
const NEARLY_FULL: u64 = 90;
const HYSTERESIS: u64 = 2;

/// Something that an event tells of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Change {
    /// A word in CamelCase.
    pub(super) reason: &'static str,
    /// Something is wrong.
    pub(super) warning: bool,
    /// For a person: what happened, why, and what to do.
    pub(super) note: String,
}

/// A second virtual machine claims a volume.
pub(super) fn claimed_again(node: &str, volume: &Observed, sandbox: &str) -> Change {
    // The name of a directory on the node, by whoever made it.
    let sandbox = crate::guest::clean(sandbox, 64);
    let note = format!(
        "a second virtual machine on node {node} (sandbox {sandbox}) shows the token of volume {}, which was given to \
         another one: it is not believed and told nothing. If it is not a leftover of this pod, somebody has read the \
         token on the node: look into sandbox {sandbox}, and delete the pod, so that the next one gets a new token",
        volume.id
    );
    Change { reason: "VolumeClaimedAgain", warning: true, note }
}

/// Somebody has had a snapshot in the pool taken or destroyed.
pub(super) fn snapshot(volume: &Observed, change: &SnapshotChange) -> Change {
    let (reason, snapshot, done) = match change {
        SnapshotChange::Taken(name) => ("SnapshotTaken", name, "was taken in the pool"),
        SnapshotChange::Destroyed(name) => ("SnapshotDestroyed", name, "was destroyed in the pool"),
    };
    let note = format!("snapshot {snapshot} {done} of {}, as was asked for by kubectl zpod", name(volume));
    Change { reason, warning: false, note }
}

/// Somebody has asked for a rollback, or has taken that back.
pub(super) fn rollback(volume: &Observed, rollback: &Rollback, asked: bool) -> Change {
    let (name, snapshot) = (name(volume), &rollback.snapshot);
    let (reason, note) = match asked {
        true => (
            "RollbackRequested",
            format!(
                "{name} goes back to snapshot {snapshot} with the start of its next pod, as was asked for; kubectl zpod                  rollback --cancel takes it back"
            ),
        ),
        false => ("RollbackCanceled", format!("{name} does not go back to snapshot {snapshot}: that was taken back")),
    };
    Change { reason, warning: false, note }
}

/// What came of a rollback.
pub(super) fn rolled_back(volume: &Observed, rollback: &Rollback, outcome: &RollbackOutcome) -> Change {
    let (name, snapshot) = (name(volume), &rollback.snapshot);
    match &outcome.refused {
        None => Change {
            reason: "RolledBack",
            warning: false,
            note: format!("{name} went back to snapshot {snapshot} before its first container, as was asked for"),
        },
        Some(reason) => Change {
            reason: "RollbackRefused",
            warning: true,
            note: format!(
                "{name} did not go back to snapshot {snapshot}, and is as it was: {reason}. It is not tried again: ask \
                 once more when that is mended (kubectl zpod rollback)"
            ),
        },
    }
}

/// What was told of a volume.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Seen {
    trouble: Option<Trouble>,
    level: Level,
    refusal: Option<String>,
    paused: Option<Paused>,
    unmounted: Option<String>,
}

/// What is wrong with a pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Trouble {
    Degraded,
    Faulted,
    Suspended,
    Unavailable,
    DataErrors,
}

/// How full a volume is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
enum Level {
    #[default]
    Room,
    Filling,
    NearlyFull,
}

impl Level {
    fn next(self, percent: u64) -> Self {
        let holds = |mark: u64, level: Self| percent >= mark || self >= level && percent >= mark - HYSTERESIS;
        if holds(NEARLY_FULL, Self::NearlyFull) {
            Self::NearlyFull
        } else if holds(FILLING, Self::Filling) {
            Self::Filling
        } else {
            Self::Room
        }
    }
}

/// `None` where it is not known.
fn trouble(report: &VolumeReport) -> Option<Option<Trouble>> {
    match report.health {
        Health::Unknown => None,
        // Nothing is known of what is locked still; who does not get it in time is told by its refusal.
        _ if report.awaits_key => None,
        // What is not there because it was refused is told as that.
        Health::Unavailable if report.refusal.is_some() => None,
        Health::Online if report.data_errors > 0 => Some(Some(Trouble::DataErrors)),
        Health::Online => Some(None),
        Health::Degraded => Some(Some(Trouble::Degraded)),
        Health::Faulted => Some(Some(Trouble::Faulted)),
        Health::Suspended => Some(Some(Trouble::Suspended)),
        Health::Unavailable => Some(Some(Trouble::Unavailable)),
    }
}

impl Seen {
    /// What a report changes.
    pub(super) fn changes(&mut self, node: &str, volume: &Observed, report: &VolumeReport) -> Vec<Change> {
        let mut changes = Vec::new();
        if let Some(trouble) = trouble(report) {
            let before = std::mem::replace(&mut self.trouble, trouble);
            match trouble {
                Some(now) if before != trouble => changes.push(now.change(node, volume, report)),
                None if before.is_some() => changes.push(Change {
                    reason: "PoolRecovered",
                    warning: false,
                    note: format!("the ZFS pool of {} is healthy again", name(volume)),
                }),
                _ => {}
            }
        }
        // Not known is not empty.
        if let Some(percent) = report.bytes.used.saturating_mul(100).checked_div(report.bytes.total) {
            let before = self.level;
            self.level = before.next(percent);
            if self.level > before {
                changes.push(filling(self.level, percent, volume, report));
            }
        }
        if report.refusal.is_some() && report.refusal != self.refusal {
            changes.push(Change {
                reason: "VolumeRefused",
                warning: true,
                note: format!(
                    "the guest did not give {} to a container, which does not start: {}; kubelet tries again, and nothing on \
                     the volume was changed",
                    name(volume),
                    report.refusal.as_deref().unwrap_or_default()
                ),
            });
        }
        self.refusal.clone_from(&report.refusal);
        // Of a pool that is not well it is not known.
        if report.health == Health::Online {
            let before = std::mem::replace(&mut self.paused, report.paused);
            match report.paused {
                Some(now) if before != report.paused => changes.push(paused(now, volume)),
                None if before.is_some() => changes.push(Change {
                    reason: "SnapshotsResumed",
                    warning: false,
                    note: format!("automatic snapshots of {} are taken again", name(volume)),
                }),
                _ => {}
            }
        }
        if let Some(unmounted) = report.unmounted.as_ref().filter(|_| report.unmounted != self.unmounted) {
            let note = format!("in {}: {unmounted}; see docs/pod-zfs.md", name(volume));
            changes.push(Change { reason: "DatasetNotMounted", warning: true, note });
        }
        self.unmounted.clone_from(&report.unmounted);
        changes
    }
}

impl Change {
    /// A container runs without the volume that it mounts.
    pub(super) fn unheard(volume: &Observed, reason: &str) -> Self {
        Self { reason: "VolumeNotPluggedIn", warning: true, note: format!("{}: {reason}", name(volume)) }
    }
}

fn name(volume: &Observed) -> String {
    match volume.label(CLAIM_NAME) {
        "" => format!("volume {}", volume.id),
        claim => format!("claim {claim} (volume {})", volume.id),
    }
}

fn paused(paused: Paused, volume: &Observed) -> Change {
    let remedy = match paused {
        Paused::NoRoom => {
            "the oldest automatic ones are removed, but for the newest of each kind, and none are taken until there is more: \
             remove data or snapshots, keep fewer (snapshotSchedule), or raise spec.resources.requests.storage of the claim"
        }
        Paused::Failing => "it is tried again each minute",
    };
    let note = format!("{} takes no automatic snapshots: {}; {remedy}", name(volume), paused.cause());
    Change { reason: "SnapshotsPaused", warning: true, note }
}

fn filling(level: Level, percent: u64, volume: &Observed, report: &VolumeReport) -> Change {
    let (used, total) = (Bytes(report.bytes.used), Bytes(report.bytes.total));
    Change {
        reason: if level == Level::NearlyFull { "VolumeNearlyFull" } else { "VolumeFilling" },
        warning: true,
        note: format!(
            "{} is {percent} % full: {used} of {total}; writes fail when it is full: remove data, or raise \
             spec.resources.requests.storage of the claim, which needs no restart within the headroom",
            name(volume)
        ),
    }
}

impl Trouble {
    fn change(self, node: &str, volume: &Observed, report: &VolumeReport) -> Change {
        let (reason, state, remedy) = match self {
            Self::Degraded => (
                "PoolDegraded",
                "degraded",
                "it works, with errors of its device: back the data up, and look at the disk below zpod's backing directory",
            ),
            Self::Faulted => (
                "PoolFaulted",
                "faulted: its device can't be used",
                "look at the disk below zpod's backing directory, then delete the pod: its next guest imports the pool anew",
            ),
            Self::Suspended => (
                "PoolSuspended",
                "suspended: its device does not answer, and writes fail",
                "see that the file system below zpod's backing directory has room and no errors: the guest tries again \
                 every 10 s, and goes on by itself",
            ),
            Self::Unavailable => (
                "PoolUnavailable",
                "not there any more in its guest",
                "delete the pod: its next guest imports the pool anew",
            ),
            Self::DataErrors => (
                "DataErrors",
                "online, with damaged files",
                "`zpool status -v` in the guest names them: remove them, or restore them from a backup or a snapshot, then \
                 `kubectl zpod scrub` clears it; and look at the disk below zpod's backing directory",
            ),
        };
        let said = if report.message.is_empty() { String::new() } else { format!(" (the guest: {})", report.message) };
        let note = format!("the ZFS pool of {} is {state}{said}; on node {node}: {remedy}", name(volume));
        Change { reason, warning: true, note }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use zpod_volume::VolumeId;

    fn volume() -> Observed {
        Observed {
            id: VolumeId::from_name("data"),
            target: "/t".into(),
            pod: None,
            labels: [(CLAIM_NAME.to_owned(), "data".to_owned())].into(),
            capacity: Bytes::gib(1),
        }
    }

    fn online() -> VolumeReport {
        VolumeReport::online(VolumeId::from_name("data"))
    }

    fn reasons(seen: &mut Seen, report: &VolumeReport) -> Vec<&'static str> {
        seen.changes("n1", &volume(), report).iter().map(|change| change.reason).collect()
    }

    #[test]
    fn each_trouble_is_told_once_with_cause_and_remedy_and_its_end_too() {
        let (mut seen, message) = (Seen::default(), "one device is bad".to_owned());
        for (health, reason) in [
            (Health::Degraded, "PoolDegraded"),
            (Health::Suspended, "PoolSuspended"),
            (Health::Faulted, "PoolFaulted"),
            (Health::Unavailable, "PoolUnavailable"),
        ] {
            let report = VolumeReport { health, message: message.clone(), ..online() };
            let changes = seen.changes("n1", &volume(), &report);
            assert_eq!(changes.len(), 1);
            assert_eq!((changes[0].reason, changes[0].warning), (reason, true));
            for part in ["claim data", "one device is bad", "node n1"] {
                assert!(changes[0].note.contains(part), "{part} in {}", changes[0].note);
            }
            assert!(changes[0].note.len() < 900, "room for a guest's words: {}", changes[0].note.len());
            assert_eq!(reasons(&mut seen, &report), Vec::<&str>::new());
        }
        assert_eq!(reasons(&mut seen, &VolumeReport { health: Health::Unknown, ..online() }), Vec::<&str>::new());
        assert_eq!(reasons(&mut seen, &online()), ["PoolRecovered"]);
        assert_eq!(reasons(&mut seen, &online()), Vec::<&str>::new());
        assert_eq!(reasons(&mut seen, &VolumeReport { data_errors: 3, ..online() }), ["DataErrors"]);
    }

    #[test]
    fn a_volume_that_waits_for_its_key_is_in_no_trouble_and_does_not_recover_from_any() {
        let (mut seen, none) = (Seen::default(), Vec::<&str>::new());
        let waits = VolumeReport { health: Health::Unavailable, awaits_key: true, encrypted: true, ..online() };
        for report in [&waits, &online(), &waits, &online()] {
            assert_eq!(reasons(&mut seen, report), none);
        }
        // What was told before it waited is neither told again nor taken back by it.
        let faulted = VolumeReport { health: Health::Faulted, ..online() };
        assert_eq!(reasons(&mut seen, &faulted), ["PoolFaulted"]);
        assert_eq!(reasons(&mut seen, &waits), none);
        assert_eq!(reasons(&mut seen, &online()), ["PoolRecovered"]);
    }

    #[test]
    fn what_mends_itself_and_what_clears_an_error_is_said() {
        let note = |report| Seen::default().changes("n1", &volume(), &report).remove(0).note;
        let suspended = note(VolumeReport { health: Health::Suspended, ..online() });
        assert!(suspended.contains("goes on by itself") && !suspended.contains("delete the pod"), "{suspended}");
        let damaged = note(VolumeReport { data_errors: 3, ..online() });
        assert!(damaged.contains("`kubectl zpod scrub`"), "{damaged}");
    }

    #[test]
    fn usage_is_told_when_it_crosses_80_and_90_percent_upwards_with_a_hysteresis_of_2() {
        let mut seen = Seen::default();
        let none: [&str; 0] = [];
        for (percent, want) in [
            (79, &none[..]),
            (80, &["VolumeFilling"]),
            (79, &none),
            (80, &none),
            (78, &none),
            (77, &none),
            (80, &["VolumeFilling"]),
            (90, &["VolumeNearlyFull"]),
            (88, &none),
            (91, &none),
            (87, &none),
            (90, &["VolumeNearlyFull"]),
            (10, &none),
            (95, &["VolumeNearlyFull"]),
        ] {
            let mut report = online();
            (report.bytes.total, report.bytes.used) = (1000, 10 * percent);
            assert_eq!(reasons(&mut seen, &report), want, "{percent}");
            // While the pool does not answer its usage is not known.
            assert_eq!(reasons(&mut seen, &online()), none);
        }
    }

    #[test]
    fn a_pause_of_the_automatic_snapshots_is_told_with_its_cause_and_its_end_too() {
        let (mut seen, none) = (Seen::default(), Vec::<&str>::new());
        let paused = |paused, health| VolumeReport { paused: Some(paused), health, ..online() };
        let no_room = paused(Paused::NoRoom, Health::Online);
        let changes = seen.changes("n1", &volume(), &no_room);
        assert_eq!((changes[0].reason, changes[0].warning, changes.len()), ("SnapshotsPaused", true, 1));
        for part in ["claim data", "less than a tenth", "snapshotSchedule"] {
            assert!(changes[0].note.contains(part), "{part} in {}", changes[0].note);
        }
        assert_eq!(reasons(&mut seen, &no_room), none);
        assert_eq!(reasons(&mut seen, &paused(Paused::Failing, Health::Online)), ["SnapshotsPaused"]);
        assert_eq!(reasons(&mut seen, &paused(Paused::NoRoom, Health::Suspended)), ["PoolSuspended"]);
        assert_eq!(reasons(&mut seen, &online()), ["PoolRecovered", "SnapshotsResumed"]);
        assert_eq!(reasons(&mut seen, &online()), none);
    }

    #[test]
    fn what_a_container_lacks_is_told_once_and_again_when_it_is_another_thing() {
        let mut seen = Seen::default();
        let lacks = |what: &str| VolumeReport { unmounted: Some(what.into()), ..online() };
        assert_eq!(reasons(&mut seen, &lacks("data/a")), ["DatasetNotMounted"]);
        assert_eq!(reasons(&mut seen, &lacks("data/a")), Vec::<&str>::new());
        assert_eq!(reasons(&mut seen, &lacks("data/b")), ["DatasetNotMounted"]);
        assert_eq!(reasons(&mut seen, &online()), Vec::<&str>::new());
    }

    #[test]
    fn a_refusal_is_told_as_that_and_again_when_its_reason_is_known_better() {
        let mut seen = Seen::default();
        let refused = |why: &str| VolumeReport {
            health: Health::Unavailable,
            refusal: Some(why.into()),
            message: why.into(),
            ..online()
        };
        assert_eq!(reasons(&mut seen, &refused("not ready yet")), ["VolumeRefused"]);
        assert_eq!(reasons(&mut seen, &refused("not ready yet")), Vec::<&str>::new());
        assert_eq!(reasons(&mut seen, &refused("no disk")), ["VolumeRefused"]);
        assert_eq!(reasons(&mut seen, &online()), Vec::<&str>::new());
    }
}
