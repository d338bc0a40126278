//! What runs in the guest: a host with three disks, a volume upon two of them, and the pool in the volume.

use std::fs::{self, File};
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::io::{Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::kmod::{ModuleInitFlags, finit_module};
use nix::mount::{MsFlags, mount};
use nix::sys::reboot::{RebootMode, reboot};

pub(crate) const INIT: &str = "/test";
pub(crate) const ARGUMENTS: [&str; 4] = ["--exact", "in_the_guest", "--ignored", "--nocapture"];
pub(crate) const DMSETUP: &str = "/sbin/dmsetup";
pub(crate) const LOSETUP: &str = "/sbin/losetup";
pub(crate) const ADDPART: &str = "/sbin/addpart";
pub(crate) const PASS: &str = "PASS";
/// The host's disks, as they come: vda, vdb, vdc.
pub(crate) const DISKS: [&str; 3] = ["a", "b", "c"];

const MIB: u64 = 1 << 20;
/// What a half measures, in sectors of 512 bytes.
const HALF: u64 = 300 * MIB / 512;
/// The first partition begins where that of every volume does; the second one begins with its half.
const FIRST: (u64, u64) = (2048, HALF - 2048);
const SECOND: (u64, u64) = (HALF, HALF - 2048);
const VOLUME: &str = "volume";
/// By the kernel's name for it: there is no udev.
const DEVICE: &str = "/dev/dm-0";
const POOL: &str = "tank";
const NOTICED: Duration = Duration::from_secs(240);

/// What half of the volume is on.
#[derive(Clone, Copy)]
enum Half<'a> {
    /// A loop device of a backing file.
    On(&'a str),
    /// Nothing: every access fails, as on a disk that died.
    Lost,
}

/// The init of the guest. Where it panics the kernel does too, and QEMU ends.
pub(crate) fn main() {
    let none = None::<&str>;
    for (kind, at) in [("proc", "/proc"), ("sysfs", "/sys"), ("devtmpfs", "/dev"), ("tmpfs", "/run")] {
        mount(none, at, Some(kind), MsFlags::empty(), none).unwrap();
    }
    load(Path::new("/modules"), None);
    load(Path::new("/zpod/modules"), Some("zfs"));
    wait_for("the disks", || Path::new("/dev/vdc").exists());
    wait_for("/dev/zfs", || Path::new("/dev/zfs").exists());
    for name in DISKS {
        mount(
            Some(format!("/dev/vd{name}").as_str()),
            format!("/{name}").as_str(),
            Some("xfs"),
            MsFlags::empty(),
            none,
        )
        .unwrap();
    }
    super::node::mirrored();
    mirror();
    println!("{PASS}");
    nix::unistd::sync();
    std::thread::sleep(Duration::from_millis(200));
    let Err(error) = reboot(RebootMode::RB_POWER_OFF);
    panic!("power off: {error}");
}

fn mirror() {
    // The host: a file system on each disk, a backing file in each, a loop device for each.
    let [a, b, c] = DISKS.map(|name| {
        let file = format!("/{name}/volume.img");
        File::create(&file).unwrap().set_len(HALF * 512).unwrap();
        run(LOSETUP, &["--find", "--show", "--direct-io=on", &file], "").trim().to_owned()
    });
    let table = |first, second| {
        let line = |half: Half<'_>, at| match half {
            Half::On(device) => format!("{at} {HALF} linear {device} 0\n"),
            Half::Lost => format!("{at} {HALF} error\n"),
        };
        format!("{}{}", line(first, 0), line(second, HALF))
    };
    dmsetup(&["create", VOLUME], &table(Half::On(&a), Half::On(&b)));
    let put_on = |first, second| {
        // Without a flush, which a lost half would fail.
        dmsetup(&["suspend", "--noflush", "--nolockfs", VOLUME], "");
        dmsetup(&["load", VOLUME], &table(first, second));
        dmsetup(&["resume", VOLUME], "");
    };

    // The guest: its disk, two partitions, one pool.
    let disk = run(LOSETUP, &["--find", "--show", "--partscan", "--direct-io=on", DEVICE], "");
    let disk = disk.trim();
    for (number, (start, size)) in [FIRST, SECOND].into_iter().enumerate() {
        run(ADDPART, &[disk, &(number + 1).to_string(), &start.to_string(), &size.to_string()], "");
    }
    let (first, second) = (format!("{disk}p1"), format!("{disk}p2"));
    wait_for("the partitions", || Path::new(&second).exists());
    let pool = ["-o", "cachefile=none", "-o", "failmode=continue", "-o", "ashift=12", "-O", "mountpoint=legacy"];
    // Nothing is kept in memory: what is read is on the disks.
    let rest = ["-O", "primarycache=metadata", POOL, "mirror", &first, &second];
    zpool(&[&["create"][..], &pool, &rest].concat());
    mount_pool();
    let one = write("/data/one");
    step("a mirror of two halves", "ONLINE");

    put_on(Half::On(&a), Half::Lost);
    let two = write("/data/two");
    lost(&second);
    check("/data/one", one);
    check("/data/two", two);
    step("the second disk is lost: all data is there, and written", "DEGRADED");

    put_on(Half::On(&a), Half::On(&c));
    zpool(&["replace", "-f", POOL, &second]);
    healed();
    step("a new disk took its place and was resilvered", "ONLINE");

    put_on(Half::Lost, Half::On(&c));
    let three = write("/data/three");
    lost(&first);
    for (file, sum) in [("/data/one", one), ("/data/two", two), ("/data/three", three)] {
        check(file, sum);
    }
    step("the first disk is lost, and the new one has everything", "DEGRADED");

    // The next pod, while one half is lost: nothing can be read of it, its label neither.
    nix::mount::umount("/data").unwrap();
    zpool(&["export", POOL]);
    zpool(&["import", "-N", "-d", &first, "-d", &second, "-o", "cachefile=none", POOL]);
    mount_pool();
    check("/data/three", three);
    let four = write("/data/four");
    step("a pool that is imported with one half", "DEGRADED");

    // The same disk comes back, as after its cable was plugged in again: what it missed is all that is written.
    put_on(Half::On(&a), Half::On(&c));
    zpool(&["online", POOL, &first]);
    healed();
    zpool(&["clear", POOL]);
    zpool(&["scrub", "-w", POOL]);
    for (file, sum) in [("/data/one", one), ("/data/two", two), ("/data/three", three), ("/data/four", four)] {
        check(file, sum);
    }
    let status = zpool(&["status", POOL]);
    assert!(status.contains("errors: No known data errors") && status.contains("repaired 0B"), "{status}");
    step("the first disk came back and caught up; a scrub finds nothing", "ONLINE");
}

fn step(what: &str, want: &str) {
    println!("{what}:\n{}", zpool(&["list", "-v", "-o", "name,size,allocated,health", POOL]));
    assert_eq!(state(), want, "{what}");
}

/// ZFS has given a device up. OpenZFS 2.3.2 says so of the device alone (spa_async_fault_vdev): the pool is called ONLINE
/// until it is opened anew.
fn lost(device: &str) {
    let name = device.trim_start_matches("/dev/");
    let given_up = || {
        let status = zpool(&["status", POOL]);
        let words = |line: &str| line.split_whitespace().take(2).map(str::to_owned).collect::<Vec<_>>();
        status.lines().map(words).any(|words| words.len() == 2 && words[0] == name && words[1] != "ONLINE")
    };
    wait_for("a device that is given up", given_up);
    println!("{name} is given up, and the pool says {}", state());
    zpool(&["reopen", POOL]);
    wait_for("DEGRADED", || state() == "DEGRADED");
}

fn healed() {
    zpool(&["wait", "-t", "resilver,replace", POOL]);
    wait_for("ONLINE", || state() == "ONLINE");
    let status = zpool(&["status", POOL]);
    println!("{}", status.lines().find(|line| line.contains("scan:")).unwrap_or_default());
    assert!(status.contains("resilvered") && status.contains("with 0 errors"), "{status}");
}

fn state() -> String {
    fs::read_to_string(format!("/proc/spl/kstat/zfs/{POOL}/state")).unwrap().trim().to_owned()
}

fn mount_pool() {
    mount(Some(POOL), "/data", Some("zfs"), MsFlags::empty(), None::<&str>).unwrap();
}

/// Writes random bytes, and gives what [`sum`] says of them.
fn write(path: &str) -> u64 {
    let mut bytes = vec![0; 24 * MIB as usize];
    File::open("/dev/urandom").unwrap().read_exact(&mut bytes).unwrap();
    let mut file = File::create(path).unwrap();
    file.write_all(&bytes).unwrap();
    file.sync_all().unwrap();
    zpool(&["sync", POOL]);
    sum(&bytes)
}

fn check(path: &str, want: u64) {
    assert_eq!(sum(&fs::read(path).unwrap()), want, "{path}");
}

fn sum(bytes: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    bytes.hash(&mut hasher);
    hasher.finish()
}

fn zpool(arguments: &[&str]) -> String {
    let tool = ["--library-path", "/zpod/lib", "/zpod/bin/zpool"];
    run("/zpod/lib/ld-linux-x86-64.so.2", &[&tool, arguments].concat(), "")
}

fn dmsetup(arguments: &[&str], table: &str) {
    run(DMSETUP, &[arguments, &["--noudevsync", "--noudevrules"]].concat(), table);
}

pub(crate) fn run(program: &str, arguments: &[&str], input: &str) -> String {
    let mut command = Command::new(program);
    command.args(arguments).env("ZFS_VDEV_DEVID_OPT_OUT", "YES");
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {}: {text}{error}", output.status);
    text
}

/// Modules of a directory, by their names or by its file `order`.
fn load(dir: &Path, group: Option<&str>) {
    let modules: Vec<PathBuf> = match group {
        None => {
            let mut all: Vec<_> = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect();
            all.sort();
            all
        }
        Some(group) => {
            let order = fs::read_to_string(dir.join("order")).unwrap();
            let lines = order.lines().filter_map(|line| line.split_once(' '));
            lines.filter(|(of, _)| *of == group).map(|(_, file)| dir.join(file)).collect()
        }
    };
    for module in modules {
        match finit_module(File::open(&module).unwrap(), c"", ModuleInitFlags::empty()) {
            Ok(()) | Err(nix::Error::EEXIST) => {}
            Err(error) => panic!("{}: {error}", module.display()),
        }
    }
}

fn wait_for(what: &str, holds: impl Fn() -> bool) {
    let end = Instant::now() + NOTICED;
    while !holds() {
        if Instant::now() >= end {
            panic!("no {what} after {NOTICED:?}: {}\n{}", state(), zpool(&["status", POOL]));
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}
