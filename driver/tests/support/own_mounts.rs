//! Tests whose mounts nobody else sees, and which are gone however a test ends.

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
