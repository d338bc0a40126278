//! A disk for volumes: as large on every machine, however little that one has left.

use std::fs::{self, File};
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, bail};

/// Makes an XFS in a sparse file beside a directory, which is made too, and mounts it there.
///
/// # Errors
/// When it can't be made or mounted: root is needed, and mkfs.xfs.
pub fn mount_xfs(at: &Path, size: u64) -> Result<()> {
    fs::create_dir_all(at).with_context(|| format!("create {}", at.display()))?;
    let image = at.with_extension("xfs");
    let made = File::create(&image).and_then(|file| file.set_len(size));
    made.with_context(|| format!("make {}", image.display()))?;
    run(Command::new("mkfs.xfs").arg("-q").arg(&image))?;
    run(Command::new("mount").args(["-o", "loop"]).args([&image, at]))
}

/// Takes it away, whoever still uses it.
///
/// # Errors
/// When it can't be.
pub fn unmount(at: &Path) -> Result<()> {
    run(Command::new("umount").arg("--lazy").arg(at))
}

fn run(command: &mut Command) -> Result<()> {
    let output = command.output().with_context(|| format!("run {command:?}"))?;
    if !output.status.success() {
        bail!("{command:?}: {}", String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}
