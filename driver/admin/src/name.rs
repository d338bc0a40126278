use std::fmt;
use std::str::FromStr;

const PREFIX: &str = "zpod-send-";
const MAX_NAME: usize = 64;
/// ZFS's tokens are some hundred characters long.
const MAX_TOKEN: usize = 16 << 10;

/// The name of a ZFS snapshot that is sent: `zpod-send-` and up to 64 of `a-z`, `0-9` and `-`. Written with or without
/// its prefix.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct SendName(String);

/// Where a receive broke off, as ZFS writes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ResumeToken(String);

/// A name or a token that does not parse.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParseTokenError {
    /// The name.
    #[error("{0:?} is not the name of a sent snapshot: 1 to 64 of a-z, 0-9 and - are allowed, after zpod-send-")]
    Name(String),
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
