//! Volumes are unpublished and destroyed where nothing new can be made: on file systems that are full, have no inodes left
//! or are read-only, with the records on the same one, killed between any two steps. ext4, XFS and btrfs on loop devices;
//! needs root. Every test mounts in a mount namespace of its own, in a child.
#![allow(clippy::unwrap_used, reason = "clippy allows it in test functions only, not in what they call")]

use std::fs::{self, File};
use std::io::{ErrorKind, Write as _};
use std::os::unix::fs::FileExt as _;
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use zpod_storage::backing::file::FileBacking;
use zpod_storage::backing::{Backing, BackingError, Copying, DeviceSpec, Outcome};
use zpod_storage::catalog::dir::{self, DirCatalog};
use zpod_storage::catalog::{Catalog, Phase, Snapshot, Volume};
use zpod_volume::{Bytes, DiskLayout, Provisioning, SnapshotId, VolumeId, VolumeParameters};

const MIB: u64 = 1 << 20;
const ANY: Copying<'static> = Copying { full: true, progress: &|_, _| true };

fn in_own_mounts(what: &str) {
    let output = Command::new("unshare")
        .args(["--mount", "--propagation", "private"])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", "child", "--ignored", "--nocapture"])
        .env("ZPOD_TEST_WHAT", what)
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{what} (root is needed): {said}");
}

#[test]
#[ignore = "what the other tests run in a mount namespace of its own"]
fn child() {
    let what = std::env::var("ZPOD_TEST_WHAT").unwrap();
    match what.split_once(' ').unwrap() {
        ("full", kind) => a_life_goes_to_its_end(kind, Lack::Space),
        ("inodes", kind) => a_life_goes_to_its_end(kind, Lack::Inodes),
        ("read-only", kind) => read_only(kind),
        ("kills", kind) => kills(kind),
        ("end", at) => end_of_life(Path::new(at)),
        ("freed", kind) => freed(kind),
        ("limit", kind) => limit(kind),
        _ => panic!("{what}?"),
    }
}

#[test]
fn on_a_full_ext4_all_is_unpublished_and_deleted_and_nothing_new_is_made_until_there_is_room() {
    in_own_mounts("full ext4");
}

#[test]
fn on_a_full_xfs_all_is_unpublished_and_deleted_and_nothing_new_is_made_until_there_is_room() {
    in_own_mounts("full xfs");
}

#[test]
fn on_a_full_btrfs_all_is_unpublished_and_deleted_and_nothing_new_is_made_until_there_is_room() {
    in_own_mounts("full btrfs");
}

#[test]
fn without_inodes_all_is_unpublished_and_deleted_and_nothing_new_is_made_until_there_are_some() {
    in_own_mounts("inodes ext4");
}

#[test]
fn a_read_only_file_system_is_opened_and_used_again_when_it_can_be_written() {
    in_own_mounts("read-only xfs");
    in_own_mounts("read-only ext4");
}

#[test]
fn kill_between_any_two_steps_on_a_full_disk_loses_nothing() {
    in_own_mounts("kills ext4");
    in_own_mounts("kills xfs");
}

#[test]
fn what_was_removed_is_free_before_anything_is_refused_on_btrfs() {
    in_own_mounts("freed btrfs");
}

#[test]
fn what_was_removed_is_free_before_anything_is_refused_on_xfs() {
    in_own_mounts("freed xfs");
}

#[test]
fn no_disk_is_longer_than_a_file_can_be() {
    in_own_mounts("limit ext4");
    in_own_mounts("limit xfs");
    in_own_mounts("limit btrfs");
}

/// A file system of its own, and beside it, on another one, room for what the test itself needs.
struct Mount {
    dir: tempfile::TempDir,
    at: PathBuf,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Lack {
    Space,
    Inodes,
}

impl Mount {
    fn new(kind: &str, mib: u64, options: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (disk, at) = (dir.path().join("disk"), dir.path().join("mnt"));
        fs::create_dir(&at).unwrap();
        File::create(&disk).unwrap().set_len(mib * MIB).unwrap();
        run(Command::new(format!("mkfs.{kind}")).arg("-q").args(options).arg(&disk));
        run(Command::new("mount").args(["-o", "loop"]).args([&disk, &at]));
        fs::create_dir(at.join("volumes")).unwrap();
        Self { dir, at }
    }

    fn remount(&self, options: &str) {
        run(Command::new("mount").args(["-o", &format!("remount,{options}")]).arg(&self.at));
    }

    /// Takes all there is of something.
    fn exhaust(&self, lack: Lack) {
        let filler = self.at.join("filler");
        fs::create_dir_all(&filler).unwrap();
        match lack {
            Lack::Space => {
                // Ever smaller pieces, until not a byte goes in; then the same in new files, for what the first ones
                // could not take.
                for n in 0..64 {
                    let Ok(file) = File::create(filler.join(n.to_string())) else { break };
                    let mut taken = 0;
                    for size in [MIB, 64 << 10, 4096, 512, 1] {
                        let bytes = vec![1; size as usize];
                        while file.write_all_at(&bytes, taken).is_ok() {
                            taken += size;
                        }
                    }
                    let _ = file.sync_all();
                    if taken < 4096 {
                        break;
                    }
                }
            }
            Lack::Inodes => {
                let mut n = 0;
                while File::create(filler.join(n.to_string())).is_ok() {
                    n += 1;
                }
            }
        }
        let _ = rustix::fs::syncfs(File::open(&self.at).unwrap());
    }

    fn give_back(&self) {
        fs::remove_dir_all(self.at.join("filler")).unwrap();
        rustix::fs::syncfs(File::open(&self.at).unwrap()).unwrap();
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

fn spec(name: &str, mib: u64) -> DeviceSpec {
    let layout = DiskLayout { capacity: Bytes::mib(mib), partition: Bytes::mib(mib), disk: Bytes::mib(mib * 2 + 2) };
    DeviceSpec { id: VolumeId::from_name(name), layout, provisioning: Provisioning::Thin }
}

/// A backing and its records, on one file system.
struct World {
    backing: FileBacking,
    volumes: DirCatalog<Volume>,
    snapshots: DirCatalog<Snapshot>,
    runtime: tokio::runtime::Runtime,
}

impl World {
    fn open(at: &Path) -> Self {
        let (volumes, snapshots) = dir::open(at.join("state")).unwrap();
        // Only over-commit lets a request get as far as the disk.
        let backing = FileBacking::open(at.join("volumes"), 100.0).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        Self { backing, volumes, snapshots, runtime }
    }

    /// A volume that is published, with what its guest has written.
    fn make(&self, name: &str) {
        self.backing.create(&spec(name, 16)).unwrap();
        let file = File::options().write(true).open(self.backing.device(VolumeId::from_name(name)).unwrap()).unwrap();
        file.write_all_at(&vec![7; 8 << 20], 2 * MIB).unwrap();
        file.sync_all().unwrap();
        let volume = Volume {
            phase: Phase::Ready,
            labels: [("published".to_owned(), "yes".repeat(200))].into(),
            ..Volume::wanted(name, Bytes::mib(16), VolumeParameters::default(), "node-1")
        };
        self.runtime.block_on(self.volumes.create(volume)).unwrap();
    }

    fn get(&self, name: &str) -> Option<Volume> {
        self.runtime.block_on(self.volumes.get(VolumeId::from_name(name))).unwrap()
    }

    /// What NodeUnpublishVolume and DeleteVolume do.
    fn unpublish(&self, name: &str) {
        if let Some(volume) = self.get(name).filter(|volume| !volume.labels.is_empty()) {
            let unpublished = Volume { labels: Default::default(), ..volume };
            self.runtime.block_on(self.volumes.update(unpublished)).unwrap();
        }
    }

    fn delete(&self, name: &str) {
        let Some(volume) = self.get(name) else { return };
        if volume.phase != Phase::Deleting {
            self.runtime.block_on(self.volumes.update(Volume { phase: Phase::Deleting, ..volume })).unwrap();
        }
        self.backing.destroy(VolumeId::from_name(name)).unwrap();
        self.runtime.block_on(self.volumes.remove(VolumeId::from_name(name))).unwrap();
    }
}

fn a_life_goes_to_its_end(kind: &str, lack: Lack) {
    let options: &[&str] = if lack == Lack::Inodes { &["-N", "128"] } else { &[] };
    let mount = Mount::new(kind, 320, options);
    let world = World::open(&mount.at);
    let names = ["a", "b", "c", "d", "e", "f"];
    names.iter().for_each(|name| world.make(name));
    world.backing.snapshot(SnapshotId::from_name("s"), &spec("a", 16), &ANY).unwrap();
    let ready = world.get("a").unwrap();
    drop(world);

    mount.exhaust(lack);
    let world = World::open(&mount.at);
    assert_eq!(world.get("a"), Some(ready), "all that was there is there");
    let refused = |result: Result<Outcome, BackingError>| {
        let error = result.unwrap_err();
        assert!(error.is_no_room(), "{kind} {lack:?}: {error}");
    };
    if world.backing.abilities().is_some() {
        println!("{kind} {lack:?}: there is room for a trial still");
    } else {
        assert_eq!(world.backing.capacity().unwrap().available, Bytes(0));
        refused(world.backing.grow(&spec("b", 32)));
        refused(world.backing.snapshot(SnapshotId::from_name("t"), &spec("a", 16), &ANY));
    }
    if lack == Lack::Inodes {
        assert_eq!(world.backing.capacity().unwrap().available, Bytes(0));
        refused(world.backing.create(&spec("new", 16)));
        let new = Volume::wanted("new", Bytes::mib(16), VolumeParameters::default(), "node-1");
        assert!(world.runtime.block_on(world.volumes.create(new)).is_err());
    }
    // What is there can be published, and so be looked at and proven.
    let proof = world.backing.exclusive(VolumeId::from_name("b")).unwrap();
    assert!(world.backing.ever_written(&spec("b", 16)).unwrap());
    world.backing.write_table(&spec("b", 16), proof.as_ref()).unwrap();
    drop(proof);
    assert_eq!(world.backing.create(&spec("b", 16)).unwrap(), Outcome::Unchanged);
    // Nothing comes free yet.
    names.iter().for_each(|name| world.unpublish(name));
    assert_eq!(world.runtime.block_on(world.snapshots.list(None, 10)).unwrap().records, vec![]);
    drop(world);
    let world = World::open(&mount.at);
    assert!(names.iter().all(|name| world.get(name).unwrap().labels.is_empty()), "recorded");
    world.backing.destroy_snapshot(SnapshotId::from_name("s")).unwrap();
    names.iter().for_each(|name| world.delete(name));
    assert!(names.iter().all(|name| world.get(name).is_none()));

    // Without a restart.
    mount.give_back();
    let made = || (0..200).any(|_| world.backing.create(&spec("new", 16)).is_ok() || wait());
    assert!(made(), "{kind} {lack:?}: it goes on by itself: {:?}", world.backing.create(&spec("new", 16)));
    assert!(world.backing.abilities().is_some());
    assert!(world.backing.capacity().unwrap().available > Bytes(0));
}

/// Until what is refused is tried again. Says false.
fn wait() -> bool {
    std::thread::sleep(std::time::Duration::from_millis(50));
    false
}

fn read_only(kind: &str) {
    let mount = Mount::new(kind, 320, &[]);
    let world = World::open(&mount.at);
    world.make("a");
    drop(world);
    mount.remount("ro");
    let world = World::open(&mount.at);
    assert!(world.get("a").is_some());
    let capacity = world.backing.capacity().unwrap();
    assert_eq!((capacity.available, capacity.largest), (Bytes(0), Bytes(0)));
    let error = world.backing.create(&spec("b", 16)).unwrap_err();
    assert!(error.is_no_room() && error.to_string().contains("Read-only file system"), "{error}");
    world.backing.device(VolumeId::from_name("a")).unwrap();
    world.backing.look().unwrap();
    mount.remount("rw");
    assert!((0..200).any(|_| world.backing.create(&spec("b", 16)).is_ok() || wait()));
    // Read-only again, while it runs.
    mount.remount("ro");
    assert_eq!(world.backing.capacity().unwrap().available, Bytes(0));
    let error = world.backing.create(&spec("c", 16)).unwrap_err();
    assert!(error.is_no_room(), "{error}");
}

/// The end of the life of a volume on a full disk: unpublished, deleted. Each step can be repeated.
fn end_of_life(at: &Path) {
    let world = World::open(at);
    world.unpublish("a");
    println!("unpublished");
    std::io::stdout().flush().unwrap();
    world.delete("a");
    println!("deleted");
}

/// Killed at each crash point of that end in turn, on a disk that is full.
fn kills(kind: &str) {
    let mount = Mount::new(kind, 320, &[]);
    World::open(&mount.at).make("keep");
    let mut points = 0;
    for crash_at in 1.. {
        World::open(&mount.at).make("a");
        mount.exhaust(Lack::Space);
        let output = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "child", "--ignored", "--nocapture", "--test-threads=1"])
            .env("ZPOD_TEST_WHAT", format!("end {}", mount.at.display()))
            .env("ZPOD_CRASH_AT", crash_at.to_string())
            .stdin(Stdio::null())
            .output()
            .unwrap();
        let killed = output.status.signal() == Some(9);
        let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
        assert!(killed || output.status.success(), "{kind}, point {crash_at}: {said}");
        let world = World::open(&mount.at);
        let found = world.get("a");
        if said.contains("unpublished") {
            assert!(found.as_ref().is_none_or(|volume| volume.labels.is_empty()), "{kind}, point {crash_at}");
        }
        if !said.contains("deleted") && killed {
            let gone = matches!(world.backing.device(VolumeId::from_name("a")), Err(BackingError::Missing { .. }));
            let deleting = found.as_ref().is_none_or(|volume| volume.phase == Phase::Deleting);
            assert!(!gone || deleting, "{kind}, point {crash_at}: its bytes are gone and its record says {found:?}");
        }
        // Repeated, on the disk as it is.
        world.unpublish("a");
        world.delete("a");
        assert!(world.get("a").is_none() && world.get("keep").is_some());
        assert!(matches!(world.backing.device(VolumeId::from_name("a")), Err(BackingError::Missing { .. })));
        world.backing.device(VolumeId::from_name("keep")).unwrap();
        drop(world);
        mount.give_back();
        if !killed {
            break;
        }
        points += 1;
    }
    assert!(points >= 12, "{kind}: only {points} points");
    assert!(mount.dir.path().exists());
}

/// A full volume is deleted, and the next one is made at once.
fn freed(kind: &str) {
    let mount = Mount::new(kind, 1024, &[]);
    let backing = FileBacking::open(mount.at.join("volumes"), 1.0).unwrap();
    for round in 0..3 {
        let large = spec(&round.to_string(), backing.capacity().unwrap().largest.0 / MIB - 64);
        backing.create(&large).unwrap();
        let path = backing.device(large.id).unwrap();
        let file = File::options().write(true).open(path).unwrap();
        let bytes = vec![round; 1 << 20];
        for at in 1..large.layout.partition.0 / MIB {
            match file.write_all_at(&bytes, at * MIB) {
                Ok(()) => {}
                // btrfs needs room of its own.
                Err(error) if error.kind() == ErrorKind::StorageFull => break,
                Err(error) => panic!("{error}"),
            }
        }
        let _ = file.sync_all();
        drop(file);
        assert_eq!(backing.destroy(large.id).unwrap(), Outcome::Changed);
        let mut next = spec("next", large.layout.partition.0 / MIB);
        next.layout.disk = large.layout.disk;
        let made = backing.create(&next);
        assert!(made.is_ok(), "{kind}, round {round}: {made:?}");
        backing.destroy(next.id).unwrap();
    }
}

fn limit(kind: &str) {
    let mount = Mount::new(kind, 320, &[]);
    // Much more is promised than there is: sizes are what this is about.
    let backing = FileBacking::open(mount.at.join("volumes"), 1000.0).unwrap();
    let largest = backing.largest_disk().unwrap();
    let tib = 1 << 40;
    match kind {
        "ext4" => {
            // Blocks of 1 KiB on so small a disk: 2^32 of them.
            let block = rustix::fs::statvfs(&mount.at).unwrap().f_frsize;
            assert!(largest.0 < block << 32 && largest.0 >= (block << 32) - 2 * MIB, "{largest}");
        }
        _ => assert!(largest.0 > 1024 * tib, "{kind}: {largest}"),
    }
    let sized =
        |name: &str, disk: Bytes| DeviceSpec { layout: DiskLayout { disk, ..spec(name, 16).layout }, ..spec(name, 16) };
    assert_eq!(backing.create(&sized("largest", largest)).unwrap(), Outcome::Changed);
    let error = backing.create(&sized("larger", Bytes(largest.0 + MIB))).unwrap_err();
    assert!(matches!(error, BackingError::TooLarge { .. }) && error.to_string().starts_with("capacity"), "{error}");
    assert!(matches!(backing.grow(&sized("largest", Bytes(largest.0 + MIB))), Err(BackingError::TooLarge { .. })));
    assert!(backing.capacity().unwrap().largest <= DiskLayout::largest_partition(largest));
    // Near 2^63, and sums of such.
    for name in ["x", "y", "z"] {
        let odd = sized(name, Bytes(u64::MAX - 511));
        assert!(matches!(backing.create(&odd), Err(BackingError::TooLarge { .. })));
        let id = VolumeId::from_name(name);
        if File::create(mount.at.join("volumes").join(format!("{id}.img"))).unwrap().set_len(i64::MAX as u64).is_err() {
            fs::remove_file(mount.at.join("volumes").join(format!("{id}.img"))).unwrap();
        }
    }
    drop(backing);
    // Files of nobody, each of which counts as promised in its whole length.
    let backing = FileBacking::open(mount.at.join("volumes"), 1000.0).unwrap();
    backing.capacity().unwrap();
}
