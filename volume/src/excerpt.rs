use std::fmt;

/// How many characters of what was given an error shows.
const SHOWN: usize = 128;

/// Text as somebody gave it, for an error: quoted, and cut where it is long, so that neither an answer nor a line of a log
/// is as long as whoever asks makes it.
#[derive(Debug, Clone, Copy)]
pub struct Excerpt<'a>(pub &'a str);

impl fmt::Display for Excerpt<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.char_indices().nth(SHOWN) {
            None => write!(f, "{:?}", self.0),
            Some((end, _)) => write!(f, "{:?}... ({} bytes)", &self.0[..end], self.0.len()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_long_is_cut_at_a_character_and_its_length_told() {
        assert_eq!(Excerpt("a\n").to_string(), r#""a\n""#);
        let whole = "\u{e9}".repeat(SHOWN);
        assert_eq!(Excerpt(&whole).to_string(), format!("{whole:?}"));
        assert_eq!(Excerpt(&format!("{whole}x")).to_string(), format!("{whole:?}... (257 bytes)"));
        assert!(Excerpt(&"x".repeat(1 << 20)).to_string().ends_with("... (1048576 bytes)"));
    }
}
