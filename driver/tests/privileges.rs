//! With what zpod-node keeps of its privileges it can do all of its work, and little else. Needs root, mkfs.xfs and
//! unshare(1): each test runs in a child with mounts of its own, since what is given up does not come back.

#![allow(clippy::unwrap_used, reason = "clippy allows it in test functions only, not in what they call")]

#[path = "support/own_mounts.rs"]
mod own_mounts;

use std::fs::{self, File, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::io::Errno;
use rustix::mount::FsOpenFlags;
use rustix::process::{DumpableBehavior, dumpable_behavior};
use rustix::thread::{CapabilitySet, capabilities, capability_is_in_bounding_set, no_new_privs};
use uuid::Uuid;
use zpod_driver::kata::{DirectVolume, DirectVolumes, TargetPath};
use zpod_driver::memory;
use zpod_driver::privileges::{NEEDED, drop_unneeded};
use zpod_driver::system_calls::refuse_unneeded;
use zpod_storage::backing::file::FileBacking;
use zpod_storage::backing::{Backing, DeviceSpec, Outcome};
use zpod_volume::{Bytes, Create, DiskLayout, Headroom, Provisioning, VolumeId, VolumeSpec};

#[test]
#[ignore = "what another test runs in a process of its own"]
fn child_without_privileges() {
    gone();
}

#[test]
#[ignore = "what another test runs in a process of its own"]
fn child_on_xfs() {
    work("xfs");
}

#[test]
#[ignore = "what another test runs in a process of its own"]
fn child_on_tmpfs() {
    work("tmpfs");
}

#[test]
fn all_but_two_capabilities_are_gone_and_do_not_come_back() {
    own_mounts::in_own_mounts("child_without_privileges");
}

#[test]
fn what_is_kept_is_enough_for_images_on_xfs_placeholders_entries_and_sockets() {
    own_mounts::in_own_mounts("child_on_xfs");
}

#[test]
fn what_is_kept_is_enough_for_images_on_tmpfs_placeholders_entries_and_sockets() {
    own_mounts::in_own_mounts("child_on_tmpfs");
}

#[test]
#[ignore = "what another test runs in a process of its own"]
fn child_with_private_memory() {
    // As root, who may lock memory without bound.
    assert!(memory::keep_private().unwrap(), "its memory is not locked");
    assert_eq!(dumpable_behavior().unwrap(), DumpableBehavior::NotDumpable);
    let own = |name: &str| fs::read_to_string(format!("/proc/self/{name}")).unwrap();
    assert!(has_no_core_dump(&own("limits")), "{}", own("limits"));
    assert!(is_locked(&own("status")), "{}", own("status"));
    // Memory is locked as it is touched, and not as it is mapped.
    let large = Vec::<u8>::with_capacity(256 << 20);
    let status = own("status");
    let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    let resident: usize = resident.trim().trim_end_matches(" kB").parse().unwrap();
    assert!(resident << 10 < large.capacity(), "{resident} KiB are resident");
}

#[test]
fn what_a_key_is_in_gets_into_no_core_dump_and_no_swap() {
    own_mounts::in_own_mounts("child_with_private_memory");
}

fn has_no_core_dump(limits: &str) -> bool {
    let core = limits.lines().find_map(|line| line.strip_prefix("Max core file size")).unwrap();
    core.split_whitespace().take(2).eq(["0", "0"])
}

fn is_locked(status: &str) -> bool {
    let locked = status.lines().find_map(|line| line.strip_prefix("VmLck:")).unwrap();
    !locked.trim().starts_with("0 ")
}

#[test]
fn zpod_node_itself_runs_with_the_filter_and_private_memory() {
    let dir = tempfile::Builder::new().tempdir_in("/dev/shm").unwrap();
    let path = |name: &str| dir.path().join(name);
    fs::create_dir(path("volumes")).unwrap();
    // Nobody serves there: it goes on asking.
    let config = r#"{"clusters": [{"name": "a", "cluster": {"server": "http://127.0.0.1:9"}}],
        "contexts": [{"name": "a", "context": {"cluster": "a", "user": ""}}], "current-context": "a"}"#;
    fs::write(path("config"), config).unwrap();
    let mut node = Command::new(env!("CARGO_BIN_EXE_zpod-node"));
    node.arg("--node-name=n").arg(format!("--endpoint={}", path("csi.sock").display()));
    for (option, name) in [("backing-dir", "volumes"), ("direct-volume-dir", "direct"), ("kata-run-dir", "kata")] {
        node.arg(format!("--{option}={}", path(name).display()));
    }
    node.arg(format!("--udev-dir={}", path("udev").display())).env("KUBECONFIG", path("config"));
    let log = File::create(path("log")).unwrap();
    let mut node = node.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn().unwrap();
    let proc = PathBuf::from(format!("/proc/{}", node.id()));
    let log = || fs::read_to_string(path("log")).unwrap();
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
    // Its threads work: it has opened the backing directory and asks for its records.
    while !log().contains("trying again") {
        assert!(node.try_wait().unwrap().is_none() && std::time::Instant::now() < deadline, "{}", log());
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    for thread in fs::read_dir(proc.join("task")).unwrap() {
        let status = fs::read_to_string(thread.unwrap().path().join("status")).unwrap();
        assert!(status.contains("Seccomp:\t2") && status.contains("NoNewPrivs:\t1"), "{status}");
    }
    let of = |name| fs::read_to_string(proc.join(name)).unwrap();
    assert!(has_no_core_dump(&of("limits")), "{}", of("limits"));
    // Of what it keeps, this is what it takes to lock memory. Not every machine that tests run on gives its root that.
    let may = capabilities(None).unwrap().permitted.contains(CapabilitySet::SYS_RESOURCE);
    assert!(!may || is_locked(&of("status")), "{}", of("status"));
    node.kill().unwrap();
    node.wait().unwrap();
}

fn run(command: &mut Command) {
    let output = command.stdin(Stdio::null()).output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

fn gone() {
    let dir = tempfile::tempdir().unwrap();
    let theirs = dir.path().join("theirs");
    fs::write(&theirs, "secret").unwrap();
    fs::set_permissions(&theirs, Permissions::from_mode(0o600)).unwrap();
    run(Command::new("chown").arg("1000:1000").arg(&theirs));
    // Not every machine that tests run on gives its root all of it.
    let bounding = CapabilitySet::all().iter().filter(|one| capability_is_in_bounding_set(*one).unwrap_or(false));
    drop(rustix::mount::fsopen("tmpfs", FsOpenFlags::empty()).unwrap());
    let had = (capabilities(None).unwrap().permitted, bounding.collect::<CapabilitySet>());
    drop_unneeded().unwrap();
    refuse_unneeded().unwrap();
    let sets = capabilities(None).unwrap();
    let (kept, bound) = (had.0 & NEEDED, had.1 & NEEDED);
    assert_eq!((sets.effective, sets.permitted), (kept, kept));
    assert_eq!(sets.inheritable, CapabilitySet::empty());
    assert!(no_new_privs().unwrap());
    for one in CapabilitySet::all().iter() {
        assert_eq!(capability_is_in_bounding_set(one).unwrap_or(false), bound.contains(one), "{one:?}");
    }
    // A program that root runs would get all that is in the bounding set.
    let status = Command::new("cat").arg("/proc/self/status").output().unwrap();
    let status = String::from_utf8(status.stdout).unwrap();
    for (set, want) in [("CapPrm", kept & bound), ("CapEff", kept & bound), ("CapBnd", bound)] {
        let line = format!("{set}:\t{:016x}", want.bits());
        assert!(status.contains(&line), "{line} in {status}");
    }
    assert!(status.contains(&format!("CapAmb:\t{:016x}", 0)) && status.contains("NoNewPrivs:\t1"), "{status}");
    // What belongs to others is out of reach; so are devices, other processes and the network's settings.
    assert_eq!(fs::read(&theirs).unwrap_err().kind(), std::io::ErrorKind::PermissionDenied);
    let node = rustix::fs::mknodat(
        rustix::fs::CWD,
        dir.path().join("disk"),
        rustix::fs::FileType::BlockDevice,
        rustix::fs::Mode::from_raw_mode(0o600),
        rustix::fs::makedev(7, 0),
    );
    assert_eq!(node.unwrap_err(), Errno::PERM);
    // What CAP_SYS_ADMIN would allow, and nobody here needs; a program that is run has the filter too.
    assert_eq!(rustix::mount::fsopen("tmpfs", FsOpenFlags::empty()).unwrap_err(), Errno::PERM);
    assert!(status.contains("Seccomp:\t2"), "{status}");
    let own = Command::new("unshare").args(["--uts", "true"]).stdin(Stdio::null()).output().unwrap();
    assert!(!own.status.success() && String::from_utf8_lossy(&own.stderr).contains("not permitted"), "{own:?}");
    // Once more changes nothing.
    drop_unneeded().unwrap();
    refuse_unneeded().unwrap();
}

/// A mounted file system; gone with the namespace.
fn mounted(kind: &str, dir: &Path) -> PathBuf {
    let at = dir.join("volumes");
    fs::create_dir(&at).unwrap();
    if kind == "tmpfs" {
        run(Command::new("mount").args(["-t", "tmpfs", "zpod-test"]).arg(&at));
        return at;
    }
    let image = dir.join("disk");
    File::create(&image).unwrap().set_len(1 << 30).unwrap();
    run(Command::new(format!("mkfs.{kind}")).arg("-q").arg(&image));
    // Where the kernel has project quotas: see that they are used without the capabilities that are given up.
    let limits = Command::new("mount").args(["-o", "loop,prjquota"]).arg(&image).arg(&at).output().unwrap();
    if !limits.status.success() {
        run(Command::new("mount").args(["-o", "loop"]).arg(&image).arg(&at));
    }
    at
}

fn work(kind: &str) {
    let dir = tempfile::tempdir().unwrap();
    let volumes = mounted(kind, dir.path());
    let before = FileBacking::open(&volumes, 1.0).unwrap().abilities();
    // As kubelet and Kata leave them: of root, closed to others.
    let (pods, kata) = (dir.path().join("pods"), dir.path().join("kata"));
    for made in [&pods, &kata] {
        fs::create_dir(made).unwrap();
        fs::set_permissions(made, Permissions::from_mode(0o700)).unwrap();
    }
    let socket = kata.join("shim-monitor.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    fs::set_permissions(&socket, Permissions::from_mode(0o600)).unwrap();

    drop_unneeded().unwrap();
    refuse_unneeded().unwrap();

    let backing = FileBacking::open(&volumes, 1.0).unwrap();
    println!("{kind}: {}", backing.abilities().unwrap());
    assert_eq!(backing.abilities(), before, "as much as with all capabilities");
    let id = VolumeId::from_name("a");
    let spec = |mib| DeviceSpec {
        id,
        layout: DiskLayout::new(Bytes::mib(mib), Headroom::NONE),
        provisioning: Provisioning::Thin,
    };
    assert_eq!(backing.create(&spec(256)).unwrap(), Outcome::Changed);
    let proof = backing.exclusive(id).unwrap();
    backing.write_table(&spec(256), proof.as_ref()).unwrap();
    drop(proof);
    assert_eq!(backing.grow(&spec(300)).unwrap(), Outcome::Changed);

    let target = TargetPath::resolve(&pods.join("mount")).unwrap();
    assert_eq!(target.mount_placeholder().unwrap(), Outcome::Changed);
    let direct = DirectVolumes::open(&dir.path().join("direct-volumes")).unwrap();
    let spec = VolumeSpec::new(id, Uuid::from_u128(1), Create::Fresh, Bytes::mib(256));
    let entry = DirectVolume { device: backing.device(id).unwrap(), spec, discard: true };
    assert_eq!(direct.publish(&target, &entry).unwrap(), Outcome::Changed);
    assert_eq!(direct.remove(&target).unwrap(), Outcome::Changed);
    assert_eq!(target.remove_placeholder().unwrap(), Outcome::Changed);

    UnixStream::connect(&socket).unwrap();
    listener.accept().unwrap();
    assert_eq!(backing.destroy(id).unwrap(), Outcome::Changed);
}
