//! Keys of encrypted volumes.
//!
//! # Design
//! A key is in memory only, and is overwritten when it is dropped. It has no text form: what shows it to a log or an error
//! does not compile. ZFS gets it on the standard input of its tools, never as an argument, in the environment or in a file.
//!
//! # Limitations
//! What gRPC and the pipe to the tools copy into buffers of their own is not overwritten when it is freed.

use std::fmt;

use zeroize::{Zeroize as _, Zeroizing};

/// Bytes of a key that is given as it is (`WRAPPING_KEY_LEN`).
const RAW: usize = 32;
/// Lengths of a passphrase (`MIN_PASSPHRASE_LEN`, `MAX_PASSPHRASE_LEN` in libzfs_crypto.c).
const PASSPHRASE: std::ops::RangeInclusive<usize> = 8..=512;

/// The key of a volume.
#[derive(Clone, PartialEq, Eq)]
pub struct Key {
    bytes: Zeroizing<Vec<u8>>,
    format: KeyFormat,
}

/// How a key is written (`keyformat` in zfsprops(7)).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeyFormat {
    /// 32 bytes as they are.
    Raw,
    /// 64 hexadecimal digits.
    Hex,
    /// Text from which ZFS derives the key.
    Passphrase,
}

impl KeyFormat {
    /// ZFS's word for it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Hex => "hex",
            Self::Passphrase => "passphrase",
        }
    }
}

/// Bytes that are no key. They are not repeated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// Too short or too long.
    #[error("it has {0} bytes; allowed are 64 hexadecimal digits, exactly 32 bytes, or a passphrase of 8 to 512 bytes")]
    Length(usize),
    /// ZFS reads a passphrase up to the end of its line.
    #[error("it is a passphrase with a line break or a zero byte in it; make the Secret without (printf, not echo)")]
    Line,
}

impl Key {
    /// A key of these bytes: 64 hexadecimal digits and 32 bytes are one as they are, anything else is a passphrase.
    ///
    /// # Errors
    /// When they can't be a key. They are overwritten then too.
    pub fn new(mut bytes: Vec<u8>) -> Result<Self, KeyError> {
        let length = bytes.len();
        let format = match length {
            RAW => Ok(KeyFormat::Raw),
            _ if length == 2 * RAW && bytes.iter().all(u8::is_ascii_hexdigit) => Ok(KeyFormat::Hex),
            _ if !PASSPHRASE.contains(&length) => Err(KeyError::Length(length)),
            _ if bytes.iter().any(|byte| matches!(byte, b'\n' | b'\r' | 0)) => Err(KeyError::Line),
            _ => Ok(KeyFormat::Passphrase),
        };
        match format {
            Ok(format) => Ok(Self { bytes: Zeroizing::new(bytes), format }),
            Err(error) => {
                bytes.zeroize();
                Err(error)
            }
        }
    }

    /// How it is written.
    pub const fn format(&self) -> KeyFormat {
        self.format
    }

    /// What ZFS's tools read on their standard input: a line, or the bytes as they are.
    pub(crate) fn input(&self) -> Zeroizing<Vec<u8>> {
        // Of the right size from the start: a buffer that grows leaves a copy behind.
        let mut input = Zeroizing::new(Vec::with_capacity(self.bytes.len() + 1));
        input.extend_from_slice(&self.bytes);
        if self.format != KeyFormat::Raw {
            input.push(b'\n');
        }
        input
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Key")
    }
}

/// What the node provides.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Keys {
    /// The key the volume is to have.
    pub key: Key,
    /// The one before it, where it is being changed.
    pub previous: Option<Key>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_hex_or_raw_or_a_passphrase_and_says_nothing_of_itself() {
        let hex = "0123456789abcdefABCDEF0123456789abcdefABCDEF01234567890123456789";
        for (text, format, input) in [
            (hex, KeyFormat::Hex, format!("{hex}\n")),
            (&hex[..32], KeyFormat::Raw, hex[..32].to_owned()),
            (&hex[..63], KeyFormat::Passphrase, format!("{}\n", &hex[..63])),
            ("correct horse", KeyFormat::Passphrase, "correct horse\n".to_owned()),
        ] {
            let key = Key::new(text.into()).unwrap();
            assert_eq!((key.format(), key.input().as_slice()), (format, input.as_bytes()));
            assert_eq!(
                format!("{:?}", Keys { previous: Some(key.clone()), key }),
                "Keys { key: Key, previous: Some(Key) }"
            );
        }
        assert_eq!(Key::new(b"short".to_vec()), Err(KeyError::Length(5)));
        assert_eq!(Key::new(vec![b'x'; 513]), Err(KeyError::Length(513)));
        assert_eq!(Key::new(format!("{hex}\n").into()), Err(KeyError::Line));
    }
}
