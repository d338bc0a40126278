//! What is done beside the calls: room that is free is made to show, and who shares what is found.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::FileBacking;
use crate::directory::Directory;

/// Between two looks at whether there is something to do.
const IDLE: Duration = Duration::from_secs(1);
/// What has freed less than this is not worth a sync of the file system.
const WORTH_A_SYNC: u64 = 4 << 20;
/// Syncs that nobody waits for come no faster than this.
const SYNC_EVERY: Duration = Duration::from_secs(3);

/// Some file systems free what was removed a while later: btrfs when it commits a transaction, every 30 s by itself.
#[derive(Debug, Default)]
pub(super) struct Freed {
    /// Counts removals.
    removals: AtomicU64,
    state: Mutex<Synced>,
    ended: Condvar,
}

#[derive(Debug, Default)]
struct Synced {
    running: bool,
    /// Removals that are surely over.
    removals: u64,
    last_removal: Option<Instant>,
    begun: Option<Instant>,
}

impl Freed {
    fn state(&self) -> std::sync::MutexGuard<'_, Synced> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes that so much was removed.
    pub(super) fn note(&self, bytes: u64) {
        if bytes >= WORTH_A_SYNC {
            self.removals.fetch_add(1, Ordering::SeqCst);
            self.state().last_removal = Some(Instant::now());
        }
    }

    /// Whether something may still count that is gone.
    pub(super) fn is_pending(&self) -> bool {
        self.state().removals < self.removals.load(Ordering::SeqCst)
    }

    /// Whether something was removed less than so long ago.
    pub(super) fn within(&self, age: Duration) -> bool {
        self.state().last_removal.is_some_and(|at| at.elapsed() < age)
    }

    /// Has the file system write everything out, which frees what was removed. It may take long where much was written:
    /// it has a thread of its own, and is waited for no longer than `patience`. Says whether it has ended.
    pub(super) fn sync(self: &Arc<Self>, directory: &Directory, patience: Duration) -> bool {
        let mut state = self.state();
        if !state.running {
            let begun = directory.reopen().and_then(|directory| {
                let freed = Arc::clone(self);
                std::thread::Builder::new().name("zpod-sync".to_owned()).spawn(move || {
                    let removals = freed.removals.load(Ordering::SeqCst);
                    let synced = rustix::fs::syncfs(&directory);
                    let mut state = freed.state();
                    state.running = false;
                    match synced {
                        Ok(()) => state.removals = state.removals.max(removals),
                        Err(error) => {
                            tracing::info!(%error, "the file system of the backing directory can't be synced")
                        }
                    }
                    freed.ended.notify_all();
                })
            });
            if let Err(error) = begun {
                tracing::info!(%error, "the file system of the backing directory can't be synced");
                return false;
            }
            (state.running, state.begun) = (true, Some(Instant::now()));
        }
        let waited = self.ended.wait_timeout_while(state, patience, |state| state.running);
        !waited.unwrap_or_else(PoisonError::into_inner).0.running
    }

    fn is_due(&self) -> bool {
        self.is_pending() && self.state().begun.is_none_or(|begun| begun.elapsed() >= SYNC_EVERY)
    }
}

impl FileBacking {
    /// Begins the upkeep: it goes on, in a thread of its own, until the backing is dropped.
    ///
    /// # Errors
    /// When there can be no such thread.
    pub fn keep_up(self: &Arc<Self>) -> io::Result<()> {
        let backing = Arc::downgrade(self);
        let upkeep = move || {
            while let Some(backing) = backing.upgrade() {
                let pause = backing.work();
                drop(backing);
                std::thread::sleep(pause);
            }
        };
        std::thread::Builder::new().name("zpod-upkeep".to_owned()).spawn(upkeep).map(drop)
    }

    /// Does a bounded piece of what there is to do; says how long to leave it at that.
    pub(super) fn work(&self) -> Duration {
        if self.abilities().is_none() {
            // Where it fails, the reason is told to whoever wants something new.
            let _ = self.tried();
        }
        if self.freed.is_due() {
            self.freed.sync(&self.directory, Duration::ZERO);
        }
        self.look_on().unwrap_or(IDLE)
    }
}
