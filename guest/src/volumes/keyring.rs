use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;
use uuid::Uuid;

use crate::error::VolumeError;
use crate::key::{Key, Keys};
use crate::machine::Step;

/// How long before a caller's deadline the wait for a key ends, so that the reason is told in time.
const MARGIN: Duration = Duration::from_millis(500);

/// What came of a key: whether the volume's own was changed to it.
pub(super) type Outcome = Result<Step, VolumeError>;

/// The key of one volume, from when the node provides it to the end of the guest, and whoever waits for it.
#[derive(Debug, Default)]
pub(super) struct Keyring {
    slot: Mutex<Slot>,
    /// A key was provided.
    provided: Notify,
    /// It is known what came of it.
    settled: Notify,
}

#[derive(Debug, Default)]
struct Slot {
    held: Option<Held>,
    /// The publication whose volume waits for its key.
    awaited: Option<Uuid>,
    /// Until when it does.
    until: Option<Instant>,
}

#[derive(Debug)]
struct Held {
    token: Uuid,
    /// Gone when they don't fit.
    keys: Option<Keys>,
    outcome: Option<Outcome>,
}

impl Keyring {
    fn slot(&self) -> MutexGuard<'_, Slot> {
        self.slot.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A caller waits for the volume until then.
    pub(super) fn extend(&self, deadline: Instant) {
        let mut slot = self.slot();
        slot.until = slot.until.max(Some(deadline - MARGIN));
    }

    /// The publication whose volume waits for its key.
    pub(super) fn awaited(&self) -> Option<Uuid> {
        self.slot().awaited
    }

    /// Keeps keys for a publication.
    pub(super) fn put(&self, token: Uuid, keys: Keys) {
        self.slot().held = Some(Held { token, keys: Some(keys), outcome: None });
        self.provided.notify_one();
    }

    /// Whether this key is in use in this publication.
    pub(super) fn uses(&self, token: Uuid, key: &Key) -> bool {
        let slot = self.slot();
        let held = slot.held.as_ref().filter(|held| held.token == token && matches!(held.outcome, Some(Ok(_))));
        held.and_then(|held| held.keys.as_ref()).is_some_and(|keys| keys.key == *key)
    }

    pub(super) fn keys(&self, token: Uuid) -> Option<Keys> {
        self.slot().held.as_ref().filter(|held| held.token == token)?.keys.clone()
    }

    /// The keys of a publication, once they are there. `None` when nobody who wants the volume waits any longer.
    pub(super) async fn wait(&self, token: Uuid) -> Option<Keys> {
        let wait = async {
            loop {
                if let Some(keys) = self.keys(token) {
                    return Some(keys);
                }
                let until = self.slot().until?;
                let news = tokio::time::timeout_at(until, self.provided.notified()).await;
                // Somebody may have come meanwhile who waits longer.
                if news.is_err() && self.slot().until.is_none_or(|until| until <= Instant::now()) {
                    return None;
                }
            }
        };
        if let Some(keys) = self.keys(token) {
            return Some(keys);
        }
        self.slot().awaited = Some(token);
        let keys = wait.await;
        self.slot().awaited = None;
        keys
    }

    /// Says what came of the keys. Those that don't fit are not kept: the next try waits for others.
    pub(super) fn settle(&self, token: Uuid, outcome: Outcome) {
        if let Some(held) = self.slot().held.as_mut().filter(|held| held.token == token) {
            held.keys.take_if(|_| matches!(outcome, Err(VolumeError::WrongKey { .. })));
            held.outcome = Some(outcome);
        }
        self.settled.notify_waiters();
    }

    /// Waits until it is known what came of the keys; `None` when that is not in time.
    pub(super) async fn outcome(&self, token: Uuid, wait: Duration) -> Option<Outcome> {
        let known = async {
            loop {
                // Before the look, so that nothing is missed between it and the wait.
                let settled = self.settled.notified();
                let slot = self.slot().held.as_ref().map(|held| (held.token, held.outcome.clone()));
                match slot {
                    Some((of, Some(outcome))) if of == token => return Some(outcome),
                    Some((of, None)) if of == token => settled.await,
                    _ => return None,
                }
            }
        };
        tokio::time::timeout(wait, known).await.ok().flatten()
    }
}
