//! The catalog in a local directory: one JSON file for each volume, `<dir>/volumes/<id>.json`.
//!
//! # Design
//! A record is written whole to a temporary file, made durable, and renamed over the old one: after a crash it is the
//! old one or the new one. One process has the directory (a lock on `<dir>/lock`), so what it knows of the records'
//! revisions stays true; only ids and revisions are in memory, 24 bytes for each volume, and records are read when
//! asked for. Each call runs to its end on a blocking thread even if its caller goes away.
//!
//! # Limitations
//! [`Catalog::list`] leaves out records that can't be read, so that one of them does not hide the others. They are
//! logged, and [`Catalog::get`] says what is wrong.

mod index;
mod records;

use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use rustix::fs::OFlags;
use zpod_volume::VolumeId;

use self::index::{Index, Known};
use self::records::Records;
use super::{Catalog, CatalogError, Created, Page, Volume};
use crate::directory::{self, Directory};

/// Calls for one volume wait for each other; those for different ones seldom do.
const LOCKS: usize = 64;

/// Records in a local directory.
#[derive(Debug)]
pub struct DirCatalog {
    store: Arc<Store>,
}

#[derive(Debug)]
struct Store {
    records: Records,
    index: Mutex<Index>,
    /// Taken for a whole call; which one follows from the id.
    locks: [Mutex<()>; LOCKS],
    /// Locked as long as this lives.
    _lock: std::fs::File,
}

impl DirCatalog {
    /// Opens the catalog in `dir`, for this process alone, and makes it where there is none. Reads every record once: a
    /// damaged one is logged and refused later, and does not stop the start. Blocks.
    ///
    /// # Errors
    /// [`CatalogError::Locked`] when another process has it.
    pub fn open(dir: impl AsRef<Path>) -> Result<Self, CatalogError> {
        let dir = dir.as_ref();
        let volumes = dir.join("volumes");
        let fail = |what| move |source| CatalogError::Io { what, path: dir.to_owned(), source };
        std::fs::create_dir_all(&volumes).map_err(fail("make the catalog"))?;
        let parent = Directory::open(dir).map_err(fail("open the catalog"))?;
        let lock =
            parent.open_file("lock", OFlags::RDWR | OFlags::CREATE).map_err(fail("open the lock of the catalog"))?;
        if !directory::lock(&lock).map_err(fail("lock the catalog"))? {
            return Err(CatalogError::Locked(dir.to_owned()));
        }
        parent.sync().map_err(fail("sync the catalog"))?;
        let records = Records::new(Directory::open(&volumes).map_err(fail("open the catalog"))?);
        let index = records.load()?;
        tracing::info!(directory = %dir.display(), volumes = index.len(), "catalog opened");
        let locks = [const { Mutex::new(()) }; LOCKS];
        Ok(Self { store: Arc::new(Store { records, index: Mutex::new(index), locks, _lock: lock }) })
    }

    /// Runs a call on a blocking thread, to its end whatever becomes of the caller.
    async fn run<T: Send + 'static>(
        &self,
        call: impl FnOnce(&Store) -> Result<T, CatalogError> + Send + 'static,
    ) -> Result<T, CatalogError> {
        let store = Arc::clone(&self.store);
        match tokio::task::spawn_blocking(move || call(&store)).await {
            Ok(result) => result,
            Err(error) => {
                let path = self.store.records.path().to_owned();
                Err(CatalogError::Io { what: "work on the catalog", path, source: std::io::Error::other(error) })
            }
        }
    }
}

impl Store {
    fn lock(&self, id: VolumeId) -> MutexGuard<'_, ()> {
        // Ids are the output of a hash: any byte of them spreads.
        let at = usize::from(id.uuid().as_bytes()[0]) % LOCKS;
        self.locks[at].lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn index(&self) -> MutexGuard<'_, Index> {
        self.index.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads a record. The caller has its lock.
    fn read(&self, id: VolumeId) -> Result<Option<Volume>, CatalogError> {
        let known = self.index().get(id);
        if known.is_none() {
            return Ok(None);
        }
        let result = self.records.read(id);
        let now = match &result {
            // Mended, or replaced by hand: what the file says is what counts.
            Ok(volume) => Known::Revision(volume.revision),
            Err(error @ CatalogError::Damaged { .. }) => {
                if known != Some(Known::Damaged) {
                    tracing::error!(volume = %id, %error, "a record was damaged since the start");
                }
                Known::Damaged
            }
            Err(_) => return result.map(Some),
        };
        if known != Some(now) {
            self.index().set(id, now);
        }
        result.map(Some)
    }

    /// Writes a record with its next revision. The caller has its lock.
    fn write(&self, mut volume: Volume) -> Result<Volume, CatalogError> {
        volume.revision += 1;
        self.records.put(&volume)?;
        // From here on it is the record, durable or not yet.
        self.index().set(volume.id, Known::Revision(volume.revision));
        self.records.sync()?;
        Ok(volume)
    }

    fn create(&self, volume: Volume) -> Result<Created, CatalogError> {
        let _lock = self.lock(volume.id);
        match self.read(volume.id)? {
            Some(existing) => {
                // Whoever wrote it may have been killed before its name was durable.
                self.records.sync()?;
                Ok(Created::Existed(existing))
            }
            None => self.write(Volume { revision: 0, ..volume }).map(Created::Created),
        }
    }

    fn update(&self, volume: Volume) -> Result<Volume, CatalogError> {
        let id = volume.id;
        let _lock = self.lock(id);
        let known = self.index().get(id);
        match known {
            None => Err(CatalogError::NotFound(id)),
            Some(Known::Damaged) => self.read(id).and(Err(CatalogError::Conflict(id))),
            Some(Known::Revision(revision)) if revision != volume.revision => Err(CatalogError::Conflict(id)),
            Some(Known::Revision(_)) => self.write(volume),
        }
    }

    fn remove(&self, id: VolumeId) -> Result<(), CatalogError> {
        let _lock = self.lock(id);
        let known = self.index().get(id);
        if known == Some(Known::Damaged) {
            // Gives the reason, or finds it mended.
            self.read(id)?;
        }
        // Where there is none: it may have been removed by a process that was killed before that was durable.
        if known.is_some() {
            self.records.remove(id)?;
            self.index().remove(id);
        }
        self.records.sync()
    }

    fn list(&self, from: Option<VolumeId>, limit: usize) -> Result<Page, CatalogError> {
        let (ids, next) = self.index().page(from, limit);
        let mut volumes = Vec::with_capacity(ids.len());
        for id in ids {
            let _lock = self.lock(id);
            match self.read(id) {
                Ok(volume) => volumes.extend(volume),
                Err(CatalogError::Damaged { .. }) => tracing::debug!(volume = %id, "a damaged record is not listed"),
                Err(error) => return Err(error),
            }
        }
        Ok(Page { volumes, next })
    }
}

#[async_trait]
impl Catalog for DirCatalog {
    async fn create(&self, volume: Volume) -> Result<Created, CatalogError> {
        self.run(|store| store.create(volume)).await
    }

    async fn get(&self, id: VolumeId) -> Result<Option<Volume>, CatalogError> {
        self.run(move |store| {
            let _lock = store.lock(id);
            store.read(id)
        })
        .await
    }

    async fn update(&self, volume: Volume) -> Result<Volume, CatalogError> {
        self.run(|store| store.update(volume)).await
    }

    async fn remove(&self, id: VolumeId) -> Result<(), CatalogError> {
        self.run(move |store| store.remove(id)).await
    }

    async fn list(&self, from: Option<VolumeId>, limit: usize) -> Result<Page, CatalogError> {
        self.run(move |store| store.list(from, limit)).await
    }
}

#[cfg(test)]
mod tests;
