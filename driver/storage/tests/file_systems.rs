//! The facts about file systems that the file backing stands on, on real ones: XFS, btrfs and ext4 on loop devices, and
//! tmpfs. Needs root, mkfs.xfs, mkfs.btrfs and mkfs.ext4; where one is missing the test fails. Every test mounts in a
//! mount namespace of its own, in a child: mounts and loop devices are gone with it, however it ends.
#![allow(clippy::unwrap_used, reason = "clippy allows it in test functions only, not in what they call")]

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use zpod_storage::backing::file::{Fencing, FileBacking};
use zpod_storage::backing::{Backing, BackingError, CopySource, Copying, DeviceSpec, Outcome};
use zpod_volume::{Bytes, DiskLayout, Provisioning, SnapshotId, VolumeId};

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
        "promise xfs" => promises_hold("xfs"),
        "promise btrfs" => promises_hold("btrfs"),
        "orders xfs" => orders("xfs"),
        "orders btrfs" => orders("btrfs"),
        "orders ext4" => orders("ext4"),
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

#[test]
fn a_promise_holds_when_all_that_a_volume_shares_is_rewritten_on_xfs() {
    in_own_mounts("promise xfs");
}

#[test]
fn a_promise_holds_when_all_that_a_volume_shares_is_rewritten_on_btrfs() {
    in_own_mounts("promise btrfs");
}

#[test]
fn whatever_goes_first_on_xfs_nothing_is_left() {
    in_own_mounts("orders xfs");
}

#[test]
fn whatever_goes_first_on_btrfs_nothing_is_left() {
    in_own_mounts("orders btrfs");
}

#[test]
fn whatever_goes_first_on_ext4_nothing_is_left() {
    in_own_mounts("orders ext4");
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

/// Bytes that are free by the file system's own word.
fn free(at: &Path) -> u64 {
    let stat = rustix::fs::statvfs(at).unwrap();
    stat.f_bavail * stat.f_frsize
}

fn facts(kind: &'static str, reflink: bool) {
    let mount = Mount::new(kind, 1024);
    let open = || FileBacking::open(&mount.at, 1.0).unwrap();
    let backing = open();
    assert_eq!(backing.abilities().unwrap().reflink, reflink);
    assert_eq!(backing.abilities().unwrap().fencing, Fencing::Lease);
    assert_eq!(backing.abilities().unwrap().nocow, kind == "btrfs");
    let (thin, thick) = (spec("thin", 64, 514, Provisioning::Thin), spec("thick", 64, 514, Provisioning::Thick));

    for spec in [thin, thick] {
        let before = free(&mount.at);
        assert_eq!(backing.create(&spec).unwrap(), Outcome::Changed);
        if spec.provisioning == Provisioning::Thick {
            let taken = before.saturating_sub(free(&mount.at));
            assert!(taken >= spec.layout.partition.0, "{kind}: {taken} bytes less are free at once");
        }
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

const ANY: Copying<'static> = Copying { full: true, progress: &|_, _| true };

fn promised(backing: &FileBacking) -> u64 {
    let capacity = backing.capacity().unwrap();
    capacity.total.0 - capacity.available.0
}

/// How a guest writes.
#[derive(Debug, Clone, Copy)]
enum Pattern {
    /// From the beginning to the end.
    InOrder,
    /// 4 KiB here and there, until all is written.
    Scattered,
}

/// What a virtual machine monitor does for a guest that writes all of its partition: through the page cache, as Kata's
/// do by default.
fn fill(backing: &FileBacking, spec: &DeviceSpec, pattern: Pattern, byte: u8) {
    let file = File::options().write(true).open(backing.device(spec.id).unwrap()).unwrap();
    let step = match pattern {
        Pattern::InOrder => MIB,
        Pattern::Scattered => 4096,
    };
    let (bytes, count) = (vec![byte; step as usize], spec.layout.partition.0 / step);
    let write = |n: u64| {
        let at = DiskLayout::PARTITION_START + n * step;
        file.write_all_at(&bytes, at).unwrap_or_else(|error| panic!("{spec:?} {pattern:?} at {at}: {error}"));
    };
    match pattern {
        Pattern::InOrder => (0..count).for_each(write),
        Pattern::Scattered => {
            let bits = count.next_power_of_two().ilog2();
            (0..1 << bits).map(|n: u64| n.reverse_bits() >> (64 - bits)).filter(|n| *n < count).for_each(write);
        }
    }
    // What the page cache has accepted must get to the disk too.
    file.sync_all().unwrap_or_else(|error| panic!("{spec:?} {pattern:?}: {error}"));
}

/// Some file systems free what is removed a while later, and a refusal may stand on figures of up to a second ago.
fn settle(dir: &Path) {
    std::thread::sleep(Duration::from_millis(1100));
    for _ in 0..2 {
        rustix::fs::syncfs(File::open(dir).unwrap()).unwrap();
    }
}

/// Everything is promised and in use, and a volume rewrites all that it shares.
fn promises_hold(kind: &'static str) {
    for pattern in [Pattern::InOrder, Pattern::Scattered] {
        let mount = Mount::new(kind, 1024);
        let backing = FileBacking::open(&mount.at, 1.0).unwrap();
        let a = spec("a", 160, 514, Provisioning::Thin);
        backing.create(&a).unwrap();
        fill(&backing, &a, Pattern::InOrder, 1);
        let id = SnapshotId::from_name("s");
        backing.snapshot(id, &a, &ANY).unwrap();
        // The rest, less what the file system itself takes to keep track of so much: nothing is kept for that where
        // there are no limits.
        let rest = spec("rest", backing.capacity().unwrap().largest.0 / MIB - 32, 1024, Provisioning::Thin);
        backing.create(&rest).unwrap();
        // A second copy would break the promise to the first volume, or to the rest.
        for result in [
            backing.snapshot(SnapshotId::from_name("t"), &a, &ANY),
            backing.create_from(
                &spec("b", 160, 514, Provisioning::Thin),
                CopySource::Snapshot(id),
                Bytes::mib(160),
                &ANY,
            ),
        ] {
            assert!(matches!(result, Err(BackingError::NoRoom { .. })), "{kind}: {result:?}");
        }
        fill(&backing, &rest, Pattern::InOrder, 2);
        fill(&backing, &a, pattern, 3);
        let free = Bytes(rustix::fs::statvfs(&mount.at).map(|stat| stat.f_bavail * stat.f_frsize).unwrap());
        println!("  {kind}, {pattern:?}: all rewritten, {free} left");
        // Again: now it is its own.
        fill(&backing, &a, pattern, 4);
        assert_eq!(backing.excess(a.id).unwrap(), Bytes(0));
        let mut bytes = [0; 1];
        let copy = mount.at.join(format!("{id}.snap"));
        File::open(copy).unwrap().read_exact_at(&mut bytes, 100 * MIB).unwrap();
        assert_eq!(bytes, [1], "the snapshot has what there was");
        backing.destroy_snapshot(id).unwrap();
        settle(&mount.at);
        let t = SnapshotId::from_name("t");
        backing.snapshot(t, &a, &ANY).unwrap_or_else(|error| panic!("{kind}: the room is there again: {error}"));
        backing.destroy_snapshot(t).unwrap();
        for id in [a.id, rest.id] {
            backing.destroy(id).unwrap();
        }
        assert_eq!((promised(&backing), names(&mount.at)), (0, vec![]));
    }
}

/// Source, snapshots, clones and a clone of a clone, gone in any order; with a restart in between.
fn orders(kind: &'static str) {
    let mount = Mount::new(kind, 2048);
    let mut backing = FileBacking::open(&mount.at, 1.0).unwrap();
    let fresh = backing.capacity().unwrap().total;
    let specs = ["source", "clone", "clone of the clone"].map(|name| spec(name, 64, 130, Provisioning::Thin));
    let [source, clone, second] = &specs;
    let [s, t] = ["s", "t"].map(SnapshotId::from_name);
    // 5! = 120 orders; every seventh has every element in every place.
    for order in (0..120).step_by(7) {
        backing.create(source).unwrap();
        fill(&backing, source, Pattern::InOrder, 1);
        backing.snapshot(s, source, &ANY).unwrap();
        backing.create_from(clone, CopySource::Snapshot(s), Bytes::mib(64), &ANY).unwrap();
        guest_writes(&backing.device(clone.id).unwrap(), 7 * MIB);
        backing.create_from(second, CopySource::Device(clone.id), Bytes::mib(64), &ANY).unwrap();
        guest_writes(&backing.device(source.id).unwrap(), 9 * MIB);
        backing.snapshot(t, second, &ANY).unwrap();
        let (mut left, mut number) = (vec![0, 1, 2, 3, 4], order);
        for count in (1..=5).rev() {
            match left.remove(number % count) {
                volume @ 0..3 => drop(backing.destroy(specs[volume].id).unwrap()),
                snapshot => drop(backing.destroy_snapshot([s, t][snapshot - 3]).unwrap()),
            }
            number /= count;
            for (volume, spec) in specs.iter().enumerate().filter(|(volume, _)| left.contains(volume)) {
                let mut bytes = [0; 1];
                File::open(backing.device(spec.id).unwrap()).unwrap().read_exact_at(&mut bytes, 20 * MIB).unwrap();
                assert_eq!(bytes, [1], "{kind}, order {order}: volume {volume} has lost something");
            }
            if count == 3 {
                drop(backing);
                backing = FileBacking::open(&mount.at, 1.0).unwrap();
            }
        }
        assert_eq!((promised(&backing), names(&mount.at)), (0, vec![]), "{kind}, order {order}");
    }
    drop(backing);
    settle(&mount.at);
    let total = FileBacking::open(&mount.at, 1.0).unwrap().capacity().unwrap().total;
    // btrfs takes space for its own trees and does not give all of it back.
    assert!(
        total.0.abs_diff(fresh.0) < if kind == "btrfs" { 128 } else { 40 } * MIB,
        "{kind}: {fresh} at first, {total} in the end"
    );
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
