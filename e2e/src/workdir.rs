//! A temporary directory in which things get mounted.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use nix::mount::{MntFlags, umount2};
use tempfile::TempDir;

/// A directory that is removed on drop, with everything mounted below it detached first. Its path is short: unix
/// sockets below it have 108 bytes. `ZPOD_E2E_KEEP` keeps it for a look.
#[derive(Debug)]
pub struct Workdir {
    dir: Option<TempDir>,
    path: PathBuf,
}

impl Workdir {
    /// A new one.
    ///
    /// # Errors
    /// When it can't be made.
    pub fn new() -> Result<Self> {
        Self::within(&std::env::temp_dir())
    }

    /// A new one in `parent`.
    ///
    /// # Errors
    /// When it can't be made.
    pub fn within(parent: &Path) -> Result<Self> {
        let dir = tempfile::Builder::new().prefix("zpod-").tempdir_in(parent).context("make a temporary directory")?;
        let path = dir.path().to_owned();
        Ok(Self { dir: Some(dir), path })
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A directory in it, made if need be.
    ///
    /// # Errors
    /// When it can't be made.
    pub fn subdirectory(&self, name: &str) -> Result<PathBuf> {
        let path = self.path.join(name);
        fs::create_dir_all(&path).with_context(|| format!("create {}", path.display()))?;
        Ok(path)
    }
}

/// Mount points at and below a path, the latest first.
pub fn mounts_below(path: &Path) -> Vec<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let points = mounts.lines().filter_map(|line| line.split(' ').nth(4)).map(PathBuf::from);
    let mut below: Vec<_> = points.filter(|point| point.starts_with(path)).collect();
    below.reverse();
    below
}

impl Drop for Workdir {
    fn drop(&mut self) {
        for mount in mounts_below(&self.path) {
            // What can't be detached keeps the directory from being removed, below.
            let _ = umount2(&mount, MntFlags::MNT_DETACH);
        }
        match self.dir.take() {
            Some(dir) if std::env::var_os("ZPOD_E2E_KEEP").is_some() => eprintln!("kept: {}", dir.keep().display()),
            Some(dir) => {
                if let Err(error) = dir.close() {
                    eprintln!("{}: {error}", self.path.display());
                }
            }
            None => {}
        }
    }
}
