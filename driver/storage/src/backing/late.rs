//! A provider whose directory may come later: a disk that is mounted after this process has started.
//!
//! # Design
//! Without its directory nothing can be done with a device, and all else goes on: publications of pods that have ended can
//! be taken back, other volumes used. It is looked for again by the calls that need it, and what was found missing is never
//! made. Once it is open it stays open.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use zpod_volume::{Bytes, SnapshotId, VolumeId};

use super::file::{Abilities, FileBacking};
use super::mirrored::Mirrored;
use super::{Backing, BackingError, Capacity, CopySource, Copying, DeviceSpec, Exclusive, Outcome};

/// It is not looked for again more often than this.
const AGAIN: Duration = Duration::from_secs(1);

/// Image files in a directory that may not be there yet.
#[derive(Debug)]
pub struct LateBacking {
    path: PathBuf,
    overprovision: f64,
    /// The directory that it must share no file system with.
    beside: Option<PathBuf>,
    opened: OnceLock<Arc<FileBacking>>,
    last: Mutex<Option<(Instant, String)>>,
}

impl LateBacking {
    /// Opens a directory, now or when it is there.
    ///
    /// # Errors
    /// For what does not mend by itself: an over-commit ratio that is not allowed, a file system that lacks something,
    /// another process that has the directory.
    pub fn open(path: impl AsRef<Path>, overprovision: f64) -> Result<Self, BackingError> {
        Self::new(path.as_ref(), overprovision, None)
    }

    /// The same for the second halves of mirrors, whose first ones are in another directory.
    ///
    /// # Errors
    /// As [`LateBacking::open`], and when both are on one file system.
    pub fn open_beside(first: &Path, path: impl AsRef<Path>, overprovision: f64) -> Result<Self, BackingError> {
        Self::new(path.as_ref(), overprovision, Some(first.to_owned()))
    }

    fn new(path: &Path, overprovision: f64, beside: Option<PathBuf>) -> Result<Self, BackingError> {
        let (opened, last) = (OnceLock::new(), Mutex::default());
        let late = Self { path: path.to_owned(), overprovision, beside, opened, last };
        match late.try_open() {
            Err(error) if !is_passing(&error) => Err(error),
            Err(error) => {
                tracing::error!(directory = %path.display(), "it can't be opened now, and is used when it can: {error}");
                late.remember(&error);
                Ok(late)
            }
            Ok(()) => Ok(late),
        }
    }

    /// What the directory's file system can do; nothing while that is not known.
    pub fn abilities(&self) -> Option<Abilities> {
        self.opened.get()?.abilities()
    }

    fn try_open(&self) -> Result<(), BackingError> {
        if let Some(first) = &self.beside {
            Mirrored::check_apart(first, &self.path)?;
        }
        let backing = Arc::new(FileBacking::open(&self.path, self.overprovision)?);
        let upkeep = backing.keep_up();
        upkeep.map_err(|source| BackingError::Io { what: "begin the upkeep of", path: self.path.clone(), source })?;
        self.opened.get_or_init(|| backing);
        Ok(())
    }

    fn remember(&self, error: &BackingError) -> String {
        let reason = match error {
            BackingError::Io { source, .. } => source.to_string(),
            error => error.to_string(),
        };
        *self.last.lock().unwrap_or_else(PoisonError::into_inner) = Some((Instant::now(), reason.clone()));
        reason
    }

    fn backing(&self) -> Result<&FileBacking, BackingError> {
        if let Some(backing) = self.opened.get() {
            return Ok(backing);
        }
        let gone = |reason| BackingError::Gone { path: self.path.clone(), reason };
        let last = self.last.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some((_, reason)) = last.filter(|(at, _)| at.elapsed() < AGAIN) {
            return self.opened.get().map(Arc::as_ref).ok_or_else(|| gone(reason));
        }
        match self.try_open() {
            Ok(()) => {}
            // Somebody else may have opened it at this moment: its lock is then ours.
            Err(error) if self.opened.get().is_none() => return Err(gone(self.remember(&error))),
            Err(_) => {}
        }
        self.opened.get().map(Arc::as_ref).ok_or_else(|| gone("it was not opened".to_owned()))
    }
}

/// Whether it may be otherwise later.
fn is_passing(error: &BackingError) -> bool {
    use io::ErrorKind::{InvalidInput, ResourceBusy, Unsupported};
    !matches!(error, BackingError::Io { source, .. } if matches!(source.kind(), InvalidInput | ResourceBusy | Unsupported))
}

impl Backing for LateBacking {
    fn create(&self, spec: &DeviceSpec) -> Result<Outcome, BackingError> {
        self.backing()?.create(spec)
    }

    fn destroy(&self, id: VolumeId) -> Result<Outcome, BackingError> {
        self.backing()?.destroy(id)
    }

    fn grow(&self, spec: &DeviceSpec) -> Result<Outcome, BackingError> {
        self.backing()?.grow(spec)
    }

    fn exclusive(&self, id: VolumeId) -> Result<Box<dyn Exclusive>, BackingError> {
        self.backing()?.exclusive(id)
    }

    fn write_table(&self, spec: &DeviceSpec, proof: &dyn Exclusive) -> Result<(), BackingError> {
        self.backing()?.write_table(spec, proof)
    }

    fn ever_written(&self, spec: &DeviceSpec) -> Result<bool, BackingError> {
        self.backing()?.ever_written(spec)
    }

    fn shares_blocks(&self) -> Result<bool, BackingError> {
        self.backing()?.shares_blocks()
    }

    fn largest_disk(&self) -> Result<Bytes, BackingError> {
        self.backing()?.largest_disk()
    }

    fn look(&self) -> Result<(), BackingError> {
        self.backing()?.look()
    }

    fn snapshot(&self, id: SnapshotId, source: &DeviceSpec, how: &Copying<'_>) -> Result<Outcome, BackingError> {
        self.backing()?.snapshot(id, source, how)
    }

    fn destroy_snapshot(&self, id: SnapshotId) -> Result<Outcome, BackingError> {
        self.backing()?.destroy_snapshot(id)
    }

    fn snapshot_allocated(&self, id: SnapshotId) -> Result<Bytes, BackingError> {
        self.backing()?.snapshot_allocated(id)
    }

    fn create_from(
        &self,
        spec: &DeviceSpec,
        source: CopySource,
        partition: Bytes,
        how: &Copying<'_>,
    ) -> Result<Outcome, BackingError> {
        self.backing()?.create_from(spec, source, partition, how)
    }

    fn write_note(&self, id: VolumeId, note: &[u8], proof: &dyn Exclusive) -> Result<(), BackingError> {
        self.backing()?.write_note(id, note, proof)
    }

    fn device(&self, id: VolumeId) -> Result<PathBuf, BackingError> {
        self.backing()?.device(id)
    }

    fn allocated(&self, id: VolumeId) -> Result<Bytes, BackingError> {
        self.backing()?.allocated(id)
    }

    fn excess(&self, id: VolumeId) -> Result<Bytes, BackingError> {
        self.backing()?.excess(id)
    }

    fn capacity(&self) -> Result<Capacity, BackingError> {
        self.backing()?.capacity()
    }

    fn location(&self) -> &Path {
        &self.path
    }
}

#[cfg(test)]
mod tests {
    use super::super::conformance::{id, thin};
    use super::*;

    #[test]
    fn a_directory_that_comes_later_is_used_and_one_that_is_missing_is_not_made() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("volumes");
        let late = LateBacking::open(&path, 1.0).unwrap();
        assert_eq!(late.abilities(), None);
        for error in [
            late.create(&thin("a", 16)).unwrap_err(),
            late.destroy(id("a")).unwrap_err(),
            late.capacity().unwrap_err(),
            late.device(id("a")).unwrap_err(),
        ] {
            assert!(matches!(error, BackingError::Gone { .. }) && error.is_lost(), "{error}");
            assert!(error.to_string().contains(path.to_str().unwrap()), "{error}");
        }
        assert!(!path.exists());
        std::fs::create_dir(&path).unwrap();
        // As if that had been a while ago.
        *late.last.lock().unwrap() = None;
        assert_eq!(late.create(&thin("a", 16)).unwrap(), Outcome::Changed);
        assert!(late.abilities().is_some());
    }

    #[test]
    fn what_does_not_mend_by_itself_is_an_error_at_once() {
        let dir = tempfile::tempdir().unwrap();
        assert!(LateBacking::open(dir.path(), 0.0).is_err());
        let other = tempfile::tempdir_in(dir.path()).unwrap();
        assert!(LateBacking::open_beside(dir.path(), other.path(), 1.0).is_err(), "one file system");
        let _first = LateBacking::open(dir.path(), 1.0).unwrap();
        let error = LateBacking::open(dir.path(), 1.0).unwrap_err().to_string();
        assert!(error.contains("another zpod process"), "{error}");
    }
}
