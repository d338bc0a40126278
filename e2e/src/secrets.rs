//! Searches for what must not be found: keys, and what a volume holds in clear text.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

/// Whether a file holds some bytes. Holes are not read, and a file that has gone holds nothing.
///
/// # Errors
/// When it can't be read.
pub fn holds(path: &Path, bytes: &[u8]) -> Result<bool> {
    // GNU grep skips holes where a zero ends a line (-z); the pattern is no argument, since those are searched too.
    let mut grep = Command::new("grep");
    grep.args(["-q", "-z", "-a", "-F", "-f", "/dev/stdin"]).arg(path);
    let pattern = File::from(std::os::fd::OwnedFd::from(pipe(bytes)?));
    let status = grep.stdin(pattern).status().context("grep")?;
    ensure!(matches!(status.code(), Some(0 | 1)) || !path.exists(), "grep {}: {status}", path.display());
    Ok(status.success())
}

fn pipe(bytes: &[u8]) -> Result<std::io::PipeReader> {
    let (reader, mut writer) = std::io::pipe()?;
    std::io::Write::write_all(&mut writer, bytes)?;
    Ok(reader)
}

fn files(dir: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let items = match fs::read_dir(dir) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(found),
        items => items.with_context(|| dir.display().to_string())?,
    };
    for item in items {
        let (path, kind) = item.map(|item| (item.path(), item.file_type()))?;
        match kind? {
            kind if kind.is_dir() => found.extend(files(&path)?),
            kind if kind.is_file() => found.push(path),
            _ => {}
        }
    }
    Ok(found)
}

/// Fails where one of the secrets stands in a file of these directories, or in a command line or the environment of any
/// process of this machine.
///
/// # Errors
/// That, or when something can't be read.
pub fn must_not_be_found(secrets: &[&[u8]], dirs: &[&Path]) -> Result<()> {
    let mut looked = 0;
    for path in dirs.iter().map(|dir| files(dir)).collect::<Result<Vec<_>>>()?.concat() {
        for secret in secrets {
            ensure!(!holds(&path, secret)?, "{:?} is in {}", String::from_utf8_lossy(secret), path.display());
        }
        looked += 1;
    }
    for process in fs::read_dir("/proc")?.flatten() {
        for name in ["cmdline", "environ"] {
            let Ok(text) = fs::read(process.path().join(name)) else { continue };
            for secret in secrets {
                let found = text.windows(secret.len()).any(|window| window == *secret);
                ensure!(!found, "a secret is in {}/{name}", process.path().display());
            }
        }
    }
    println!("{looked} files have none of {} secrets in them", secrets.len());
    Ok(())
}
