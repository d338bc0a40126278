use std::fmt;

use serde::{Deserialize, Serialize};

/// One of the two halves of a mirrored volume's disk. Each is laid out as a disk of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Half {
    /// The one at the beginning.
    First,
    /// The one behind it.
    Second,
}

impl Half {
    /// Both, in their order.
    pub const BOTH: [Self; 2] = [Self::First, Self::Second];

    /// The other one.
    pub const fn other(self) -> Self {
        match self {
            Self::First => Self::Second,
            Self::Second => Self::First,
        }
    }

    /// Its place among the two, from 0.
    pub const fn index(self) -> usize {
        match self {
            Self::First => 0,
            Self::Second => 1,
        }
    }
}

impl fmt::Display for Half {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::First => "first half",
            Self::Second => "second half",
        })
    }
}

/// What the node says of a volume whose disk is two halves, on two disks of the host, and whose pool is a mirror of them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct Mirror {
    /// The half that was last known not to have all that the other one has. It is never used alone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub behind: Option<Half>,
}
