//! The installer on a node that kata-deploy has been to.

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::time::Duration;

use crate::node::{KATA, Node};
use zpod_image::Archive;
use zpod_installer::Error;
use zpod_installer::install::{Outcome, Reason, install};
use zpod_installer::uninstall::uninstall;

fn reinstalls(node: &Node, reason: &Reason) {
    let outcome = install(&node.places()).unwrap();
    assert!(matches!(&outcome, Outcome::Installed { because, .. } if because == reason), "{outcome:?}");
    node.assert_installed();
}

fn is_up_to_date(node: &Node) {
    let before = node.snapshot();
    assert!(matches!(install(&node.places()).unwrap(), Outcome::UpToDate(_)));
    assert_eq!(node.snapshot(), before);
}

#[test]
fn katas_initrd_gets_our_overlay_and_the_kernel_comes_with_it() {
    let node = Node::new();
    let outcome = install(&node.places()).unwrap();
    node.assert_installed();
    let stamp = outcome.stamp();
    assert_eq!(stamp.kata_version.as_deref(), Some("4.1.0-7c6ba40c54"));
    assert_eq!(stamp.kata.real_path, Path::new("/opt/kata/share/kata-containers/kata-ubuntu-resolute.initrd"));
    for name in ["vmlinuz", "initrd", "manifest.json"] {
        let mode = fs::metadata(node.host("opt/zpod/guest").join(name)).unwrap().permissions().mode();
        assert_eq!(mode & 0o7777, 0o644, "{name}");
    }
}

#[test]
fn nothing_is_rewritten_when_all_is_up_to_date() {
    let node = Node::new();
    install(&node.places()).unwrap();
    is_up_to_date(&node);
}

#[test]
fn an_upgrade_of_kata_gives_a_new_initrd_and_keeps_the_one_before() {
    let node = Node::new();
    let first = install(&node.places()).unwrap().stamp().id();
    node.deploy_kata("4.2.0", 2);
    reinstalls(&node, &Reason::KataChanged);
    assert!(node.host("opt/zpod/versions").join(&first).join("initrd").exists());
    is_up_to_date(&node);
    // And only the one before.
    node.deploy_kata("4.3.0", 3);
    reinstalls(&node, &Reason::KataChanged);
    assert!(!node.host("opt/zpod/versions").join(&first).exists());
    assert_eq!(fs::read_dir(node.host("opt/zpod/versions")).unwrap().count(), 2);
    // A downgrade finds its version there.
    node.deploy_kata("4.2.0", 2);
    reinstalls(&node, &Reason::KataChanged);
    is_up_to_date(&node);
}

#[test]
fn a_new_release_of_zpod_replaces_the_guest() {
    let node = Node::new();
    install(&node.places()).unwrap();
    node.put_guest(2);
    reinstalls(&node, &Reason::GuestChanged);
    is_up_to_date(&node);
}

#[test]
fn kata_installed_again_with_the_same_bytes_costs_a_new_stamp_and_nothing_more() {
    let node = Node::new();
    install(&node.places()).unwrap();
    let initrd = node.host("opt/zpod/guest/initrd");
    let before = fs::metadata(&initrd).unwrap().modified().unwrap();
    node.deploy_kata("4.1.0", 1);
    assert!(matches!(install(&node.places()).unwrap(), Outcome::UpToDate(_)));
    assert_eq!(fs::metadata(&initrd).unwrap().modified().unwrap(), before);
    is_up_to_date(&node);
}

#[test]
fn damage_is_noticed_and_repaired() {
    let node = Node::new();
    install(&node.places()).unwrap();
    for (path, what) in [
        ("opt/zpod/guest/initrd", Some("initrd has been altered")),
        ("opt/zpod/guest/vmlinuz", Some("vmlinuz has been altered")),
        ("opt/zpod/guest/vmlinuz", None),
        ("opt/zpod/guest/manifest.json", None),
    ] {
        match what {
            Some(_) => {
                let mut bytes = node.read(path);
                bytes[10] ^= 1;
                fs::write(node.host(path), bytes).unwrap();
            }
            None => fs::remove_file(node.host(path)).unwrap(),
        }
        let outcome = install(&node.places()).unwrap();
        let Outcome::Installed { because: Reason::Damaged(found), .. } = outcome else { panic!("{outcome:?}") };
        assert!(what.is_none_or(|what| what == found), "{found}");
        node.assert_installed();
        is_up_to_date(&node);
    }
    fs::remove_file(node.host("opt/zpod/guest")).unwrap();
    reinstalls(&node, &Reason::Absent);
}

#[test]
fn what_goes_wrong_leaves_what_was_there() {
    let node = Node::new();
    install(&node.places()).unwrap();
    let before = (node.read("opt/zpod/guest/initrd"), node.read("opt/zpod/guest/manifest.json"));
    let path = format!("{KATA}/kata-ubuntu-resolute.initrd");
    let whole = crate::node::kata_initrd("4.2.0", 2);
    let too_old = crate::node::kata_initrd("3.25.0", 1);
    let empty = crate::node::gzip(&Archive::new().file("etc/x", *b"1", 0o644).to_cpio().unwrap());
    let twice = [whole.clone(), fs::read(node.guest_dir().join("overlay.cpio.zst")).unwrap()].concat();
    let cases: [(&[u8], &str); 6] = [
        (&whole[..whole.len() - 9], "KataUnfinished"),
        (b"not an initrd", "KataInitrdUnusable"),
        (&too_old, "KataTooOld"),
        (&empty, "KataInitrdUnusable"),
        (&twice, "KataInitrdUnusable"),
        (b"", "KataUnfinished"),
    ];
    for (bytes, name) in cases {
        node.put(&path, bytes);
        let error = install(&node.places()).unwrap_err();
        assert_eq!(error.name(), name, "{error}");
        assert_eq!((node.read("opt/zpod/guest/initrd"), node.read("opt/zpod/guest/manifest.json")), before);
        assert_eq!(fs::read_dir(node.host("opt/zpod/versions")).unwrap().count(), 1, "{name}");
    }
    fs::remove_dir_all(node.host("opt/kata")).unwrap();
    assert!(matches!(install(&node.places()), Err(Error::NoKata { .. })));
    assert_eq!(node.read("opt/zpod/guest/initrd"), before.0);
}

#[test]
fn an_initrd_that_is_still_being_written_is_waited_for() {
    let node = Node::new();
    let mut places = node.places();
    places.settle = Duration::from_secs(1);
    // Without checksums, only time tells.
    let whole = Archive::new().file("init", vec![7; 100_000], 0o755).to_cpio().unwrap();
    let path = node.host(&format!("{KATA}/kata-ubuntu-resolute.initrd"));
    fs::write(&path, "").unwrap();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for piece in whole.chunks(whole.len() / 5 + 1) {
                fs::File::options().append(true).open(&path).unwrap().write_all(piece).unwrap();
                std::thread::sleep(Duration::from_millis(300));
            }
        });
        install(&places).unwrap();
    });
    assert_eq!(node.read("opt/zpod/guest/initrd"), node.expected_initrd());
}

#[test]
fn what_is_not_ours_is_not_touched() {
    let node = Node::new();
    node.put("opt/zpod/guest/vmlinuz", "somebody's");
    let before = node.snapshot();
    assert!(matches!(install(&node.places()), Err(Error::InTheWay { .. })));
    assert_eq!(node.snapshot(), before);
    fs::remove_dir_all(node.host("opt/zpod")).unwrap();
    node.link("opt/zpod/guest", "/etc");
    assert!(matches!(install(&node.places()), Err(Error::InTheWay { .. })));
    assert_eq!(uninstall(&node.places()).unwrap().left, [Path::new("/opt/zpod/guest")]);
    assert!(node.host("opt/zpod/guest").is_symlink());
}

#[test]
fn an_uninstallation_leaves_the_node_as_it_was() {
    let node = Node::new();
    let before = node.snapshot();
    install(&node.places()).unwrap();
    node.deploy_kata("4.2.0", 2);
    let kata = node.snapshot();
    install(&node.places()).unwrap();
    assert_eq!(uninstall(&node.places()).unwrap().versions.len(), 2);
    assert_eq!(node.snapshot().keys().collect::<Vec<_>>(), before.keys().collect::<Vec<_>>());
    assert!(node.snapshot().iter().all(|(path, status)| path.ends_with("opt") || kata[path] == *status));
    assert!(uninstall(&node.places()).unwrap().versions.is_empty());
}

#[test]
fn an_uninstallation_leaves_what_others_put_there_and_names_it() {
    let node = Node::new();
    let id = install(&node.places()).unwrap().stamp().id();
    node.put("opt/zpod/notes", "1");
    node.put("opt/zpod/versions/mine/file", "2");
    node.put(&format!("opt/zpod/versions/{id}/theirs"), "3");
    let removal = uninstall(&node.places()).unwrap();
    let mut left = removal.left;
    left.sort();
    let id = format!("/opt/zpod/versions/{id}");
    assert_eq!(left, ["/opt/zpod/notes", &id, "/opt/zpod/versions/mine"].map(Path::new));
    assert_eq!(node.read(&format!("{}/theirs", &id[1..])), b"3");
    assert!(!node.host(&id[1..]).join("initrd").exists());
    assert!(!node.host("opt/zpod/guest").exists());
}

#[test]
fn two_installers_at_once_install_once() {
    let node = Node::new();
    let places = node.places();
    let outcomes: Vec<_> = std::thread::scope(|scope| {
        let runs: Vec<_> = (0..4).map(|_| scope.spawn(|| install(&places).unwrap())).collect();
        runs.into_iter().map(|run| run.join().unwrap()).collect()
    });
    assert_eq!(outcomes.iter().filter(|outcome| matches!(outcome, Outcome::Installed { .. })).count(), 1);
    node.assert_installed();
}

#[test]
fn a_directory_for_us_that_is_a_link_stays_on_the_node() {
    let node = Node::new();
    fs::create_dir_all(node.host("var/lib/zpod-guest")).unwrap();
    node.link("opt/zpod", "/var/lib/zpod-guest");
    install(&node.places()).unwrap();
    node.assert_installed_at("var/lib/zpod-guest");
}

impl Node {
    fn assert_installed_at(&self, dir: &str) {
        assert_eq!(self.read(&format!("{dir}/guest/initrd")), self.expected_initrd());
    }
}
