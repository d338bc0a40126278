//! A small file system on a loop device, and what can befall it.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::fs::FallocateFlags;
use rustix::io::Errno;
use rustix::mount::UnmountFlags;

/// Room for some dozen volumes.
const SIZE: u64 = 6 << 30;
/// On ext4, which has a fixed number: few, so that they are soon taken.
const INODES: &str = "512";
const FILLER: &str = "filler";
const EMPTY_FILES: &str = "empty-files";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Xfs,
    Btrfs,
    Ext4,
}

/// How it is with the file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum State {
    Free,
    /// Not a block is left.
    Full,
    /// Not an inode is left.
    NoInodes,
    /// Remounted read-only.
    ReadOnly,
    /// The disk is as it should be, and the file system in memory that has Kata's entries and pods' directories is full.
    NoRun,
}

#[derive(Debug)]
pub(crate) struct Disk {
    pub(crate) kind: Kind,
    at: PathBuf,
    /// What is `/run` on a node, and kubelet's directory.
    run: PathBuf,
}

fn run(program: &str, arguments: &[&str], paths: &[&Path]) {
    let output = Command::new(program).args(arguments).args(paths).output().unwrap();
    assert!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Takes all inodes of a file system.
fn take_inodes(at: &Path) {
    let dir = at.join(EMPTY_FILES);
    let full = fs::create_dir_all(&dir).err();
    let full = full.or_else(|| (0..).find_map(|at| File::create_new(dir.join(format!("{at}"))).err())).unwrap();
    assert_eq!(full.raw_os_error(), Some(Errno::NOSPC.raw_os_error()), "{full}");
}

impl Disk {
    /// Makes one and mounts it.
    pub(crate) fn mount(kind: Kind, at: &Path) -> Self {
        let image = at.with_extension("disk");
        File::create_new(&image).unwrap().set_len(SIZE).unwrap();
        fs::create_dir(at).unwrap();
        match kind {
            Kind::Xfs => run("mkfs.xfs", &["-q", "-K", "-m", "reflink=1"], &[&image]),
            Kind::Btrfs => run("mkfs.btrfs", &["-q", "-K"], &[&image]),
            Kind::Ext4 => {
                run("mkfs.ext4", &["-q", "-m", "0", "-N", INODES, "-E", "nodiscard,lazy_itable_init=1"], &[&image]);
            }
        }
        run("mount", &["-o", "loop"], &[&image, at]);
        let in_memory = at.with_extension("run");
        fs::create_dir(&in_memory).unwrap();
        run("mount", &["-t", "tmpfs", "-o", "size=1m,nr_inodes=200", "zpod-test"], &[&in_memory]);
        Self { kind, at: at.to_owned(), run: in_memory }
    }

    /// A directory on it, or in memory, seen at another path too.
    pub(crate) fn directory_at(&self, path: &Path, in_memory: bool) {
        let directory = if in_memory { &self.run } else { &self.at }.join(path.file_name().unwrap());
        fs::create_dir(&directory).unwrap();
        fs::create_dir_all(path).unwrap();
        rustix::mount::mount_bind(&directory, path).unwrap();
    }

    /// Whether files share blocks on it.
    pub(crate) fn shares(&self) -> bool {
        self.kind != Kind::Ext4
    }

    /// Bytes of it all that zpod's files can have.
    pub(crate) fn room(&self) -> u64 {
        let stat = rustix::fs::statvfs(&self.at).unwrap();
        let others = fs::metadata(self.at.join(FILLER)).map_or(0, |filler| filler.blocks() * 512);
        (stat.f_blocks * stat.f_frsize).saturating_sub(others)
    }

    /// Takes all that is left of it.
    pub(crate) fn befall(&self, state: State) {
        match state {
            State::Free => self.free(),
            State::Full => self.fill(),
            State::NoInodes => take_inodes(&self.at),
            State::NoRun => {
                let full = fs::write(self.run.join(FILLER), vec![1; 2 << 20]).unwrap_err();
                assert_eq!(full.raw_os_error(), Some(Errno::NOSPC.raw_os_error()), "{full}");
                take_inodes(&self.run);
            }
            State::ReadOnly => run("mount", &["-o", "remount,ro"], &[&self.at]),
        }
    }

    fn fill(&self) {
        let filler = File::create(self.at.join(FILLER)).unwrap();
        let (mut at, mut step) = (0, SIZE);
        while step >= 4096 {
            match rustix::fs::fallocate(&filler, FallocateFlags::empty(), at, step) {
                Ok(()) => at += step,
                Err(Errno::NOSPC) => step /= 2,
                Err(error) => panic!("fill the disk: {error}"),
            }
        }
        // What is kept back for metadata is not ours to take; what was freed just now is.
        rustix::fs::syncfs(&filler).unwrap();
    }

    fn free(&self) {
        run("mount", &["-o", "remount,rw"], &[&self.at]);
        for at in [&self.at, &self.run] {
            let _ = fs::remove_file(at.join(FILLER));
            let _ = fs::remove_dir_all(at.join(EMPTY_FILES));
        }
        rustix::fs::syncfs(File::open(&self.at).unwrap()).unwrap();
    }

    /// Unmounts it. Fails where anybody still has a file of it.
    pub(crate) fn unmount(&self) -> Result<(), Errno> {
        rustix::mount::unmount(&self.at, UnmountFlags::empty())
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        for at in [&self.at, &self.run] {
            let _ = rustix::mount::unmount(at, UnmountFlags::DETACH);
        }
    }
}
