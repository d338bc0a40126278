//! Mounting datasets for containers.
//!
//! # Design
//! Kata's agent runs on the initramfs, where no pivot_root is possible: a container's mount namespace keeps, hidden
//! under its root, a copy of every mount there was when it started (`ms_move_root` in rustjail). Such a copy of another
//! container's volume would keep the pool busy after that container is gone. The agent makes those copies slaves, so
//! an unmount of ours reaches them, provided that what we mount on is shared. It is made so right before, save for the
//! root itself: there the agent's own setup decides.
//!
//! A snapshot that somebody goes into (`.zfs/snapshot`) is mounted below our own mount of the volume ([`crate::automount`]).
//! For containers to see it, what they get is a bind mount of that one, which takes over what is mounted and unmounted
//! there, and hands it on to its own copies: a slave that is shared. Not a peer: what is taken away with one container
//! stays with the others.

use std::ffi::CString;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt as _;
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

/// The dataset that is mounted there.
fn dataset_at<'a>(mounts: &'a [Mount], target: &Path) -> Option<&'a str> {
    // The last one is on top.
    let there = mounts.iter().rfind(|mount| mount.point == target);
    there.filter(|there| there.kind == "zfs").map(|there| there.source.as_str())
}

/// Mounts a dataset at a place of ours, unless it is mounted there already.
///
/// # Errors
/// Those of mount(2).
pub fn mount(dataset: &str, target: &Path, flags: MountFlags) -> io::Result<Step> {
    let mounts = table()?;
    if dataset_at(&mounts, target) == Some(dataset) {
        return Ok(Step::Unchanged);
    }
    share_below(&mounts, target);
    let mut bits = bits(flags);
    bits.set(Flags::RDONLY, flags.read_only);
    // Where snapshots are mounted that somebody goes into.
    let place = CString::new([b"mntpoint=", target.as_os_str().as_bytes()].concat())?;
    rustix::mount::mount(dataset, target, "zfs", bits, place.as_c_str())?;
    Ok(Step::Changed)
}

/// Mounts what we have mounted at `base` for a container too, with the snapshots that are mounted in it.
///
/// # Errors
/// Those of mount(2), or when nothing is mounted there.
pub fn mount_for_container(base: &Path, target: &Path, flags: MountFlags) -> io::Result<Step> {
    let mounts = table()?;
    let Some(dataset) = dataset_at(&mounts, base) else {
        return Err(io::Error::other(format!("nothing is mounted at {}", base.display())));
    };
    if dataset_at(&mounts, target) == Some(dataset) {
        return Ok(Step::Unchanged);
    }
    share_below(&mounts, target);
    rustix::mount::mount_bind_recursive(base, target)?;
    let settled = || {
        let all = MountPropagationFlags::REC;
        rustix::mount::mount_change(target, MountPropagationFlags::DOWNSTREAM | all)?;
        rustix::mount::mount_change(target, MountPropagationFlags::SHARED | all)?;
        // Of this mount only: others of the dataset have flags of their own. Without a word on access times it would have
        // those of our own mount.
        let mut bits = bits(flags);
        bits.set(Flags::RDONLY, flags.read_only);
        bits.set(Flags::RELATIME, !flags.noatime);
        rustix::mount::mount_remount(target, bits | Flags::BIND, c"")
    };
    if let Err(error) = settled() {
        let _ = rustix::mount::unmount(target, UnmountFlags::DETACH);
        return Err(error.into());
    }
    Ok(Step::Changed)
}

/// As mount(2) has them, but for read-only.
pub(crate) fn bits(flags: MountFlags) -> Flags {
    let mut bits = Flags::empty();
    bits.set(Flags::NOEXEC, flags.noexec);
    bits.set(Flags::NOSUID, flags.nosuid);
    bits.set(Flags::NODEV, flags.nodev);
    bits.set(Flags::NOATIME, flags.noatime);
    bits
}

/// Makes what a place lies on a shared mount.
fn share_below(mounts: &[Mount], target: &Path) {
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
}

/// Unmounts, with the snapshots that are mounted in it; what is not mounted is left so.
///
/// # Errors
/// EBUSY while somebody uses it and `lazy` is not set.
pub fn unmount(target: &Path, lazy: bool) -> io::Result<Step> {
    let flags = if lazy { UnmountFlags::DETACH | UnmountFlags::NOFOLLOW } else { UnmountFlags::NOFOLLOW };
    for snapshot in snapshots_in(&table()?, target) {
        match rustix::mount::unmount(snapshot, flags) {
            // ZFS itself unmounts what nobody has used for a while.
            Ok(()) | Err(Errno::INVAL | Errno::NOENT) => {}
            Err(error) => return Err(error.into()),
        }
    }
    match rustix::mount::unmount(target, flags) {
        Ok(()) => Ok(Step::Changed),
        // Not a mount point; not there.
        Err(Errno::INVAL | Errno::NOENT) => Ok(Step::Unchanged),
        Err(error) => Err(error.into()),
    }
}

/// Where snapshots are mounted in what is mounted there.
fn snapshots_in<'a>(mounts: &'a [Mount], target: &Path) -> Vec<&'a Path> {
    let place = target.join(".zfs/snapshot");
    let inside = mounts.iter().filter(|mount| mount.kind == "zfs" && mount.point.parent() == Some(&place));
    inside.map(|mount| mount.point.as_path()).collect()
}

/// Whether a dataset is what is mounted there.
///
/// # Errors
/// When the mounts can't be read.
pub fn is_mounted(dataset: &str, target: &Path) -> io::Result<bool> {
    let mounts = table()?;
    let there = mounts.iter().rfind(|mount| mount.point == target);
    Ok(there.is_some_and(|there| there.kind == "zfs" && there.source == dataset))
}

/// Whether datasets are mounted below a mount point of ours: those that a tenant has made ([`crate::children`]).
///
/// # Errors
/// When the mounts can't be read.
pub fn has_children(target: &Path) -> io::Result<bool> {
    let below = |mount: &Mount| mount.point != target && mount.point.starts_with(target);
    Ok(table()?.iter().any(|mount| mount.kind == "zfs" && !mount.source.contains('@') && below(mount)))
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
        let lines = [
            "98 1 0:44 / /zpod/volumes/1 rw shared:7 - zfs zpod-1/data rw",
            "99 98 0:45 / /zpod/volumes/1/.zfs/snapshot/s ro shared:8 - zfs zpod-1/data@s ro",
            "97 1 0:46 / /zpod/volumes/1/.zfs/snapshot/s/below rw - tmpfs tmpfs rw",
            "96 1 0:44 / /zpod/volumes/10/.zfs/snapshot/s rw shared:7 - zfs zpod-10/data@s ro",
        ];
        let mounts: Vec<_> = lines.into_iter().filter_map(parse).collect();
        assert_eq!(dataset_at(&mounts, Path::new("/zpod/volumes/1")), Some("zpod-1/data"));
        let inside = snapshots_in(&mounts, Path::new("/zpod/volumes/1"));
        assert_eq!(inside, [Path::new("/zpod/volumes/1/.zfs/snapshot/s")]);
    }
}
