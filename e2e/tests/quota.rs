//! A guest that writes past its partition, on file systems with project quotas. Few kernels for virtual machines have
//! those; Debian's has. So the file backing itself is what runs in the guest here: this very program, as its init.
#![allow(clippy::unwrap_used, reason = "clippy allows it in test functions only, not in what they call")]

#[path = "quota/guest.rs"]
mod guest;
// As it is in the driver, whose crate would bring a Kubernetes client into the guest.
#[allow(unreachable_pub)]
#[path = "../../driver/src/privileges.rs"]
mod privileges;

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use zpod_e2e::accel::Accel;
use zpod_e2e::process::Process;
use zpod_e2e::slot::Slot;
use zpod_e2e::workdir::Workdir;
use zpod_e2e::{base_initrd, console, inputs};
use zpod_image::Archive;
use zpod_image::cache::Cache;
use zpod_image::chroot::Chroot;
use zpod_image::debian::Versions;
use zpod_image::modules::{self, Group};

const DEADLINE: Duration = Duration::from_secs(600);
const MIB: u64 = 1 << 20;

/// `quota_v2` is ext4's.
const MODULES: [(Group, &str); 3] = [(Group::Boot, "virtio_blk"), (Group::Boot, "xfs"), (Group::Boot, "quota_v2")];

#[tokio::test]
async fn a_guest_that_writes_past_its_partition_is_stopped_by_a_project_quota_and_takes_no_room_from_others()
-> Result<()> {
    let _slot = Slot::take().await?;
    let dir = Workdir::new()?;
    let place = |name: &str| dir.path().join(name);
    let kernel = write_initrd(dir.path(), &place("initrd"))?;
    let xfs = disk(place("xfs"), 400, "mkfs.xfs", &["-q"])?;
    let ext4 = disk(place("ext4"), 256, "mkfs.ext4", &["-q", "-O", "project,quota"])?;

    let drive = |name: &str, disk: &Path| {
        let file = format!("if=none,id={name},format=raw,cache=unsafe,file={}", disk.display());
        ["-drive".to_owned(), file, "-device".to_owned(), format!("virtio-blk-pci,drive={name}")]
    };
    let fixed = "-nodefaults -no-user-config -no-reboot -display none -machine q35 -cpu max -smp 2 -m 768";
    let mut arguments: Vec<String> = fixed.split(' ').map(str::to_owned).collect();
    arguments.extend(["-accel".to_owned(), Accel::detect().await?.argument().to_owned()]);
    arguments.extend(["-serial".to_owned(), format!("file:{}", place("console").display())]);
    arguments.extend(drive("xfs", &xfs).into_iter().chain(drive("ext4", &ext4)));
    arguments.extend(["-kernel".to_owned(), kernel.display().to_string()]);
    arguments.extend(["-initrd".to_owned(), place("initrd").display().to_string(), "-append".to_owned()]);
    // What follows the two dashes are init's arguments.
    arguments.push(format!("console=ttyS0 quiet panic=-1 rdinit={} -- {}", guest::INIT, guest::ARGUMENTS.join(" ")));

    let started = Instant::now();
    let mut qemu = Process::start(&inputs::qemu()?, arguments, &[], &place("qemu.log"))?;
    while qemu.ended()?.is_none() {
        if started.elapsed() > DEADLINE {
            bail!("not done after {DEADLINE:?}; the console ends:\n{}", console::tail(&place("console"), 40));
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let said = console::tail(&place("console"), 200);
    println!("{said}\nin {:?}", started.elapsed());
    assert!(said.lines().any(|line| line == guest::PASS), "{said}\n{}", qemu.tail());
    Ok(())
}

/// Not a test of its own: what the guest starts.
#[test]
#[ignore = "what the other test runs in a guest"]
fn in_the_guest() {
    guest::main();
}

/// What the guest starts again and again, to be killed.
#[test]
#[ignore = "what the other test runs in a guest, to be killed there"]
fn to_be_killed() {
    guest::volumes_life();
}

/// A sparse disk with a file system.
fn disk(path: PathBuf, mib: u64, mkfs: &str, options: &[&str]) -> Result<PathBuf> {
    File::create(&path)?.set_len(mib * MIB)?;
    let program = inputs::program(mkfs, "install xfsprogs and e2fsprogs")?;
    let output = Command::new(program).args(options).arg(&path).output()?;
    if !output.status.success() {
        bail!("{mkfs}: {}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(path)
}

/// This program, the tools it looks with, and the kernel's modules; gives the kernel.
fn write_initrd(scratch: &Path, to: &Path) -> Result<PathBuf> {
    let (chroot, _) = Chroot::for_versions(&Cache::from_env()?, &Versions::resolve()?)?;
    let mut archive = Archive::new();
    for dir in ["/dev", "/proc", "/tmp", "/etc", "/modules", "/mnt"] {
        archive.dir(dir, 0o755);
    }
    archive.char_device("/dev/console", 0o600, 5, 1);
    archive.symlink("/etc/mtab", "/proc/mounts");
    base_initrd::add_program(&mut archive, guest::INIT, "", &std::env::current_exe()?)?;
    let install = "install xfsprogs and e2fsprogs";
    base_initrd::add_program(&mut archive, guest::XFS_QUOTA, "", &inputs::program("xfs_quota", install)?)?;
    base_initrd::add_program(&mut archive, guest::CHATTR, "", &inputs::program("chattr", install)?)?;
    let order = modules::load_order(&chroot.modules(), chroot.release(), &MODULES)?;
    for (number, module) in order.iter().enumerate() {
        let bytes = modules::loadable(&chroot, module, scratch)?;
        archive.file(&format!("/modules/{number:02}-{}.ko", module.name), bytes, 0o644);
    }
    fs::write(to, archive.to_cpio()?).with_context(|| format!("write {}", to.display()))?;
    Ok(chroot.vmlinuz())
}
