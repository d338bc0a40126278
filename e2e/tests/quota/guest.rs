//! What runs in the guest: the file backing, on XFS and ext4, with and without limits that hold.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use nix::fcntl::{FallocateFlags, OFlag, fallocate};
use nix::kmod::{ModuleInitFlags, finit_module};
use nix::mount::{MsFlags, mount, umount};
use nix::sys::reboot::{RebootMode, reboot};
use zpod_storage::backing::file::FileBacking;
use zpod_storage::backing::{Backing, BackingError, Copying, DeviceSpec, Outcome};
use zpod_volume::{Bytes, DiskLayout, Provisioning, SnapshotId, VolumeId};

use crate::privileges;

pub(crate) const INIT: &str = "/test";
pub(crate) const ARGUMENTS: [&str; 4] = ["--exact", "in_the_guest", "--ignored", "--nocapture"];
pub(crate) const XFS_QUOTA: &str = "/bin/xfs_quota";
pub(crate) const CHATTR: &str = "/bin/chattr";
pub(crate) const PASS: &str = "PASS";

const MIB: u64 = 1 << 20;
const MNT: &str = "/mnt";
const XFS: (&str, &str) = ("/dev/vda", "xfs");
const EXT4: (&str, &str) = ("/dev/vdb", "ext4");

/// The init of the guest. Where it panics the kernel does too, and QEMU ends.
pub(crate) fn main() {
    let none = None::<&str>;
    mount(none, "/proc", Some("proc"), MsFlags::empty(), none).unwrap();
    mount(none, "/dev", Some("devtmpfs"), MsFlags::empty(), none).unwrap();
    let mut modules: Vec<PathBuf> = fs::read_dir("/modules").unwrap().map(|entry| entry.unwrap().path()).collect();
    modules.sort();
    for module in modules {
        finit_module(File::open(&module).unwrap(), c"", ModuleInitFlags::empty()).unwrap();
    }
    let deadline = Instant::now() + Duration::from_secs(60);
    while !Path::new(EXT4.0).exists() {
        assert!(Instant::now() < deadline, "no disks");
        std::thread::sleep(Duration::from_millis(20));
    }

    for (what, test) in TESTS {
        let started = Instant::now();
        println!("{what} ...");
        test();
        println!("{what}: ok, {:.1} s", started.elapsed().as_secs_f64());
    }
    println!("{PASS}");
    nix::unistd::sync();
    std::thread::sleep(Duration::from_millis(200));
    let Err(error) = reboot(RebootMode::RB_POWER_OFF);
    panic!("power off: {error}");
}

const TESTS: [(&str, fn()); 12] = [
    ("a volume rewrites all that it shares with a snapshot, within its limit, and no more", shared_blocks),
    ("how much room beside its promise rewriting needs", room_to_rewrite),
    ("a guest is stopped at its limit and another volume gets all it was promised", the_limit_holds),
    ("the same with the privileges that zpod-node keeps", with_what_zpod_node_keeps),
    ("growth raises the limit, a restart keeps it, destroying lifts it", the_limit_follows_the_promise),
    ("each image is a project of its own, and a project is used again only when it is empty", projects_are_unique),
    ("a guest that scatters its blocks still gets all it was promised", scattered_blocks_fit),
    ("kill between any two steps leaves neither a volume without its promise nor one without its limit", killed),
    (
        "without limits a guest takes the room of others, which is seen, and limits come with the mount option",
        unlimited,
    ),
    ("a limit that is only counted is not taken for one that holds", only_counted),
    ("a directory that hands its own project down works without limits", handed_down),
    ("ext4 lets root past any limit, and is not taken for a file system with limits", ext4),
];

struct Mounted;

impl Mounted {
    fn new((device, kind): (&str, &str), options: &str) -> Self {
        mount(Some(device), MNT, Some(kind), MsFlags::empty(), Some(options)).unwrap();
        Self
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        umount(MNT).unwrap();
    }
}

fn open() -> FileBacking {
    FileBacking::open(MNT, 1.0).unwrap()
}

fn limited() -> FileBacking {
    let backing = open();
    assert!(backing.abilities().unwrap().quota);
    backing
}

fn spec(name: &str, mib: u64, disk_mib: u64, provisioning: Provisioning) -> DeviceSpec {
    let layout = DiskLayout { capacity: Bytes::mib(mib), partition: Bytes::mib(mib), disk: Bytes::mib(disk_mib) };
    DeviceSpec { id: VolumeId::from_name(name), layout, provisioning }
}

fn thin(name: &str, mib: u64) -> DeviceSpec {
    spec(name, mib, 2000, Provisioning::Thin)
}

/// What a virtual machine monitor does for a guest: writes past all caches, from one byte to another. Says where it was
/// refused, if it was.
fn guest_writes(backing: &FileBacking, id: VolumeId, from: u64, to: u64) -> Option<u64> {
    let file = opened(backing, id, OFlag::empty());
    let bytes = vec![7; MIB as usize];
    let mut at = from;
    while at < to {
        match file.write_at(&bytes[..MIB.min(to - at) as usize], at) {
            Ok(written) => at += written as u64,
            Err(error) if no_room(&error) => return Some(at),
            Err(error) => panic!("at {at}: {error}"),
        }
    }
    // What the page cache has accepted must get to the disk too.
    file.sync_all().unwrap();
    None
}

fn guest_fills(backing: &FileBacking, spec: &DeviceSpec) {
    let (from, to) = (DiskLayout::PARTITION_START, DiskLayout::PARTITION_START + spec.layout.partition.0);
    assert_eq!(guest_writes(backing, spec.id, from, to), None, "the promise of {spec:?} is broken");
}

fn no_room(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}

fn opened(backing: &FileBacking, id: VolumeId, flags: OFlag) -> File {
    OpenOptions::new().write(true).custom_flags(flags.bits()).open(backing.device(id).unwrap()).unwrap()
}

/// Hard limits by project, as xfs_quota sees them, in bytes; those without one left out.
fn limits() -> BTreeMap<u32, u64> {
    let output = Command::new(XFS_QUOTA).args(["-x", "-c", "report -p -n -N -b", MNT]).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    let row = |line: &str| -> Option<(u32, u64)> {
        let mut words = line.split_whitespace();
        let project = words.next()?.strip_prefix('#')?.parse().ok()?;
        Some((project, words.nth(2)?.parse::<u64>().ok()? * 1024))
    };
    text.lines().filter_map(row).filter(|(_, hard)| *hard > 0).collect()
}

fn the_limit_holds() {
    let _mounted = Mounted::new(XFS, "prjquota");
    let backing = limited();
    let hostile = thin("hostile", 32);
    backing.create(&hostile).unwrap();
    let room = backing.capacity().unwrap();
    let other = thin("other", room.largest.0 / MIB);
    backing.create(&other).unwrap();
    assert!(backing.capacity().unwrap().available < Bytes::mib(8), "all is promised");

    guest_fills(&backing, &hostile);
    let refused_at = guest_writes(&backing, hostile.id, 33 * MIB, hostile.layout.disk.0).unwrap();
    let taken = backing.allocated(hostile.id).unwrap();
    println!("  32 MiB promised, refused at {:.2} MiB, {:.2} MiB taken", mib(refused_at), mib(taken.0));
    assert!(taken.0 <= 34 * MIB, "{taken}");
    assert_eq!(backing.excess(hostile.id).unwrap(), Bytes(0));
    // It keeps what it has, and so does the host: tables are written.
    guest_fills(&backing, &hostile);
    let proof = backing.exclusive(hostile.id).unwrap();
    backing.write_table(&hostile, proof.as_ref()).unwrap();
    drop(proof);

    guest_fills(&backing, &other);
    println!("  the other volume has all of its {} MiB", other.layout.partition.0 / MIB);
    // All that was promised is in use: it can be told even so.
    drop(backing);
    let backing = limited();
    for spec in [hostile, other] {
        assert_eq!(backing.destroy(spec.id).unwrap(), Outcome::Changed);
    }
    assert_eq!(limits(), BTreeMap::new());
}

/// Here, where root has all privileges: what is given up is given up by this thread alone.
fn with_what_zpod_node_keeps() {
    let work = || {
        privileges::drop_unneeded().unwrap();
        the_limit_holds();
    };
    std::thread::spawn(work).join().unwrap();
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / MIB as f64
}

fn the_limit_follows_the_promise() {
    let mounted = Mounted::new(XFS, "prjquota");
    let backing = limited();
    let (small, large) = (thin("a", 16), thin("a", 48));
    backing.create(&small).unwrap();
    let before = limits();
    assert!(guest_writes(&backing, small.id, MIB, 49 * MIB).is_some());
    assert_eq!(backing.grow(&large).unwrap(), Outcome::Changed);
    guest_fills(&backing, &large);
    assert!(guest_writes(&backing, small.id, 49 * MIB, 100 * MIB).is_some());
    let grown = limits();
    assert_eq!((before.len(), grown.len()), (1, 1));
    assert_eq!(before.keys().collect::<Vec<_>>(), grown.keys().collect::<Vec<_>>());
    assert!(grown.values().sum::<u64>() - before.values().sum::<u64>() >= 32 * MIB);
    // A growth that can't be leaves the limit.
    assert!(matches!(backing.grow(&thin("a", 1500)), Err(BackingError::NoRoom { .. })));
    assert_eq!(limits(), grown);

    drop((backing, mounted));
    let _mounted = Mounted::new(XFS, "prjquota");
    let backing = limited();
    assert_eq!(limits(), grown, "kept over a restart of machine and zpod");
    assert_eq!(backing.create(&spec("a", 48, 2000, Provisioning::Thin)).unwrap(), Outcome::Unchanged);
    assert!(guest_writes(&backing, small.id, 60 * MIB, 100 * MIB).is_some());
    guest_fills(&backing, &large);
    backing.destroy(large.id).unwrap();
    assert_eq!(limits(), BTreeMap::new());
    // Thick: the space is taken under the limit, and no more than that.
    let thick = spec("thick", 64, 2000, Provisioning::Thick);
    backing.create(&thick).unwrap();
    backing.grow(&spec("thick", 96, 2000, Provisioning::Thick)).unwrap();
    let file = opened(&backing, thick.id, OFlag::empty());
    let keep = FallocateFlags::FALLOC_FL_KEEP_SIZE;
    assert!(fallocate(&file, keep, 97 * MIB as i64, 200 * MIB as i64).is_err());
    drop(file);
    backing.destroy(thick.id).unwrap();
}

fn projects_are_unique() {
    let _mounted = Mounted::new(XFS, "prjquota");
    let backing = limited();
    for round in 0..2 {
        let specs: Vec<_> = (0..80).map(|n| thin(&format!("{round}-{n}"), 2)).collect();
        specs.iter().for_each(|spec| assert_eq!(backing.create(spec).unwrap(), Outcome::Changed));
        assert_eq!(limits().len(), specs.len());
        // Two with one limit could not both be filled.
        specs.iter().for_each(|spec| guest_fills(&backing, spec));
        specs.iter().for_each(|spec| assert_eq!(backing.destroy(spec.id).unwrap(), Outcome::Changed));
        assert_eq!(limits(), BTreeMap::new());
    }
    // A file that is none of ours has the project of one that was, and a copy has none and no promise.
    let (a, b) = (thin("a", 2), thin("b", 2));
    backing.create(&a).unwrap();
    backing.create(&b).unwrap();
    let before = limits();
    println!("  projects {:?}", before.keys());
    assert!(before.keys().all(|project| *project >= 1 << 31));
    drop(backing);
    fs::rename(format!("{MNT}/{}.img", b.id), format!("{MNT}/aside")).unwrap();
    fs::copy(format!("{MNT}/aside"), format!("{MNT}/{}.img", b.id)).unwrap();
    let backing = limited();
    let after = limits();
    assert!(after.len() == 3 && before.iter().all(|(project, limit)| after.get(project) == Some(limit)), "{after:?}");
    assert!(after.values().any(|limit| *limit > b.layout.disk.0), "what nobody knows the promise of: {after:?}");
    assert!(guest_writes(&backing, a.id, MIB, 100 * MIB).is_some());
    for spec in [a, b] {
        backing.destroy(spec.id).unwrap();
    }
    assert_eq!(limits().len(), 1);
    // Still taken, so not given to a new one.
    backing.create(&b).unwrap();
    assert_eq!(limits().len(), 2);
    backing.destroy(b.id).unwrap();
    fs::rename(format!("{MNT}/aside"), format!("{MNT}/{}.img", b.id)).unwrap();
    drop(backing);
    limited().destroy(b.id).unwrap();
    assert_eq!(limits(), BTreeMap::new());
}

/// Every other block of a thick volume written by itself: as many records as there are blocks, in a tree that takes more
/// room than there is between a partition and the next MiB.
fn scattered_blocks_fit() {
    let _mounted = Mounted::new(XFS, "prjquota");
    let backing = limited();
    let spec = spec("scattered", 112, 2000, Provisioning::Thick);
    backing.create(&spec).unwrap();
    let before = backing.allocated(spec.id).unwrap().0;
    let file = opened(&backing, spec.id, OFlag::O_DIRECT);
    let memory = vec![7; 8192];
    let aligned = memory.as_ptr().align_offset(4096);
    let block = &memory[aligned..aligned + 4096];
    let blocks = u32::try_from(spec.layout.partition.0 / 4096).unwrap();
    let bits = blocks.next_power_of_two().ilog2();
    // Bits reversed: far apart first, neighbours last.
    let numbers = (0..1_u32 << bits).map(|n| n.reverse_bits() >> (32 - bits));
    for number in numbers.filter(|number| *number < blocks && number.is_multiple_of(2)) {
        file.write_all_at(block, DiskLayout::PARTITION_START + u64::from(number) * 4096).unwrap();
    }
    file.sync_all().unwrap();
    drop(file);
    let taken = backing.allocated(spec.id).unwrap().0;
    let limit: u64 = limits().into_values().sum();
    let (tree, limit_beside) = (mib(taken - before), mib(limit - spec.layout.partition.0));
    println!("  112 MiB in single blocks: {tree:.2} MiB to keep track of them, limit 112 + {limit_beside:.2} MiB");
    assert!(taken > spec.layout.partition.0 + MIB, "nothing would have to be kept for that");
    assert!(taken <= limit);
    guest_fills(&backing, &spec);
    backing.destroy(spec.id).unwrap();
}

const SHARED: Copying<'static> = Copying { full: false, progress: &|_, _| true };

/// Writes all of a partition in pieces of 4 KiB, the neighbours last. Says where that was refused, if it was.
fn guest_scatters(backing: &FileBacking, spec: &DeviceSpec, byte: u8) -> Option<u64> {
    let file = opened(backing, spec.id, OFlag::empty());
    let blocks = u32::try_from(spec.layout.partition.0 / 4096).unwrap();
    let bits = blocks.next_power_of_two().ilog2();
    for number in (0..1_u32 << bits).map(|n| n.reverse_bits() >> (32 - bits)).filter(|number| *number < blocks) {
        let at = DiskLayout::PARTITION_START + u64::from(number) * 4096;
        match file.write_all_at(&[byte; 4096], at) {
            Err(error) if no_room(&error) => return Some(at),
            result => result.unwrap(),
        }
    }
    file.sync_all().unwrap();
    None
}

fn shared_blocks() {
    for scattered in [false, true] {
        // Mounted anew: XFS frees what is removed a while later.
        let _mounted = Mounted::new(XFS, "prjquota");
        rewrite_what_is_shared(scattered);
    }
}

fn rewrite_what_is_shared(scattered: bool) {
    let backing = limited();
    assert!(backing.shares_blocks().unwrap());
    // Scattered, a volume that has less room to rewrite in than it shares is slow: see below.
    let size = if scattered { 60 } else { 96 };
    let (spec, id) = (thin("a", size), SnapshotId::from_name("s"));
    backing.create(&spec).unwrap();
    guest_fills(&backing, &spec);
    let before = limits().into_values().sum::<u64>();
    backing.snapshot(id, &spec, &SHARED).unwrap();
    println!("  the limit of {size} MiB rises by {:.1} MiB", mib(limits().into_values().sum::<u64>() - before));
    let rest = thin("rest", backing.capacity().unwrap().largest.0 / MIB);
    backing.create(&rest).unwrap();
    let result = backing.snapshot(SnapshotId::from_name("t"), &spec, &SHARED);
    assert!(matches!(result, Err(BackingError::NoRoom { .. })), "{result:?}");
    guest_fills(&backing, &rest);
    if scattered {
        assert_eq!(guest_scatters(&backing, &spec, 8), None, "the promise is broken");
    } else {
        guest_fills(&backing, &spec);
    }
    // It is held to it: what it gets beyond its partition is not the others'.
    assert!(guest_writes(&backing, spec.id, 100 * MIB, 400 * MIB).is_some());
    guest_fills(&backing, &rest);
    guest_fills(&backing, &spec);
    // After a restart too.
    let before = limits();
    drop(backing);
    let backing = limited();
    assert_eq!(limits(), before);
    backing.destroy_snapshot(id).unwrap();
    for spec in [spec, rest] {
        backing.destroy(spec.id).unwrap();
    }
    assert_eq!(limits(), BTreeMap::new());
    let capacity = backing.capacity().unwrap();
    assert_eq!(capacity.total, capacity.available);
}

/// Limits set by hand below what zpod sets. What is shared counts twice until the new block is written out; at its limit
/// XFS writes out everything and goes on. So nothing is refused, however little room there is: it only takes longer, most
/// of all where each 4 KiB takes 128 KiB for a while.
fn room_to_rewrite() {
    let _mounted = Mounted::new(XFS, "prjquota");
    let backing = limited();
    let (spec, id) = (thin("a", 16), SnapshotId::from_name("s"));
    for room in [0, 16] {
        for scattered in [false, true] {
            backing.create(&spec).unwrap();
            guest_fills(&backing, &spec);
            let (project, limit) = limits().into_iter().next().unwrap();
            backing.snapshot(id, &spec, &SHARED).unwrap();
            let command = format!("limit -p bhard={}k {project}", limit / 1024 + room * 1024);
            assert!(Command::new(XFS_QUOTA).args(["-x", "-c", &command, MNT]).status().unwrap().success());
            let started = Instant::now();
            let (from, to) = (DiskLayout::PARTITION_START, DiskLayout::PARTITION_START + spec.layout.partition.0);
            let refused = match scattered {
                false => guest_writes(&backing, spec.id, from, to),
                true => guest_scatters(&backing, &spec, 9),
            };
            let (how, took) = (if scattered { "scattered" } else { "in order" }, started.elapsed());
            println!("  {room} MiB, 16 MiB rewritten {how}: refused {refused:?}, {:.1} s", took.as_secs_f64());
            assert_eq!(refused, None);
            backing.destroy_snapshot(id).unwrap();
            backing.destroy(spec.id).unwrap();
        }
    }
}

/// A life of a volume, killed at the point that the environment names.
pub(crate) fn volumes_life() {
    let backing = limited();
    backing.create(&life(16)).unwrap();
    backing.grow(&life(32)).unwrap();
    backing.destroy(life(16).id).unwrap();
}

fn life(mib: u64) -> DeviceSpec {
    spec("life", mib, 2000, Provisioning::Thin)
}

fn killed() {
    let _mounted = Mounted::new(XFS, "prjquota");
    let mut points = 0;
    let mut names = Vec::new();
    loop {
        let output = Command::new("/proc/self/exe")
            .args(["--exact", "to_be_killed", "--ignored", "--nocapture"])
            .env("ZPOD_CRASH_AT", (points + 1).to_string())
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        if output.status.success() {
            break;
        }
        assert!(said.contains("crash point"), "{said}");
        names.extend(said.lines().filter(|line| line.contains("quota:") || line.contains("limit")).map(str::to_owned));
        points += 1;

        let backing = limited();
        let found = [16, 32].map(life).into_iter().find(|_| backing.device(life(16).id).is_ok()).map(|_| {
            let is = |spec: &DeviceSpec| matches!(backing.create(spec), Ok(Outcome::Unchanged));
            [16, 32].map(life).into_iter().find(is).unwrap()
        });
        let limits_now = limits();
        assert_eq!(limits_now.len(), usize::from(found.is_some()), "{said}: {limits_now:?}");
        if let Some(found) = found {
            let limit: u64 = limits_now.into_values().sum();
            let least = found.layout.partition.0 + MIB;
            assert!((least..least + MIB).contains(&limit), "{said}: {found:?} has a limit of {limit}");
            guest_fills(&backing, &found);
            assert!(guest_writes(&backing, found.id, 40 * MIB, 100 * MIB).is_some(), "{said}");
        }
        // Made again, to the end.
        backing.destroy(life(16).id).unwrap();
        drop(backing);
        assert_eq!(limits(), BTreeMap::new(), "{said}");
    }
    println!("  {points} points, of them {names:?}");
    assert!(points >= 20 && names.len() >= 4, "{points} {names:?}");
}

fn unlimited() {
    let (a, b) = (thin("a", 64), thin("b", 150));
    {
        let _mounted = Mounted::new(XFS, "noquota");
        let backing = open();
        assert!(!backing.abilities().unwrap().quota);
        backing.create(&a).unwrap();
        backing.create(&b).unwrap();
        assert_eq!(guest_writes(&backing, a.id, MIB, 230 * MIB), None, "nothing stops it");
        let excess = backing.excess(a.id).unwrap();
        println!("  64 MiB promised, {excess} beyond that");
        assert!(excess.0 > 160 * MIB && excess.0 < 166 * MIB, "{excess}");
        assert_eq!(backing.excess(b.id).unwrap(), Bytes(0));
        assert!(guest_writes(&backing, b.id, MIB, 151 * MIB).is_some(), "the promise to the other is broken");
        let shrunk = opened(&backing, a.id, OFlag::empty());
        let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        fallocate(&shrunk, punch, 100 * MIB as i64, 100 * MIB as i64).unwrap();
    }
    let _mounted = Mounted::new(XFS, "prjquota");
    let backing = limited();
    assert_eq!(limits().len(), 2);
    assert!(backing.excess(a.id).unwrap().0 > 60 * MIB, "what it took before is still seen");
    assert!(guest_writes(&backing, a.id, 300 * MIB, 400 * MIB).is_some(), "and it gets no more");
    guest_fills(&backing, &b);
    for spec in [a, b] {
        backing.destroy(spec.id).unwrap();
    }
}

fn only_counted() {
    let _mounted = Mounted::new(XFS, "pqnoenforce");
    assert!(!open().abilities().unwrap().quota);
}

fn handed_down() {
    let _mounted = Mounted::new(XFS, "prjquota");
    let dir = format!("{MNT}/with-project");
    fs::create_dir(&dir).unwrap();
    assert!(Command::new(CHATTR).args(["+P", &dir]).status().unwrap().success());
    let backing = FileBacking::open(&dir, 1.0).unwrap();
    assert!(!backing.abilities().unwrap().quota);
    let spec = thin("a", 16);
    backing.create(&spec).unwrap();
    guest_fills(&backing, &spec);
    backing.destroy(spec.id).unwrap();
    assert_eq!(limits(), BTreeMap::new());
    drop(backing);
    // It does so from some day on: a limit from before still holds, and must not stop who grows.
    assert!(Command::new(CHATTR).args(["-P", &dir]).status().unwrap().success());
    FileBacking::open(&dir, 1.0).unwrap().create(&spec).unwrap();
    assert_eq!(limits().len(), 1);
    assert!(Command::new(CHATTR).args(["+P", &dir]).status().unwrap().success());
    let backing = FileBacking::open(&dir, 1.0).unwrap();
    assert!(!backing.abilities().unwrap().quota);
    backing.grow(&thin("a", 32)).unwrap();
    guest_fills(&backing, &thin("a", 32));
    backing.destroy(spec.id).unwrap();
}

fn ext4() {
    let _mounted = Mounted::new(EXT4, "prjquota");
    let backing = open();
    assert!(!backing.abilities().unwrap().quota, "or root is held to it by now: tell the docs");
    let spec = thin("a", 16);
    backing.create(&spec).unwrap();
    assert_eq!(guest_writes(&backing, spec.id, MIB, 50 * MIB), None);
    assert!(backing.excess(spec.id).unwrap().0 > 30 * MIB);
    assert!(fs::metadata(backing.device(spec.id).unwrap()).unwrap().blocks() > 0);
    backing.destroy(spec.id).unwrap();
}
