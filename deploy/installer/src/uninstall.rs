//! Takes away what was installed, and nothing else.

use std::path::PathBuf;

use crate::error::{Error, Result};
use crate::install::Places;
use crate::install_dir::InstallDir;
use crate::root::HostRoot;

/// What came of it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Removal {
    /// The versions that were there, and are gone.
    pub versions: Vec<String>,
    /// What lies in the directory and is not ours.
    pub left: Vec<PathBuf>,
}

/// Removes the link, every version and the directories, as far as they are ours. Killed anywhere, it can be run again.
///
/// # Errors
/// What the kernel says.
pub fn uninstall(places: &Places) -> Result<Removal> {
    let root = HostRoot::open(&places.host_root)?;
    let Some(dir) = InstallDir::open(&root, &places.install_dir, places.lock_wait)? else {
        return Ok(Removal::default());
    };
    // The link first: whoever finds it finds what it leads to.
    match dir.current() {
        Ok(Some(_)) => dir.unlink()?,
        // Not ours: it is named among what is left.
        Ok(None) | Err(Error::InTheWay { .. }) => {}
        Err(error) => return Err(error),
    }
    dir.clear_leftovers()?;
    let mut versions = dir.versions()?;
    for id in &versions {
        dir.remove(id)?;
    }
    let kept = dir.versions()?;
    versions.retain(|id| !kept.contains(id));
    let left = dir.remove_if_empty(&root)?;
    Ok(Removal { versions, left })
}
