//! Kata on a node, as far as zpod's installer looks at it: what kata-deploy 4.1.0 leaves, with the tests' own initrd.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;

use anyhow::{Context as _, Result};

use crate::base_initrd;

const SHARE: &str = "opt/kata/share/kata-containers";
const INITRD: &str = "kata-ubuntu-resolute.initrd";
const VERSION: &str = "4.1.0\n";

/// Lays it out below a node's root; nothing when it is there.
pub(crate) fn deploy(root: &Path) -> Result<()> {
    let share = root.join(SHARE);
    if share.exists() {
        return Ok(());
    }
    fs::create_dir_all(&share).with_context(|| format!("create {}", share.display()))?;
    base_initrd::write(&share.join(INITRD))?;
    symlink(INITRD, share.join("kata-containers-initrd.img")).context("link the initrd")?;
    fs::write(root.join("opt/kata/VERSION"), VERSION).context("write Kata's version")
}
