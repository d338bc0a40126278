//! Writes cpio archives in the "newc" format, the one Linux unpacks as initramfs.
//!
//! Format: `Documentation/driver-api/early-userspace/buffer-format.rst` in the
//! kernel's source. Entries come out sorted by path with sequential inode
//! numbers, owner 0:0 and one fixed time, so equal contents are equal bytes.

use std::{
    collections::BTreeMap,
    fs,
    io::{self, Write},
    os::unix::fs::{FileTypeExt, MetadataExt},
    path::Path,
};

use crate::{Error, Result};

/// Every entry's modification time, in seconds since 1970.
const MTIME: u32 = 0;
/// zstd level of [`Archive::to_zstd`]. 19 is the highest whose window (8 MiB)
/// doesn't cost the booting guest more memory.
const ZSTD_LEVEL: i32 = 19;

const S_IFDIR: u32 = 0o040_000;
const S_IFREG: u32 = 0o100_000;
const S_IFLNK: u32 = 0o120_000;
const S_IFCHR: u32 = 0o020_000;
const TRAILER: &str = "TRAILER!!!";

#[derive(Debug, Clone, PartialEq, Eq)]
enum Entry {
    File { bytes: Vec<u8>, mode: u32 },
    Dir { mode: u32 },
    Symlink { target: String },
    CharDevice { mode: u32, major: u32, minor: u32 },
}

/// An initramfs archive in the making. Parent directories come by themselves
/// (mode 0755); adding a path twice replaces the first.
///
/// ```
/// let mut archive = zpod_image::Archive::new();
/// archive
///     .file("/init", b"#!/bin/sh\n".to_vec(), 0o755)
///     .dir("/proc", 0o555)
///     .symlink("/sbin/init", "../init");
/// let bytes = archive.to_cpio()?;
/// # Ok::<(), zpod_image::Error>(())
/// ```
#[derive(Debug, Default, Clone)]
pub struct Archive {
    entries: BTreeMap<String, Entry>,
}

impl Archive {
    /// An empty archive.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a regular file; `mode` is its permission bits.
    pub fn file(&mut self, path: &str, bytes: impl Into<Vec<u8>>, mode: u32) -> &mut Self {
        self.add(path, Entry::File { bytes: bytes.into(), mode })
    }

    /// Adds a directory; `mode` is its permission bits.
    pub fn dir(&mut self, path: &str, mode: u32) -> &mut Self {
        self.add(path, Entry::Dir { mode })
    }

    /// Adds a symbolic link at `path` that points to `target`.
    pub fn symlink(&mut self, path: &str, target: &str) -> &mut Self {
        self.add(path, Entry::Symlink { target: target.to_owned() })
    }

    /// Adds a character device. An initrd that is to have a console before
    /// its init mounts devtmpfs needs `/dev/console` (5, 1).
    pub fn char_device(&mut self, path: &str, mode: u32, major: u32, minor: u32) -> &mut Self {
        self.add(path, Entry::CharDevice { mode, major, minor })
    }

    /// Adds everything below the directory `from`, as if it were the root.
    ///
    /// # Errors
    /// A file can't be read, has a name that is not UTF-8, or is a socket,
    /// FIFO or block device.
    pub fn tree(&mut self, from: &Path) -> Result<&mut Self> {
        self.tree_at(from, "")?;
        Ok(self)
    }

    fn tree_at(&mut self, dir: &Path, prefix: &str) -> Result<()> {
        for item in fs::read_dir(dir).map_err(Error::io("list", dir))? {
            let path = item.map_err(Error::io("list", dir))?.path();
            let bad = |reason: &str| Error::BadEntry { path: path.display().to_string(), reason: reason.to_owned() };
            let name = path.file_name().and_then(|name| name.to_str()).ok_or_else(|| bad("its name is not UTF-8"))?;
            let inside = format!("{prefix}/{name}");
            let meta = fs::symlink_metadata(&path).map_err(Error::io("stat", &path))?;
            let (kind, mode) = (meta.file_type(), meta.mode() & 0o7777);
            if kind.is_dir() {
                self.dir(&inside, mode).tree_at(&path, &inside)?;
            } else if kind.is_symlink() {
                let target = fs::read_link(&path).map_err(Error::io("read link", &path))?;
                self.symlink(&inside, target.to_str().ok_or_else(|| bad("its target is not UTF-8"))?);
            } else if kind.is_file() {
                self.file(&inside, fs::read(&path).map_err(Error::io("read", &path))?, mode);
            } else if kind.is_char_device() {
                let device = meta.rdev();
                self.char_device(&inside, mode, rustix::fs::major(device), rustix::fs::minor(device));
            } else {
                return Err(bad("sockets, FIFOs and block devices have no place in an initramfs"));
            }
        }
        Ok(())
    }

    fn add(&mut self, path: &str, entry: Entry) -> &mut Self {
        self.entries.insert(path.trim_matches('/').to_owned(), entry);
        self
    }

    /// The bytes of all regular files together, uncompressed.
    #[must_use]
    pub fn content_bytes(&self) -> u64 {
        self.sizes().map(|(_, bytes)| bytes).sum()
    }

    /// The path (without leading `/`) and size of each regular file.
    pub fn sizes(&self) -> impl Iterator<Item = (&str, u64)> {
        self.entries.iter().filter_map(|(path, entry)| match entry {
            Entry::File { bytes, .. } => Some((path.as_str(), bytes.len() as u64)),
            _ => None,
        })
    }

    /// The archive as bytes, uncompressed.
    ///
    /// # Errors
    /// As for [`Archive::write`].
    pub fn to_cpio(&self) -> Result<Vec<u8>> {
        let mut out = Vec::new();
        self.write(&mut out)?;
        Ok(out)
    }

    /// The archive as bytes, compressed with zstd in one thread (several
    /// threads would make the bytes depend on the machine).
    ///
    /// # Errors
    /// As for [`Archive::write`].
    pub fn to_zstd(&self) -> Result<Vec<u8>> {
        let cpio = self.to_cpio()?;
        zstd::bulk::compress(&cpio, ZSTD_LEVEL).map_err(Error::io("compress", "the archive"))
    }

    /// Writes the archive, uncompressed.
    ///
    /// # Errors
    /// A path is empty or has `.` or `..` in it, lies below something that is
    /// not a directory, a file is 4 GiB or more, or `to` fails.
    pub fn write(&self, to: &mut impl Write) -> Result<()> {
        let entries = self.with_parents()?;
        for (ino, (path, entry)) in (1..).zip(&entries) {
            write_entry(to, ino, path, entry)?;
        }
        let trailer = Entry::File { bytes: Vec::new(), mode: 0 };
        write_header(to, 0, 0, TRAILER, 0, &trailer).map_err(Error::io("write", "the archive"))
    }

    fn with_parents(&self) -> Result<BTreeMap<&str, Entry>> {
        let mut all: BTreeMap<&str, Entry> =
            self.entries.iter().map(|(path, entry)| (path.as_str(), entry.clone())).collect();
        for path in self.entries.keys() {
            let bad = |reason: &str| Error::BadEntry { path: path.clone(), reason: reason.to_owned() };
            if path.split('/').any(|part| matches!(part, "" | "." | "..")) || path.contains('\0') || path == TRAILER {
                return Err(bad("not a plain path below the root"));
            }
            for (end, _) in path.match_indices('/') {
                let parent = all.entry(&path[..end]).or_insert(Entry::Dir { mode: 0o755 });
                if !matches!(parent, Entry::Dir { .. }) {
                    return Err(bad("its parent is not a directory"));
                }
            }
        }
        Ok(all)
    }
}

fn write_entry(to: &mut impl Write, ino: u32, path: &str, entry: &Entry) -> Result<()> {
    let (mode, data): (u32, &[u8]) = match entry {
        Entry::File { bytes, mode } => (S_IFREG | mode, bytes),
        Entry::Dir { mode } => (S_IFDIR | mode, &[]),
        Entry::Symlink { target } => (S_IFLNK | 0o777, target.as_bytes()),
        Entry::CharDevice { mode, .. } => (S_IFCHR | mode, &[]),
    };
    let size = u32::try_from(data.len()).map_err(|_| Error::BadEntry {
        path: path.to_owned(),
        reason: "4 GiB or more don't fit the format".to_owned(),
    })?;
    write_header(to, ino, mode, path, size, entry)
        .and_then(|()| to.write_all(data))
        .and_then(|()| pad(to, data.len()))
        .map_err(Error::io("write", "the archive"))
}

fn write_header(to: &mut impl Write, ino: u32, mode: u32, path: &str, size: u32, entry: &Entry) -> io::Result<()> {
    // One link each: with more, the kernel looks for hard links by inode number.
    let links = if matches!(entry, Entry::Dir { .. }) { 2 } else { 1 };
    let (major, minor) = match entry {
        Entry::CharDevice { major, minor, .. } => (*major, *minor),
        _ => (0, 0),
    };
    let name_size = u32::try_from(path.len() + 1).map_err(io::Error::other)?;
    let (uid, gid, check) = (0, 0, 0);
    write!(to, "070701")?;
    for field in [ino, mode, uid, gid, links, MTIME, size, 0, 0, major, minor, name_size, check] {
        write!(to, "{field:08x}")?;
    }
    write!(to, "{path}\0")?;
    pad(to, 110 + path.len() + 1)
}

/// Headers and data each end on a 4-byte boundary.
fn pad(to: &mut impl Write, written: usize) -> io::Result<()> {
    to.write_all(&[0; 3][..written.wrapping_neg() % 4])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_single_file_is_laid_out_as_the_kernel_documents_it() {
        let bytes = Archive::new().file("/a", *b"hello", 0o644).to_cpio().unwrap();
        let header = "070701\
            00000001000081a400000000000000000000000100000000\
            000000050000000000000000000000000000000000000002\
            00000000";
        let mut expected = header.as_bytes().to_vec();
        expected.extend_from_slice(b"a\0hello\0\0\0");
        assert_eq!(&bytes[..expected.len()], expected);
        assert!(bytes[expected.len()..].starts_with(b"070701"));
        assert!(bytes.windows(TRAILER.len()).any(|window| window == TRAILER.as_bytes()));
        assert_eq!(bytes.len() % 4, 0);
    }

    #[test]
    fn the_order_of_adding_does_not_change_a_byte() {
        let one = Archive::new().file("/b/c", *b"1", 0o644).symlink("/a", "b").to_zstd().unwrap();
        let two = Archive::new().symlink("a", "b").dir("b/", 0o755).file("b/c", *b"1", 0o644).to_zstd().unwrap();
        assert_eq!(one, two);
    }

    #[test]
    fn a_path_that_leaves_the_root_is_refused() {
        for path in ["", "/", "a/../b", "../a", "a//b", "./a", "a\0b", "TRAILER!!!"] {
            assert!(
                matches!(Archive::new().file(path, *b"", 0o644).to_cpio(), Err(Error::BadEntry { .. })),
                "{path:?}"
            );
        }
    }

    #[test]
    fn a_file_below_a_file_is_refused() {
        let result = Archive::new().file("a", *b"", 0o644).file("a/b", *b"", 0o644).to_cpio();
        assert!(matches!(result, Err(Error::BadEntry { .. })));
    }
}
