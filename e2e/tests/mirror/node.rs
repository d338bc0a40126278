//! The node's side: two backing directories on two disks, and zpod's own device of the two images.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt as _, FileTypeExt as _};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use zpod_storage::backing::file::FileBacking;
use zpod_storage::backing::mirrored::Mirrored;
use zpod_storage::backing::{Backing as _, DeviceSpec, Outcome};
use zpod_volume::{Bytes, DiskLayout, Half, Provisioning, VolumeId, gpt};

use super::guest::{LOSETUP, run};
use super::mapper::{Mapper, MapperError, Removal};
use super::privileges;

/// What the guest starts again and again.
pub(crate) const KILLED: [&str; 4] = ["--exact", "to_be_killed", "--ignored", "--nocapture"];
pub(crate) const XFS_IO: &str = "/sbin/xfs_io";
const DIRECTORIES: [&str; 2] = ["/a/volumes", "/b/volumes"];
const LOOPS: &str = "LOOPS";
/// Without `CAP_MKNOD`, as zpod-node is.
const UNPRIVILEGED: &str = "UNPRIVILEGED";

fn id() -> VolumeId {
    VolumeId::from_name("mirrored")
}

fn spec() -> DeviceSpec {
    let layout = DiskLayout { capacity: Bytes::mib(64), partition: Bytes::mib(64), disk: Bytes::mib(128) };
    DeviceSpec { id: id(), layout, provisioning: Provisioning::Thin }
}

pub(crate) fn mirrored() {
    for directory in DIRECTORIES {
        fs::create_dir_all(directory).unwrap();
    }
    Mirrored::check_apart(Path::new(DIRECTORIES[0]), Path::new(DIRECTORIES[1])).unwrap();
    let [first, second] = DIRECTORIES.map(|directory| Arc::new(FileBacking::open(directory, 1.0).unwrap()));
    let backing = Mirrored::new(first, second);
    assert_eq!(backing.create(&spec()).unwrap(), Outcome::Changed);
    let images = Half::BOTH.map(|half| backing.half(id(), half).unwrap());
    let attach = |image: &PathBuf| {
        run(LOSETUP, &["--find", "--show", "--direct-io=on", image.to_str().unwrap()], "").trim().to_owned()
    };
    let loops = images.each_ref().map(attach);
    let [one, two] = loops.each_ref().map(Path::new);

    let (mapper, path, half) = (Mapper::open().unwrap(), Mapper::path(id()), spec().layout.disk);
    assert_eq!(mapper.unmap(id(), Removal::Now).unwrap(), Outcome::Unchanged);
    assert_eq!(mapper.map(id(), [Some(one), Some(two)], half).unwrap(), Outcome::Changed);
    assert_eq!(mapper.map(id(), [Some(one), Some(two)], half).unwrap(), Outcome::Unchanged);
    assert!(fs::metadata(&path).unwrap().file_type().is_block_device());
    let device = OpenOptions::new().read(true).write(true).open(&path).unwrap();
    for (number, image) in images.iter().enumerate() {
        // Each half begins with its table, and is its image.
        let at = number as u64 * half.0;
        let mut table = vec![0; gpt::PRIMARY_BYTES];
        device.read_exact_at(&mut table, at).unwrap();
        assert_eq!(gpt::decode(&table).unwrap().disk_guid, id().uuid());
        let mark = [number as u8 + 1; 4096];
        device.write_all_at(&mark, at + DiskLayout::PARTITION_START).unwrap();
        device.sync_all().unwrap();
        let mut found = [0; 4096];
        File::open(image).unwrap().read_exact_at(&mut found, DiskLayout::PARTITION_START).unwrap();
        assert_eq!(found, mark);
    }
    // In use.
    assert!(matches!(mapper.unmap(id(), Removal::Now), Err(MapperError::InUse(_))));
    assert!(backing.exclusive(id()).is_err());
    assert_eq!(mapper.unmap(id(), Removal::WhenUnused).unwrap(), Outcome::Changed);
    assert_eq!(mapper.unmap(id(), Removal::WhenUnused).unwrap(), Outcome::Changed);
    let mut found = [0; 4096];
    device.read_exact_at(&mut found, DiskLayout::PARTITION_START).unwrap();
    drop(device);
    // It goes with its user, by a task of the kernel's own; what led to it goes now.
    mapper.unmap(id(), Removal::Now).unwrap();
    assert_eq!(mapper.unmap(id(), Removal::Now).unwrap(), Outcome::Unchanged);
    assert!(!path.exists());
    println!("a device of two images of two directories, removed with its last user");

    for lost in Half::BOTH {
        let mut there = [Some(one), Some(two)];
        there[lost.index()] = None;
        mapper.map(id(), there, half).unwrap();
        let device = File::open(&path).unwrap();
        let read = |of: Half| device.read_exact_at(&mut [0; 4096], of.index() as u64 * half.0);
        assert_eq!(read(lost).map_err(|error| error.raw_os_error()), Err(Some(nix::libc::EIO)));
        read(lost.other()).unwrap();
        drop(device);
        mapper.unmap(id(), Removal::Now).unwrap();
    }
    assert!(matches!(mapper.map(id(), [None, None], half), Err(MapperError::NoHalves(_))));
    // What can't be made says why, and nothing stays of it.
    let error = mapper.map(id(), [Some(one), Some(two)], Bytes::gib(1)).unwrap_err();
    assert!(matches!(&error, MapperError::Tool { text, .. } if !text.is_empty()), "{error}");
    assert_eq!(mapper.unmap(id(), Removal::Now).unwrap(), Outcome::Unchanged);
    println!("{error}");

    let loops = loops.join(" ");
    killed(&loops, false);
    killed(&loops, true);
    for device in loops.split(' ') {
        run(LOSETUP, &["--detach", device], "");
    }
    backing.exclusive(id()).unwrap();
    dead_disk(&backing);
    // As after a restart of zpod-node with the disk in order again: nothing of the half is lost.
    drop(backing);
    nix::mount::umount("/b").unwrap();
    nix::mount::mount(Some("/dev/vdb"), "/b", Some("xfs"), nix::mount::MsFlags::empty(), None::<&str>).unwrap();
    let [first, second] = DIRECTORIES.map(|directory| Arc::new(FileBacking::open(directory, 1.0).unwrap()));
    let backing = Mirrored::new(first, second);
    backing.half(id(), Half::Second).unwrap();
    assert_eq!(backing.destroy(id()).unwrap(), Outcome::Changed);
}

/// XFS shuts down when its disk fails under it. The half is lost then, and the other one is enough.
fn dead_disk(backing: &Mirrored) {
    run(XFS_IO, &["-x", "-c", "shutdown", "/b"], "");
    let error = backing.half(id(), Half::Second).unwrap_err();
    println!("of a dead disk: {error}");
    assert!(error.is_lost(), "{error}");
    backing.half(id(), Half::First).unwrap();
    let proof = backing.exclusive(id()).unwrap();
    backing.write_table(&spec(), proof.as_ref()).unwrap();
    drop(proof);
    assert!(backing.ever_written(&spec()).unwrap());
    assert!(backing.replace(&spec(), Half::Second).is_err() && backing.destroy(id()).is_err());
    backing.half(id(), Half::First).unwrap();
}

/// Made and removed, killed at the point that the environment names.
pub(crate) fn to_be_killed() {
    if std::env::var_os(UNPRIVILEGED).is_some() {
        privileges::drop_unneeded().unwrap();
    }
    let loops = std::env::var(LOOPS).unwrap();
    let (one, two) = loops.split_once(' ').unwrap();
    let mapper = Mapper::open().unwrap();
    mapper.map(id(), [Some(Path::new(one)), Some(Path::new(two))], spec().layout.disk).unwrap();
    let device = OpenOptions::new().read(true).write(true).open(Mapper::path(id())).unwrap();
    device.read_exact_at(&mut [0; 4096], 0).unwrap();
    drop(device);
    mapper.unmap(id(), Removal::Now).unwrap();
}

fn killed(loops: &str, unprivileged: bool) {
    let mapper = Mapper::open().unwrap();
    let mut points = 0;
    loop {
        let mut command = Command::new("/proc/self/exe");
        command.args(KILLED).env("ZPOD_CRASH_AT", (points + 1).to_string()).env(LOOPS, loops);
        if unprivileged {
            command.env(UNPRIVILEGED, "1");
        }
        let output = command.output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        if output.status.success() {
            assert!(fs::metadata(Mapper::path(id())).is_err_and(|error| error.kind() == io::ErrorKind::NotFound));
            break;
        }
        assert!(said.contains("crash point"), "{said}{}", String::from_utf8_lossy(&output.stdout));
        points += 1;
        // Once more, to the end, from wherever it was.
        let mut command = Command::new("/proc/self/exe");
        let output = command.args(KILLED).env(LOOPS, loops).output().unwrap();
        assert!(output.status.success(), "{said}{}", String::from_utf8_lossy(&output.stderr));
        assert_eq!(mapper.unmap(id(), Removal::Now).unwrap(), Outcome::Unchanged);
    }
    println!("killed at each of {points} points, unprivileged: {unprivileged}");
    assert!(points >= 2);
}
