use std::path::Path;

use zpod_admin::Check;
use zpod_storage::backing::file::{Abilities, Fencing};
use zpod_volume::Bytes;

use crate::volumes::{NodeVolumes, Provisioner};

/// Less than this part of what there is, in percent, is worth a word.
const LOW: u64 = 10;
/// Less than this of the file system itself, and pools will be suspended.
const FULL: u64 = 2;

/// File systems by their magic numbers (linux/magic.h), those that backing directories are put on.
const KNOWN: [(u64, &str); 8] = [
    (0x5846_5342, "XFS"),
    (0x9123_683E, "btrfs"),
    (0xEF53, "ext4"),
    (0x0102_1994, "tmpfs"),
    (0x2FC1_2FC1, "ZFS"),
    (0x794C_7630, "overlayfs"),
    (0x6969, "NFS"),
    (0xF2F5_2010, "F2FS"),
];

pub(super) fn checks(dir: &Path, abilities: Option<Abilities>) -> Vec<Check> {
    let name = "backing-directory";
    let stat = match rustix::fs::statfs(dir) {
        Ok(stat) => stat,
        Err(error) => {
            let remedy = "mount the disk that should be there, and see --backing-dir (node.backingDir of the chart)";
            return vec![Check::fail(name, format!("{}: {error}", dir.display()), remedy)];
        }
    };
    let magic = u64::try_from(stat.f_type).unwrap_or_default();
    let kind = KNOWN.iter().find(|(known, _)| *known == magic);
    let kind = kind.map_or_else(|| format!("file system {magic:#x}"), |(_, name)| (*name).to_owned());
    let mut checks = vec![match kind.as_str() {
        "tmpfs" => Check::warn(
            name,
            format!("{} is in memory (tmpfs)", dir.display()),
            "volumes are gone with the next boot: use a disk",
        ),
        "overlayfs" => {
            Check::warn(name, format!("{} is in a container's layer", dir.display()), "mount a disk of the node there")
        }
        _ => Check::ok(name, format!("{} is on {kind}", dir.display())),
    }];
    let Some(abilities) = abilities else {
        checks.push(Check::fail(
            "backing-usable",
            format!("what the file system of {} can do can't be tried out: nothing new is made there", dir.display()),
            "free space or inodes, or see why it is read-only (dmesg); zpod goes on by itself then",
        ));
        return checks;
    };
    checks.push(match abilities.reflink {
        true => Check::ok("backing-reflink", "files share blocks: snapshots and clones take no time and no space"),
        false => Check::warn(
            "backing-reflink",
            format!("files can't share blocks on {kind}: snapshots and clones would be full copies"),
            "put the backing directory on XFS or btrfs, or allow copies (parameter allowCopy)",
        ),
    });
    checks.push(match abilities.fencing {
        Fencing::Lease => Check::ok("backing-leases", "the kernel counts who has a device open"),
        Fencing::Lock => Check::warn(
            "backing-leases",
            "there are no leases: a virtual machine that takes no lock on its disk is not noticed",
            "put the backing directory on XFS, btrfs or ext4, and leave fs.leases-enable at 1",
        ),
    });
    checks.push(match abilities.quota {
        true => Check::ok("backing-quotas", "a guest that writes past its partition is stopped by a project quota"),
        false => Check::warn(
            "backing-quotas",
            "there are no project quotas: a guest can write past its partition, into room that others were promised",
            "XFS mounted with prjquota stops that, and so does headroom 1x; the metric of excess and an alarm tell of it",
        ),
    });
    let (total, free) = (stat.f_blocks, stat.f_bavail);
    let size = |blocks: u64| mib(Bytes(blocks.saturating_mul(u64::try_from(stat.f_bsize).unwrap_or(4096))));
    let message = format!("{} of {} are free in the file system", size(free), size(total));
    checks.push(match free.saturating_mul(100) {
        part if part < total.saturating_mul(FULL) => Check::fail(
            "backing-space",
            message,
            "pools are suspended when their disks can't be written: free space, or enlarge the file system, now",
        ),
        part if part < total.saturating_mul(LOW) => Check::warn(
            "backing-space",
            message,
            "free space, enlarge the file system, or move volumes away (kubectl zpod send)",
        ),
        _ => Check::ok("backing-space", message),
    });
    checks
}

/// What can still be promised.
pub(super) async fn room(volumes: &NodeVolumes) -> Vec<Check> {
    let name = "backing-room";
    let provisioner = Provisioner::new(volumes.context_shared());
    vec![match provisioner.capacity(zpod_volume::Vdevs::Single).await {
        Ok((room, total)) => {
            let message = format!("{} of {} can still be promised to new volumes", mib(room.available), mib(total));
            match room.available.0.saturating_mul(100) < total.0.saturating_mul(LOW) {
                true => Check::warn(
                    name,
                    message,
                    "new volumes go to other nodes; more disk, or --overprovision, makes room",
                ),
                false => Check::ok(name, message),
            }
        }
        Err(error) => {
            Check::fail(name, error.to_string(), "see whether the disk is there, and the kernel's log (dmesg)")
        }
    }]
}

fn mib(bytes: Bytes) -> Bytes {
    let unit = if bytes.0 >= 10 << 30 { 1 << 30 } else { 1 << 20 };
    bytes.round_down(unit)
}

#[cfg(test)]
mod tests {
    use super::*;
    use zpod_admin::Level;
    use zpod_storage::backing::file::FileBacking;

    #[test]
    fn a_directory_that_is_not_there_fails_and_one_in_memory_warns() {
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let abilities = FileBacking::open(dir.path(), 1.0).unwrap().abilities();
        let found = checks(dir.path(), abilities);
        assert_eq!((found[0].level, found[0].name.as_str()), (Level::Warn, "backing-directory"));
        assert!(found[0].message.contains("tmpfs"), "{found:?}");
        assert_eq!(found.len(), 5);
        let untried = checks(dir.path(), None);
        assert_eq!((untried[1].level, untried[1].name.as_str()), (Level::Fail, "backing-usable"));
        let missing = checks(&dir.path().join("missing"), abilities);
        assert_eq!(missing.len(), 1);
        assert_eq!(missing[0].level, Level::Fail);
        assert!(missing[0].remedy.contains("--backing-dir"), "{missing:?}");
    }
}
