//! The catalogs in a local directory: one JSON file for each record, `<dir>/volumes/<id>.json` and
//! `<dir>/snapshots/<id>.json`.
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
mod spares;

use std::hash::{Hash as _, Hasher as _};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use rustix::fs::OFlags;

use self::index::{Index, Known};
use self::records::Records;
use super::{Catalog, CatalogError, Created, Page, Record, Snapshot, Volume};
use crate::directory::{self, Directory};

/// Calls for one volume wait for each other; those for different ones seldom do.
const LOCKS: usize = 64;

/// Records of one kind in a local directory.
#[derive(Debug)]
pub struct DirCatalog<R: Record = Volume> {
    store: Arc<Store<R>>,
}

#[derive(Debug)]
struct Store<R: Record> {
    records: Records<R>,
    index: Mutex<Index<R::Id>>,
    /// Taken for a whole call; which one follows from the id.
    locks: [Mutex<()>; LOCKS],
    /// Locked as long as this lives.
    _lock: Arc<std::fs::File>,
}

/// Opens the catalogs in `dir`, for this process alone, and makes them where there are none. Reads every record once: a
/// damaged one is logged and refused later, and does not stop the start. Blocks.
///
/// # Errors
/// [`CatalogError::Locked`] when another process has them.
pub fn open(dir: impl AsRef<Path>) -> Result<(DirCatalog<Volume>, DirCatalog<Snapshot>), CatalogError> {
    let dir = dir.as_ref();
    let fail = |what| move |source| CatalogError::Io { what, path: dir.to_owned(), source };
    std::fs::create_dir_all(dir).map_err(fail("make the catalog"))?;
    let parent = Directory::open(dir).map_err(fail("open the catalog"))?;
    let lock = parent
        .open_file("lock", OFlags::RDWR | OFlags::CREATE)
        // One that is there can be locked where nothing can be written.
        .or_else(|_| parent.open_file("lock", OFlags::RDONLY))
        .map_err(fail("open the lock of the catalog"))?;
    if !directory::lock(&lock).map_err(fail("lock the catalog"))? {
        return Err(CatalogError::Locked(dir.to_owned()));
    }
    let lock = Arc::new(lock);
    let catalogs =
        (DirCatalog::open(&dir.join("volumes"), Arc::clone(&lock))?, DirCatalog::open(&dir.join("snapshots"), lock)?);
    parent.sync().map_err(fail("sync the catalog"))?;
    Ok(catalogs)
}

impl<R: Record> DirCatalog<R> {
    fn open(dir: &Path, lock: Arc<std::fs::File>) -> Result<Self, CatalogError> {
        let fail = |what| move |source| CatalogError::Io { what, path: dir.to_owned(), source };
        std::fs::create_dir_all(dir).map_err(fail("make the catalog"))?;
        let records = Records::new(Directory::open(dir).map_err(fail("open the catalog"))?);
        let index = records.load()?;
        tracing::info!(directory = %dir.display(), records = index.len(), "catalog opened");
        let locks = [const { Mutex::new(()) }; LOCKS];
        Ok(Self { store: Arc::new(Store { records, index: Mutex::new(index), locks, _lock: lock }) })
    }

    /// Runs a call on a blocking thread, to its end whatever becomes of the caller.
    async fn run<T: Send + 'static>(
        &self,
        call: impl FnOnce(&Store<R>) -> Result<T, CatalogError> + Send + 'static,
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

impl<R: Record> Store<R> {
    fn lock(&self, id: R::Id) -> MutexGuard<'_, ()> {
        let mut hasher = std::hash::DefaultHasher::new();
        id.hash(&mut hasher);
        let at = hasher.finish() as usize % LOCKS;
        self.locks[at].lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn index(&self) -> MutexGuard<'_, Index<R::Id>> {
        self.index.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads a record. The caller has its lock.
    fn read(&self, id: R::Id) -> Result<Option<R>, CatalogError> {
        let known = self.index().get(id);
        if known.is_none() {
            return Ok(None);
        }
        let result = self.records.read(id);
        let now = match &result {
            // Mended, or replaced by hand: what the file says is what counts.
            Ok(record) => Known::Revision(record.revision()),
            Err(error @ CatalogError::Damaged { .. }) => {
                if known != Some(Known::Damaged) {
                    tracing::error!(kind = R::KIND, %id, %error, "a record was damaged since the start");
                }
                Known::Damaged
            }
            // Nobody knows what is in it, as long as it can't be read.
            Err(error) => {
                if known != Some(Known::Damaged) {
                    tracing::error!(kind = R::KIND, %id, %error, "a record can't be read");
                }
                Known::Damaged
            }
        };
        if known != Some(now) {
            self.index().set(id, now);
        }
        result.map(Some)
    }

    /// Writes a record with its next revision. The caller has its lock.
    fn write(&self, record: R, there: bool) -> Result<R, CatalogError> {
        let revision = record.revision() + 1;
        let record = record.with_revision(revision);
        if there {
            self.records.replace(&record)?
        } else {
            self.records.put(&record)?
        }
        // From here on it is the record, durable or not yet.
        self.index().set(record.id(), Known::Revision(revision));
        self.records.sync()?;
        Ok(record)
    }

    fn create(&self, record: R) -> Result<Created<R>, CatalogError> {
        let _lock = self.lock(record.id());
        match self.read(record.id())? {
            Some(existing) => {
                // Whoever wrote it may have been killed before its name was durable.
                self.records.sync()?;
                Ok(Created::Existed(existing))
            }
            None => self.write(record.with_revision(0), false).map(Created::Created),
        }
    }

    fn update(&self, record: R) -> Result<R, CatalogError> {
        let id = record.id();
        let _lock = self.lock(id);
        let known = self.index().get(id);
        match known {
            None => Err(CatalogError::not_found::<R>(id)),
            Some(Known::Damaged) => self.read(id).and(Err(CatalogError::conflict::<R>(id))),
            Some(Known::Revision(revision)) if revision != record.revision() => Err(CatalogError::conflict::<R>(id)),
            Some(Known::Revision(_)) => self.write(record, true),
        }
    }

    fn remove(&self, id: R::Id) -> Result<(), CatalogError> {
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

    fn list(&self, from: Option<R::Id>, limit: usize) -> Result<Page<R>, CatalogError> {
        let (ids, next) = self.index().page(from, limit);
        let mut records = Vec::with_capacity(ids.len());
        for id in ids {
            let _lock = self.lock(id);
            match self.read(id) {
                Ok(record) => records.extend(record),
                // Told when it was found. It keeps nobody from the others.
                Err(error) => tracing::debug!(kind = R::KIND, %id, %error, "a record that can't be read is not listed"),
            }
        }
        Ok(Page { records, next })
    }
}

#[async_trait]
impl<R: Record> Catalog<R> for DirCatalog<R> {
    async fn create(&self, record: R) -> Result<Created<R>, CatalogError> {
        self.run(|store| store.create(record)).await
    }

    async fn get(&self, id: R::Id) -> Result<Option<R>, CatalogError> {
        self.run(move |store| {
            let _lock = store.lock(id);
            store.read(id)
        })
        .await
    }

    async fn update(&self, record: R) -> Result<R, CatalogError> {
        self.run(|store| store.update(record)).await
    }

    async fn remove(&self, id: R::Id) -> Result<(), CatalogError> {
        self.run(move |store| store.remove(id)).await
    }

    async fn list(&self, from: Option<R::Id>, limit: usize) -> Result<Page<R>, CatalogError> {
        self.run(move |store| store.list(from, limit)).await
    }
}

#[cfg(test)]
mod tests;
