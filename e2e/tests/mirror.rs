//! Whether a volume can lie on two disks of the host, though Kata hands a guest one device per mount: device-mapper makes
//! one device of two halves, and in the guest each half is a partition and one side of a ZFS mirror. Few kernels for
//! virtual machines have device-mapper; Debian's has. So host and guest are one kernel here, this very program is its
//! init, and a loop device upon the host's device takes the place of the guest's disk. The node's own side runs there too:
//! its two backing directories, and what makes one device of two images.
#![allow(clippy::unwrap_used, reason = "clippy allows it in test functions only, not in what they call")]

#[path = "mirror/guest.rs"]
mod guest;
#[path = "mirror/node.rs"]
mod node;
// As they are in the driver, whose crate would bring a Kubernetes client into the guest.
#[allow(unreachable_pub)]
#[path = "../../driver/src/kata/mapper.rs"]
mod mapper;
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
use zpod_image::cache::Cache;
use zpod_image::chroot::Chroot;
use zpod_image::debian::Versions;
use zpod_image::modules::{self, Group};
use zpod_image::{Archive, initrd};

const DEADLINE: Duration = Duration::from_secs(600);

const MODULES: [(Group, &str); 4] =
    [(Group::Boot, "virtio_blk"), (Group::Boot, "xfs"), (Group::Boot, "loop"), (Group::Boot, "dm_mod")];

#[tokio::test]
async fn a_device_of_two_halves_is_a_mirror_in_the_guest_which_outlives_either_half_and_heals() -> Result<()> {
    let _slot = Slot::take().await?;
    let dir = Workdir::new()?;
    let place = |name: &str| dir.path().join(name);
    write_initrd(dir.path(), &place("initrd"))?;

    let fixed = "-nodefaults -no-user-config -no-reboot -display none -machine q35 -cpu max -smp 1 -m 1024";
    let mut arguments: Vec<String> = fixed.split(' ').map(str::to_owned).collect();
    arguments.extend(["-accel".to_owned(), Accel::detect().await?.argument().to_owned()]);
    arguments.extend(["-serial".to_owned(), format!("file:{}", place("console").display())]);
    for name in guest::DISKS {
        let file = format!("if=none,id={name},format=raw,cache=unsafe,file={}", xfs(place(name))?.display());
        arguments.extend(["-drive".to_owned(), file, "-device".to_owned(), format!("virtio-blk-pci,drive={name}")]);
    }
    arguments.extend(["-kernel".to_owned(), inputs::guest_image()?.kernel.display().to_string()]);
    arguments.extend(["-initrd".to_owned(), place("initrd").display().to_string(), "-append".to_owned()]);
    // What follows the two dashes are init's arguments.
    arguments.push(format!("console=ttyS0 quiet panic=-1 rdinit={} -- {}", guest::INIT, guest::ARGUMENTS.join(" ")));

    let started = Instant::now();
    let mut qemu = Process::start(&inputs::qemu()?, arguments, &[], &place("qemu.log"))?;
    while qemu.ended()?.is_none() {
        if started.elapsed() > DEADLINE {
            bail!("not done after {DEADLINE:?}; the console ends:\n{}", console::tail(&place("console"), 60));
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let said = console::tail(&place("console"), 300);
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
    node::to_be_killed();
}

/// A disk of the host.
fn xfs(path: PathBuf) -> Result<PathBuf> {
    File::create(&path)?.set_len(500 << 20)?;
    let output = Command::new(inputs::program("mkfs.xfs", "install xfsprogs")?).arg("-q").arg(&path).output()?;
    if !output.status.success() {
        bail!("mkfs.xfs: {}", String::from_utf8_lossy(&output.stderr));
    }
    Ok(path)
}

/// This program, the host's tools, the kernel's modules, and upon that what our guests have: ZFS.
fn write_initrd(scratch: &Path, to: &Path) -> Result<()> {
    let (chroot, _) = Chroot::for_versions(&Cache::from_env()?, &Versions::resolve()?)?;
    let mut archive = Archive::new();
    for dir in ["/dev", "/proc", "/sys", "/run", "/tmp", "/etc", "/modules", "/data", "/a", "/b", "/c"] {
        archive.dir(dir, 0o755);
    }
    archive.char_device("/dev/console", 0o600, 5, 1);
    archive.symlink("/etc/mtab", "/proc/mounts");
    base_initrd::add_program(&mut archive, guest::INIT, "", &std::env::current_exe()?)?;
    for (path, name) in [(guest::DMSETUP, "dmsetup"), (guest::LOSETUP, "losetup"), (guest::ADDPART, "addpart")] {
        base_initrd::add_program(&mut archive, path, "", &inputs::program(name, "install dmsetup and util-linux")?)?;
    }
    base_initrd::add_program(&mut archive, node::XFS_IO, "", &inputs::program("xfs_io", "install xfsprogs")?)?;
    let order = modules::load_order(&chroot.modules(), chroot.release(), &MODULES)?;
    for (number, module) in order.iter().enumerate() {
        let bytes = modules::loadable(&chroot, module, scratch)?;
        archive.file(&format!("/modules/{number:02}-{}.ko", module.name), bytes, 0o644);
    }
    let base = scratch.join("base");
    fs::write(&base, archive.to_cpio()?).with_context(|| format!("write {}", base.display()))?;
    initrd::append(&base, &inputs::guest_image()?.overlay, to)?;
    Ok(())
}
