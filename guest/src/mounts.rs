//! Mounting datasets for containers.
//!
//! # Design
//! Kata's agent runs on the initramfs, where no pivot_root is possible: a container's mount namespace keeps, hidden
//! under its root, a copy of every mount there was when it started (`ms_move_root` in rustjail). Such a copy of another
//! container's volume would keep the pool busy after that container is gone. The agent makes those copies slaves, so
//! an unmount of ours reaches them, provided that what we mount on is shared. It is made so right before, save for the
//! root itself: there the agent's own setup decides.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use rustix::io::Errno;
use rustix::mount::{MountFlags as Flags, MountPropagationFlags, UnmountFlags};

use crate::machine::{MountFlags, Step};

const MOUNTINFO: &str = "/proc/self/mountinfo";

/// A line of mountinfo (proc_pid_mountinfo(5)).
#[derive(Debug, PartialEq, Eq)]
struct Mount {
    point: PathBuf,
    shared: bool,
    kind: String,
    source: String,
}

fn parse(line: &str) -> Option<Mount> {
    let (before, after) = line.split_once(" - ")?;
    let mut fields = before.split(' ');
    let point = unescape(fields.nth(4)?);
    let shared = fields.skip(1).any(|tag| tag.starts_with("shared:"));
    let mut after = after.split(' ');
    Some(Mount { point: point.into(), shared, kind: after.next()?.into(), source: unescape(after.next()?) })
}

/// Undoes the octal escapes of space, tab, newline and backslash.
fn unescape(text: &str) -> String {
    let mut parts = text.split('\\');
    let mut out = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        match (part.get(..3).and_then(|digits| u8::from_str_radix(digits, 8).ok()), part.get(3..)) {
            (Some(byte), Some(rest)) => {
                out.push(char::from(byte));
                out.push_str(rest);
            }
            _ => {
                out.push('\\');
                out.push_str(part);
            }
        }
    }
    out
}

fn table() -> io::Result<Vec<Mount>> {
    Ok(fs::read_to_string(MOUNTINFO)?.lines().filter_map(parse).collect())
}

/// Mounts a dataset, unless it is mounted there already.
///
/// # Errors
/// Those of mount(2).
pub fn mount(dataset: &str, target: &Path, flags: MountFlags) -> io::Result<Step> {
    let mounts = table()?;
    // The last one is on top.
    if let Some(there) = mounts.iter().rfind(|mount| mount.point == target)
        && there.kind == "zfs"
        && there.source == dataset
    {
        return Ok(Step::Unchanged);
    }
    let below = mounts
        .iter()
        .filter(|mount| target.starts_with(&mount.point))
        .max_by_key(|mount| mount.point.as_os_str().len());
    if let Some(below) = below
        && !below.shared
        && below.point != Path::new("/")
        && let Err(error) = rustix::mount::mount_change(&below.point, MountPropagationFlags::SHARED)
    {
        tracing::warn!("{} can't be made a shared mount: {error}", below.point.display());
    }
    let mut bits = Flags::empty();
    bits.set(Flags::NOEXEC, flags.noexec);
    bits.set(Flags::NOSUID, flags.nosuid);
    bits.set(Flags::NODEV, flags.nodev);
    bits.set(Flags::NOATIME, flags.noatime);
    match rustix::mount::mount(dataset, target, "zfs", bits, None) {
        // The file system itself is read-only, since its pool is, and is mounted already: it has to be asked for so.
        Err(Errno::BUSY) if flags.read_only => {
            rustix::mount::mount(dataset, target, "zfs", bits | Flags::RDONLY, None)?;
        }
        mounted => mounted?,
    }
    if flags.read_only {
        // Of this mount only. Asked for at mount(2), it would be asked of the file system, which ZFS refuses with EBUSY
        // while another mount of the dataset writes (`zpl_mount_impl`).
        let remount = bits | Flags::BIND | Flags::RDONLY;
        if let Err(error) = rustix::mount::mount_remount(target, remount, c"") {
            let _ = rustix::mount::unmount(target, UnmountFlags::DETACH);
            return Err(error.into());
        }
    }
    Ok(Step::Changed)
}

/// Unmounts; what is not mounted is left so.
///
/// # Errors
/// EBUSY while somebody uses it and `lazy` is not set.
pub fn unmount(target: &Path, lazy: bool) -> io::Result<Step> {
    let flags = if lazy { UnmountFlags::DETACH | UnmountFlags::NOFOLLOW } else { UnmountFlags::NOFOLLOW };
    match rustix::mount::unmount(target, flags) {
        Ok(()) => Ok(Step::Changed),
        // Not a mount point; not there.
        Err(Errno::INVAL | Errno::NOENT) => Ok(Step::Unchanged),
        Err(error) => Err(error.into()),
    }
}

/// Makes a place for our own mounts: a file system of its own, shared, so that the root's propagation stays as it is.
///
/// # Errors
/// Those of mkdir(2) and mount(2).
pub fn prepare_bases(path: &Path) -> io::Result<()> {
    fs::create_dir_all(path)?;
    rustix::mount::mount("zpod", path, "tmpfs", Flags::NOEXEC | Flags::NOSUID | Flags::NODEV, c"size=1m,mode=0700")?;
    rustix::mount::mount_change(path, MountPropagationFlags::SHARED)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_mountinfo_are_read() {
        let line = "98 1 0:44 / /run/a\\040b rw,nosuid shared:7 master:2 - zfs zpod-1/data rw,xattr";
        let want = Mount { point: "/run/a b".into(), shared: true, kind: "zfs".into(), source: "zpod-1/data".into() };
        assert_eq!(parse(line), Some(want));
        assert!(!parse("1 1 0:2 / / rw - rootfs rootfs rw").unwrap().shared);
        assert_eq!(parse("nonsense"), None);
        assert!(!table().unwrap().is_empty());
    }
}
