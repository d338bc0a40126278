use std::fs;
use std::os::unix::fs::symlink;
use std::time::SystemTime;

use super::*;

struct Node(tempfile::TempDir);

impl Node {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn put(&self, path: &str, bytes: impl AsRef<[u8]>) -> &Self {
        let place = self.0.path().join(path.trim_start_matches('/'));
        fs::create_dir_all(place.parent().unwrap()).unwrap();
        fs::write(place, bytes).unwrap();
        self
    }

    fn link(&self, path: &str, target: &str) -> &Self {
        let place = self.0.path().join(path.trim_start_matches('/'));
        fs::create_dir_all(place.parent().unwrap()).unwrap();
        symlink(target, place).unwrap();
        self
    }

    fn find(&self) -> Result<KataInitrd> {
        self.find_with(None)
    }

    fn find_with(&self, initrd: Option<&str>) -> Result<KataInitrd> {
        let initrd = initrd.map(Path::new);
        let search = Search { kata_dir: Path::new("/opt/kata"), install_dir: Path::new("/opt/zpod"), initrd };
        search.find(&HostRoot::open(self.0.path()).unwrap())
    }

    fn finds(&self, real_path: &str) {
        assert_eq!(self.find().unwrap().identity.real_path, Path::new(real_path));
    }
}

const DEFAULT: &str = "/opt/kata/share/kata-containers/kata-containers-initrd.img";
const DEFAULTS: &str = "/opt/kata/share/defaults/kata-containers";

fn names(path: &str) -> String {
    format!("[hypervisor.qemu]\ninitrd = \"{path}\"\n")
}

#[test]
fn kata_deploys_initrd_is_found_through_its_link() {
    let node = Node::new();
    node.put("/opt/kata/share/kata-containers/kata-ubuntu-resolute.initrd", "1")
        .link(DEFAULT, "kata-ubuntu-resolute.initrd");
    node.put(&format!("{DEFAULTS}/configuration-qemu.toml"), "[hypervisor.qemu]\nimage = \"/x\"\n");
    node.finds("/opt/kata/share/kata-containers/kata-ubuntu-resolute.initrd");
    assert_eq!(node.find().unwrap().identity.path, Path::new(DEFAULT));
}

#[test]
fn an_initrd_that_a_base_configuration_names_goes_before_the_usual_one() {
    let node = Node::new();
    node.put(DEFAULT, "1").put("/srv/own.img", "2");
    node.put(&format!("{DEFAULTS}/runtime-rs/configuration-qemu-runtime-rs.toml"), names("/srv/own.img"));
    node.finds("/srv/own.img");
    // The configuration that our default runtime is a copy of is asked first.
    node.put("/srv/go.img", "3").put(&format!("{DEFAULTS}/configuration-qemu.toml"), names("/srv/go.img"));
    node.finds("/srv/go.img");
}

#[test]
fn a_configuration_of_no_use_is_passed_over() {
    let node = Node::new();
    node.put(DEFAULT, "1");
    node.put(&format!("{DEFAULTS}/configuration-qemu.toml"), names("/nowhere.img"));
    node.put(&format!("{DEFAULTS}/configuration-clh.toml"), "no = [toml");
    node.finds(DEFAULT);
}

#[test]
fn packages_of_distributions_are_found_without_kata_deploy() {
    let node = Node::new();
    node.put("/usr/share/kata-containers/kata-containers-initrd.img", "1");
    node.finds("/usr/share/kata-containers/kata-containers-initrd.img");
    node.put("/var/cache/kata-containers/osbuilder-images/6.17/fedora.initrd", "2");
    node.put(
        "/etc/kata-containers/configuration.toml",
        names("/var/cache/kata-containers/osbuilder-images/6.17/fedora.initrd"),
    );
    node.finds("/var/cache/kata-containers/osbuilder-images/6.17/fedora.initrd");
}

#[test]
fn another_katas_initrd_is_not_taken_while_kata_deploy_replaces_its_own() {
    let node = Node::new();
    node.put("/usr/share/kata-containers/kata-containers-initrd.img", "1");
    node.put("/opt/kata/share/kata-containers/kata-ubuntu-resolute.initrd", "2");
    assert!(matches!(node.find(), Err(Error::NoKata { .. })));
}

#[test]
fn our_own_initrd_is_never_taken_for_katas() {
    let node = Node::new();
    node.put("/opt/zpod/versions/1/initrd", "ours").link("/opt/zpod/guest", "versions/1");
    node.put("/etc/kata-containers/configuration.toml", names("/opt/zpod/guest/initrd"));
    let error = node.find().unwrap_err();
    assert!(matches!(&error, Error::NoKata { .. }) && error.to_string().contains("zpod's own"), "{error}");
    node.put(DEFAULT, "1");
    node.finds(DEFAULT);
}

#[test]
fn an_initrd_that_was_named_is_the_only_one_looked_at() {
    let node = Node::new();
    node.put(DEFAULT, "1").put("/srv/own.img", "2");
    assert_eq!(node.find_with(Some("/srv/own.img")).unwrap().identity.path, Path::new("/srv/own.img"));
    let error = node.find_with(Some("/srv/missing.img")).unwrap_err().to_string();
    assert!(error.contains("/srv/missing.img (--kata-initrd)"), "{error}");
}

#[test]
fn a_node_without_kata_and_one_with_only_an_image_are_told_apart() {
    let node = Node::new();
    assert!(matches!(node.find(), Err(Error::NoKata { looked_at }) if looked_at.len() == 3));
    node.link(DEFAULT, "kata-missing.initrd");
    assert!(matches!(node.find(), Err(Error::NoKata { .. })));
    node.put("/opt/kata/share/kata-containers/kata-containers.img", "1");
    assert!(matches!(node.find(), Err(Error::OnlyImage { .. })));
}

#[test]
fn a_kata_for_another_machine_is_refused() {
    let node = Node::new();
    let mut shim = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\xb7\0".to_vec();
    node.put(DEFAULT, "1").put("/opt/kata/bin/containerd-shim-kata-v2", &shim);
    assert!(matches!(node.find(), Err(Error::Architecture { found, .. }) if found == "aarch64"));
    shim[18] = 62;
    node.put("/opt/kata/bin/containerd-shim-kata-v2", &shim);
    node.find().unwrap();
}

#[test]
fn a_version_file_left_by_an_earlier_kata_is_not_believed() {
    let node = Node::new();
    node.put("/opt/kata/VERSION", "3.20.0\n").put(DEFAULT, "1");
    assert_eq!(node.find().unwrap().version.as_deref(), Some("3.20.0"));
    let old = SystemTime::now() - Duration::from_secs(90 * 24 * 3600);
    fs::File::options().append(true).open(node.0.path().join("opt/kata/VERSION")).unwrap().set_modified(old).unwrap();
    assert_eq!(node.find().unwrap().version, None);
}

#[test]
fn a_replaced_initrd_is_another_one() {
    let node = Node::new();
    node.put("/opt/kata/share/kata-containers/kata-a.initrd", "1")
        .put("/opt/kata/share/kata-containers/kata-b.initrd", "1");
    node.link(DEFAULT, "kata-a.initrd");
    let root = HostRoot::open(node.0.path()).unwrap();
    let found = node.find().unwrap();
    assert!(found.is_unchanged(&root));
    fs::remove_file(node.0.path().join(&DEFAULT[1..])).unwrap();
    assert!(!found.is_unchanged(&root));
    node.link(DEFAULT, "kata-b.initrd");
    assert!(!found.is_unchanged(&root));
}
