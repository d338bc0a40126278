//! csi-sanity, the official test of CSI drivers, against the `zpod` binary with all it offers. Needs root and mkfs.xfs:
//! snapshots and clones share blocks on XFS.
//!
//! The suite is looked for in `ZPOD_CSI_SANITY` and in the project's cache, where `deploy/setup.sh` puts it.

#![allow(clippy::unwrap_used)]

#[path = "support/daemon.rs"]
#[allow(dead_code)]
mod daemon;
#[path = "support/own_mounts.rs"]
mod own_mounts;
#[path = "support/xfs.rs"]
mod xfs;

use std::collections::BTreeSet;
use std::env;
use std::fs;
use std::path::PathBuf;
use std::process::Command;

use daemon::Node;

/// Of 96, with one that the suite leaves pending.
const PASSED: usize = 85;
/// All that is skipped: what needs ControllerPublishVolume, which we don't offer, as nothing is attached to a node.
const SKIPPED: [&str; 10] = [
    "ControllerPublishVolume should fail when no node id is provided",
    "ControllerPublishVolume should fail when no volume capability is provided",
    "ControllerPublishVolume should fail when no volume id is provided",
    "ControllerPublishVolume should fail when publishing more volumes than the node max attach limit",
    "ControllerPublishVolume should fail when the node does not exist",
    "ControllerPublishVolume should fail when the volume does not exist",
    "ControllerPublishVolume should fail when the volume is already published but is incompatible",
    "ControllerUnpublishVolume should fail when no volume id is provided",
    "volume lifecycle should be idempotent",
    "volume lifecycle should work",
];
const CONTROLLER: &str = "[It] Controller Service [Controller Server] ";

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

/// The value of an attribute in a line of JUnit's XML.
fn attribute<'a>(line: &'a str, name: &str) -> Option<&'a str> {
    line.split_once(&format!(" {name}=\""))?.1.split('"').next()
}

/// Runs the whole suite, once for each kind of volume.
fn run(access_type: &str) {
    let (suite, node) = (suite(), Node::new());
    xfs::mount(&node.path("volumes"), 64 << 30);
    let daemon = node.start(None);
    let written = |name: &str, text: &str| {
        fs::write(node.path(name), text).unwrap();
        node.path(name).display().to_string()
    };
    let report = node.path("junit.xml");
    let output = Command::new(suite)
        .arg(format!("--csi.endpoint=unix://{}", daemon.socket().display()))
        .arg(format!("--csi.mountdir={}", node.path("mount").display()))
        .arg(format!("--csi.stagingdir={}", node.path("staging").display()))
        .arg(format!("--csi.testvolumemutableparameters={}", written("m.yaml", "compression: zstd\nsync: always\n")))
        .arg(format!("--csi.testsnapshotparameters={}", written("s.yaml", "allowCopy: \"false\"\n")))
        .arg(format!("--csi.testvolumeaccesstype={access_type}"))
        .args(["--csi.testvolumesize=1073741824", "--csi.testvolumeexpandsize=2147483649", "--ginkgo.no-color"])
        .arg(format!("--ginkgo.junit-report={}", report.display()))
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}\n{}", node.log());

    let report = fs::read_to_string(report).unwrap();
    let cases = report.lines().filter(|line| line.trim_start().starts_with("<testcase "));
    let cases: Vec<_> =
        cases.map(|line| (attribute(line, "name").unwrap(), attribute(line, "status").unwrap())).collect();
    let of = |status: &str| {
        cases.iter().filter(|(_, found)| *found == status).map(|(name, _)| *name).collect::<BTreeSet<_>>()
    };
    println!("csi-sanity {access_type}: {} passed, {} skipped", of("passed").len(), of("skipped").len());
    let skipped = of("skipped").into_iter().map(|name| name.strip_prefix(CONTROLLER).unwrap_or(name));
    assert_eq!(skipped.collect::<Vec<_>>(), SKIPPED);
    assert_eq!(of("passed").len(), PASSED);

    assert_eq!(node.names("volumes"), [""; 0], "every device and every copy is gone");
    assert_eq!(node.names("state/volumes"), [""; 0], "every record is gone");
    assert_eq!(node.names("state/snapshots"), [""; 0], "every record is gone");
    assert_eq!(node.names("direct-volumes"), [""; 0], "every entry is gone");
    let socket = daemon.socket().to_owned();
    assert!(daemon.terminate().success());
    assert!(!socket.exists(), "the socket is gone with its process");
}

#[test]
fn csi_sanity_finds_nothing_to_complain_about() {
    own_mounts::in_own_mounts("file_systems");
}

#[test]
#[ignore = "what the test above runs in a mount namespace of its own"]
fn file_systems() {
    run("mount");
}

#[test]
fn csi_sanity_finds_nothing_to_complain_about_with_block_devices() {
    own_mounts::in_own_mounts("block_devices");
}

#[test]
#[ignore = "what the test above runs in a mount namespace of its own"]
fn block_devices() {
    run("block");
}
