use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// How often automatic snapshots of one kind are taken: once in each hour, day, week or month of the calendar, in UTC.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum SnapshotKind {
    /// In each hour.
    Hourly,
    /// In each day.
    Daily,
    /// In each week; one begins on Monday.
    Weekly,
    /// In each month.
    Monthly,
}

impl SnapshotKind {
    /// Every kind, from the shortest period to the longest.
    pub const ALL: [Self; 4] = [Self::Hourly, Self::Daily, Self::Weekly, Self::Monthly];

    /// Its word, in a schedule and in the names of its snapshots.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Hourly => "hourly",
            Self::Daily => "daily",
            Self::Weekly => "weekly",
            Self::Monthly => "monthly",
        }
    }

    /// The kind of that word.
    pub fn named(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.as_str() == word)
    }
}

/// Which automatic snapshots of a volume its guest takes, and how many of each kind it keeps. At least one kind: a volume
/// without a schedule has none of these.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SnapshotSchedule(BTreeMap<SnapshotKind, u32>);

/// A schedule that does not parse.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "none, or each of hourly, daily, weekly, monthly at most once, with = and how many are kept (from 1, all together at \
     most {}), and a space between them, such as \"hourly=24 daily=7\"",
    SnapshotSchedule::MOST
)]
pub struct ParseScheduleError;

impl SnapshotSchedule {
    /// How many snapshots a schedule keeps at most, of all kinds together. ZFS itself bounds them by room only, but each
    /// costs memory and time where they are listed.
    pub const MOST: u32 = 1000;

    /// The value for no schedule. So is an empty one.
    pub const NONE: &str = "none";

    /// Reads a parameter's value.
    ///
    /// # Errors
    /// When it is neither a schedule nor what stands for none.
    pub fn parse(value: &str) -> Result<Option<Self>, ParseScheduleError> {
        match value.trim() {
            "" | Self::NONE => Ok(None),
            schedule => schedule.parse().map(Some),
        }
    }

    /// What is kept, by kind, from the shortest period to the longest.
    pub fn iter(&self) -> impl Iterator<Item = (SnapshotKind, u32)> {
        self.0.iter().map(|(kind, count)| (*kind, *count))
    }

    /// How many of a kind are kept; `None` of one that it does not name.
    pub fn keeps(&self, kind: SnapshotKind) -> Option<u32> {
        self.0.get(&kind).copied()
    }
}

impl FromStr for SnapshotSchedule {
    type Err = ParseScheduleError;

    fn from_str(text: &str) -> Result<Self, ParseScheduleError> {
        let mut kinds = BTreeMap::new();
        for word in text.split_ascii_whitespace() {
            let (kind, count) = word.split_once('=').ok_or(ParseScheduleError)?;
            let kind = SnapshotKind::named(kind).ok_or(ParseScheduleError)?;
            // No sign and no leading zero: what is shown is what was written.
            let plain = count.bytes().all(|b| b.is_ascii_digit()) && !count.starts_with('0');
            let count = count.parse().ok().filter(|count| plain && (1..=Self::MOST).contains(count));
            if kinds.insert(kind, count.ok_or(ParseScheduleError)?).is_some() {
                return Err(ParseScheduleError);
            }
        }
        // No more than four numbers, each bounded.
        let sum: u32 = kinds.values().sum();
        if (1..=Self::MOST).contains(&sum) { Ok(Self(kinds)) } else { Err(ParseScheduleError) }
    }
}

impl fmt::Display for SnapshotSchedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (place, (kind, count)) in self.iter().enumerate() {
            let space = if place == 0 { "" } else { " " };
            write!(f, "{space}{}={count}", kind.as_str())?;
        }
        Ok(())
    }
}

impl TryFrom<String> for SnapshotSchedule {
    type Error = ParseScheduleError;

    fn try_from(text: String) -> Result<Self, ParseScheduleError> {
        text.parse()
    }
}

impl From<SnapshotSchedule> for String {
    fn from(schedule: SnapshotSchedule) -> Self {
        schedule.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_schedule_is_words_in_any_order_and_shown_from_the_shortest_period_to_the_longest() {
        let schedule = SnapshotSchedule::parse(" monthly=6  hourly=24 weekly=4 daily=7 ").unwrap().unwrap();
        assert_eq!(schedule.to_string(), "hourly=24 daily=7 weekly=4 monthly=6");
        assert_eq!(schedule.keeps(SnapshotKind::Weekly), Some(4));
        let one: SnapshotSchedule = "daily=1000".parse().unwrap();
        assert_eq!((one.keeps(SnapshotKind::Daily), one.keeps(SnapshotKind::Hourly)), (Some(1000), None));
        let json = serde_json::to_string(&schedule).unwrap();
        assert_eq!(json, "\"hourly=24 daily=7 weekly=4 monthly=6\"");
        assert_eq!(serde_json::from_str::<SnapshotSchedule>(&json).unwrap(), schedule);
        assert!(serde_json::from_str::<SnapshotSchedule>("\"none\"").is_err(), "a schedule is never none");
    }

    #[test]
    fn nothing_and_none_are_no_schedule() {
        for value in ["", "  ", "none", " none "] {
            assert_eq!(SnapshotSchedule::parse(value), Ok(None), "{value:?}");
        }
    }

    #[test]
    fn unknown_words_repeated_ones_and_counts_of_zero_or_too_many_are_refused() {
        for value in [
            "hourly",
            "hourly=",
            "hourly=0",
            "hourly=-1",
            "hourly=+1",
            "hourly=01",
            "hourly=1.5",
            "hourly=1001",
            "hourly=99999999999999999999",
            "hourly=600 daily=401",
            "hourly=1 hourly=1",
            "hourly = 24",
            "hourly=24,daily=7",
            "Hourly=24",
            "yearly=1",
            "none hourly=24",
            "hourly=24 none",
            "24",
            "=",
        ] {
            assert_eq!(SnapshotSchedule::parse(value), Err(ParseScheduleError), "{value:?}");
        }
        assert!(ParseScheduleError.to_string().contains("all together at most 1000"));
    }

    proptest! {
        #[test]
        fn any_text_is_refused_or_means_what_it_is_shown_as(text in "[a-z0-9= ]{0,40}|(hourly|daily|weekly|monthly)=[0-9]{1,4}") {
            if let Ok(Some(schedule)) = SnapshotSchedule::parse(&text) {
                prop_assert_eq!(schedule.to_string().parse::<SnapshotSchedule>(), Ok(schedule.clone()));
                prop_assert!(schedule.iter().map(|(_, count)| count).sum::<u32>() <= SnapshotSchedule::MOST);
            }
        }
    }
}
