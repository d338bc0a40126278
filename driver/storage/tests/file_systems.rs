//! The facts about file systems that the file backing stands on, on real ones: XFS, btrfs and ext4 on loop devices, and
//! tmpfs. Needs root, mkfs.xfs, mkfs.btrfs and mkfs.ext4; where one is missing the test fails. Every test mounts in a
//! mount namespace of its own, in a child: mounts and loop devices are gone with it, however it ends.
#![allow(clippy::unwrap_used, reason = "clippy allows it in test functions only, not in what they call")]

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use zpod_storage::backing::file::{Fencing, FileBacking};
use zpod_storage::backing::{Backing, BackingError, DeviceSpec, Outcome};
use zpod_volume::{Bytes, DiskLayout, Provisioning, VolumeId};

const MIB: u64 = 1 << 20;

/// Runs one of the functions below in a mount namespace of its own.
fn in_own_mounts(what: &str) {
    let status = Command::new("unshare")
        .args(["--mount", "--propagation", "private"])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", "child", "--ignored", "--nocapture"])
        .env("ZPOD_TEST_WHAT", what)
        .stdin(Stdio::null())
        .status()
        .unwrap();
    assert!(status.success(), "{what}: {status} (root is needed)");
}

#[test]
#[ignore = "what the other tests run in a mount namespace of its own"]
fn child() {
    match std::env::var("ZPOD_TEST_WHAT").unwrap().as_str() {
        "xfs" => facts("xfs", true),
        "btrfs" => facts("btrfs", true),
        "ext4" => facts("ext4", false),
        "tmpfs" => facts("tmpfs", false),
        "full" => thick_on_a_full_disk(),
        "qemu" => qemu(),
        what => panic!("{what}?"),
    }
}

#[test]
fn the_file_backing_stands_on_facts_of_xfs() {
    in_own_mounts("xfs");
}

#[test]
fn the_file_backing_stands_on_facts_of_btrfs() {
    in_own_mounts("btrfs");
}

#[test]
fn the_file_backing_stands_on_facts_of_ext4() {
    in_own_mounts("ext4");
}

#[test]
fn the_file_backing_stands_on_facts_of_tmpfs() {
    in_own_mounts("tmpfs");
}

#[test]
fn a_thick_volume_that_the_disk_cannot_hold_is_refused_and_leaves_nothing() {
    in_own_mounts("full");
}

#[test]
fn one_kernel_at_a_time_a_disk_that_qemu_has_is_not_taken() {
    in_own_mounts("qemu");
}

/// A mounted file system. Unmounted at the end of the process's mount namespace at the latest.
struct Mount {
    dir: tempfile::TempDir,
    at: PathBuf,
}

impl Mount {
    fn new(kind: &'static str, mib: u64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let at = dir.path().join("mnt");
        std::fs::create_dir(&at).unwrap();
        let mount = Self { dir, at };
        if kind == "tmpfs" {
            run(Command::new("mount").args(["-t", "tmpfs", "-o", &format!("size={mib}m"), "zpod-test"]).arg(&mount.at));
        } else {
            File::create(mount.image()).unwrap().set_len(mib * MIB).unwrap();
            run(Command::new(format!("mkfs.{kind}")).arg("-q").arg(mount.image()));
            mount.mount();
        }
        mount
    }

    fn image(&self) -> PathBuf {
        self.dir.path().join("disk")
    }

    fn mount(&self) {
        run(Command::new("mount").args(["-o", "loop"]).arg(self.image()).arg(&self.at));
    }

    /// As a reboot does: nothing in caches.
    fn remount(&self) {
        run(Command::new("umount").arg(&self.at));
        self.mount();
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(&self.at).status();
    }
}

fn run(command: &mut Command) {
    let output = command.stdin(Stdio::null()).output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

fn spec(name: &str, mib: u64, disk_mib: u64, provisioning: Provisioning) -> DeviceSpec {
    let layout = DiskLayout { capacity: Bytes::mib(mib), partition: Bytes::mib(mib), disk: Bytes::mib(disk_mib) };
    DeviceSpec { id: VolumeId::from_name(name), layout, provisioning }
}

fn guest_writes(path: &Path, at: u64) {
    let file = File::options().write(true).open(path).unwrap();
    file.write_all_at(&[1; 4096], at).unwrap();
    file.sync_all().unwrap();
}

fn facts(kind: &'static str, reflink: bool) {
    let mount = Mount::new(kind, 1024);
    let open = || FileBacking::open(&mount.at, 1.0).unwrap();
    let backing = open();
    assert_eq!(backing.abilities().reflink, reflink);
    assert_eq!(backing.abilities().fencing, Fencing::Lease);
    assert_eq!(backing.abilities().nocow, kind == "btrfs");
    let (thin, thick) = (spec("thin", 64, 514, Provisioning::Thin), spec("thick", 64, 514, Provisioning::Thick));

    for spec in [thin, thick] {
        assert_eq!(backing.create(&spec).unwrap(), Outcome::Changed);
        let path = backing.device(spec.id).unwrap();
        assert!(!backing.ever_written(&spec).unwrap(), "{kind}: fresh {spec:?}");
        if kind != "tmpfs" {
            let mut bytes = vec![0; 1 << 20];
            File::open(&path).unwrap().read_exact_at(&mut bytes, MIB).unwrap();
            assert!(!backing.ever_written(&spec).unwrap(), "{kind}: read {spec:?}");
        }
        guest_writes(&path, DiskLayout::JOURNAL_OFFSET);
        assert!(!backing.ever_written(&spec).unwrap(), "{kind}: journal {spec:?}");

        let elsewhere = File::open(&path).unwrap();
        assert!(matches!(backing.exclusive(spec.id), Err(BackingError::InUse { .. })), "{kind}: open elsewhere");
        drop(elsewhere);
        let proof = backing.exclusive(spec.id).unwrap();
        backing.write_table(&spec, proof.as_ref()).unwrap();
        drop(proof);
        assert!(!backing.ever_written(&spec).unwrap(), "{kind}: table {spec:?}");

        guest_writes(&path, 40 * MIB);
        assert!(backing.ever_written(&spec).unwrap(), "{kind}: written {spec:?}");
    }
    assert!(backing.allocated(thick.id).unwrap() >= thick.layout.partition);
    assert!(backing.allocated(thin.id).unwrap() < Bytes::mib(2), "{kind}: thin stays thin");
    // A disk lengthened before its first use stays never written; one that was used keeps all it has.
    let fresh = spec("fresh", 16, 18, Provisioning::Thin);
    backing.create(&fresh).unwrap();
    let longer = spec("fresh", 32, 34, Provisioning::Thin);
    backing.grow(&longer).unwrap();
    assert!(!backing.ever_written(&longer).unwrap(), "{kind}: lengthened");

    let promised = |backing: &FileBacking| {
        let capacity = backing.capacity().unwrap();
        capacity.total.0 - capacity.available.0
    };
    assert_eq!(promised(&backing), (65 + 65 + 33) * MIB);
    drop(backing);
    if kind != "tmpfs" {
        mount.remount();
    }
    let backing = open();
    assert_eq!(promised(&backing), (65 + 65 + 33) * MIB, "{kind}: after a remount");
    for spec in [thin, thick] {
        assert_eq!(backing.create(&spec).unwrap(), Outcome::Unchanged);
        assert!(backing.ever_written(&spec).unwrap(), "{kind}: written, after a remount {spec:?}");
    }
    assert!(!backing.ever_written(&longer).unwrap(), "{kind}: lengthened, after a remount");
    for spec in [thin, thick, fresh] {
        backing.destroy(spec.id).unwrap();
    }
    assert_eq!(promised(&backing), 0);
    assert_eq!(names(&mount.at), Vec::<String>::new());
}

fn names(dir: &Path) -> Vec<String> {
    let names = std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
    names.filter(|name| name != "lost+found").collect()
}

fn thick_on_a_full_disk() {
    let mount = Mount::new("tmpfs", 64);
    // Only over-commit lets a request get as far as the disk.
    let backing = FileBacking::open(&mount.at, 100.0).unwrap();
    let before = backing.capacity().unwrap().available;
    let big = spec("big", 100, 102, Provisioning::Thick);
    let error = backing.create(&big).unwrap_err();
    assert!(matches!(error, BackingError::NoRoom { .. }), "{error}");
    assert_eq!(names(&mount.at), Vec::<String>::new());
    assert_eq!(backing.capacity().unwrap().available, before);

    let small = spec("small", 16, 102, Provisioning::Thick);
    backing.create(&small).unwrap();
    let promised = backing.capacity().unwrap().available;
    let error = backing.grow(&spec("small", 100, 102, Provisioning::Thick)).unwrap_err();
    assert!(matches!(error, BackingError::NoRoom { .. }), "{error}");
    assert_eq!(backing.capacity().unwrap().available, promised, "a growth that failed promises nothing");
    assert_eq!(std::fs::metadata(backing.device(small.id).unwrap()).unwrap().size(), 102 * MIB);
    assert_eq!(backing.create(&small).unwrap(), Outcome::Unchanged);
    // Without over-commit it does not get that far.
    drop(backing);
    let backing = FileBacking::open(&mount.at, 1.0).unwrap();
    assert!(matches!(backing.create(&big), Err(BackingError::NoRoom { .. })));
}

/// A virtual machine that has the disk as Kata gives it to QEMU.
struct Qemu(Child);

impl Qemu {
    fn start(disk: &Path) -> Self {
        let mut child = Command::new("qemu-system-x86_64")
            .args(["-machine", "q35,accel=tcg", "-S", "-display", "none", "-nodefaults", "-qmp", "stdio"])
            .args(["-blockdev", &format!("driver=raw,node-name=d,file.driver=file,file.filename={}", disk.display())])
            .args(["-device", "virtio-blk-pci,drive=d,share-rw=on"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("qemu-system-x86_64: {error}"));
        // The greeting may come before the devices are there; an answer comes from the main loop, hence after them.
        let (mut input, output) = (child.stdin.as_ref().unwrap(), child.stdout.as_mut().unwrap());
        input.write_all(b"{\"execute\": \"qmp_capabilities\"}\n").unwrap();
        let mut lines = BufReader::new(output).lines().map_while(Result::ok);
        assert!(lines.any(|line| line.contains("return")), "no answer of QEMU");
        Self(child)
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn qemu() {
    let mount = Mount::new("tmpfs", 64);
    let backing = FileBacking::open(&mount.at, 1.0).unwrap();
    let spec = spec("a", 16, 130, Provisioning::Thin);
    backing.create(&spec).unwrap();
    let qemu = Qemu::start(&backing.device(spec.id).unwrap());
    let error = backing.exclusive(spec.id).unwrap_err().to_string();
    assert!(error.contains("QEMU's image lock"), "{error}");
    assert!(matches!(backing.destroy(spec.id), Err(BackingError::InUse { .. })));
    assert!(!backing.ever_written(&spec).unwrap());
    drop(qemu);
    backing.destroy(spec.id).unwrap();
}
