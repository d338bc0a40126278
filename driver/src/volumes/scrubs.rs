//! Scrubs: reading every block of a pool and mending what is damaged, while its pod runs.
//!
//! # Design
//! The guest of a volume scrubs it; the node says when: on demand; when the StorageClass's `scrubInterval` has passed
//! since the last scrub's end, by the pool's own word, or since the guest was first heard where there never was one; and
//! once when a pool says that its data is damaged. ZFS says so too of writes that failed until the pool was resumed and
//! are whole since then, and only a scrub lets it forget them.
//!
//! A scrub reads all that is on the disk, and the volumes of a node share its disks: so few run at once, and the others
//! wait for their turn.
//!
//! A guest may lie. One that says for ever that it scrubs holds its turn for [`LONGEST`] only, one that never says so is
//! passed over at once, and whoever was asked last comes last: no tenant keeps the others' volumes from being scrubbed.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use zpod_storage::catalog::Volume;
use zpod_volume::VolumeId;

use super::VolumeError;
use super::context::to_the_end;
use super::publish::NodeVolumes;
use super::published::Heard;
use crate::guest::{Health, Scrub, ScrubState, VolumeReport};

/// Scrubs at once on a node.
const AT_ONCE: usize = 1;
/// How often is looked whether one is due.
const LOOK: Duration = Duration::from_secs(5);
/// How long a scrub that was started counts as running while its guest has not said so: it repeats itself each 30 s.
const UNHEARD: Duration = Duration::from_secs(60);
/// How long a scrub that runs keeps the others waiting.
const LONGEST: Duration = Duration::from_secs(12 * 3600);
/// How long a guest that failed to start one is left alone.
const RETRY: Duration = Duration::from_secs(300);

/// What came of a scrub that was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ScrubStart {
    /// It was started.
    Started,
    /// One runs.
    Running,
    /// Another volume of the node is being scrubbed: it begins when that is done.
    Waiting,
}

/// What is known of the scrubs of a published volume.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Scrubs {
    every: Option<Duration>,
    /// When it was first looked at with its guest heard.
    seen: Option<Instant>,
    /// Since when its guest has said that one runs.
    running: Option<Instant>,
    /// Since when its guest has said that data is damaged.
    damaged: Option<Instant>,
    /// Somebody wants one, and waits for its turn.
    wanted: bool,
    asked: Option<Asked>,
}

/// When a guest was asked to start one.
#[derive(Debug, Clone, Copy)]
struct Asked {
    at: Instant,
    /// What it had said of scrubs by then.
    before: Option<Scrub>,
    failed: bool,
}

/// A moment, by both clocks.
#[derive(Debug, Clone, Copy)]
pub(super) struct Moment {
    at: Instant,
    clock: SystemTime,
}

impl Moment {
    fn now() -> Self {
        Self { at: Instant::now(), clock: SystemTime::now() }
    }
}

impl Scrubs {
    pub(super) fn of(volume: &Volume) -> Self {
        Self { every: volume.parameters.scrub_interval.map(|interval| interval.duration()), ..Self::default() }
    }

    /// Takes note of what its guest says now.
    fn look(&mut self, report: &VolumeReport, now: Moment) {
        self.seen.get_or_insert(now.at);
        match state(report) {
            Some(ScrubState::Running) => _ = self.running.get_or_insert(now.at),
            _ => self.running = None,
        }
        match report.data_errors {
            0 => self.damaged = None,
            _ => _ = self.damaged.get_or_insert(now.at),
        }
    }

    /// Whether it has the disks for itself.
    fn runs(&self, report: &VolumeReport, now: Moment) -> bool {
        let since = |at: Instant| now.at.duration_since(at);
        let unheard = |asked: Asked| !asked.failed && asked.before == report.scrub && since(asked.at) < UNHEARD;
        self.running.is_some_and(|at| since(at) < LONGEST) || self.asked.is_some_and(unheard)
    }

    /// Whether one is to be started.
    fn is_due(&self, report: &VolumeReport, now: Moment) -> bool {
        if !can_be_scrubbed(report.health) || self.running.is_some() || self.runs(report, now) {
            return false;
        }
        let since = |at: Instant| now.at.duration_since(at);
        if self.asked.is_some_and(|asked| asked.failed && since(asked.at) < RETRY) {
            return false;
        }
        let by_interval = |every: Duration| {
            let ended = report.scrub.and_then(|scrub| scrub.ended).map(|at| UNIX_EPOCH + Duration::from_secs(at));
            // In the future: the guest's clock is ahead. Its next one is due when the host's has caught up.
            let passed = match ended {
                Some(ended) => now.clock.duration_since(ended).is_ok_and(|passed| passed >= every),
                None => self.seen.is_some_and(|seen| since(seen) >= every),
            };
            let asked = self.asked.is_some_and(|asked| !asked.failed && since(asked.at) < every);
            passed && !asked
        };
        // Damage that a scrub has found already is there to stay.
        let news = report.scrub.is_none_or(|scrub| scrub.errors == 0);
        let by_damage = |damaged| news && self.asked.is_none_or(|asked| asked.failed || asked.at < damaged);
        let by_itself = self.every.is_some_and(by_interval) || self.damaged.is_some_and(by_damage);
        // A scrub that somebody paused is theirs to resume.
        self.wanted || by_itself && state(report) != Some(ScrubState::Paused)
    }

    fn ask(&mut self, report: &VolumeReport, now: Moment) {
        self.wanted = false;
        self.asked = Some(Asked { at: now.at, before: report.scrub, failed: false });
    }

    fn fail(&mut self) {
        self.asked = self.asked.map(|asked| Asked { failed: true, ..asked });
    }
}

fn state(report: &VolumeReport) -> Option<ScrubState> {
    report.scrub.map(|scrub| scrub.state)
}

fn can_be_scrubbed(health: Health) -> bool {
    matches!(health, Health::Online | Health::Degraded)
}

/// One of the volumes whose guests are heard.
pub(super) type Candidate<'a> = (VolumeId, &'a Heard, &'a mut Scrubs);

/// Takes the next turn, if there is one, for a volume that is due: those that somebody waits for first, and of each kind
/// the one that was asked longest ago.
fn next(all: &mut [Candidate<'_>], now: Moment) -> Option<(VolumeId, Heard)> {
    for (_, heard, scrubs) in &mut *all {
        scrubs.look(&heard.report, now);
    }
    let running = all.iter().filter(|(_, heard, scrubs)| scrubs.runs(&heard.report, now)).count();
    if running >= AT_ONCE {
        return None;
    }
    let due = all.iter_mut().filter(|(_, heard, scrubs)| scrubs.is_due(&heard.report, now));
    let (id, heard, scrubs) = due.min_by_key(|(_, _, scrubs)| (!scrubs.wanted, scrubs.asked.map(|asked| asked.at)))?;
    scrubs.ask(&heard.report, now);
    Some((*id, heard.clone()))
}

impl NodeVolumes {
    /// Starts scrubs when they are due, for ever.
    pub async fn keep_scrubbing(self) {
        loop {
            while let Some((id, heard)) = self.context.published.scrubs(|all| next(all, Moment::now())) {
                // Its failure is logged, and the next turn is another volume's.
                let _ = self.start_scrub(id, &heard).await;
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Scrubs a volume now, or when its turn comes. Repeated while one runs or waits it changes nothing.
    ///
    /// # Errors
    /// When it is not published, its guest is silent or refuses, or its pool is in no state to be scrubbed.
    pub async fn scrub(&self, id: VolumeId) -> Result<ScrubStart, VolumeError> {
        let node = self.clone();
        to_the_end(async move { node.scrub_now(id).await }).await
    }

    async fn scrub_now(&self, id: VolumeId) -> Result<ScrubStart, VolumeError> {
        if self.context.published.observed(id).is_none() {
            self.context.ready(id).await?;
            let (state, remedy) = ("not published to a pod", "a scrub runs in the guest of its pod: start one");
            return Err(VolumeError::NotReady { id, state, remedy });
        }
        let silent = || VolumeError::GuestSilent { id, node: self.context.node.clone() };
        let heard = self.context.published.heard(id).ok_or_else(silent)?;
        if !can_be_scrubbed(heard.report.health) {
            let state = heard.report.health.name();
            return Err(VolumeError::NotReady { id, state, remedy: "it can be scrubbed once its pool works again" });
        }
        let now = Moment::now();
        let turn = self.context.published.scrubs(|all| {
            let (_, heard, scrubs) = all.iter_mut().find(|(other, ..)| *other == id)?;
            scrubs.look(&heard.report, now);
            if scrubs.running.is_some() || scrubs.runs(&heard.report, now) {
                return Some(Err(ScrubStart::Running));
            }
            scrubs.wanted = true;
            // Somebody asks: a failure of a moment ago is no reason to wait.
            scrubs.asked = scrubs.asked.filter(|asked| !asked.failed);
            Some(next(all, now).ok_or(ScrubStart::Waiting))
        });
        match turn {
            None => Err(silent()),
            Some(Err(start)) => Ok(start),
            Some(Ok((next, heard))) => {
                let started = self.start_scrub(next, &heard).await;
                // Others may have waited longer.
                if next != id { Ok(ScrubStart::Waiting) } else { started.map(|()| ScrubStart::Started) }
            }
        }
    }

    async fn start_scrub(&self, id: VolumeId, heard: &Heard) -> Result<(), VolumeError> {
        match heard.guest.scrub(id).await {
            Ok(()) => {
                tracing::info!(volume = %id, sandbox = heard.guest.sandbox(), "scrub started");
                Ok(())
            }
            Err(source) => {
                tracing::warn!(volume = %id, "scrub not started: {source}");
                self.context.published.scrubs(|all| {
                    let failed = all.iter_mut().find(|(other, ..)| *other == id);
                    failed.into_iter().for_each(|(_, _, scrubs)| scrubs.fail());
                });
                Err(VolumeError::Guest { id, source })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::GuestClient;
    use zpod_volume::Bytes;

    const DAY: Duration = Duration::from_secs(86400);

    struct Known {
        id: VolumeId,
        heard: Heard,
        scrubs: Scrubs,
    }

    fn known(name: &str, every: Option<Duration>, ended: Option<u64>) -> Known {
        let id = VolumeId::from_name(name);
        let report = VolumeReport { scrub: ended.map(finished), ..VolumeReport::online(id) };
        let heard = Heard { guest: GuestClient::unconnected("sandbox"), report };
        Known { id, heard, scrubs: Scrubs { every, ..Scrubs::default() } }
    }

    fn finished(ended: u64) -> Scrub {
        Scrub { state: ScrubState::Finished, ended: Some(ended), errors: 0, bytes: Bytes(1) }
    }

    fn running() -> Option<Scrub> {
        Some(Scrub { state: ScrubState::Running, ended: None, ..finished(0) })
    }

    /// A thousand days after 1970, and so long after that.
    fn moment(passed: Duration) -> Moment {
        static BEGIN: std::sync::OnceLock<Instant> = std::sync::OnceLock::new();
        Moment { at: *BEGIN.get_or_init(Instant::now) + passed, clock: UNIX_EPOCH + 1000 * DAY + passed }
    }

    fn turn(all: &mut [Known], passed: Duration) -> Option<VolumeId> {
        let mut candidates: Vec<_> = all.iter_mut().map(|known| (known.id, &known.heard, &mut known.scrubs)).collect();
        next(&mut candidates, moment(passed)).map(|(id, _)| id)
    }

    const BEFORE: u64 = 999 * 86400;

    #[tokio::test]
    async fn a_scrub_is_due_when_the_interval_has_passed_since_the_last_ones_end() {
        let mut all = [known("a", Some(2 * DAY), Some(BEFORE)), known("never", None, Some(1))];
        assert_eq!(turn(&mut all, DAY - LOOK), None);
        assert_eq!(turn(&mut all, DAY), Some(all[0].id));
        all[0].heard.report.scrub = running();
        assert_eq!(turn(&mut all, DAY + LOOK), None);
        all[0].heard.report.scrub = Some(finished(1001 * 86400 + 60));
        assert_eq!(turn(&mut all, 2 * DAY), None);
        assert_eq!(turn(&mut all, 3 * DAY + Duration::from_secs(60)), Some(all[0].id));
    }

    #[tokio::test]
    async fn a_volume_that_was_never_scrubbed_is_due_an_interval_after_it_was_heard() {
        let mut all = [known("a", Some(DAY), None)];
        assert_eq!(turn(&mut all, DAY), None);
        assert_eq!(turn(&mut all, 2 * DAY - LOOK), None);
        assert_eq!(turn(&mut all, 2 * DAY), Some(all[0].id));
    }

    #[tokio::test]
    async fn one_is_scrubbed_at_a_time_and_the_one_asked_last_comes_last() {
        let mut all = ["a", "b", "c"].map(|name| known(name, Some(DAY), Some(1)));
        let mut order = Vec::new();
        for step in 0..3 {
            let now = step * UNHEARD;
            let id = turn(&mut all, now).unwrap();
            assert_eq!(turn(&mut all, now + LOOK), None, "one was asked and has not answered yet");
            all.iter_mut().find(|known| known.id == id).unwrap().heard.report.scrub = running();
            assert_eq!(turn(&mut all, now + 2 * LOOK), None, "one runs");
            // A small one: done, and known to be before its time is up.
            all.iter_mut().find(|known| known.id == id).unwrap().heard.report.scrub = Some(finished(1000 * 86400));
            order.push(id);
        }
        order.dedup();
        assert_eq!(order.len(), 3);
        assert_eq!(turn(&mut all, DAY - LOOK), None);
        assert!(turn(&mut all, DAY + UNHEARD).is_some());
    }

    #[tokio::test]
    async fn a_guest_that_lies_does_not_keep_others_from_being_scrubbed() {
        // One scrubs for ever, one never says that it did.
        let mut all =
            [known("for ever", None, None), known("deaf", Some(DAY), Some(1)), known("c", Some(DAY), Some(1))];
        all[0].heard.report.scrub = running();
        all[1].scrubs.asked = None;
        all[2].scrubs.asked = Some(Asked { at: moment(Duration::ZERO).at, before: None, failed: true });
        assert_eq!(turn(&mut all, Duration::ZERO), None);
        assert_eq!(turn(&mut all, LONGEST), Some(all[1].id));
        assert_eq!(turn(&mut all, LONGEST + UNHEARD), Some(all[2].id), "asked before, but the other was asked later");
        assert_eq!(turn(&mut all, LONGEST + 2 * UNHEARD), None, "nobody is asked more often than the interval says");
    }

    #[tokio::test]
    async fn a_pool_that_does_not_work_is_not_scrubbed_and_a_paused_scrub_is_left_alone() {
        let mut all = [known("a", Some(DAY), Some(1))];
        for health in [Health::Suspended, Health::Faulted, Health::Unavailable, Health::Unknown] {
            all[0].heard.report.health = health;
            all[0].scrubs.wanted = true;
            assert_eq!(turn(&mut all, DAY), None, "{health:?}");
        }
        all[0].scrubs.wanted = false;
        all[0].heard.report.health = Health::Degraded;
        all[0].heard.report.scrub = Some(Scrub { state: ScrubState::Paused, ended: None, ..finished(0) });
        assert_eq!(turn(&mut all, 3 * DAY), None);
        all[0].scrubs.wanted = true;
        assert_eq!(turn(&mut all, 3 * DAY), Some(all[0].id));
    }

    #[tokio::test]
    async fn damage_that_no_scrub_has_found_yet_is_looked_at_once_without_an_interval_too() {
        let mut all = [known("a", None, Some(BEFORE))];
        assert_eq!(turn(&mut all, DAY), None);
        all[0].heard.report.data_errors = 13;
        assert_eq!(turn(&mut all, 2 * DAY), Some(all[0].id));
        // It was none: what failed has been written since.
        (all[0].heard.report.data_errors, all[0].heard.report.scrub) = (0, Some(finished(1002 * 86400)));
        assert_eq!(turn(&mut all, 3 * DAY), None);
        all[0].heard.report.data_errors = 1;
        assert_eq!(turn(&mut all, 4 * DAY), Some(all[0].id));
        all[0].heard.report.scrub = Some(Scrub { errors: 1, ..finished(1004 * 86400) });
        assert_eq!(turn(&mut all, 9 * DAY), None);
        // To a zpod that has just begun it is no news either.
        all[0].scrubs = Scrubs::default();
        assert_eq!(turn(&mut all, 10 * DAY), None);
    }

    #[tokio::test]
    async fn what_somebody_wants_comes_first_and_a_guest_that_failed_is_left_alone_for_a_while() {
        let mut all = [known("a", Some(DAY), Some(1)), known("b", None, None)];
        all[1].scrubs.wanted = true;
        assert_eq!(turn(&mut all, DAY), Some(all[1].id));
        all[1].scrubs.fail();
        assert_eq!(turn(&mut all, DAY), Some(all[0].id), "a failure keeps nobody waiting");
        all[0].scrubs.fail();
        assert_eq!(turn(&mut all, DAY + LOOK), None);
        assert_eq!(turn(&mut all, DAY + RETRY), Some(all[0].id));
    }
}
