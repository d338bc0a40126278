//! A node's own disk for volumes: as large on every machine, however little that one has left.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, bail};

/// A hundred volumes of the smallest size, twice; sparse.
const SIZE: &str = "64G";

/// Mounts it below a node's root; nothing when somebody has given the node another.
pub(crate) fn mount(root: &Path) -> Result<()> {
    let place = root.join("var/lib/zpod");
    if place.exists() {
        return Ok(());
    }
    fs::create_dir_all(&place).with_context(|| format!("create {}", place.display()))?;
    let (image, place) = (root.join("disk.xfs").display().to_string(), place.display().to_string());
    run("truncate", &["--size", SIZE, &image])?;
    run("mkfs.xfs", &["-q", &image])?;
    run("mount", &["-o", "loop", &image, &place])
}

fn run(program: &str, arguments: &[&str]) -> Result<()> {
    let output = Command::new(program).args(arguments).output().with_context(|| format!("run {program}"))?;
    if !output.status.success() {
        bail!("{program} {}: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}
