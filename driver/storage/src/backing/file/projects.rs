//! The host's own protection against a guest that writes past its partition: every image is a project of its own, with
//! a hard limit on the blocks it may take.
//!
//! # Design
//! The limit is what the ledger keeps for the volume ([`Ledger::promise`](crate::backing::ledger::Ledger)): its
//! partition, the tables, and what the file system needs to keep track of them. An image has its project and its limit
//! before it has its name; a limit is raised before the larger promise is recorded, and lifted when the image is about
//! to be removed and nobody has it open. So wherever a call is cut short, an image may take what it was promised; a
//! limit that is too large or gone is put right at the next start, by what the image's own attribute says.
//!
//! **Which project.** The image itself says (`FS_IOC_FSGETXATTR`): there is no list to lose. An id must be nobody
//! else's in the whole file system, where the kubelet, container engines and /etc/projects give them out too, low ones.
//! Ours are above 2^31, in one of 2047 ranges that the inode of the backing directory chooses. They are taken in order
//! and used again, since XFS keeps 30 neighbours in a block of its quota file and never gives those blocks back. Free means
//! that the kernel counts no file in that project; and once the image is in it, it must be the only one.
//!
//! **Where.** It is tried, not guessed: a file must be refused blocks beyond its limit and given them when the limit is
//! raised. XFS mounted with `prjquota` passes. ext4 with the same option does not: there the kernel lets any process
//! with `CAP_SYS_RESOURCE` past the limit (`ignore_hardlimit` in fs/quota/dquot.c), and a virtual machine monitor that
//! Kata starts is one.
//!
//! **What the guest sees.** XFS refuses with ENOSPC. QEMU, as Kata starts it (`werror=enospc`, the default), stops the
//! virtual machine then and there (measured with QEMU 10.0: `query-status` says `io-error`), so that Kata's shim gets no
//! more answers; other monitors pass an I/O error on. It takes a guest that has written more outside of its partition
//! than its partition has left to get there: no other guest is touched.
//!
//! # Limitations
//! * quotactl_fd(2) is needed: Linux 5.14.
//! * A directory that hands its own project down (`chattr +P`, as the kubelet's quotas do) can't have files of others.
//! * What is shared by reflink is counted in full for each file.

use std::collections::{HashMap, HashSet, VecDeque};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::{Mutex, MutexGuard, PoisonError};

use rustix::fs::OFlags;
use rustix::thread::CapabilitySet;
use zpod_volume::VolumeId;

use super::quotactl;
use crate::crash;
use crate::directory::Directory;

const PROBE: &str = ".zpod-probe-quota";
const PROBE_RENAMED: &str = ".zpod-probe-quota-renamed";

/// The first id of ours.
const FIRST: u32 = 1 << 31;
/// Ids of one backing directory. 2047 times as many end below 2^32 - 1, which is no project.
const EACH: u32 = 1 << 20;
const DIRECTORIES: u64 = 2047;

/// How many ids that turn out to be somebody's are passed over.
const TRIES: u32 = 1000;

/// How many ids rest before one is used again: XFS counts a removed file until it has freed its blocks, in the
/// background.
const RESTING: usize = 64;

/// Small: where all that was promised is in use, little is free.
const PROBE_LIMIT: u64 = 256 << 10;
const PROBE_BYTES: u64 = 512 << 10;

/// The projects of the images of one directory.
#[derive(Debug)]
pub(super) struct Projects {
    range: Range<u32>,
    ids: Mutex<Ids>,
}

#[derive(Debug, Default)]
struct Ids {
    of: HashMap<VolumeId, u32>,
    taken: HashSet<u32>,
    /// Given back, the oldest first.
    returned: VecDeque<u32>,
    /// The first one not looked at since the start.
    next: u32,
}

impl Projects {
    /// Tries whether limits are kept in the file system of the directory; the error says why not.
    pub(super) fn probe(directory: &Directory) -> io::Result<Self> {
        let inode = rustix::fs::fstat(directory)?.st_ino;
        // The remainder is below 2047.
        let first = FIRST + (inode % DIRECTORIES) as u32 * EACH;
        let ids = Ids { next: first, ..Ids::default() };
        let projects = Self { range: first..first + EACH, ids: Mutex::new(ids) };
        // Fails at once where there are no project quotas, before anything is made.
        quotactl::usage(directory, first)?;
        projects.clean_up(directory)?;
        let tried = projects.try_out(directory);
        projects.clean_up(directory)?;
        projects.release(VolumeId::from_name(PROBE));
        tried.map(|()| projects)
    }

    fn try_out(&self, directory: &Directory) -> io::Result<()> {
        let not = |why: &str| Err(io::Error::new(io::ErrorKind::Unsupported, why));
        // Whoever has it may be let past a limit that then holds nobody who matters.
        let able = rustix::thread::capabilities(None)?.effective;
        if !able.contains(CapabilitySet::SYS_RESOURCE) {
            return not("whether limits hold root can be tried only with CAP_SYS_RESOURCE");
        }
        let file = directory.fresh_file(PROBE)?;
        file.set_len(PROBE_BYTES)?;
        self.bound(directory, VolumeId::from_name(PROBE), &file, PROBE_LIMIT)?;
        if !refused(&file)? {
            return not("a limit does not hold root here; mount XFS with prjquota");
        }
        self.bound(directory, VolumeId::from_name(PROBE), &file, 4 * PROBE_BYTES)?;
        let stat = rustix::fs::fstatvfs(directory)?;
        // On a full disk one can't tell. Limits that don't hold harm nobody; one that does and is not raised would.
        if refused(&file)? && stat.f_bavail.saturating_mul(stat.f_frsize) > 2 * PROBE_BYTES {
            return not("a limit that was raised still holds");
        }
        // EXDEV where the directory hands its own project down (FS_XFLAG_PROJINHERIT).
        directory.rename_new(PROBE, PROBE_RENAMED).map_err(|error| {
            io::Error::new(error.kind(), format!("files of another project can't be named here: {error}"))
        })
    }

    fn clean_up(&self, directory: &Directory) -> io::Result<()> {
        for name in [PROBE, PROBE_RENAMED] {
            self.lift_leftover(directory, name)?;
            directory.remove(name)?;
        }
        Ok(())
    }

    fn ids(&self) -> MutexGuard<'_, Ids> {
        // What the lock guards is whole at every point where a thread could have panicked.
        self.ids.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sees to it that an image is a project of its own, and that its blocks are limited to so many bytes.
    pub(super) fn bound(&self, directory: &Directory, id: VolumeId, image: &File, limit: u64) -> io::Result<()> {
        let project = self.project(directory, id, image)?;
        if quotactl::usage(directory, project)?.limit != limit.next_multiple_of(1024) {
            quotactl::set_limit(directory, project, limit)?;
            crash::point("quota: limit set");
        }
        Ok(())
    }

    /// The project of an image, given to it if need be.
    fn project(&self, directory: &Directory, id: VolumeId, image: &File) -> io::Result<u32> {
        let mut ids = self.ids();
        let project = quotactl::project(image)?;
        if ids.of.get(&id) == Some(&project) {
            return Ok(project);
        }
        // From before the start; not if it was put there by a hand that copied it from another image.
        if self.range.contains(&project) && !ids.taken.contains(&project) && alone_in(directory, project)? {
            ids.take(id, project);
            return Ok(project);
        }
        for _ in 0..TRIES {
            let Some(project) = ids.candidate(&self.range) else { break };
            let usage = quotactl::usage(directory, project)?;
            if usage.inodes > 0 || usage.bytes > 0 {
                continue;
            }
            quotactl::set_project(image, project)?;
            crash::point("quota: project set");
            // Another process, for another directory, may have done the same at this moment.
            if alone_in(directory, project)? {
                ids.take(id, project);
                return Ok(project);
            }
            quotactl::set_project(image, 0)?;
        }
        let why = format!("no project id from {} to {} is free", self.range.start, self.range.end - 1);
        Err(io::Error::other(why))
    }

    /// Lifts the limit of an image that is to go. Before it goes: nothing says afterwards whose limit one was.
    pub(super) fn lift(&self, directory: &Directory, id: VolumeId) -> io::Result<()> {
        let project = self.ids().of.get(&id).copied();
        project.map_or(Ok(()), |project| quotactl::set_limit(directory, project, 0))
    }

    /// The same for a file that a crash left under a temporary name, before anything of ours is known.
    pub(super) fn lift_leftover(&self, directory: &Directory, name: &str) -> io::Result<()> {
        let file = match directory.open_file(name, OFlags::RDONLY) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(error),
        };
        let project = quotactl::project(&file)?;
        if self.range.contains(&project) && alone_in(directory, project)? {
            quotactl::set_limit(directory, project, 0)?;
        }
        Ok(())
    }

    /// Takes back the project of an image that is gone.
    pub(super) fn release(&self, id: VolumeId) {
        let mut ids = self.ids();
        if let Some(project) = ids.of.remove(&id) {
            ids.taken.remove(&project);
            ids.returned.push_back(project);
        }
    }
}

/// Where limits are not used by now, but were: sees to it that one that may still hold is not below so many bytes.
pub(super) fn raise_leftover(directory: &Directory, image: &File, limit: u64) -> io::Result<()> {
    // Most file systems have neither projects nor quotas.
    let Ok(project) = quotactl::project(image) else { return Ok(()) };
    let Ok(usage) = quotactl::usage(directory, project) else { return Ok(()) };
    if project >= FIRST && usage.limit > 0 && usage.limit < limit {
        quotactl::set_limit(directory, project, limit)?;
    }
    Ok(())
}

fn alone_in(directory: &Directory, project: u32) -> io::Result<bool> {
    Ok(quotactl::usage(directory, project)?.inodes == 1)
}

impl Ids {
    fn take(&mut self, id: VolumeId, project: u32) {
        if let Some(before) = self.of.insert(id, project) {
            self.taken.remove(&before);
        }
        self.taken.insert(project);
        self.returned.retain(|returned| *returned != project);
    }

    /// An id that may be free. What turns out not to be is not looked at again before the next start.
    fn candidate(&mut self, range: &Range<u32>) -> Option<u32> {
        if self.returned.len() > RESTING {
            return self.returned.pop_front();
        }
        while self.next < range.end {
            let id = self.next;
            self.next += 1;
            if !self.taken.contains(&id) {
                return Some(id);
            }
        }
        self.returned.pop_front()
    }
}

/// Whether writing the probe file is refused for lack of room.
fn refused(file: &File) -> io::Result<bool> {
    let bytes = [1; 1 << 16];
    for at in (0..PROBE_BYTES).step_by(bytes.len()) {
        match file.write_all_at(&bytes, at) {
            Ok(()) => {}
            Err(error) if matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded) => {
                return Ok(true);
            }
            Err(error) => return Err(error),
        }
    }
    Ok(false)
}
