//! A temporary directory in which things get mounted.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use nix::mount::{MntFlags, umount2};
use tempfile::TempDir;

const PREFIX: &str = "zpod-e2e-";

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
        sweep(parent);
        let prefix = format!("{PREFIX}{}-", std::process::id());
        let dir = tempfile::Builder::new().prefix(&prefix).tempdir_in(parent).context("make a temporary directory")?;
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

/// Removes what processes that were killed left behind: their ids are in the names.
fn sweep(parent: &Path) {
    for item in fs::read_dir(parent).into_iter().flatten().flatten() {
        let name = item.file_name();
        let rest = name.to_str().and_then(|name| name.strip_prefix(PREFIX));
        let owner: Option<u32> = rest.and_then(|rest| rest.split_once('-')).and_then(|(id, _)| id.parse().ok());
        if owner.is_some_and(|id| !Path::new("/proc").join(id.to_string()).exists()) {
            detach_below(&item.path());
            // Another process may be at it too.
            let _ = fs::remove_dir_all(item.path());
        }
    }
}

fn detach_below(path: &Path) {
    for mount in mounts_below(path) {
        // What can't be detached keeps its directory from being removed.
        let _ = umount2(&mount, MntFlags::MNT_DETACH);
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
        detach_below(&self.path);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_killed_process_left_is_removed_and_nothing_else() {
        let parent = tempfile::tempdir().unwrap();
        let dirs = ["zpod-e2e-4194304-left", "zpod-e2e-1-alive", "zpod-e2e-notes", "other-4194304-x"];
        let [left, others @ ..] = dirs.map(|name| parent.path().join(name));
        for dir in others.iter().chain([&left]) {
            fs::create_dir(dir).unwrap();
        }
        let own = Workdir::within(parent.path()).unwrap();
        assert!(!left.exists() && own.path().exists());
        assert!(others.iter().all(|dir| dir.exists()));
    }
}
