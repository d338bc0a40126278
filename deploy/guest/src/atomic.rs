//! Files that appear whole or not at all.

use std::{
    fs::{self, File},
    io::Write,
    path::{Path, PathBuf},
};

use crate::{Error, Result};

/// Writes a file by `fill` beside its final place, syncs it, and renames it
/// over `path`: a reader sees the old file or the new one, never half of one.
///
/// # Errors
/// The directory can't be written, or `fill` fails; `path` is unchanged then.
pub fn write_with(path: &Path, fill: impl FnOnce(&mut File) -> Result<()>) -> Result<()> {
    let aside = beside(path);
    let written = File::create(&aside).map_err(Error::io("create", &aside)).and_then(|mut file| {
        fill(&mut file)?;
        file.sync_all().map_err(Error::io("sync", &aside))
    });
    let renamed = written.and_then(|()| fs::rename(&aside, path).map_err(Error::io("rename to", path)));
    if renamed.is_err() {
        // The first error is the one to report.
        let _ = fs::remove_file(&aside);
    }
    renamed
}

/// As [`write_with`], from bytes in memory.
///
/// # Errors
/// The directory can't be written; `path` is unchanged then.
pub fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    write_with(path, |file| file.write_all(bytes).map_err(Error::io("write", path)))
}

/// A name in the same directory, hence on the same file system.
pub(crate) fn beside(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!(".{name}.{}.tmp", std::process::id()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_write_leaves_the_old_file_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        write(&path, b"old").unwrap();
        let failed = write_with(&path, |file| {
            file.write_all(b"half").unwrap();
            Err(Error::NoMirror)
        });
        assert!(failed.is_err());
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
