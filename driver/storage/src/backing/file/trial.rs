//! What the file system can do, tried at the start or, where that can't be done then, as soon as it can.
//!
//! # Design
//! To try it takes a file and a few blocks. On a file system that is full, has no inodes left or is read-only there are
//! none, and just then volumes have to be unpublished and destroyed. What that needs is found without a trial: a lease is
//! tried on the image itself, and the attributes of an image are those that it has. What makes something new is refused
//! until the trial succeeds. It is made again by those calls, and by the upkeep.

use std::io;
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use super::projects::Projects;
use super::{Abilities, FileBacking, Overhead};
use crate::backing::BackingError;
use crate::backing::kept::Kept;

/// It is not tried again more often than this.
const AGAIN: Duration = Duration::from_secs(1);

/// What was found.
#[derive(Debug)]
pub(super) struct Tried {
    pub(super) abilities: Abilities,
    /// Where the file system keeps limits.
    pub(super) projects: Option<Projects>,
}

/// What was found, or when it was last looked for and why nothing was.
#[derive(Debug, Default)]
pub(super) struct Trial {
    pub(super) found: OnceLock<Tried>,
    last: Mutex<Option<(Instant, String)>>,
}

impl FileBacking {
    /// What the directory's file system can do; nothing while that can't be tried, since it is full or read-only.
    pub fn abilities(&self) -> Option<Abilities> {
        self.trial.found.get().map(|tried| tried.abilities)
    }

    /// What was found of the file system, which is tried now if need be.
    pub(super) fn tried(&self) -> Result<&Tried, BackingError> {
        if let Some(tried) = self.trial.found.get() {
            return Ok(tried);
        }
        let mut last = self.trial.last.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(tried) = self.trial.found.get() {
            return Ok(tried);
        }
        match last.as_ref().filter(|(at, _)| at.elapsed() < AGAIN) {
            Some((_, reason)) => Err(self.restricted(reason.clone())),
            None => match self.try_out() {
                Ok(tried) => {
                    let tried = self.trial.found.get_or_init(|| tried);
                    self.take_over(tried);
                    Ok(tried)
                }
                Err(error) => {
                    let reason = error.to_string();
                    *last = Some((Instant::now(), reason.clone()));
                    Err(self.restricted(reason))
                }
            },
        }
    }

    /// As the first step of all: what will never be is an error.
    pub(super) fn try_at_start(&self) -> io::Result<()> {
        match self.try_out() {
            Ok(tried) => {
                self.ledger().keep(kept_with(&tried, self.overhead));
                self.trial.found.get_or_init(|| tried);
            }
            Err(error) if error.kind() == io::ErrorKind::Unsupported => return Err(error),
            Err(error) => {
                let directory = self.directory.path().display();
                tracing::error!(%directory, %error, "the file system can't be tried out: new volumes, growth and \
                    copies are refused until it can be, all else works; free space there or see why it is read-only");
                *self.trial.last.lock().unwrap_or_else(PoisonError::into_inner) =
                    Some((Instant::now(), error.to_string()));
            }
        }
        Ok(())
    }

    fn try_out(&self) -> io::Result<Tried> {
        let mut abilities = Abilities::probe(&self.directory)?;
        let projects = match Projects::probe(&self.directory) {
            Ok(projects) => Some(projects),
            Err(error) if is_passing(&error) => return Err(error),
            Err(error) => {
                let directory = self.directory.path().display();
                tracing::info!(%directory, %error, "no project quotas: a guest can write past its partition");
                None
            }
        };
        abilities.quota = projects.is_some();
        Ok(Tried { abilities, projects })
    }

    /// Brings what was taken in without a trial to where it would be with one.
    fn take_over(&self, tried: &Tried) {
        let directory = self.directory.path().display();
        tracing::info!(%directory, abilities = %tried.abilities, "the file system could be tried out now: volumes can be \
            made again");
        let promises = {
            let mut ledger = self.ledger();
            ledger.keep(kept_with(tried, self.overhead));
            ledger.promises()
        };
        for promised in promises {
            if let Kept::Volume(id) = promised.kept {
                self.bound_again(id);
            }
        }
    }

    pub(super) fn restricted(&self, reason: String) -> BackingError {
        BackingError::Restricted { location: self.directory.path().display().to_string(), reason }
    }
}

/// What is kept for metadata: only where a limit holds guests to it.
fn kept_with(tried: &Tried, overhead: Overhead) -> Overhead {
    if tried.projects.is_some() { overhead } else { Overhead::NONE }
}

/// Whether it may be otherwise later.
fn is_passing(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::ReadOnlyFilesystem
    )
}
