use std::fmt;
use std::str::FromStr;

const PREFIX: &str = "zpod-send-";
const MAX_NAME: usize = 64;
const MAX_SNAPSHOT: usize = 255;
const MAX_NEW_SNAPSHOT: usize = 128;
/// Names that begin so are zpod's own.
const OURS: &str = "zpod-";
/// ZFS's tokens are some hundred characters long.
const MAX_TOKEN: usize = 16 << 10;

/// The name of a ZFS snapshot that is sent: `zpod-send-` and up to 64 of `a-z`, `0-9` and `-`. Written with or without
/// its prefix.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct SendName(String);

/// The name of a ZFS snapshot, what stands behind the `@`: 1 to 255 of `A-Z`, `a-z`, `0-9`, `_`, `.`, `:` and `-`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct SnapshotName(String);

/// The name of a ZFS snapshot that is to be taken by hand: up to 128 characters, and none of zpod's own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewSnapshotName(SnapshotName);

/// Where a receive broke off, as ZFS writes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ResumeToken(String);

/// A name or a token that does not parse.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParseTokenError {
    /// The name.
    #[error("{0:?} is not the name of a sent snapshot: 1 to 64 of a-z, 0-9 and - are allowed, after zpod-send-")]
    Name(String),
    /// The name of any snapshot.
    #[error("{0:?} is not the name of a snapshot: 1 to 255 of A-Z, a-z, 0-9, _, ., : and - are allowed")]
    Snapshot(String),
    /// The name of one that is to be taken.
    #[error(
        "{0:?} is not a name for a snapshot: 1 to 128 of A-Z, a-z, 0-9, _, ., : and - are allowed, and not zpod- at the beginning"
    )]
    NewSnapshot(String),
    /// The token.
    #[error(
        "that is not a token to go on with: copy it whole, as `kubectl zpod receive` showed it (1-..., hexadecimal)"
    )]
    Token,
}

impl SendName {
    /// The whole name: what stands behind the `@`.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for SendName {
    type Err = ParseTokenError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let name = text.strip_prefix(PREFIX).unwrap_or(text);
        let sound = name.bytes().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == b'-');
        if sound && (1..=MAX_NAME).contains(&name.len()) {
            Ok(Self(format!("{PREFIX}{name}")))
        } else {
            Err(ParseTokenError::Name(text.chars().take(2 * MAX_NAME).collect()))
        }
    }
}

impl fmt::Display for SendName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for SnapshotName {
    type Err = ParseTokenError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let sound = text.bytes().all(|c| c.is_ascii_alphanumeric() || b"_.:-".contains(&c));
        if sound && (1..=MAX_SNAPSHOT).contains(&text.len()) {
            Ok(Self(text.into()))
        } else {
            Err(ParseTokenError::Snapshot(text.chars().take(2 * MAX_NAME).collect()))
        }
    }
}

impl From<SendName> for SnapshotName {
    fn from(name: SendName) -> Self {
        Self(name.0)
    }
}

impl From<NewSnapshotName> for SnapshotName {
    fn from(name: NewSnapshotName) -> Self {
        name.0
    }
}

impl FromStr for NewSnapshotName {
    type Err = ParseTokenError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let refused = || ParseTokenError::NewSnapshot(text.chars().take(2 * MAX_NAME).collect());
        if text.len() > MAX_NEW_SNAPSHOT || text.starts_with(OURS) {
            return Err(refused());
        }
        text.parse().map(Self).map_err(|_| refused())
    }
}

impl fmt::Display for NewSnapshotName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for SnapshotName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl ResumeToken {
    /// As ZFS takes it.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for ResumeToken {
    type Err = ParseTokenError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let sound = text.bytes().all(|c| c.is_ascii_hexdigit() || c == b'-');
        if sound && (4..=MAX_TOKEN).contains(&text.len()) { Ok(Self(text.into())) } else { Err(ParseTokenError::Token) }
    }
}

impl fmt::Display for ResumeToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_of_a_snapshot_is_one_name_and_needs_no_escape_in_an_address() {
        for text in ["a", "before_upgrade.1", "zpod-auto-hourly-20261130T120000Z", "12:00"] {
            assert_eq!(text.parse::<SnapshotName>().unwrap().to_string(), text);
        }
        let long = "x".repeat(256);
        for text in ["", "a@b", "a%b", "a,b", "a b", "a/b", "a&b=c", "ü", long.as_str()] {
            let error = text.parse::<SnapshotName>().unwrap_err().to_string();
            assert!(error.contains("are allowed") && error.len() < 250, "{error}");
        }
    }

    #[test]
    fn a_snapshot_that_is_taken_by_hand_has_no_name_of_zpods_own() {
        for text in ["manual-20261130T120000Z", "before_upgrade.1", "zpod", &"x".repeat(128)] {
            assert_eq!(text.parse::<NewSnapshotName>().unwrap().to_string(), text);
        }
        let long = "x".repeat(129);
        for text in ["", "zpod-mine", "zpod-auto-hourly-20261130T120000Z", "a b", "a@b", long.as_str()] {
            let error = text.parse::<NewSnapshotName>().unwrap_err().to_string();
            assert!(error.contains("not zpod- at the beginning") && error.len() < 300, "{error}");
        }
    }

    #[test]
    fn names_are_the_same_with_and_without_their_prefix_and_nothing_else_is_one() {
        for text in ["monday", "zpod-send-monday"] {
            assert_eq!(text.parse::<SendName>().unwrap().as_str(), "zpod-send-monday");
        }
        let long = "x".repeat(65);
        for text in ["", "zpod-send-", "a@b", "A", "a/b", "a b", "a&from=b", "ü", long.as_str()] {
            assert!(text.parse::<SendName>().is_err(), "{text}");
        }
    }

    #[test]
    fn tokens_are_hexadecimal_and_short() {
        assert!("1-fe6-d8-789c636064".parse::<ResumeToken>().is_ok());
        for text in ["", "1-x", "1-fe&a", "../..", &"a".repeat(20_000)] {
            assert!(text.parse::<ResumeToken>().is_err(), "{text}");
        }
    }
}
