//! Makes a node's initrd: the Kata initrd that is there, plus our overlay.

use std::{
    fs::{self, File},
    io::{self, Read, Write},
    path::Path,
};

use crate::{Error, Result, atomic};

/// What an initramfs segment may start with: `usr/gen_init_cpio` and
/// `lib/decompress.c` in the kernel's source.
const MAGICS: [&[u8]; 9] = [
    b"070701",
    b"070702",
    b"\x1f\x8b",
    b"\x28\xb5\x2f\xfd",
    b"\xfd7zXZ\0",
    b"\x02\x21\x4c\x18",
    b"\x04\x22\x4d\x18",
    b"\x5d\0\0",
    b"BZh",
];

/// Whether a file that starts like this may be an initramfs. Eight bytes are enough.
#[must_use]
pub fn starts_like_initramfs(start: &[u8]) -> bool {
    MAGICS.iter().any(|magic| start.starts_with(magic))
}

/// Writes `base` followed by `overlay`, and returns how many bytes that are.
///
/// The kernel unpacks concatenated archives in order, each with its own
/// compression, and skips zero bytes between them; an uncompressed archive has
/// to start on a 4-byte boundary, so the base is padded to one.
///
/// # Errors
/// One can't be read, or `out` not be written.
pub fn concatenate(mut base: impl Read, mut overlay: impl Read, mut out: impl Write) -> io::Result<u64> {
    let size = io::copy(&mut base, &mut out)?;
    let padding = size.wrapping_neg() % 4;
    out.write_all(&[0; 3][..padding as usize])?;
    Ok(size + padding + io::copy(&mut overlay, &mut out)?)
}

/// Writes `base` followed by `overlay` to `out`, as [`concatenate`] does, atomically.
///
/// # Errors
/// An input is unreadable or no initramfs, `out` is one of the inputs, or the
/// output can't be written; an existing `out` is unchanged then.
pub fn append(base: &Path, overlay: &Path, out: &Path) -> Result<u64> {
    for input in [base, overlay] {
        check_magic(input)?;
        if same_file(input, out)? {
            return Err(Error::SameFile(out.to_owned()));
        }
    }
    let mut total = 0;
    atomic::write_with(out, |file| {
        total = concatenate(open(base)?, open(overlay)?, file).map_err(Error::io("write", out))?;
        Ok(())
    })?;
    Ok(total)
}

fn open(path: &Path) -> Result<File> {
    File::open(path).map_err(Error::io("open", path))
}

fn check_magic(path: &Path) -> Result<()> {
    let mut start = Vec::new();
    open(path)?.take(8).read_to_end(&mut start).map_err(Error::io("read", path))?;
    if starts_like_initramfs(&start) { Ok(()) } else { Err(Error::NotAnInitrd(path.to_owned())) }
}

fn same_file(input: &Path, out: &Path) -> Result<bool> {
    if !out.exists() {
        return Ok(false);
    }
    let real = |path: &Path| fs::canonicalize(path).map_err(Error::io("resolve", path));
    Ok(real(input)? == real(out)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Archive;

    #[test]
    fn the_overlay_starts_on_a_four_byte_boundary_after_the_base() {
        let dir = tempfile::tempdir().unwrap();
        let [base, overlay, out] = ["base", "overlay", "out"].map(|name| dir.path().join(name));
        let archive = Archive::new().file("a", *b"1", 0o644).to_cpio().unwrap();
        fs::write(&overlay, &archive).unwrap();
        for length in 10..14 {
            let mut bytes = b"\x1f\x8b".to_vec();
            bytes.resize(length, 7);
            fs::write(&base, &bytes).unwrap();
            let size = append(&base, &overlay, &out).unwrap();
            let whole = fs::read(&out).unwrap();
            assert_eq!(size, whole.len() as u64);
            assert_eq!(&whole[..length], bytes);
            assert_eq!(
                whole[length..].iter().position(|byte| *byte != 0).unwrap(),
                length.next_multiple_of(4) - length
            );
            assert!(whole.ends_with(&archive));
        }
    }

    #[test]
    fn a_file_that_is_no_initramfs_is_refused_and_the_output_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let [base, out] = ["base", "out"].map(|name| dir.path().join(name));
        fs::write(&base, b"not an initrd").unwrap();
        fs::write(&out, b"old").unwrap();
        assert!(matches!(append(&base, &base, &out), Err(Error::NotAnInitrd(_))));
        assert_eq!(fs::read(&out).unwrap(), b"old");
    }

    #[test]
    fn appending_in_place_is_refused_because_a_second_run_would_append_again() {
        let dir = tempfile::tempdir().unwrap();
        let base = dir.path().join("base");
        fs::write(&base, b"070701").unwrap();
        assert!(matches!(append(&base, &base, &base), Err(Error::SameFile(_))));
    }
}
