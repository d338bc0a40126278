//! csi-sanity, the official test of CSI drivers, against the `zpod` binary. Needs root, as the driver mounts.
//!
//! The suite is looked for in `ZPOD_CSI_SANITY` and in the project's cache, where `deploy/setup.sh` puts it.

#![allow(clippy::unwrap_used)]

#[path = "support/daemon.rs"]
#[allow(dead_code)]
mod daemon;

use std::env;
use std::path::PathBuf;
use std::process::Command;

use daemon::Node;

/// Of 96: what the controller and node capabilities we don't offer (attach, snapshots, clones, modify, groups) skip.
const PASSED: u32 = 49;
const SKIPPED: u32 = 46;

fn suite() -> PathBuf {
    let cache = env::var_os("ZPOD_CACHE").map(PathBuf::from).or_else(|| {
        let home = env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
        Some(home.or_else(|| Some(PathBuf::from(env::var_os("HOME")?).join(".cache")))?.join("zpod"))
    });
    let mut places: Vec<PathBuf> = env::var_os("ZPOD_CSI_SANITY").map(PathBuf::from).into_iter().collect();
    places.extend(cache.iter().flat_map(|cache| [cache.join("csi-sanity"), cache.join("bin/csi-sanity")]));
    let found = places.iter().find(|path| path.is_file()).cloned();
    found.unwrap_or_else(|| {
        panic!(
            "csi-sanity is in none of {places:?}: run deploy/setup.sh, or GOBIN=<dir> go install \
             github.com/kubernetes-csi/csi-test/v5/cmd/csi-sanity@v5.5.0 and set ZPOD_CSI_SANITY"
        )
    })
}

/// The number before a word of the summary: `49 Passed | 0 Failed | 1 Pending | 46 Skipped`.
fn count(output: &str, word: &str) -> Option<u32> {
    let line = output.lines().rev().find(|line| line.contains(" Passed | "))?;
    let part = line.rsplit(" -- ").next()?.split(" | ").find(|part| part.ends_with(word))?;
    part.split_whitespace().next()?.parse().ok()
}

#[test]
fn csi_sanity_finds_nothing_to_complain_about() {
    let (suite, node) = (suite(), Node::new());
    let daemon = node.start(None);
    let output = Command::new(suite)
        .arg(format!("--csi.endpoint=unix://{}", daemon.socket().display()))
        .arg(format!("--csi.mountdir={}", node.path("mount").display()))
        .arg(format!("--csi.stagingdir={}", node.path("staging").display()))
        .args(["--csi.testvolumesize=1073741824", "--csi.testvolumeexpandsize=2147483649", "--ginkgo.no-color"])
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let summary = ["Passed", "Failed", "Pending", "Skipped"].map(|word| count(&text, word));
    println!("csi-sanity: passed, failed, pending, skipped: {summary:?}");
    assert!(output.status.success(), "{text}\n{}", node.log());
    assert_eq!(summary, [Some(PASSED), Some(0), Some(1), Some(SKIPPED)], "{text}");

    assert_eq!(node.names("volumes"), [""; 0], "every device is gone");
    assert_eq!(node.names("state/volumes"), [""; 0], "every record is gone");
    assert_eq!(node.names("direct-volumes"), [""; 0], "every entry is gone");
    let socket = daemon.socket().to_owned();
    assert!(daemon.terminate().success());
    assert!(!socket.exists(), "the socket is gone with its process");
}
