//! That the node's udev, by the rules that Debian ships, looks into other loop devices and not into ours. Needs root, loop
//! devices, unshare(1), and udev installed; it need not run, and where it does it learns nothing of this: the test runs in
//! a child with a /run of its own.

#![allow(clippy::unwrap_used)]

#[path = "support/own_mounts.rs"]
mod own_mounts;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::mount::{MountFlags, mount};
use zpod_driver::kata::{LoopDevice, udev_rule};

/// Where udev looks for rules of this boot.
const UDEV: &str = "/run/udev";

/// What udev would do for a loop device.
fn simulate(device: &LoopDevice) -> String {
    let sys = Path::new("/sys/block").join(device.path().file_name().unwrap());
    // What udevadm found of an earlier device of this number it would take for properties of this one; udev itself doesn't.
    let number = fs::read_to_string(sys.join("dev")).unwrap();
    let _ = fs::remove_file(Path::new(UDEV).join("data").join(format!("b{}", number.trim())));
    let output = Command::new("udevadm").arg("test").arg(sys).output().unwrap();
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text).into_owned();
    assert!(text.contains("60-persistent-storage.rules"), "udev's own rules are missing: {text}");
    text
}

/// What a tenant may have written: the signature of a file system, where blkid looks for it.
fn image(dir: &Path) -> PathBuf {
    let path = dir.join("volume.img");
    fs::File::create(&path).unwrap().set_len(320 << 20).unwrap();
    assert!(Command::new("mkfs.xfs").arg("-q").arg(&path).status().unwrap().success());
    path
}

#[test]
fn udev_does_not_look_into_the_devices_of_volumes() {
    own_mounts::in_own_mounts("child");
}

#[test]
#[ignore = "what the other test runs in a process of its own"]
fn child() {
    mount("tmpfs", "/run", "tmpfs", MountFlags::empty(), None).unwrap();
    fs::create_dir_all(UDEV).unwrap();
    let (ours, others) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    // Kubelet's is upon ours, by a path like this.
    let kubelets = others.path().join("plugins/kubernetes.io/csi/volumeDevices/pv-1/dev");
    fs::create_dir_all(&kubelets).unwrap();
    let images = [image(ours.path()), image(&kubelets), image(others.path())];
    let devices = images.each_ref().map(|path| LoopDevice::attach(path, true).unwrap().0);
    for device in &devices {
        let said = simulate(device);
        assert!(said.contains("ID_FS_TYPE=xfs"), "nothing to be kept from udev: {said}");
    }
    udev_rule::write(Path::new(UDEV), &[ours.path()]).unwrap().unwrap();
    let [our, kubelet, other] = devices.each_ref().map(simulate);
    for said in [our, kubelet] {
        assert!(!said.contains("ID_FS_"), "{said}");
        assert!(said.contains("UDISKS_IGNORE=1") && said.contains("SYSTEMD_READY=0"), "{said}");
    }
    assert!(other.contains("ID_FS_TYPE=xfs"), "{other}");
    for path in &images {
        LoopDevice::detach(path).unwrap();
    }
}
