//! mount(2) as kata-agent uses it.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result};
use nix::mount::{MntFlags, MsFlags, mount, umount2};

/// Mounts a file system that has no device.
pub(crate) fn mount_new(fstype: &str, target: &str, flags: MsFlags) -> Result<()> {
    fs::create_dir_all(target).with_context(|| format!("create {target}"))?;
    mount(Some(fstype), target, Some(fstype), flags, None::<&str>)
        .with_context(|| format!("mount {fstype} on {target}"))
}

/// Mount flags, propagation flags, and what is left as data (kata-sys-util `parse_mount_options`).
pub(crate) fn parse_options(options: &[String]) -> (MsFlags, MsFlags, String) {
    let mut flags = MsFlags::empty();
    let mut propagation = MsFlags::empty();
    let mut data = Vec::new();
    for option in options {
        match option.as_str() {
            "ro" => flags |= MsFlags::MS_RDONLY,
            "rw" | "defaults" => {}
            "nosuid" => flags |= MsFlags::MS_NOSUID,
            "nodev" => flags |= MsFlags::MS_NODEV,
            "noexec" => flags |= MsFlags::MS_NOEXEC,
            "noatime" => flags |= MsFlags::MS_NOATIME,
            "relatime" => flags |= MsFlags::MS_RELATIME,
            "strictatime" => flags |= MsFlags::MS_STRICTATIME,
            "bind" => flags |= MsFlags::MS_BIND,
            "rbind" => flags |= MsFlags::MS_BIND | MsFlags::MS_REC,
            "private" => propagation |= MsFlags::MS_PRIVATE,
            "rprivate" => propagation |= MsFlags::MS_PRIVATE | MsFlags::MS_REC,
            "slave" => propagation |= MsFlags::MS_SLAVE,
            "rslave" => propagation |= MsFlags::MS_SLAVE | MsFlags::MS_REC,
            "shared" => propagation |= MsFlags::MS_SHARED,
            "rshared" => propagation |= MsFlags::MS_SHARED | MsFlags::MS_REC,
            other => data.push(other),
        }
    }
    (flags, propagation, data.join(","))
}

/// The type of the first mount at a path, as the kernel lists them.
pub(crate) fn mounted_type(path: &str) -> Option<String> {
    let mounts = fs::read_to_string("/proc/mounts").ok()?;
    mounts.lines().find_map(|line| {
        let mut fields = line.split(' ').skip(1);
        (fields.next() == Some(path)).then(|| fields.next().map(str::to_owned))?
    })
}

/// Unmounts with MNT_DETACH, as rustjail's `destroy` does with a rootfs.
pub(crate) fn detach(path: &Path) -> nix::Result<()> {
    umount2(path, MntFlags::MNT_DETACH)
}
