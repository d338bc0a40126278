//! A node as kata-deploy 4.1.0 leaves it, as small as it can be.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write as _;
use std::os::unix::fs::{MetadataExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::Duration;

use zpod_image::Archive;
use zpod_installer::install::Places;

pub(crate) const KATA: &str = "opt/kata/share/kata-containers";

pub(crate) struct Node {
    dir: tempfile::TempDir,
}

impl Node {
    /// Nothing of Kata, and a guest to install.
    pub(crate) fn bare() -> Self {
        let node = Self { dir: tempfile::tempdir().unwrap() };
        fs::create_dir(node.dir.path().join("host")).unwrap();
        node.put_guest(1);
        node
    }

    /// With Kata.
    pub(crate) fn new() -> Self {
        let node = Self::bare();
        node.deploy_kata("4.1.0", 1);
        node
    }

    pub(crate) fn host(&self, path: &str) -> PathBuf {
        self.dir.path().join("host").join(path)
    }

    pub(crate) fn guest_dir(&self) -> PathBuf {
        self.dir.path().join("guest")
    }

    pub(crate) fn put(&self, path: &str, bytes: impl AsRef<[u8]>) {
        let place = self.host(path);
        fs::create_dir_all(place.parent().unwrap()).unwrap();
        // As kata-deploy's `extract_tarball` does it: removed, then written.
        let _ = fs::remove_file(&place);
        fs::write(place, bytes).unwrap();
    }

    /// The layout of kata-deploy's component tarballs for the shim qemu-runtime-rs.
    pub(crate) fn deploy_kata(&self, version: &str, content: u8) {
        self.put("opt/kata/versions.yaml", "assets:\n");
        let shim = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x03\0\x3e\0rest";
        self.put("opt/kata/runtime-rs/bin/containerd-shim-kata-v2", shim);
        self.put(
            "opt/kata/share/defaults/kata-containers/runtime-rs/configuration-qemu-runtime-rs.toml",
            "[hypervisor.qemu]\npath = \"/opt/kata/bin/qemu-system-x86_64\"\nkernel = \
             \"/opt/kata/share/kata-containers/vmlinuz.container\"\nimage = \
             \"/opt/kata/share/kata-containers/kata-containers.img\"\n",
        );
        self.put(&format!("{KATA}/kata-ubuntu-resolute.image"), "MBR");
        self.link(&format!("{KATA}/kata-containers.img"), "kata-ubuntu-resolute.image");
        self.put(&format!("{KATA}/kata-ubuntu-resolute.initrd"), kata_initrd(version, content));
        self.link(&format!("{KATA}/kata-containers-initrd.img"), "kata-ubuntu-resolute.initrd");
    }

    pub(crate) fn link(&self, path: &str, target: &str) {
        let place = self.host(path);
        fs::create_dir_all(place.parent().unwrap()).unwrap();
        let _ = fs::remove_file(&place);
        symlink(target, place).unwrap();
    }

    pub(crate) fn put_guest(&self, content: u8) {
        let dir = self.guest_dir();
        fs::create_dir_all(&dir).unwrap();
        let mut kernel = vec![content; 4096];
        kernel[0x202..0x206].copy_from_slice(b"HdrS");
        fs::write(dir.join("vmlinuz"), kernel).unwrap();
        let overlay = Archive::new().file("zpod/init", [content; 64], 0o755).to_zstd().unwrap();
        fs::write(dir.join("overlay.cpio.zst"), overlay).unwrap();
    }

    pub(crate) fn places(&self) -> Places {
        Places {
            host_root: self.host(""),
            guest_dir: self.guest_dir(),
            kata_dir: "/opt/kata".into(),
            install_dir: "/opt/zpod".into(),
            kata_initrd: None,
            settle: Duration::ZERO,
            lock_wait: Duration::from_secs(10),
        }
    }

    /// The program, with this node.
    pub(crate) fn installer(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_zpod-installer"));
        command.args(arguments).arg("--host-root").arg(self.host("")).arg("--guest-dir").arg(self.guest_dir());
        command.args(["--settle", "0"]).arg("--termination-log").arg(self.dir.path().join("termination-log"));
        command.env_remove("KUBERNETES_SERVICE_HOST").env("NODE_NAME", "node-a");
        command
    }

    pub(crate) fn run(&self, arguments: &[&str]) -> Output {
        self.installer(arguments).output().unwrap()
    }

    /// Makes the file that Kubernetes would make, and reads it after a run.
    pub(crate) fn termination_message(&self, arguments: &[&str]) -> (Option<i32>, serde_json::Value) {
        let log = self.dir.path().join("termination-log");
        fs::write(&log, "").unwrap();
        let output = self.run(arguments);
        (output.status.code(), serde_json::from_slice(&fs::read(log).unwrap()).unwrap())
    }

    pub(crate) fn read(&self, path: &str) -> Vec<u8> {
        fs::read(self.host(path)).unwrap()
    }

    /// What has to be installed, from what is on the node now.
    pub(crate) fn expected_initrd(&self) -> Vec<u8> {
        let mut bytes = self.read(&format!("{KATA}/kata-containers-initrd.img"));
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes.extend(fs::read(self.guest_dir().join("overlay.cpio.zst")).unwrap());
        bytes
    }

    /// Kernel and initrd of the version in use are those of now.
    pub(crate) fn assert_installed(&self) {
        assert_eq!(self.read("opt/zpod/guest/vmlinuz"), fs::read(self.guest_dir().join("vmlinuz")).unwrap());
        assert_eq!(self.read("opt/zpod/guest/initrd"), self.expected_initrd());
    }

    /// Every path below the host root, with what tells whether it was touched.
    pub(crate) fn snapshot(&self) -> BTreeMap<PathBuf, (u64, i64, i64)> {
        let mut found = BTreeMap::new();
        let mut todo = vec![self.host("")];
        while let Some(dir) = todo.pop() {
            for entry in fs::read_dir(dir).unwrap() {
                let path = entry.unwrap().path();
                let status = fs::symlink_metadata(&path).unwrap();
                found.insert(path.clone(), (status.ino(), status.mtime(), status.mtime_nsec()));
                if status.is_dir() {
                    todo.push(path);
                }
            }
        }
        found
    }

    pub(crate) fn path(&self) -> &Path {
        self.dir.path()
    }
}

/// `gzip -9` of a cpio archive with osbuilder's summary, as initrd_builder.sh makes it.
pub(crate) fn kata_initrd(version: &str, content: u8) -> Vec<u8> {
    let summary = format!(
        "---\nosbuilder:\n  url: \"https://github.com/kata-containers/kata-containers/tools/osbuilder\"\n  version: \
         \"{version}-7c6ba40c54\"\narchitecture: \"x86_64\"\nbase-distro:\n  name: \"ubuntu\"\n  version: \"resolute\"\n\
         agent:\n  name: \"kata-agent\"\n  version: \"unknown\"\n  agent-is-init-daemon: \"yes\"\n"
    );
    let mut archive = Archive::new();
    archive.file("sbin/init", [content; 3001], 0o755).symlink("init", "/sbin/init");
    archive.file("var/lib/osbuilder/osbuilder.yaml", summary, 0o644);
    gzip(&archive.to_cpio().unwrap())
}

pub(crate) fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}
