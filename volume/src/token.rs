use std::fmt;
use std::str::FromStr;

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use sha2::{Digest as _, Sha256};
use uuid::Uuid;

/// The SHA-256 of a publication's token: enough to know the token when it is shown, and worth nothing to whoever reads it.
///
/// Records and objects have the digest only. Those of earlier versions have the token itself: they are read, and
/// [`TokenDigest::was_plain`] says that they must be written again.
#[derive(Clone, Copy)]
pub struct TokenDigest {
    digest: [u8; 32],
    plain: bool,
}

/// Text that is neither a digest nor a token.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a token's digest has 64 hexadecimal digits")]
pub struct ParseTokenError;

impl TokenDigest {
    /// Of a token.
    pub fn of(token: Uuid) -> Self {
        Self { digest: Sha256::digest(token.as_bytes()).into(), plain: false }
    }

    /// Whether that is the token.
    pub fn is_of(&self, token: Uuid) -> bool {
        *self == Self::of(token)
    }

    /// Whether it was read from a record that had the token itself.
    pub fn was_plain(&self) -> bool {
        self.plain
    }
}

impl PartialEq for TokenDigest {
    fn eq(&self, other: &Self) -> bool {
        self.digest == other.digest
    }
}

impl Eq for TokenDigest {}

impl fmt::Display for TokenDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.digest.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for TokenDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TokenDigest({self})")
    }
}

impl FromStr for TokenDigest {
    type Err = ParseTokenError;

    fn from_str(text: &str) -> Result<Self, ParseTokenError> {
        if text.len() == 64 && text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            let mut digest = [0; 32];
            for (index, byte) in digest.iter_mut().enumerate() {
                *byte = u8::from_str_radix(&text[2 * index..2 * index + 2], 16).map_err(|_| ParseTokenError)?;
            }
            return Ok(Self { digest, plain: false });
        }
        let token = Uuid::try_parse(text).map_err(|_| ParseTokenError)?;
        Ok(Self { plain: true, ..Self::of(token) })
    }
}

impl Serialize for TokenDigest {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for TokenDigest {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_digest_knows_its_token_and_does_not_tell_it() {
        let token = Uuid::from_u128(0x1234_5678);
        let digest = TokenDigest::of(token);
        assert!(digest.is_of(token) && !digest.is_of(Uuid::from_u128(1)) && !digest.was_plain());
        let text = serde_json::to_string(&digest).unwrap();
        assert!(!text.contains("12345678") && !format!("{digest:?}").contains("12345678"), "{text}");
        assert_eq!(serde_json::from_str::<TokenDigest>(&text).unwrap(), digest);
    }

    #[test]
    fn records_that_have_the_token_itself_are_read_and_never_written_so() {
        let token = Uuid::from_u128(7);
        let read: TokenDigest = serde_json::from_str(&format!("\"{token}\"")).unwrap();
        assert!(read.is_of(token) && read.was_plain());
        assert_eq!(serde_json::to_string(&read).unwrap(), format!("\"{}\"", TokenDigest::of(token)));
        for bad in ["", "zz", &"é".repeat(32), &"g".repeat(64)] {
            assert_eq!(bad.parse::<TokenDigest>(), Err(ParseTokenError), "{bad}");
        }
    }
}
