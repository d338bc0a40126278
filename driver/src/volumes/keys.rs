//! Keys of encrypted volumes, as CSI secrets bring them.
//!
//! # Design
//! A key is in the memory of this process from NodePublishVolume to NodeUnpublishVolume, and nowhere else on the host: not
//! in a record, an entry of Kata, a log, an error, an argument or the environment. It goes to one guest only, over the
//! control channel: the one that gives the token of the volume's publication. After a restart of this process kubelet
//! brings it again (CSIDriver `requiresRepublish`).
//!
//! # Limitations
//! What gRPC copies into its buffers on the way in and out is not overwritten when it is freed.

mod delivery;
mod secret;

pub use secret::{KeyPair, Secret};
pub(super) use secret::{missing, not_encrypted};

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use uuid::Uuid;
use zpod_volume::VolumeId;

use super::VolumeError;

/// What a guest has said may be this old when it is read.
const OLD_NEWS: Duration = Duration::from_secs(2);

/// The keys of the volumes that are published here.
#[derive(Debug, Default)]
pub(super) struct Keys(Mutex<HashMap<VolumeId, Held>>);

#[derive(Debug)]
struct Held {
    pair: Arc<KeyPair>,
    /// The publication whose guest has taken this key, and when.
    taken: Option<(Uuid, Instant)>,
    /// Why its guest did not take it, for a person.
    trouble: Option<String>,
    /// A guest is being given it.
    busy: bool,
}

impl Held {
    fn has_taken(&self, token: Uuid) -> bool {
        self.taken.is_some_and(|(by, _)| by == token)
    }
}

impl Keys {
    fn held(&self) -> MutexGuard<'_, HashMap<VolumeId, Held>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps what a publication brought. What it brought before is replaced.
    ///
    /// # Errors
    /// When a running guest has another key, and the request does not say that this one is to take its place.
    pub(super) fn offer(&self, id: VolumeId, pair: KeyPair) -> Result<(), VolumeError> {
        let mut held = self.held();
        let new = |taken| Held { pair: Arc::new(pair.clone()), taken, trouble: None, busy: false };
        let Some(before) = held.get_mut(&id) else {
            held.insert(id, new(None));
            return Ok(());
        };
        if before.pair.key == pair.key {
            // The one before it is only left out when it has been replaced everywhere.
            if before.pair.previous != pair.previous {
                before.pair = Arc::new(pair);
            }
            return Ok(());
        }
        if before.taken.is_some() && pair.previous.as_ref() != Some(&before.pair.key) {
            return Err(secret::changed_without_previous(id));
        }
        let busy = before.busy;
        *before = Held { busy, ..new(None) };
        Ok(())
    }

    /// Forgets a volume's key.
    pub(super) fn forget(&self, id: VolumeId) {
        self.held().remove(&id);
    }

    /// Why the guest of a volume has not got its key, for a person.
    pub(super) fn trouble(&self, id: VolumeId) -> Option<String> {
        self.held().get(&id)?.trouble.clone()
    }

    /// Whether a key is held.
    pub(super) fn knows(&self, id: VolumeId) -> bool {
        self.held().contains_key(&id)
    }

    /// Whether the guest of this publication has the key.
    pub(super) fn has_taken(&self, id: VolumeId, token: Uuid) -> bool {
        self.held().get(&id).is_some_and(|held| held.has_taken(token))
    }

    /// Whether a key is held that is to take the place of another one in the guest of this publication.
    pub(super) fn replaces(&self, id: VolumeId, token: Uuid) -> bool {
        self.held().get(&id).is_some_and(|held| held.pair.previous.is_some() && !held.has_taken(token))
    }

    /// Whether a guest is being given the key now.
    fn is_busy(&self, id: VolumeId) -> bool {
        self.held().get(&id).is_some_and(|held| held.busy)
    }

    /// The key, to be given to a guest; `None` while somebody is at that, or just was.
    fn begin(&self, id: VolumeId, token: Uuid) -> Option<Arc<KeyPair>> {
        let mut held = self.held();
        let held = held.get_mut(&id).filter(|held| !held.busy)?;
        // A report may be older than the key that the guest has by now.
        if held.taken.is_some_and(|(by, at)| by == token && at.elapsed() < OLD_NEWS) {
            return None;
        }
        held.busy = true;
        Some(held.pair.clone())
    }

    /// Notes how that ended. What was said of a key that is not the one any more is passed over.
    fn end(&self, id: VolumeId, token: Uuid, pair: &KeyPair, trouble: Option<String>) {
        if let Some(held) = self.held().get_mut(&id) {
            held.busy = false;
            if held.pair.key == pair.key {
                held.taken = trouble.is_none().then(|| (token, Instant::now()));
                held.trouble = trouble;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    fn pair(key: &str, previous: &str) -> KeyPair {
        let secrets = [("encryptionKey", key), ("previousEncryptionKey", previous)];
        let given = secrets.into_iter().filter(|(_, value)| !value.is_empty());
        let given: HashMap<_, _> = given.map(|(name, value)| (name.to_owned(), value.to_owned())).collect();
        KeyPair::take(VolumeId::from_name("a"), given).unwrap().unwrap()
    }

    #[test]
    fn a_key_that_a_guest_runs_on_is_only_replaced_when_it_is_named_as_the_one_before() {
        let (keys, id, token) = (Keys::default(), VolumeId::from_name("a"), Uuid::from_u128(1));
        keys.offer(id, pair("a wrong key", "")).unwrap();
        let given = keys.begin(id, token).unwrap();
        assert!(keys.begin(id, token).is_none(), "one at a time");
        keys.end(id, token, &given, Some("wrong".into()));
        assert_eq!(keys.trouble(id).unwrap(), "wrong");
        // Nobody runs on it: the Secret was mended.
        keys.offer(id, pair("the right key", "")).unwrap();
        assert_eq!(keys.trouble(id), None);
        let given = keys.begin(id, token).unwrap();
        keys.end(id, token, &given, None);
        keys.offer(id, pair("the right key", "")).unwrap();
        assert!(!keys.replaces(id, token));

        let error = keys.offer(id, pair("another key", "")).unwrap_err().to_string();
        assert!(error.contains("previousEncryptionKey"), "{error}");
        assert!(keys.offer(id, pair("another key", "a third key")).is_err());
        keys.offer(id, pair("another key", "the right key")).unwrap();
        assert!(keys.replaces(id, token));
        let given = keys.begin(id, token).unwrap();
        keys.end(id, token, &given, None);
        assert!(!keys.replaces(id, token) && keys.replaces(id, Uuid::from_u128(2)));
        keys.forget(id);
        assert!(!keys.knows(id) && keys.begin(id, token).is_none());
    }

    #[test]
    fn what_is_said_of_a_key_that_was_replaced_meanwhile_is_passed_over() {
        let (keys, id, token) = (Keys::default(), VolumeId::from_name("a"), Uuid::from_u128(1));
        keys.offer(id, pair("a wrong key", "")).unwrap();
        let given = keys.begin(id, token).unwrap();
        keys.offer(id, pair("the right key", "")).unwrap();
        keys.end(id, token, &given, Some("wrong".into()));
        assert_eq!(keys.trouble(id), None);
        assert!(keys.begin(id, token).is_some());
    }

    #[test]
    fn neither_debug_output_nor_errors_show_a_key() {
        let keys = Keys::default();
        keys.offer(VolumeId::from_name("a"), pair("hunter2hunter2", "correct horse")).unwrap();
        let shown = format!("{keys:?} {:#?}", pair("hunter2hunter2", "correct horse"));
        assert!(!shown.contains("hunter2") && !shown.contains("horse"), "{shown}");
        assert!(!shown.contains("104, 117"), "not as numbers either: {shown}");
    }
}
