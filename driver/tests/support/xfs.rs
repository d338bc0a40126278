//! An XFS on a loop device, in a mount namespace of its own: mount and device are gone with it, however a test ends.

use std::fs::File;
use std::path::Path;
use std::process::{Command, Stdio};

/// Runs an ignored test of this file in a mount namespace of its own.
pub(crate) fn in_own_mounts(test: &str) {
    let status = Command::new("unshare")
        .args(["--mount", "--propagation", "private"])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", test, "--ignored", "--nocapture"])
        .stdin(Stdio::null())
        .status()
        .unwrap();
    assert!(status.success(), "{test}: {status} (root is needed)");
}

/// Mounts a new XFS over a directory, on a sparse file beside it.
pub(crate) fn mount(at: &Path, bytes: u64) {
    let image = at.with_extension("xfs");
    File::create_new(&image).unwrap().set_len(bytes).unwrap();
    let run = |program: &str, arguments: &[&str], path: &[&Path]| {
        let output = Command::new(program).args(arguments).args(path).output().unwrap();
        assert!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
    };
    run("mkfs.xfs", &["-q", "-m", "reflink=1"], &[&image]);
    run("mount", &["-t", "xfs", "-o", "loop"], &[&image, at]);
}
