//! What keeps the node's udev away from loop devices whose bytes tenants write.
//!
//! # Design
//! A file is opened by nobody but zpod and the virtual machine. A block volume's is a loop device as well, which udev sees
//! come: by its usual rules (60-persistent-storage.rules and what builds upon that) blkid, LVM, md and btrfs look at what
//! is on it. The rule here comes before those. It is written below `/run`, so that it goes with the boot of the node and
//! is there before this boot's first loop device.

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use super::KataError;

/// Before 60-persistent-storage.rules.
const NAME: &str = "59-zpod.rules";
/// Kubelet puts a loop device of its own upon ours (`volumepathhandler` in its source): below this its links are.
const KUBELETS: &str = "*/kubernetes.io/csi/volumeDevices/*";

/// Writes the rule for the images of directories, and for the devices of mirrors, below udev's own (`/run/udev`). Udev
/// itself sees that its rules have changed (udev(7)). A node without udev has no such directory, and needs no rule.
///
/// # Errors
/// When it can't be written.
pub fn write(udev_dir: &Path, backing_dirs: &[&Path]) -> Result<Option<PathBuf>, KataError> {
    if !udev_dir.is_dir() {
        return Ok(None);
    }
    let rules_dir = udev_dir.join("rules.d");
    fs::create_dir_all(&rules_dir).map_err(KataError::io("make", &rules_dir))?;
    let (path, partial) = (rules_dir.join(NAME), rules_dir.join(format!(".{NAME}")));
    let text = rule(backing_dirs).map_err(KataError::io("write a udev rule below", udev_dir))?;
    if fs::read_to_string(&path).is_ok_and(|found| found == text) {
        return Ok(Some(path));
    }
    fs::write(&partial, text).map_err(KataError::io("write", &partial))?;
    fs::set_permissions(&partial, Permissions::from_mode(0o644)).map_err(KataError::io("set the mode of", &partial))?;
    fs::rename(&partial, &path).map_err(KataError::io("write", &path))?;
    Ok(Some(path))
}

fn rule(backing_dirs: &[&Path]) -> io::Result<String> {
    let special = |c: char| c.is_control() || "\"*?[]|\\".contains(c);
    let mut images = String::new();
    for dir in backing_dirs {
        // As the kernel names the files in it.
        let real = dir.canonicalize();
        let text = real.as_deref().unwrap_or(dir).to_str().filter(|text| !text.contains(special));
        let why = || format!("the name {} has characters that udev's patterns can't have", dir.display());
        images.push_str(text.ok_or_else(|| io::Error::other(why()))?);
        images.push_str("/*|");
    }
    // Of 60-persistent-storage.rules, systemd's units, udisks.
    let hidden = "ENV{UDEV_DISABLE_PERSISTENT_STORAGE_RULES_FLAG}=\"1\", ENV{SYSTEMD_READY}=\"0\", \
                  ENV{UDISKS_IGNORE}=\"1\", OPTIONS:=\"nowatch\"";
    Ok(format!(
        "# Written by zpod-node. What a guest writes on its disk is read by guests: nothing on the node looks at it.\n\
         ACTION!=\"remove\", SUBSYSTEM==\"block\", KERNEL==\"loop*\", \
         ATTR{{loop/backing_file}}==\"{images}{KUBELETS}\", {hidden}\n\
         ACTION!=\"remove\", SUBSYSTEM==\"block\", KERNEL==\"dm-*\", ATTR{{dm/name}}==\"zpod-*\", {hidden}\n"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rule_is_written_where_there_is_udev_and_once() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(write(&dir.path().join("none"), &[Path::new("/volumes")]).unwrap(), None);
        let path = write(dir.path(), &[Path::new("/volumes")]).unwrap().unwrap();
        let written = fs::metadata(&path).unwrap();
        assert!(fs::read_to_string(&path).unwrap().contains("backing_file}==\"/volumes/*|"));
        write(dir.path(), &[Path::new("/volumes")]).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().modified().unwrap(), written.modified().unwrap());
        write(dir.path(), &[Path::new("/elsewhere"), Path::new("/other")]).unwrap();
        assert!(fs::read_to_string(&path).unwrap().contains("\"/elsewhere/*|/other/*|"));
        assert_eq!(fs::read_dir(dir.path().join("rules.d")).unwrap().count(), 1);
    }

    #[test]
    fn a_directory_that_is_a_pattern_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["/vol*", "/a|/b", "/a\"b", "/a\nb", "/[a]"] {
            write(dir.path(), &[Path::new(name)]).unwrap_err();
        }
        assert_eq!(fs::read_dir(dir.path().join("rules.d")).unwrap().count(), 0);
    }
}
