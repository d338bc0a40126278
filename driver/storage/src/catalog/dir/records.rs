//! The files of the records.

use std::fmt::Display;
use std::io::{self, Read, Write};
use std::marker::PhantomData;
use std::path::Path;
use std::sync::OnceLock;

use rustix::fs::OFlags;

use super::index::{Index, Known};
use super::spares::{self, Spares};
use crate::catalog::{CatalogError, Record};
use crate::crash;
use crate::directory::{self, Directory};

/// No record is nearly as long.
const MAX_BYTES: u64 = 1 << 20;

/// The directory with the records.
#[derive(Debug)]
pub(super) struct Records<R> {
    directory: Directory,
    spares: OnceLock<Spares>,
    kind: PhantomData<fn() -> R>,
}

impl<R: Record> Records<R> {
    pub(super) fn new(directory: Directory) -> Self {
        Self { directory, spares: OnceLock::new(), kind: PhantomData }
    }

    pub(super) fn path(&self) -> &Path {
        self.directory.path()
    }

    /// Reads all records once and removes what crashes left.
    pub(super) fn load(&self) -> Result<Index<R::Id>, CatalogError> {
        let (mut ids, mut leftovers, mut spares) = (Vec::new(), Vec::new(), Vec::new());
        let names = self.directory.each_name(|name| {
            if directory::is_temporary(name) {
                leftovers.push(name.to_owned());
            } else if spares::is_spare(name) {
                spares.push(name.to_owned());
            } else if let Some(id) = name.strip_suffix(".json").and_then(|id| id.parse().ok()) {
                ids.push(id);
            }
            Ok(())
        });
        names.map_err(|source| self.fail("read", source))?;
        for name in leftovers {
            if let Err(error) = self.directory.remove(&name) {
                tracing::warn!(kind = R::KIND, name, %error, "a temporary file stays until the next start");
            }
        }
        self.spares.get_or_init(|| Spares::new(&self.directory, spares));
        let mut index = Index::default();
        for id in ids {
            let known = match self.read(id) {
                Ok(record) => Known::Revision(record.revision()),
                Err(error) => {
                    tracing::error!(kind = R::KIND, %id, %error, "a record can't be used");
                    Known::Damaged
                }
            };
            index.set(id, known);
        }
        Ok(index)
    }

    /// Reads a record that is there.
    pub(super) fn read(&self, id: R::Id) -> Result<R, CatalogError> {
        let name = name_of(id);
        let damaged = |reason: String| CatalogError::Damaged { path: self.directory.join(&name), reason };
        let fail = |source: io::Error| match source.kind() {
            io::ErrorKind::NotFound => damaged("it has disappeared".to_owned()),
            _ => CatalogError::Io { what: "read the record", path: self.directory.join(&name), source },
        };
        let file = self.directory.open_file(&name, OFlags::RDONLY).map_err(fail)?;
        let mut json = Vec::with_capacity(9 << 10);
        file.take(MAX_BYTES + 1).read_to_end(&mut json).map_err(fail)?;
        if json.len() as u64 > MAX_BYTES {
            return Err(damaged(format!("it is longer than {MAX_BYTES} bytes")));
        }
        let record: R = serde_json::from_slice(&json).map_err(|error| damaged(error.to_string()))?;
        if record.id() != id {
            return Err(damaged(format!("it is that of {} {}", R::KIND, record.id())));
        }
        if record.revision() == 0 {
            return Err(damaged("its revision is 0, which no stored record has".to_owned()));
        }
        Ok(record)
    }

    fn spares(&self) -> &Spares {
        self.spares.get_or_init(|| Spares::new(&self.directory, vec![]))
    }

    /// Puts a record where there is none. Durable after [`Records::sync`].
    pub(super) fn put(&self, record: &R) -> Result<(), CatalogError> {
        let (name, temporary) = (name_of(record.id()), directory::temporary_name(record.id()));
        let put = || -> io::Result<()> {
            let json = spares::padded(serde_json::to_vec_pretty(record)?, 0);
            let mut file = self.spares().new_file(&self.directory, &temporary)?;
            crash::point("record: temporary file made");
            file.write_all(&json)?;
            crash::point("record: written");
            rustix::fs::fsync(&file)?;
            crash::point("record: durable");
            self.directory.replace(&temporary, &name)
        };
        put().map_err(|source| {
            if let Err(error) = self.directory.remove(&temporary) {
                tracing::warn!(kind = R::KIND, id = %record.id(), %error, "a temporary file stays until the next start");
            }
            self.fail_on(&name, source)
        })?;
        crash::point("record: named");
        Ok(())
    }

    /// Puts a record in the place of the one there is, which needs no room. Durable after [`Records::sync`].
    pub(super) fn replace(&self, record: &R) -> Result<(), CatalogError> {
        let name = name_of(record.id());
        let (spares, directory) = (self.spares(), &self.directory);
        let json = serde_json::to_vec_pretty(record).map_err(|error| self.fail_on(&name, error.into()))?;
        let spare = spares.take(directory).map_err(|error| self.fail_on(&name, error))?;
        crash::point("record: spare taken");
        let put = || -> io::Result<bool> {
            Spares::fill(directory, &spare, json)?;
            crash::point("record: durable");
            match directory.exchange(&spare, &name) {
                Ok(()) => Ok(false),
                // No record there any more, or a file system that can't.
                Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::EINVAL | libc::ENOSYS)) => {
                    directory.replace(&spare, &name).map(|()| true)
                }
                Err(error) => Err(error),
            }
        };
        let put = put();
        spares.give_back(directory, spare, matches!(put, Ok(true)));
        put.map_err(|error| self.fail_on(&name, error))?;
        crash::point("record: named");
        Ok(())
    }

    fn fail_on(&self, name: &str, source: io::Error) -> CatalogError {
        CatalogError::Io { what: "write the record", path: self.directory.join(name), source }
    }

    /// Removes a record. Durable after [`Records::sync`].
    pub(super) fn remove(&self, id: R::Id) -> Result<(), CatalogError> {
        crash::point("record: to be removed");
        let name = name_of(id);
        self.spares().recycle(&self.directory, &name).map_err(|source| CatalogError::Io {
            what: "remove the record",
            path: self.directory.join(&name),
            source,
        })?;
        crash::point("record: removed");
        Ok(())
    }

    /// Makes names durable: new ones and removals.
    pub(super) fn sync(&self) -> Result<(), CatalogError> {
        self.directory.sync().map_err(|source| self.fail("sync", source))?;
        crash::point("record: name durable");
        Ok(())
    }

    fn fail(&self, what: &'static str, source: io::Error) -> CatalogError {
        CatalogError::Io { what, path: self.directory.path().to_owned(), source }
    }
}

fn name_of(id: impl Display) -> String {
    format!("{id}.json")
}
