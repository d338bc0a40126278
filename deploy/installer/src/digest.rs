//! Hashes what passes by.

use std::io::{self, Read, Write};

use sha2::{Digest as _, Sha256};
use zpod_image::manifest::Output;

/// A reader or a writer whose bytes are counted and hashed.
#[derive(Debug)]
pub struct Hashing<T> {
    inner: T,
    hash: Sha256,
    bytes: u64,
}

impl<T> Hashing<T> {
    /// Wraps one.
    pub fn new(inner: T) -> Self {
        Self { inner, hash: Sha256::new(), bytes: 0 }
    }

    /// What passed by.
    #[must_use]
    pub fn output(self) -> Output {
        let sha256 = self.hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
        Output { bytes: self.bytes, sha256 }
    }

    fn see(&mut self, bytes: &[u8]) {
        self.hash.update(bytes);
        self.bytes += bytes.len() as u64;
    }
}

impl<T: Read> Read for Hashing<T> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.see(&buffer[..count]);
        Ok(count)
    }
}

impl<T: Write> Write for Hashing<T> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        let count = self.inner.write(buffer)?;
        self.see(&buffer[..count]);
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}

/// Size and hash of all that a reader gives.
///
/// # Errors
/// It can't be read.
pub fn of(reader: impl Read) -> io::Result<Output> {
    let mut hashing = Hashing::new(reader);
    io::copy(&mut hashing, &mut io::sink())?;
    Ok(hashing.output())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_passes_by_has_the_hash_of_what_is_there() {
        let bytes = vec![7; 100_000];
        let mut writer = Hashing::new(Vec::new());
        writer.write_all(&bytes).unwrap();
        assert_eq!(writer.output(), Output::of(&bytes));
        assert_eq!(of(&bytes[..]).unwrap(), Output::of(&bytes));
    }
}
