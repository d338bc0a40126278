//! Proof that nobody else has an image open.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use zpod_volume::VolumeId;

use super::{Fencing, fcntl};
use crate::backing::Exclusive;

/// A child between fork and exec has copies of every descriptor for a moment.
const TRIES: u32 = 5;
const PAUSE: Duration = Duration::from_millis(10);

/// An image that only this process has open, through this description.
#[derive(Debug)]
pub(super) struct Held {
    pub(super) file: File,
    fencing: Fencing,
}

/// What [`Held::take`] found instead.
#[derive(Debug)]
pub(super) enum TakeError {
    /// Somebody has it open; what was seen of them.
    InUse(String),
    Io(io::Error),
}

impl Held {
    /// Takes an open image for this process alone.
    pub(super) fn take(file: File, fencing: Fencing) -> Result<Self, TakeError> {
        for attempt in 1..=TRIES {
            let taken = match fencing {
                Fencing::Lease => match fcntl::take_lease(file.as_fd()) {
                    Ok(()) => true,
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => false,
                    Err(error) => return Err(TakeError::Io(error)),
                },
                Fencing::Lock => fcntl::lock_all(file.as_fd()).map_err(TakeError::Io)?,
            };
            if taken {
                return Ok(Self { file, fencing });
            }
            if attempt < TRIES {
                std::thread::sleep(PAUSE);
            }
        }
        let locked = fcntl::locked_byte(file.as_fd()).map_err(TakeError::Io)?;
        Err(TakeError::InUse(match locked {
            // block/file-posix.c of QEMU: RAW_LOCK_PERM_BASE 100, RAW_LOCK_SHARED_BASE 200.
            Some(byte @ 100..300) => format!("QEMU's image lock is held at byte {byte}; `fuser -v` names the process"),
            Some(byte) => format!("a lock is held at byte {byte}; `fuser -v` names the process"),
            None => "the kernel counts another open description of it, without a lock; `fuser -v` names the process"
                .to_owned(),
        }))
    }

    /// Whether it still is for this process alone.
    pub(super) fn holds(&self) -> io::Result<bool> {
        match self.fencing {
            Fencing::Lease => fcntl::has_lease(self.file.as_fd()),
            Fencing::Lock => Ok(true),
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        // Explicitly: a child between fork and exec may keep the description alive a moment longer. A lock goes with
        // the last descriptor.
        if self.fencing == Fencing::Lease
            && let Err(error) = fcntl::give_lease_back(self.file.as_fd())
        {
            tracing::warn!(%error, "a lease could not be given back; it ends with its descriptor");
        }
    }
}

/// The images that this process has for itself, while it does.
#[derive(Debug, Default)]
pub(super) struct Proven(Mutex<HashMap<VolumeId, Weak<Held>>>);

impl Proven {
    fn all(&self) -> MutexGuard<'_, HashMap<VolumeId, Weak<Held>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn get(&self, id: VolumeId) -> Option<Arc<Held>> {
        self.all().get(&id).and_then(Weak::upgrade)
    }

    pub(super) fn put(&self, id: VolumeId, held: &Arc<Held>) {
        let mut all = self.all();
        all.retain(|_, held| held.strong_count() > 0);
        all.insert(id, Arc::downgrade(held));
    }
}

/// What the caller holds.
#[derive(Debug)]
pub(super) struct Proof {
    held: Option<Arc<Held>>,
    all: Arc<Proven>,
}

impl Proof {
    pub(super) fn new(held: Arc<Held>, all: &Arc<Proven>) -> Self {
        Self { held: Some(held), all: Arc::clone(all) }
    }
}

impl Drop for Proof {
    fn drop(&mut self) {
        // Whoever looks for it meanwhile finds it, or finds it closed.
        let _all = self.all.all();
        self.held = None;
    }
}

impl Exclusive for Proof {}
