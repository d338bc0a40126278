use std::collections::HashMap;
use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use zpod_storage::backing::{BackingError, CopySource, Copying};
use zpod_volume::{Bytes, SnapshotId, VolumeId};

/// The full copies that are being made now, and those that failed and nobody has asked for since. A copy that shares
/// blocks is made at once and is never here.
///
/// # Design
/// A full copy may take hours: longer than any call waits, and than anybody may hold a volume's lock. It has a thread of
/// its own, which ends with the process; what it has made by then is nothing, and it begins again when it is asked for
/// again. Whoever wants to change what is read or written by it looks here first, under the lock of its volume.
#[derive(Debug, Clone, Default)]
pub(super) struct Copies(Arc<Mutex<HashMap<Target, Arc<Copy>>>>);

/// What is being made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Target {
    Volume(VolumeId),
    Snapshot(SnapshotId),
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Volume(id) => write!(f, "volume {id}"),
            Self::Snapshot(id) => write!(f, "snapshot {id}"),
        }
    }
}

/// How far a full copy is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Progress {
    /// Bytes done.
    pub done: Bytes,
    /// Bytes in all; zero while that is not known.
    pub total: Bytes,
}

impl Progress {
    /// In percent: 100 only when it is done.
    pub fn percent(self) -> u64 {
        let done = u128::from(self.done.0.min(self.total.0)) * 100;
        done.checked_div(self.total.0.into()).and_then(|percent| u64::try_from(percent).ok()).unwrap_or(0)
    }
}

impl fmt::Display for Progress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}% ({} of {})", self.percent(), self.done, self.total)
    }
}

#[derive(Debug)]
struct Copy {
    source: CopySource,
    done: AtomicU64,
    total: AtomicU64,
    stopped: AtomicBool,
    failed: Mutex<Option<BackingError>>,
    ended: watch::Sender<bool>,
}

impl Copy {
    fn progress(&self) -> Progress {
        Progress { done: Bytes(self.done.load(Ordering::Relaxed)), total: Bytes(self.total.load(Ordering::Relaxed)) }
    }

    fn has_ended(&self) -> bool {
        *self.ended.borrow()
    }

    fn work(&self, work: impl FnOnce(&Copying<'_>) -> Result<(), BackingError>) -> Result<(), BackingError> {
        let progress = |done: Bytes, total: Bytes| {
            self.done.store(done.0, Ordering::Relaxed);
            self.total.store(total.0, Ordering::Relaxed);
            !self.stopped.load(Ordering::Relaxed)
        };
        work(&Copying { full: true, progress: &progress })
    }
}

impl Copies {
    fn all(&self) -> MutexGuard<'_, HashMap<Target, Arc<Copy>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How far the copy into this is, while it is being made.
    pub(super) fn progress(&self, target: Target) -> Option<Progress> {
        self.all().get(&target).filter(|copy| !copy.has_ended()).map(|copy| copy.progress())
    }

    /// Whether a copy into this is being made, or has failed and nobody was told.
    pub(super) fn is_known(&self, target: Target) -> bool {
        self.all().contains_key(&target)
    }

    /// What is being copied from this, and how far that is.
    pub(super) fn reading(&self, source: CopySource) -> Option<(Target, Progress)> {
        let copies = self.all();
        let mut running = copies.iter().filter(|(_, copy)| copy.source == source && !copy.has_ended());
        running.next().map(|(target, copy)| (*target, copy.progress()))
    }

    /// Why the copy into this failed. Told once.
    pub(super) fn take_failure(&self, target: Target) -> Option<BackingError> {
        let mut copies = self.all();
        let copy = copies.get(&target).filter(|copy| copy.has_ended())?.clone();
        copies.remove(&target);
        copy.failed.lock().unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Begins a copy; when it is made, `then` follows.
    pub(super) fn begin(
        &self,
        target: Target,
        source: CopySource,
        work: impl FnOnce(&Copying<'_>) -> Result<(), BackingError> + Send + 'static,
        then: impl Future<Output = ()> + Send + 'static,
    ) {
        let copy = Arc::new(Copy {
            source,
            done: AtomicU64::new(0),
            total: AtomicU64::new(0),
            stopped: AtomicBool::new(false),
            failed: Mutex::default(),
            ended: watch::Sender::new(false),
        });
        self.all().insert(target, Arc::clone(&copy));
        let copies = self.clone();
        let runtime = tokio::runtime::Handle::current();
        // Not one of the runtime's threads: those are waited for when the process ends.
        std::thread::spawn(move || {
            let result = copy.work(work);
            match result {
                Ok(()) => {
                    copies.all().remove(&target);
                    copy.ended.send_replace(true);
                    runtime.spawn(then);
                }
                Err(error) => {
                    tracing::warn!(%target, "full copy failed: {error}");
                    *copy.failed.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
                    copy.ended.send_replace(true);
                }
            }
        });
    }

    /// Waits for the end of the copy into this, if one is being made. Whether it has ended.
    pub(super) async fn wait(&self, target: Target, patience: Duration) -> bool {
        let Some(mut ended) = self.all().get(&target).map(|copy| copy.ended.subscribe()) else { return true };
        tokio::time::timeout(patience, ended.wait_for(|ended| *ended)).await.is_ok()
    }

    /// Stops the copy into this, if one is being made, and forgets it.
    pub(super) async fn stop(&self, target: Target) {
        let Some(copy) = self.all().get(&target).cloned() else { return };
        copy.stopped.store(true, Ordering::Relaxed);
        let _ = copy.ended.subscribe().wait_for(|ended| *ended).await;
        self.all().remove(&target);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PATIENCE: Duration = Duration::from_secs(10);

    fn ids() -> (Target, CopySource) {
        (Target::Volume(VolumeId::from_name("b")), CopySource::Device(VolumeId::from_name("a")))
    }

    #[tokio::test]
    async fn a_copy_is_seen_from_both_ends_until_it_is_made() {
        let (copies, (target, source)) = (Copies::default(), ids());
        let (go, gone) = std::sync::mpsc::channel::<()>();
        let (told, then) = tokio::sync::oneshot::channel();
        let work = move |how: &Copying<'_>| {
            assert!(how.full && (how.progress)(Bytes(1), Bytes(4)));
            let _ = gone.recv();
            Ok(())
        };
        copies.begin(target, source, work, async move { told.send(()).unwrap() });
        while copies.progress(target) != Some(Progress { done: Bytes(1), total: Bytes(4) }) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        assert_eq!(copies.reading(source).unwrap().0, target);
        assert_eq!(copies.progress(target).unwrap().percent(), 25);
        assert!(!copies.wait(target, Duration::from_millis(10)).await);
        go.send(()).unwrap();
        assert!(copies.wait(target, PATIENCE).await);
        then.await.unwrap();
        assert_eq!((copies.progress(target), copies.reading(source)), (None, None));
        assert!(copies.take_failure(target).is_none());
    }

    #[tokio::test]
    async fn a_failure_is_told_once_and_what_is_stopped_is_forgotten() {
        let (copies, (target, source)) = (Copies::default(), ids());
        copies.begin(target, source, |_| Err(BackingError::Stopped), async {});
        assert!(copies.wait(target, PATIENCE).await);
        assert!(copies.take_failure(target).is_some());
        assert!(copies.take_failure(target).is_none());
        let work = |how: &Copying<'_>| {
            while (how.progress)(Bytes(0), Bytes(0)) {
                std::thread::sleep(Duration::from_millis(1));
            }
            Err(BackingError::Stopped)
        };
        copies.begin(target, source, work, async { unreachable!("nothing was made") });
        copies.stop(target).await;
        assert!(copies.take_failure(target).is_none());
    }

    #[test]
    fn nothing_is_done_before_it_is_done() {
        let percent = |done, total| Progress { done: Bytes(done), total: Bytes(total) }.percent();
        assert_eq!([percent(0, 0), percent(u64::MAX - 1, u64::MAX), percent(7, 7)], [0, 99, 100]);
    }
}
