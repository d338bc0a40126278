//! An XFS on a loop device. In a mount namespace of a test's own (`own_mounts.rs`) mount and device are gone with it, however
//! the test ends.

use std::fs::File;
use std::path::Path;
use std::process::Command;

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
