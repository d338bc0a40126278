use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// One thing that was looked at on a node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Check {
    /// What was looked at: words with hyphens, always the same.
    pub name: String,
    /// How it is.
    pub level: Level,
    /// What was found.
    pub message: String,
    /// What to do; empty where nothing is to be done.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub remedy: String,
}

/// How something is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// As it should be.
    Ok,
    /// It works, and could be better.
    Warn,
    /// It does not work.
    Fail,
}

impl Check {
    /// All is well.
    pub fn ok(name: &str, message: impl Into<String>) -> Self {
        Self { name: name.into(), level: Level::Ok, message: message.into(), remedy: String::new() }
    }

    /// It could be better.
    pub fn warn(name: &str, message: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { name: name.into(), level: Level::Warn, message: message.into(), remedy: remedy.into() }
    }

    /// It does not work.
    pub fn fail(name: &str, message: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { name: name.into(), level: Level::Fail, message: message.into(), remedy: remedy.into() }
    }
}

/// Properties of a running volume, as its guest says.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Properties {
    /// Of the dataset.
    pub dataset: BTreeMap<String, String>,
    /// Of the pool.
    pub pool: BTreeMap<String, String>,
}

/// What sends and receives left in a volume.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SendPoints {
    /// The snapshots, oldest first.
    pub points: Vec<SendPoint>,
    /// Where a receive broke off.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resume_token: Option<String>,
}

/// A snapshot that was sent or received.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct SendPoint {
    /// Its name.
    pub name: String,
    /// ZFS's id of it, the same wherever it is received; decimal. A string, for it has 64 bits.
    pub guid: String,
    /// When it was taken, in seconds since 1970 by the guest's clock.
    pub created: u64,
    /// Bytes it refers to.
    pub referenced_bytes: u64,
    /// Bytes it alone holds.
    pub used_bytes: u64,
}

/// The snapshots in a volume's pool.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PoolSnapshots {
    /// The latest, oldest first.
    pub snapshots: Vec<SendPoint>,
    /// How many earlier ones there are.
    pub left_out: u64,
}

/// A snapshot that was taken.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Taken {
    /// Its name.
    pub snapshot: String,
}

/// What was removed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Removed {
    /// The snapshot that is no more.
    pub snapshot: String,
}

/// What going back to a snapshot would take.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RollbackPlan {
    /// The snapshot.
    pub snapshot: String,
    /// Snapshots that are newer and would be destroyed, oldest first; bookmarks have their `#` in front.
    pub newer: Vec<String>,
    /// How many more there are.
    pub left_out: u64,
    /// What was written since, in bytes.
    pub written_bytes: u64,
}

/// A rollback that was asked for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct RollbackRequested {
    /// Its id.
    pub id: String,
    /// The snapshot.
    pub snapshot: String,
    /// Newer snapshots may be destroyed for it.
    pub destroy_newer: bool,
    /// A pod was started with it: one that has ended unheard may have gone back.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub given: bool,
}

/// What was received.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Received {
    /// The snapshot that is there now.
    pub snapshot: String,
    /// Bytes that were read.
    pub bytes: u64,
}

/// Why something was not done: the body of every answer that is not 200.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Failed {
    /// For a person: what, why, and what to do.
    pub error: String,
}
