//! Files that are kept so that a record can be replaced where there is no room.
//!
//! # Design
//! A record is written into a spare file, made durable, and then the two change their names (`RENAME_EXCHANGE`): what was
//! the record is the next spare. That takes no inode and no block, so that a volume can be unpublished and deleted on a
//! file system that is full, and at any moment there is one whole record of that name: the old one or the new one.
//!
//! A spare has all of its blocks before it counts as one. On btrfs it is out of copy-on-write, for what is written into
//! it would take new blocks otherwise. Spares are made when there is room, be it the record of a volume that is deleted.
//!
//! # Limitations
//! What is new takes new files: it is refused where there is no room.

use std::fs::File;
use std::io::{self, Write as _};
use std::os::unix::fs::FileExt as _;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

use rustix::fs::OFlags;

use crate::backing::file::{disable_cow, is_nocow};
use crate::directory::Directory;

/// As many are kept. More calls than that at a time wait for each other where there is no room.
const KEPT: usize = 4;
/// What a record takes at least, so that the longer one that follows it fits.
const BYTES: usize = 8 << 10;
const BLOCK: usize = 4 << 10;

const PREFIX: &str = ".spare-";

/// The spare files of a directory.
#[derive(Debug)]
pub(super) struct Spares {
    nocow: bool,
    state: Mutex<State>,
    returned: Condvar,
}

#[derive(Debug, Default)]
struct State {
    free: Vec<String>,
    /// In somebody's hands.
    lent: usize,
    /// The number of the next one.
    next: u64,
}

/// Whether a name is one of theirs.
pub(super) fn is_spare(name: &str) -> bool {
    name.strip_prefix(PREFIX).is_some_and(|number| number.parse::<u64>().is_ok_and(|n| n.to_string() == number))
}

impl Spares {
    /// Takes in those that an earlier process has left.
    pub(super) fn new(directory: &Directory, found: Vec<String>) -> Self {
        let number = |name: &String| name.strip_prefix(PREFIX).and_then(|number| number.parse::<u64>().ok());
        let next = found.iter().filter_map(number).max().map_or(0, |number| number.saturating_add(1));
        let state = Mutex::new(State { free: found, lent: 0, next });
        let spares = Self { nocow: is_nocow(directory).unwrap_or_default(), state, returned: Condvar::new() };
        spares.keep_few(directory);
        spares.refill(directory);
        spares
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes one: of those that are kept, or a new one; where there is no room for that, the next that is given back.
    pub(super) fn take(&self, directory: &Directory) -> io::Result<String> {
        let mut state = self.state();
        loop {
            if let Some(name) = state.free.pop() {
                state.lent += 1;
                return Ok(name);
            }
            match self.make(directory, &mut state) {
                Ok(name) => {
                    state.lent += 1;
                    return Ok(name);
                }
                Err(error) if state.lent == 0 => return Err(error),
                Err(_) => state = self.returned.wait(state).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }

    /// Gives one back. `used`: its name is there no more.
    pub(super) fn give_back(&self, directory: &Directory, name: String, used: bool) {
        let mut state = self.state();
        state.lent -= 1;
        if !used {
            state.free.push(name);
        }
        drop(state);
        self.returned.notify_one();
        self.keep_few(directory);
    }

    /// Removes a record, or makes a spare of it where one is wanted; says whether there was one.
    pub(super) fn recycle(&self, directory: &Directory, record: &str) -> io::Result<bool> {
        let mut state = self.state();
        if state.free.len() + state.lent >= KEPT {
            drop(state);
            return directory.remove(record);
        }
        let name = state.name();
        match directory.replace(record, &name) {
            Ok(()) => {
                state.free.push(name);
                drop(state);
                self.returned.notify_one();
                Ok(true)
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Makes those that are missing, as far as there is room.
    pub(super) fn refill(&self, directory: &Directory) {
        let mut state = self.state();
        while state.free.len() + state.lent < KEPT {
            match self.make(directory, &mut state) {
                Ok(name) => state.free.push(name),
                Err(error) => {
                    tracing::warn!(directory = %directory.path().display(), %error, "no room for spare records: while \
                        the file system is full, volumes can't be unpublished and deleted; free some space there");
                    return;
                }
            }
        }
    }

    fn keep_few(&self, directory: &Directory) {
        let mut state = self.state();
        while state.free.len() > KEPT {
            let Some(name) = state.free.pop() else { return };
            if let Err(error) = directory.remove(&name) {
                tracing::warn!(name, %error, "a spare record stays");
            }
        }
    }

    /// A new one, with all of its blocks.
    fn make(&self, directory: &Directory, state: &mut State) -> io::Result<String> {
        let name = state.name();
        let made = self.new_file(directory, &name).and_then(|mut file| {
            file.write_all(&[b' '; BYTES])?;
            Ok(rustix::fs::fsync(&file)?)
        });
        if let Err(error) = made {
            let _ = directory.remove(&name);
            return Err(error);
        }
        Ok(name)
    }

    /// An empty file for a record.
    pub(super) fn new_file(&self, directory: &Directory, name: &str) -> io::Result<File> {
        let file = directory.fresh_file(name)?;
        if self.nocow {
            disable_cow(&file)?;
        }
        Ok(file)
    }

    /// Writes a record over all that a spare has in it.
    pub(super) fn fill(directory: &Directory, name: &str, json: Vec<u8>) -> io::Result<()> {
        let file = directory.open_file(name, OFlags::WRONLY)?;
        // Never shortened: that would give blocks back.
        let length = usize::try_from(file.metadata()?.len()).unwrap_or_default();
        file.write_all_at(&padded(json, length), 0)?;
        Ok(rustix::fs::fsync(&file)?)
    }
}

impl State {
    fn name(&mut self) -> String {
        self.next += 1;
        format!("{PREFIX}{}", self.next - 1)
    }
}

/// A record with blanks behind it, which JSON allows: as long as that makes it a good spare, and as `least`.
pub(super) fn padded(mut json: Vec<u8>, least: usize) -> Vec<u8> {
    let blocks = json.len().next_multiple_of(BLOCK);
    let length = if least == 0 { blocks.max(BYTES) } else { blocks.max(least) };
    json.resize(length, b' ');
    json
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fixture() -> (tempfile::TempDir, Directory) {
        let dir = tempfile::tempdir().unwrap();
        let directory = Directory::open(dir.path()).unwrap();
        (dir, directory)
    }

    fn names(dir: &tempfile::TempDir) -> usize {
        std::fs::read_dir(dir.path()).unwrap().count()
    }

    #[test]
    fn as_many_are_kept_as_were_made_whatever_is_taken_and_left() {
        let (dir, directory) = fixture();
        let spares = Spares::new(&directory, vec![]);
        assert_eq!(names(&dir), KEPT);
        let taken: Vec<_> = (0..KEPT + 3).map(|_| spares.take(&directory).unwrap()).collect();
        assert_eq!(names(&dir), KEPT + 3);
        taken.into_iter().for_each(|name| spares.give_back(&directory, name, false));
        assert_eq!(names(&dir), KEPT);
        let left: Vec<_> =
            std::fs::read_dir(dir.path()).unwrap().map(|n| n.unwrap().file_name().into_string().unwrap()).collect();
        assert!(left.iter().all(|name| is_spare(name)), "{left:?}");
        let again = Spares::new(&directory, left);
        assert_eq!((names(&dir), again.state().free.len()), (KEPT, KEPT));
    }

    #[test]
    fn the_record_of_what_is_deleted_becomes_a_spare_where_one_is_missing() {
        let (dir, directory) = fixture();
        let spares = Spares::new(&directory, vec![]);
        for name in ["a.json", "b.json"] {
            std::fs::write(dir.path().join(name), "{}").unwrap();
        }
        let taken = spares.take(&directory).unwrap();
        std::fs::remove_file(dir.path().join(&taken)).unwrap();
        spares.give_back(&directory, taken, true);
        assert!(spares.recycle(&directory, "a.json").unwrap());
        assert_eq!(names(&dir), KEPT + 1, "it has another name now");
        assert!(spares.recycle(&directory, "b.json").unwrap());
        assert_eq!(names(&dir), KEPT);
        assert!(!spares.recycle(&directory, "b.json").unwrap());
    }

    #[test]
    fn names_of_others_are_none_of_theirs() {
        assert!(is_spare(".spare-0") && is_spare(".spare-17"));
        for name in [".spare-", ".spare-x", ".spare-01", "spare-1", ".spare-1.json", ".spare--1"] {
            assert!(!is_spare(name), "{name}");
        }
    }

    #[test]
    fn a_record_is_padded_and_reads_the_same() {
        let padded = padded(b"{\"a\": 1}".to_vec(), 0);
        assert_eq!(padded.len(), BYTES);
        assert_eq!(serde_json::from_slice::<serde_json::Value>(&padded).unwrap()["a"], 1);
        assert_eq!(super::padded(vec![b'x'; 9000], 4096).len(), 12288);
        assert_eq!(super::padded(vec![b'x'; 10], 4096).len(), 4096);
    }
}
