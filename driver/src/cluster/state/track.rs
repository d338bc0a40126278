use std::time::Duration;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use tokio::time::Instant;
use zpod_kubernetes::crd::LastSnapshot;
use zpod_volume::Bytes;

use super::said::Said;
use crate::bucket::Bucket;

/// No volume is written more often than this.
const PACE: Duration = Duration::from_secs(1);
/// News of one volume: this many at once, then one each [`NEWS_EVERY`]. A pool that fails has a few to tell, a guest
/// that flaps to no end.
const NEWS_BURST: u32 = 10;
const NEWS_EVERY: Duration = Duration::from_secs(10);
/// Usage of one volume is written no more often than this.
const USAGE_EVERY: Duration = Duration::from_secs(30);
/// An object that can't be written, or is not there, is left alone for this long.
const REST: Duration = Duration::from_secs(60);

/// A volume: what is to be said of its pool, and what was.
#[derive(Debug)]
pub(super) struct Track {
    wanted: Wanted,
    /// Told by this process. What an earlier one has told stands in the object.
    snapshot: Option<LastSnapshot>,
    capacity: Bytes,
    base: Base,
    news: Bucket,
    rests: Option<Instant>,
    gone: bool,
}

/// What is to be said.
#[derive(Debug)]
enum Wanted {
    /// What the guest said last.
    Said(Said),
    /// That a container runs without it. What was known of its pool before is kept.
    Unheard(Said),
    /// That no pod uses the volume any more; with what the guest said before that.
    Withdrawn(Option<Said>),
}

/// What is said already.
#[derive(Debug)]
pub(super) enum Base {
    /// Not known: the object has to be read first.
    Unknown,
    /// This, or nothing.
    Known(Option<Box<Written>>),
}

/// What stands in an object.
#[derive(Debug, Clone)]
pub(super) struct Written {
    pub(super) said: Said,
    /// Since when the condition is what it is.
    pub(super) since: Time,
    /// When it was written, where this process has done so.
    pub(super) at: Option<Instant>,
}

/// What is to be done for a volume.
#[derive(Debug, PartialEq)]
pub(super) enum Next {
    /// Read its object.
    Look,
    /// Say this in it; the condition is so since then, or since now.
    Write(Box<Said>, Option<Time>),
}

impl Default for Track {
    fn default() -> Self {
        Self {
            wanted: Wanted::Withdrawn(None),
            snapshot: None,
            capacity: Bytes(0),
            base: Base::Unknown,
            news: Bucket::new(NEWS_BURST, NEWS_EVERY),
            rests: None,
            gone: false,
        }
    }
}

impl Track {
    /// A volume that is not in use, whose object says otherwise.
    pub(super) fn left_over(written: Written) -> Self {
        Self { base: Base::Known(Some(Box::new(written))), ..Self::default() }
    }

    /// Notes a report. Whether it says anything else than the one before.
    pub(super) fn report(&mut self, said: Said, capacity: Bytes) -> bool {
        let changed = self.capacity != capacity || !matches!(&self.wanted, Wanted::Said(before) if *before == said);
        (self.wanted, self.capacity) = (Wanted::Said(said), capacity);
        changed
    }

    /// Notes that a container runs without it, until a guest reports or it is withdrawn.
    pub(super) fn unheard(&mut self, said: Said) {
        self.wanted = Wanted::Unheard(said);
    }

    /// Notes that a snapshot was taken or destroyed.
    pub(super) fn snapshot(&mut self, last: LastSnapshot) {
        self.snapshot = Some(last);
    }

    /// Notes that no pod uses it any more.
    pub(super) fn withdraw(&mut self) {
        let wanted = std::mem::replace(&mut self.wanted, Wanted::Withdrawn(None));
        self.wanted = Wanted::Withdrawn(match wanted {
            Wanted::Said(said) => Some(said),
            Wanted::Unheard(_) => None,
            Wanted::Withdrawn(before) => before,
        });
    }

    /// Notes what the object says now; `write` where that was just written.
    pub(super) fn based(&mut self, base: Base, write: bool, now: Instant) {
        let written = |base: &Base| matches!(base, Base::Known(Some(_)));
        if write {
            let news = match (&self.base, &base) {
                (Base::Known(Some(before)), Base::Known(Some(after))) => after.said.is_news(&before.said),
                (_, after) => written(after),
            };
            if news {
                self.news.take(now);
            }
        }
        (self.base, self.gone) = (base, false);
    }

    /// Notes that it could not be written.
    pub(super) fn rest(&mut self, now: Instant) {
        self.rests = Some(now + REST);
    }

    /// Notes that there is no object.
    pub(super) fn gone(&mut self, now: Instant) {
        (self.gone, self.base) = (true, Base::Unknown);
        self.rest(now);
    }

    /// Notes that there is another object, which says nothing yet.
    pub(super) fn made_anew(&mut self) {
        (self.base, self.gone, self.rests) = (Base::Unknown, false, None);
    }

    /// Whether there is nothing left to say, now and later.
    pub(super) fn is_over(&self) -> bool {
        match (&self.wanted, &self.base) {
            (Wanted::Said(_) | Wanted::Unheard(_), _) => false,
            (Wanted::Withdrawn(_), _) if self.gone => true,
            (Wanted::Withdrawn(_), Base::Unknown) => false,
            (Wanted::Withdrawn(_), Base::Known(written)) => {
                self.said().is_none_or(|said| written.as_ref().is_some_and(|written| !said.is_news(&written.said)))
            }
        }
    }

    /// What is to be said.
    fn said(&self) -> Option<Said> {
        let written = match &self.base {
            Base::Known(Some(written)) => Some(&written.said),
            Base::Known(None) | Base::Unknown => None,
        };
        let said = match &self.wanted {
            Wanted::Said(said) => said.clone(),
            Wanted::Unheard(said) => said.clone().or_pool_of(written),
            Wanted::Withdrawn(Some(said)) => said.clone().exported(),
            // Of one that was never heard of there is nothing to say.
            Wanted::Withdrawn(None) => written?.clone().exported(),
        };
        Some(said.or_usage_of(written).with_snapshot(self.snapshot.as_ref(), written))
    }

    /// What is to be done, and when; `None` while there is nothing.
    pub(super) fn next(&self, now: Instant) -> Option<(Instant, Next)> {
        let (at, next) = self.due(now)?;
        Some((self.rests.map_or(at, |rests| at.max(rests)), next))
    }

    fn due(&self, now: Instant) -> Option<(Instant, Next)> {
        let written = match &self.base {
            Base::Unknown => return Some((now, Next::Look)),
            Base::Known(written) => written.as_deref(),
        };
        let said = self.said()?;
        let Some(written) = written else { return Some((now, Next::Write(Box::new(said), None))) };
        let after = |wait: Duration| written.at.map_or(now, |at| at + wait);
        let at = if said.is_news(&written.said) {
            after(PACE).max(self.news.ready(now).unwrap_or(now))
        } else if said.has_moved(&written.said, self.capacity) {
            after(USAGE_EVERY)
        } else {
            return None;
        };
        let since = (said.healthy.status == written.said.healthy.status).then(|| written.since.clone());
        Some((at, Next::Write(Box::new(said), since)))
    }
}
