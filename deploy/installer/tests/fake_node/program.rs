//! The program, as Kubernetes and a person meet it.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::node::Node;
use zpod_installer::watch::{Look, Watch};

fn check(node: &Node) -> (Option<i32>, String) {
    let output = node.run(&["check"]);
    (output.status.code(), String::from_utf8(output.stdout).unwrap())
}

#[test]
fn kubernetes_is_told_what_happened() {
    let node = Node::new();
    let (code, message) = node.termination_message(&["install"]);
    assert_eq!((code, &message["reason"], &message["node"]), (Some(0), &"Installed".into(), &"node-a".into()));
    let (code, message) = node.termination_message(&["install"]);
    assert_eq!((code, &message["reason"]), (Some(0), &"UpToDate".into()));
    assert!(message["message"].as_str().unwrap().contains("/opt/zpod/guest/initrd"), "{message}");
    let (code, message) = node.termination_message(&["uninstall"]);
    assert_eq!((code, &message["reason"]), (Some(0), &"Removed".into()));
}

#[test]
fn every_failure_has_a_name_a_remedy_and_a_code() {
    let bare = Node::bare();
    let (code, message) = bare.termination_message(&["install"]);
    assert_eq!((code, &message["reason"]), (Some(3), &"KataMissing".into()));
    assert!(message["remedy"].as_str().unwrap().contains("kata-deploy"), "{message}");

    let node = Node::new();
    fs::remove_file(node.host(&format!("{}/kata-containers-initrd.img", crate::node::KATA))).unwrap();
    let (code, message) = node.termination_message(&["install"]);
    assert_eq!((code, &message["reason"]), (Some(3), &"KataInitrdMissing".into()));
    node.deploy_kata("3.19.1", 1);
    let (code, message) = node.termination_message(&["install"]);
    assert_eq!((code, &message["reason"]), (Some(4), &"KataTooOld".into()));
    assert!(message["message"].as_str().unwrap().contains("3.26.0 or later"), "{message}");
    fs::remove_dir_all(node.host("")).unwrap();
    let (code, message) = node.termination_message(&["install"]);
    assert_eq!((code, &message["reason"]), (Some(5), &"HostRootMissing".into()));
    let guestless = Node::new();
    fs::remove_file(guestless.guest_dir().join("vmlinuz")).unwrap();
    let (code, message) = guestless.termination_message(&["install"]);
    assert_eq!((code, &message["reason"]), (Some(6), &"GuestUnusable".into()));
    assert_eq!(node.run(&["install", "--kata-dir", "opt/kata"]).status.code(), Some(2));
}

#[test]
fn in_a_pod_the_directory_has_to_be_the_nodes() {
    let node = Node::new();
    // Here it is on the mount of the root, as a forgotten hostPath volume would be.
    let output = node.installer(&["install"]).env("KUBERNETES_SERVICE_HOST", "10.96.0.1").output().unwrap();
    let same_mount = fs::canonicalize(node.path()).is_ok_and(|path| !is_on_a_mount_below_root(&path));
    if same_mount {
        assert_eq!(output.status.code(), Some(5), "{}", String::from_utf8_lossy(&output.stderr));
        assert!(String::from_utf8_lossy(&output.stderr).contains("hostPath"));
    }
}

fn is_on_a_mount_below_root(path: &Path) -> bool {
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    mounts.lines().filter_map(|line| line.split(' ').nth(4)).any(|mount| mount != "/" && path.starts_with(mount))
}

#[test]
fn a_person_is_told_what_is_there() {
    let node = Node::new();
    let (code, text) = check(&node);
    assert!(
        code == Some(10) && text.contains("nothing was installed") && text.contains("zpod-installer install"),
        "{text}"
    );
    node.run(&["install"]);
    let (code, text) = check(&node);
    assert!(code == Some(0) && text.contains("up to date") && text.contains("Kata 4.1.0-7c6ba40c54"), "{text}");
    node.deploy_kata("4.2.0", 2);
    let (code, text) = check(&node);
    assert!(code == Some(11) && text.contains("Kata's initrd has changed"), "{text}");
    node.run(&["install"]);
    fs::write(node.host("opt/zpod/guest/initrd"), "short").unwrap();
    let (code, text) = check(&node);
    assert!(code == Some(12) && text.contains("initrd has 5 bytes"), "{text}");
    node.run(&["install"]);
    fs::remove_dir_all(node.host("opt/kata")).unwrap();
    let (code, text) = check(&node);
    assert!(code == Some(3) && text.contains("up to date") && text.contains("install Kata Containers"), "{text}");
    node.run(&["uninstall"]);
    let (code, text) = check(&node);
    assert!(code == Some(3) && text.contains("nothing was installed"), "{text}");
}

/// In namespaces of its own: a small disk, and a read-only one.
#[test]
fn a_full_disk_and_a_read_only_one_are_named() {
    let node = Node::new();
    node.put("opt/zpod/keep", "");
    for (options, reason, remedy) in
        [("size=64k", "DiskFull", "make room"), ("ro", "ReadOnlyFileSystem", "mount it writable")]
    {
        let log = node.path().join("termination-log");
        fs::write(&log, "").unwrap();
        let install = node.installer(&["install"]);
        let mut unshare = Command::new("unshare");
        unshare
            .args(["--map-root-user", "--mount", "sh", "-ec"])
            .arg("mount -t tmpfs -o \"$0\" zpod \"$1\"; shift; exec \"$@\"");
        unshare.arg(options).arg(node.host("opt/zpod")).arg(install.get_program()).args(install.get_args());
        let output = unshare.output().unwrap();
        assert_eq!(output.status.code(), Some(5), "{}", String::from_utf8_lossy(&output.stderr));
        let message: serde_json::Value = serde_json::from_slice(&fs::read(log).unwrap()).unwrap();
        assert_eq!(message["reason"], reason, "{message}");
        assert!(message["remedy"].as_str().unwrap().contains(remedy), "{message}");
    }
}

#[test]
fn a_watch_follows_kata_and_leaves_other_releases_alone() {
    let node = Node::new();
    let places = node.places();
    let mut watch = Watch::new(&places).unwrap();
    assert!(matches!(watch.look().unwrap(), Look::Renewed(_)));
    let before = node.snapshot();
    assert_eq!(watch.look().unwrap(), Look::Same);
    assert_eq!(node.snapshot(), before);

    node.deploy_kata("4.2.0", 2);
    assert!(matches!(watch.look().unwrap(), Look::Renewed(_)));
    node.assert_installed();

    fs::remove_file(node.host("opt/zpod/guest")).unwrap();
    assert!(matches!(watch.look().unwrap(), Look::Renewed(_)));
    node.assert_installed();

    // Nobody has told this watch to end: whatever ran an uninstaller beside it, new pods need a guest.
    node.run(&["uninstall"]);
    assert!(matches!(watch.look().unwrap(), Look::Renewed(_)));
    node.assert_installed();

    // Kata on its way out and in again: what is there stays.
    fs::remove_dir_all(node.host("opt/kata")).unwrap();
    assert_eq!(watch.look().unwrap_err().name(), "KataMissing");
    assert!(node.host("opt/zpod/guest/initrd").exists());
    node.deploy_kata("4.3.0", 3);
    assert!(matches!(watch.look().unwrap(), Look::Renewed(_)));

    node.put_guest(9);
    node.run(&["install"]);
    assert_eq!(watch.look().unwrap(), Look::Superseded);
    node.assert_installed();

    node.run(&["uninstall"]);
    assert_eq!(watch.look().unwrap(), Look::Superseded, "what another release installed is that one's to put back");
    assert!(!node.host("opt/zpod").exists());
}

#[test]
fn a_watch_ends_when_it_is_told_to() {
    let node = Node::new();
    let mut child = node.installer(&["watch", "--interval", "1"]).stderr(std::process::Stdio::null()).spawn().unwrap();
    wait_for("an installation", || node.host("opt/zpod/guest/initrd").exists());
    node.deploy_kata("4.2.0", 2);
    wait_for("another one", || node.read("opt/zpod/guest/initrd") == node.expected_initrd());
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

fn wait_for(what: &str, mut condition: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(120);
    while !condition() {
        assert!(Instant::now() < end, "no sign of {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}
