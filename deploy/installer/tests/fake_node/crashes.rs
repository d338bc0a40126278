//! Killed anywhere, it leaves a node on which the next run ends well, and on which pods could start all the time.

use std::fs;
use std::os::unix::fs::symlink;
use std::time::{Duration, Instant};

use crate::node::Node;
use zpod_image::Archive;
use zpod_installer::install::install;
use zpod_installer::uninstall::uninstall;

/// Enough that a run takes a while, and kills hit all of it.
const LARGE: usize = 1 << 20;

fn upgrade(node: &Node, content: u8) {
    let noise = (0..LARGE).map(|at| ((at * at) >> 7) as u8 ^ content).collect::<Vec<_>>();
    let mut archive = Archive::new();
    archive.file("init", [content; 3001], 0o755).file("usr/noise", noise, 0o644);
    node.put("opt/kata/share/kata-containers/kata-ubuntu-resolute.initrd", archive.to_cpio().unwrap());
}

/// The version in use is whole, whichever it is: kernel and initrd go by the same stamp.
fn assert_consistent(node: &Node) {
    let Ok(text) = fs::read(node.host("opt/zpod/guest/manifest.json")) else {
        assert!(!node.host("opt/zpod/guest").exists(), "a link to nothing");
        return;
    };
    let stamp = zpod_installer::stamp::Stamp::parse(&text).unwrap();
    for name in ["vmlinuz", "initrd"] {
        let bytes = node.read(&format!("opt/zpod/guest/{name}"));
        assert_eq!(zpod_image::manifest::Output::of(&bytes), stamp.files[name], "{name}");
    }
}

/// How long one of these runs takes.
fn time(node: &Node, arguments: &[&str]) -> Duration {
    let started = Instant::now();
    assert!(node.run(arguments).status.success());
    started.elapsed()
}

fn kill_after(node: &Node, arguments: &[&str], delay: Duration) {
    let mut child = node.installer(arguments).stderr(std::process::Stdio::null()).spawn().unwrap();
    std::thread::sleep(delay);
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn an_installation_killed_at_any_time_is_finished_by_the_next() {
    const KILLS: u32 = 24;
    let node = Node::new();
    upgrade(&node, 0);
    let takes = time(&node, &["install"]);
    for kill in 0..KILLS {
        upgrade(&node, u8::try_from(kill % 250 + 1).unwrap());
        kill_after(&node, &["install"], takes * kill / KILLS);
        assert_consistent(&node);
        if kill % 4 == 3 {
            install(&node.places()).unwrap();
            node.assert_installed();
            assert_consistent(&node);
            let names = |dir: &str| fs::read_dir(node.host(dir)).unwrap().count();
            assert_eq!((names("opt/zpod"), names("opt/zpod/versions")), (2, 2));
        }
    }
}

#[test]
fn an_uninstallation_killed_at_any_time_is_finished_by_the_next() {
    const KILLS: u32 = 20;
    let node = Node::new();
    install(&node.places()).unwrap();
    let takes = time(&node, &["uninstall"]);
    for kill in 0..KILLS {
        install(&node.places()).unwrap();
        kill_after(&node, &["uninstall"], takes * kill / KILLS);
        assert!(uninstall(&node.places()).unwrap().left.is_empty());
        assert!(!node.host("opt/zpod").exists());
    }
}

#[test]
fn what_a_killed_installer_can_leave_is_cleared_by_the_next() {
    let node = Node::new();
    let places = node.places();
    let staging = node.host("opt/zpod/versions/.staging");
    let link = node.host("opt/zpod/.guest");
    let leave = || {
        fs::create_dir_all(&staging).unwrap();
        fs::write(staging.join("initrd"), "half").unwrap();
        symlink("versions/0123456789abcdef", &link).unwrap();
    };
    // Before there was anything, when all is up to date, and at the end.
    leave();
    install(&places).unwrap();
    assert!(!staging.exists() && !link.is_symlink());
    leave();
    install(&places).unwrap();
    assert!(!staging.exists() && !link.is_symlink());
    leave();
    // A version whose removal got as far as its stamp.
    fs::create_dir(node.host("opt/zpod/versions/0123456789abcdef")).unwrap();
    assert!(uninstall(&places).unwrap().left.is_empty());
    assert!(!node.host("opt/zpod").exists());
}

/// One that was killed after the link was replaced, and before old versions were removed.
#[test]
fn versions_that_a_killed_installer_left_are_removed_by_the_next() {
    let node = Node::new();
    let places = node.places();
    install(&places).unwrap();
    for old in ["0123456789abcdef", "0123456789abcdee"] {
        fs::create_dir(node.host("opt/zpod/versions").join(old)).unwrap();
        // Longer than a tick of the clock that files are dated by.
        std::thread::sleep(Duration::from_millis(30));
    }
    install(&places).unwrap();
    node.assert_installed();
    assert_eq!(fs::read_dir(node.host("opt/zpod/versions")).unwrap().count(), 2, "the one in use and the latest other");
    assert!(node.host("opt/zpod/versions/0123456789abcdee").exists());
}

#[test]
fn a_version_that_was_made_but_not_switched_to_is_taken() {
    let node = Node::new();
    let id = install(&node.places()).unwrap().stamp().id();
    fs::remove_file(node.host("opt/zpod/guest")).unwrap();
    assert_eq!(install(&node.places()).unwrap().stamp().id(), id);
    node.assert_installed();
}
