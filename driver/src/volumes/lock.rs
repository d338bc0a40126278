use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::{Mutex as AsyncMutex, OwnedMutexGuard};
use zpod_volume::VolumeId;

type Locks = Arc<Mutex<HashMap<VolumeId, Arc<AsyncMutex<()>>>>>;

/// One lock for each volume that is being worked on; none for the others.
#[derive(Debug, Default)]
pub(super) struct VolumeLocks(Locks);

/// Held while a volume is worked on.
#[derive(Debug)]
pub(super) struct VolumeLock {
    id: VolumeId,
    locks: Locks,
    guard: Option<OwnedMutexGuard<()>>,
}

impl VolumeLocks {
    /// Waits for the volume.
    pub(super) async fn lock(&self, id: VolumeId) -> VolumeLock {
        let lock = self.0.lock().unwrap_or_else(PoisonError::into_inner).entry(id).or_default().clone();
        // From here on Drop cleans up, also when the wait is given up.
        let mut held = VolumeLock { id, locks: self.0.clone(), guard: None };
        held.guard = Some(lock.lock_owned().await);
        held
    }
}

impl Drop for VolumeLock {
    fn drop(&mut self) {
        let mut locks = self.locks.lock().unwrap_or_else(PoisonError::into_inner);
        drop(self.guard.take());
        if locks.get(&self.id).is_some_and(|lock| Arc::strong_count(lock) == 1) {
            locks.remove(&self.id);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[tokio::test]
    async fn one_at_a_time_for_each_volume_and_nothing_left_behind() {
        let locks = VolumeLocks::default();
        let (a, b) = (VolumeId::from_name("a"), VolumeId::from_name("b"));
        let held = locks.lock(a).await;
        let _other = locks.lock(b).await;
        // A wait that is given up leaves nothing either.
        assert!(tokio::time::timeout(Duration::from_millis(20), locks.lock(a)).await.is_err());
        drop(held);
        drop(locks.lock(a).await);
        assert_eq!(locks.0.lock().unwrap().len(), 1);
    }
}
