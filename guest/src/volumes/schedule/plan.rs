//! Which automatic snapshots to take and which to destroy. Pure.
//!
//! # Design
//! A kind is due when the period of its that the clock is in (an hour, a day, a week, a month of UTC) has none yet, by
//! the names of those there are. So what was missed is not made up for, a pod that starts again within the period takes no
//! second one, and a clock that was wrong for a while, ahead or behind, holds up nothing once it is right again.
//!
//! Which is the newest and which the oldest is ZFS's word (`createtxg`), not that of the names.

use jiff::Timestamp;
use jiff::civil::{DateTime, ISOWeekDate};
use jiff::tz::Offset;
use zpod_volume::{SnapshotKind, SnapshotSchedule};

/// What the name of each begins with. Marks are `zpod-mark-...`, send points `zpod-send-...`.
const PREFIX: &str = "zpod-auto-";
/// How the time stands in it, always UTC.
const TIME: &str = "%Y%m%dT%H%M%SZ";

/// An automatic snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::volumes) struct Automatic {
    pub(super) name: String,
    pub(super) kind: SnapshotKind,
    period: Period,
    /// It has a hold or a clone, and can't be destroyed.
    pub(super) pinned: bool,
}

/// An hour, a day, a week or a month of the calendar.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Period {
    year: i16,
    /// The day of the year, the week or the month.
    part: i16,
    hour: i8,
}

impl Period {
    /// That which a time is in.
    pub(super) fn of(kind: SnapshotKind, time: Timestamp) -> Self {
        Self::at(kind, utc(time))
    }

    fn at(kind: SnapshotKind, time: DateTime) -> Self {
        let (year, week): (i16, ISOWeekDate) = (time.year(), time.date().iso_week_date());
        match kind {
            SnapshotKind::Hourly => Self { year, part: time.date().day_of_year(), hour: time.hour() },
            SnapshotKind::Daily => Self { year, part: time.date().day_of_year(), hour: 0 },
            SnapshotKind::Weekly => Self { year: week.year(), part: week.week().into(), hour: 0 },
            SnapshotKind::Monthly => Self { year, part: time.month().into(), hour: 0 },
        }
    }
}

fn utc(time: Timestamp) -> DateTime {
    Offset::UTC.to_datetime(time)
}

/// The name of one that is taken now.
pub(super) fn name(kind: SnapshotKind, now: Timestamp) -> String {
    format!("{PREFIX}{}-{}", kind.as_str(), utc(now).strftime(TIME))
}

impl Automatic {
    /// Reads the name of a snapshot; `None` of one that is none of these.
    pub(super) fn named(name: &str, pinned: bool) -> Option<Self> {
        let (kind, text) = name.strip_prefix(PREFIX)?.split_once('-')?;
        let (kind, time) = (SnapshotKind::named(kind)?, DateTime::strptime(TIME, text).ok()?);
        // Only as it is written here.
        let exact = time.strftime(TIME).to_string() == text;
        exact.then(|| Self { name: name.to_owned(), kind, period: Period::at(kind, time), pinned })
    }
}

/// The kinds that are due, by the automatic snapshots there are.
pub(super) fn due(found: &[Automatic], schedule: &SnapshotSchedule, now: Timestamp) -> Vec<SnapshotKind> {
    let missing = |kind: &SnapshotKind| {
        let period = Period::of(*kind, now);
        !found.iter().any(|there| there.kind == *kind && there.period == period)
    };
    schedule.iter().map(|(kind, _)| kind).filter(missing).collect()
}

/// Those that are beyond the schedule's numbers, by the automatic snapshots there are, oldest first. What is pinned neither
/// goes nor counts. What the schedule does not name stays.
pub(super) fn surplus(found: &[Automatic], schedule: &SnapshotSchedule) -> Vec<String> {
    let of_kind = |(kind, keeps): (SnapshotKind, u32)| {
        let free: Vec<_> = found.iter().filter(|there| there.kind == kind && !there.pinned).collect();
        let beyond = free.len().saturating_sub(keeps as usize);
        free.into_iter().take(beyond).map(|there| there.name.clone()).collect::<Vec<_>>()
    };
    schedule.iter().flat_map(of_kind).collect()
}

/// Those that can go where there is too little room, in the order in which they do: the oldest first, of whatever kind, but
/// none that is pinned or the newest of its kind.
pub(super) fn dispensable(found: &[Automatic]) -> impl Iterator<Item = &str> {
    let newest = |place: usize| !found[place + 1..].iter().any(|later| later.kind == found[place].kind);
    let goes = found.iter().enumerate().filter(move |(place, there)| !there.pinned && !newest(*place));
    goes.map(|(_, there)| there.name.as_str())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn at(text: &str) -> Timestamp {
        text.parse().unwrap()
    }

    fn all(names: &[&str]) -> Vec<Automatic> {
        names.iter().map(|name| Automatic::named(name, false).unwrap()).collect()
    }

    fn schedule(text: &str) -> SnapshotSchedule {
        text.parse().unwrap()
    }

    #[test]
    fn a_name_has_kind_and_time_and_any_other_is_none_of_these() {
        let made = name(SnapshotKind::Hourly, at("2026-11-30T12:00:03Z"));
        assert_eq!(made, "zpod-auto-hourly-20261130T120003Z");
        let read = Automatic::named(&made, true).unwrap();
        assert_eq!((read.kind, read.pinned), (SnapshotKind::Hourly, true));
        for other in [
            "zpod-mark-0123456789abcdef0123456789abcdef",
            "zpod-send-a",
            "zpod-auto-hourly",
            "zpod-auto-hourly-",
            "zpod-auto-yearly-20261130T120003Z",
            "zpod-auto-hourly-20261130T120003",
            "zpod-auto-hourly-20261130T120003Z ",
            "zpod-auto-hourly-2026113T120003Z",
            "zpod-auto-hourly-20261330T120003Z",
            "zpod-auto-hourly-20261130T250003Z",
            "auto-hourly-20261130T120003Z",
        ] {
            assert_eq!(Automatic::named(other, false), None, "{other:?}");
        }
    }

    #[test]
    fn a_kind_is_due_once_in_each_period_of_the_calendar() {
        let every = schedule("hourly=1 daily=1 weekly=1 monthly=1");
        // Of a Monday, and in the last hour of one.
        let names = ["hourly", "daily", "weekly", "monthly"].map(|kind| format!("zpod-auto-{kind}-20261130T120003Z"));
        let found = all(&names.each_ref().map(String::as_str));
        for (now, want) in [
            ("2026-11-30T12:00:03Z", vec![]),
            ("2026-11-30T12:59:59Z", vec![]),
            ("2026-11-30T13:00:00Z", vec![SnapshotKind::Hourly]),
            ("2026-12-01T00:00:00Z", vec![SnapshotKind::Hourly, SnapshotKind::Daily, SnapshotKind::Monthly]),
            ("2026-12-06T23:59:59Z", vec![SnapshotKind::Hourly, SnapshotKind::Daily, SnapshotKind::Monthly]),
            ("2026-12-07T00:00:00Z", SnapshotKind::ALL.to_vec()),
            // The clock was ahead, and is set right.
            ("2026-11-30T11:59:59Z", vec![SnapshotKind::Hourly]),
            ("2026-10-01T00:00:00Z", SnapshotKind::ALL.to_vec()),
        ] {
            assert_eq!(due(&found, &every, at(now)), want, "{now}");
        }
        assert_eq!(due(&[], &every, at("2026-11-30T12:00:00Z")), SnapshotKind::ALL);
        assert_eq!(due(&[], &schedule("weekly=2"), at("2026-11-30T12:00:00Z")), [SnapshotKind::Weekly]);
        // A week of two years is one.
        let new_year = all(&["zpod-auto-weekly-20261231T235959Z"]);
        assert_eq!(due(&new_year, &schedule("weekly=2"), at("2027-01-03T10:00:00Z")), []);
    }

    #[test]
    fn the_oldest_beyond_the_number_go_and_what_is_pinned_neither_goes_nor_counts() {
        let mut found = all(&[
            "zpod-auto-daily-20261101T000000Z",
            "zpod-auto-hourly-20261130T100000Z",
            "zpod-auto-hourly-20261130T110000Z",
            "zpod-auto-hourly-20261130T120000Z",
            "zpod-auto-hourly-20261130T130000Z",
        ]);
        found[2].pinned = true;
        let of = |text: &str| surplus(&found, &schedule(text));
        assert_eq!(of("hourly=2"), ["zpod-auto-hourly-20261130T100000Z"]);
        assert_eq!(of("hourly=1"), ["zpod-auto-hourly-20261130T100000Z", "zpod-auto-hourly-20261130T120000Z"]);
        assert!(of("hourly=3 daily=1").is_empty());
        assert!(of("weekly=1").is_empty(), "what the schedule does not name stays");
    }

    #[test]
    fn where_there_is_no_room_the_oldest_goes_that_is_not_the_newest_of_its_kind() {
        let mut found = all(&[
            "zpod-auto-monthly-20261101T000000Z",
            "zpod-auto-hourly-20261130T100000Z",
            "zpod-auto-daily-20261130T100000Z",
            "zpod-auto-hourly-20261130T110000Z",
            "zpod-auto-hourly-20261130T120000Z",
        ]);
        let (ten, eleven) = ("zpod-auto-hourly-20261130T100000Z", "zpod-auto-hourly-20261130T110000Z");
        let of = |found: &[Automatic]| dispensable(found).map(str::to_owned).collect::<Vec<_>>();
        assert_eq!(of(&found), [ten, eleven]);
        found[1].pinned = true;
        assert_eq!(of(&found), [eleven]);
        found[3].pinned = true;
        assert!(of(&found).is_empty());
    }

    fn kinds() -> impl Strategy<Value = SnapshotKind> {
        prop::sample::select(SnapshotKind::ALL.to_vec())
    }

    fn schedules() -> impl Strategy<Value = SnapshotSchedule> {
        prop::collection::btree_map(kinds(), 1u32..8, 1..=4).prop_map(|kinds| {
            let words: Vec<_> = kinds.iter().map(|(kind, count)| format!("{}={count}", kind.as_str())).collect();
            schedule(&words.join(" "))
        })
    }

    fn times() -> impl Strategy<Value = Timestamp> {
        (0i64..4_000_000_000).prop_map(|seconds| Timestamp::from_second(seconds).unwrap())
    }

    proptest! {
        #[test]
        fn a_name_says_what_it_was_made_of(kind in kinds(), now in times()) {
            let read = Automatic::named(&name(kind, now), false).unwrap();
            prop_assert_eq!((read.kind, read.period), (kind, Period::of(kind, now)));
        }

        #[test]
        fn whatever_is_there_the_newest_of_each_kind_and_what_is_pinned_stay(
            taken in prop::collection::vec((kinds(), times(), any::<bool>()), 0..40),
            schedule in schedules(),
        ) {
            let found: Vec<_> =
                taken.iter().map(|(kind, time, pinned)| Automatic::named(&name(*kind, *time), *pinned).unwrap()).collect();
            let goes: BTreeSet<_> = surplus(&found, &schedule).into_iter().collect();
            let mut goes_too: BTreeSet<_> = dispensable(&found).map(str::to_owned).collect();
            goes_too.extend(goes.clone());
            for kind in SnapshotKind::ALL {
                let of_kind: Vec<_> = found.iter().enumerate().filter(|(_, there)| there.kind == kind).collect();
                let free = of_kind.iter().filter(|(_, there)| !there.pinned);
                let left = free.clone().filter(|(_, there)| !goes.contains(&there.name)).count();
                match schedule.keeps(kind) {
                    Some(keeps) => prop_assert_eq!(left, free.count().min(keeps as usize)),
                    None => prop_assert_eq!(left, free.count()),
                }
                let Some((_, newest)) = of_kind.last() else { continue };
                let alone = of_kind.iter().filter(|(_, there)| there.name == newest.name).count() == 1;
                prop_assert!(!alone || !goes_too.contains(&newest.name));
            }
            for there in found.iter().filter(|there| there.pinned) {
                let alone = found.iter().filter(|other| other.name == there.name).count() == 1;
                prop_assert!(!alone || !goes_too.contains(&there.name));
            }
        }

        #[test]
        fn over_any_time_with_any_pauses_each_period_gets_one_and_no_more_are_kept_than_are_to_be(
            start in times(),
            steps in prop::collection::vec(1i64..100_000, 1..120),
            schedule in schedules(),
        ) {
            let (mut now, mut found) = (start, Vec::<Automatic>::new());
            for step in steps {
                now = Timestamp::from_second(now.as_second() + step).unwrap();
                for kind in due(&found, &schedule, now) {
                    let taken = Automatic::named(&name(kind, now), false).unwrap();
                    prop_assert!(!found.contains(&taken));
                    found.push(taken);
                }
                prop_assert!(due(&found, &schedule, now).is_empty(), "taken is taken");
                let goes = surplus(&found, &schedule);
                found.retain(|there| !goes.contains(&there.name));
                for (kind, keeps) in schedule.iter() {
                    let of_kind: Vec<_> = found.iter().filter(|there| there.kind == kind).collect();
                    prop_assert!(!of_kind.is_empty() && of_kind.len() <= keeps as usize);
                    prop_assert_eq!(of_kind.last().unwrap().period, Period::of(kind, now));
                    prop_assert!(of_kind.windows(2).all(|two| two[0].period != two[1].period));
                }
            }
        }
    }
}
