use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::Excerpt;

/// A number of bytes. Shown with a binary unit where that is exact, parsed with or without one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Bytes(pub u64);

const UNITS: [(&str, u64); 5] = [("Ti", 1 << 40), ("Gi", 1 << 30), ("Mi", 1 << 20), ("Ki", 1 << 10), ("", 1)];

impl Bytes {
    /// `n` KiB.
    pub const fn kib(n: u64) -> Self {
        Self(n << 10)
    }

    /// `n` MiB.
    pub const fn mib(n: u64) -> Self {
        Self(n << 20)
    }

    /// `n` GiB.
    pub const fn gib(n: u64) -> Self {
        Self(n << 30)
    }

    /// The next multiple of `unit`, or the largest one that fits where there is none.
    pub const fn round_up(self, unit: u64) -> Self {
        match self.0.checked_next_multiple_of(unit) {
            Some(n) => Self(n),
            None => Self(u64::MAX - u64::MAX % unit),
        }
    }

    /// The multiple of `unit` at or below.
    pub const fn round_down(self, unit: u64) -> Self {
        Self(self.0 - self.0 % unit)
    }
}

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (unit, size) in UNITS {
            if self.0 >= size && self.0.is_multiple_of(size) {
                let suffix = if unit.is_empty() { " bytes".to_owned() } else { format!(" {unit}B") };
                return write!(f, "{}{suffix}", self.0 / size);
            }
        }
        write!(f, "0 bytes")
    }
}

/// A size that does not parse.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{} is not a size: write a whole number of bytes, or one with Ki, Mi, Gi or Ti behind it", Excerpt(_0))]
pub struct ParseBytesError(String);

impl FromStr for Bytes {
    type Err = ParseBytesError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let error = || ParseBytesError(text.to_owned());
        let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
        let suffix = &text[digits.len()..];
        let suffix = suffix.strip_suffix('B').filter(|s| !s.is_empty()).unwrap_or(suffix);
        let (_, unit) = UNITS.iter().find(|(name, _)| *name == suffix).ok_or_else(error)?;
        if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
            return Err(error());
        }
        let number: u64 = digits.parse().map_err(|_| error())?;
        number.checked_mul(*unit).map(Self).ok_or_else(error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_parse_with_and_without_a_unit() {
        for (text, want) in [("0", 0), ("512", 512), ("4Ki", 4096), ("1Gi", 1 << 30), ("2GiB", 2 << 30)] {
            assert_eq!(text.parse(), Ok(Bytes(want)), "{text}");
        }
    }

    #[test]
    fn what_is_not_a_size_is_refused() {
        for text in ["", "-1", "1.5Gi", "1G", "Gi", "1 Gi", "99999999999Ti", "1GiBB", "+1"] {
            assert!(text.parse::<Bytes>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_size_is_shown_in_the_largest_exact_unit() {
        assert_eq!(Bytes::gib(1).to_string(), "1 GiB");
        assert_eq!(Bytes(1025).to_string(), "1025 bytes");
        assert_eq!(Bytes::mib(1536).to_string(), "1536 MiB");
    }
}
