//! Versions of Kata, as far as their order matters.

use std::fmt;
use std::str::FromStr;

/// The three numbers of a version. What follows them ("-rc0", "-12-gabc") is left aside.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    numbers: [u32; 3],
}

impl Version {
    /// A version.
    #[must_use]
    pub const fn new(major: u32, minor: u32, patch: u32) -> Self {
        Self { numbers: [major, minor, patch] }
    }
}

impl fmt::Display for Version {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [major, minor, patch] = self.numbers;
        write!(formatter, "{major}.{minor}.{patch}")
    }
}

impl FromStr for Version {
    type Err = NotAVersion;

    fn from_str(text: &str) -> Result<Self, NotAVersion> {
        let numbers = text.trim().split(['-', '+']).next().unwrap_or_default();
        let mut parsed = numbers.split('.').map(str::parse);
        let mut next = || parsed.next().and_then(Result::ok).ok_or(NotAVersion);
        let version = Self::new(next()?, next()?, next()?);
        if parsed.next().is_some() { Err(NotAVersion) } else { Ok(version) }
    }
}

/// The text doesn't begin with three numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NotAVersion;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_kata_writes_is_understood() {
        for (text, version) in [
            ("4.1.0\n", Version::new(4, 1, 0)),
            ("3.32.0-rc0", Version::new(3, 32, 0)),
            ("3.26.0-12-g7c6ba40c54", Version::new(3, 26, 0)),
            ("4.1.0-7c6ba40c54-dirty", Version::new(4, 1, 0)),
        ] {
            assert_eq!(text.parse(), Ok(version), "{text}");
        }
        for text in ["", "unknown", "4.1", "4.1.0.2", "v4.1.0", "4.x.0", "99999999999.0.0"] {
            assert_eq!(text.parse::<Version>(), Err(NotAVersion), "{text}");
        }
    }

    #[test]
    fn versions_are_ordered_by_number_not_by_letter() {
        assert!(Version::new(3, 9, 0) < Version::new(3, 26, 0));
        assert!(Version::new(3, 32, 0) < Version::new(4, 0, 0));
    }
}
