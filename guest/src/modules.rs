//! Loading kernel modules, in the order that the image gives.

use std::fs::{self, File};
use std::io;
use std::path::Path;

use rustix::io::Errno;

/// A group of modules.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Group {
    /// What the agent and the proxy need.
    Boot,
    /// ZFS.
    Zfs,
}

impl Group {
    const fn name(self) -> &'static str {
        match self {
            Self::Boot => "boot",
            Self::Zfs => "zfs",
        }
    }
}

/// Loads the modules of a group from `directory`, in the order of its file `order`: lines of a group and a file name.
///
/// # Errors
/// On the first that does not load. One that is loaded already, or whose hardware is missing, is no error.
pub fn load(directory: &Path, group: Group) -> io::Result<usize> {
    let order = fs::read_to_string(directory.join("order"))?;
    let mut count = 0;
    for name in files(&order, group) {
        let loaded =
            File::open(directory.join(name)).and_then(|file| match rustix::system::finit_module(&file, c"", 0) {
                Ok(()) | Err(Errno::EXIST | Errno::NODEV) => Ok(()),
                Err(error) => Err(error.into()),
            });
        loaded.map_err(|error| io::Error::new(error.kind(), format!("module {name}: {error}")))?;
        count += 1;
    }
    Ok(count)
}

fn files(order: &str, group: Group) -> impl Iterator<Item = &str> {
    let lines = order.lines().filter_map(|line| line.trim().split_once(char::is_whitespace));
    lines.filter(move |(name, _)| *name == group.name()).map(|(_, file)| file.trim())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_come_by_group_in_their_order() {
        let order = "boot virtio.ko\nboot vsock.ko\n\nzfs spl.ko\nzfs zfs.ko\n";
        assert_eq!(files(order, Group::Boot).collect::<Vec<_>>(), ["virtio.ko", "vsock.ko"]);
        assert_eq!(files(order, Group::Zfs).collect::<Vec<_>>(), ["spl.ko", "zfs.ko"]);
    }
}
