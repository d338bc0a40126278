//! Snapshots below `.zfs/snapshot`, mounted when somebody goes there.
//!
//! # Design
//! OpenZFS mounts such a snapshot by a program that the kernel starts, `/usr/bin/env mount -t zfs ...`, as a child of none
//! of the container's processes: in the mount namespace of the guest's init, at the place that the volume's file system was
//! told to have when it was mounted (`zfsctl_snapshot_mount`, zfs_ctldir.c). Kata's initrd need not have these programs,
//! and with those of util-linux a snapshot would be mounted without the flags of its volume. So `/usr/bin/env` of the guest
//! is this program: it mounts and unmounts by itself, and becomes the env that was there before for anything else. That
//! containers see what is mounted so is up to [`crate::mounts`].

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::fs::symlink;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Command, ExitCode};

use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags};

/// What the kernel starts, and where the one is that was there before.
const ENV: &str = "/usr/bin/env";
const BEFORE: &str = "/usr/bin/env.zpod";
/// How mount(8) and umount(8) end where what they were to do is under way, or somebody is still there.
const BUSY: u8 = 32;
const FAILED: u8 = 1;

/// Puts this program in the place of the guest's env.
///
/// # Errors
/// Those of the file system. Then nobody can go into snapshots.
pub fn install(program: &Path) -> io::Result<()> {
    install_at(program, Path::new(ENV), Path::new(BEFORE))
}

fn install_at(program: &Path, env: &Path, before: &Path) -> io::Result<()> {
    if let Some(directory) = env.parent() {
        fs::create_dir_all(directory)?;
    }
    match fs::rename(env, before) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => symlink(program, env),
    }
}

/// Whether this program was started in the place of env.
pub fn is_env(name: Option<&OsString>) -> bool {
    name.is_some_and(|name| Path::new(name).file_name().is_some_and(|file| file == "env"))
}

/// What the kernel wants.
#[derive(Debug, PartialEq, Eq)]
enum Task<'a> {
    Mount { snapshot: &'a str, target: &'a str },
    Unmount { target: &'a str, force: bool },
}

/// Reads what the kernel starts; `None` of anything else.
fn task<'a>(arguments: &[&'a str]) -> Option<Task<'a>> {
    let (tool, rest) = arguments.split_first()?;
    let zfs = rest.windows(2).any(|pair| pair == ["-t", "zfs"]);
    match (*tool, rest) {
        ("mount", [.., snapshot, target]) if zfs && snapshot.contains('@') && target.starts_with('/') => {
            Some(Task::Mount { snapshot, target })
        }
        ("umount", [.., target]) if zfs && target.starts_with('/') => {
            let force = rest.iter().any(|option| matches!(*option, "-f" | "-fn"));
            Some(Task::Unmount { target, force })
        }
        _ => None,
    }
}

/// Does what the kernel has started env for, or becomes the env that was there before.
pub fn run(arguments: &[OsString]) -> ExitCode {
    let words: Option<Vec<_>> = arguments.iter().map(|word| word.to_str()).collect();
    let done = match words.as_deref().and_then(task) {
        Some(Task::Mount { snapshot, target }) => {
            let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::RDONLY;
            rustix::mount::mount(snapshot, target, "zfs", flags, None)
        }
        Some(Task::Unmount { target, force }) => {
            let flags = if force { UnmountFlags::FORCE } else { UnmountFlags::empty() };
            rustix::mount::unmount(target, flags | UnmountFlags::NOFOLLOW)
        }
        None => {
            // Only returns when it fails.
            let error = Command::new(BEFORE).arg0("env").args(arguments).exec();
            eprintln!("env: {error}");
            return ExitCode::from(127);
        }
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(Errno::BUSY) => ExitCode::from(BUSY),
        Err(_) => ExitCode::from(FAILED),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_kernel_starts_is_told_from_anything_else() {
        let (snapshot, target) = ("zpod-1/data@s", "/zpod/volumes/1/.zfs/snapshot/s");
        let mount = Some(Task::Mount { snapshot, target });
        // OpenZFS 2.3, and later versions.
        assert_eq!(task(&["mount", "-i", "-t", "zfs", "-n", snapshot, target]), mount);
        assert_eq!(task(&["mount", "-i", "-t", "zfs", "-n", "-o", "suid", snapshot, target]), mount);
        for (option, force) in [("-n", false), ("-fn", true)] {
            assert_eq!(task(&["umount", "-t", "zfs", option, target]), Some(Task::Unmount { target, force }));
        }
        for other in [
            &["mount", "-t", "zfs", "zpod-1/data", "/mnt"][..],
            &["mount", "-t", "ext4", "a@b", "/mnt"],
            &["umount", "/mnt"],
            &["ls", "-t", "zfs", "/"],
            &["mount"],
            &[],
        ] {
            assert_eq!(task(other), None, "{other:?}");
        }
        assert!(is_env(Some(&"/usr/bin/env".into())) && !is_env(Some(&"/zpod/init".into())) && !is_env(None));
    }

    #[test]
    fn the_env_that_was_there_is_kept_and_none_is_needed() {
        let dir = tempfile::tempdir().unwrap();
        let (env, before) = (dir.path().join("usr/bin/env"), dir.path().join("usr/bin/env.zpod"));
        install_at(Path::new("/zpod/init"), &env, &before).unwrap();
        assert_eq!(fs::read_link(&env).unwrap(), Path::new("/zpod/init"));
        assert!(!before.exists());
        fs::remove_file(&env).unwrap();
        fs::write(&env, "theirs").unwrap();
        install_at(Path::new("/zpod/init"), &env, &before).unwrap();
        assert_eq!(fs::read_link(&env).unwrap(), Path::new("/zpod/init"));
        assert_eq!(fs::read_to_string(&before).unwrap(), "theirs");
    }
}
