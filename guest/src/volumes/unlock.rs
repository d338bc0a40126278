//! Keys of encrypted volumes: loading them, changing them.
//!
//! # Design
//! A volume is encrypted as a whole or not at all, from its creation on. Its pool can be imported without the key; what is
//! in it can't be read, and is not mounted. The node gives the key over the control channel when the guest says that it
//! waits for it, or before; it stays in this guest's memory as long as the guest lives, since a container that starts
//! again needs it again.
//!
//! The key that the node has encrypts the key that the contents are encrypted with: changing it is a small write, and a
//! copy of the disk that was made before still has the one before.

use std::time::Duration;

use tokio::time::Instant;
use uuid::Uuid;
use zpod_volume::VolumeId;

use super::activate::Activation;
use super::{Volume, Volumes};
use crate::error::VolumeError;
use crate::key::{Key, Keys};
use crate::machine::{Fault, Machine, Properties, Step};

/// How long ProvideKey waits for what comes of a key that is waited for.
const OUTCOME: Duration = Duration::from_secs(20);
/// Volumes for which keys are kept before a container asks for them. A pod has few.
const EARLY: usize = 256;

impl<M: Machine> Activation<'_, M> {
    /// The key to make an encrypted dataset with; `None` where it is not to be encrypted.
    pub(super) async fn new_key(&self) -> Result<Option<Key>, VolumeError> {
        match self.request.spec.encryption {
            Some(_) => Ok(Some(self.keys().await?.key)),
            None => Ok(None),
        }
    }

    /// Says that the dataset was made with the key.
    pub(super) fn key_is_used(&self) {
        self.volume.keyring.settle(self.request.spec.token, Ok(Step::Unchanged));
    }

    async fn keys(&self) -> Result<Keys, VolumeError> {
        self.progress.stage("waiting for its key, which the node has not provided");
        let since = Instant::now();
        let keys = self.volume.keyring.wait(self.request.spec.token).await;
        self.progress.stage("loading its key");
        keys.ok_or(VolumeError::NoKey { id: self.id, waited: since.elapsed() })
    }

    /// Loads the key of an encrypted dataset.
    /// A new one replaces it, unless the pool is read-only.
    pub(super) async fn unlock(&self, now: &Properties, read_only: bool) -> Result<(), VolumeError> {
        let spec = &self.request.spec;
        let found = now.get("encryption").map_or("off", String::as_str);
        let wanted = spec.encryption.map_or("off", |encryption| encryption.as_str());
        if found != wanted {
            let (wanted, found) = (wanted.to_owned(), found.to_owned());
            return Err(VolumeError::Differs { id: self.id, property: "encryption", wanted, found });
        }
        // The pool may have been left imported.
        if spec.encryption.is_none() || now.get("keystatus").is_some_and(|status| status == "available") {
            return Ok(());
        }
        let keys = self.keys().await?;
        let failed = self.failed("loading its key");
        let outcome = self
            .load(&keys, now, read_only)
            .await
            .map_err(&failed)
            .and_then(|step| step.ok_or(VolumeError::WrongKey { id: self.id, previous: keys.previous.is_some() }));
        self.volume.keyring.settle(spec.token, outcome.clone());
        outcome.map(drop)
    }

    async fn load(&self, keys: &Keys, now: &Properties, read_only: bool) -> Result<Option<Step>, Fault> {
        let dataset = self.request.spec.dataset();
        if fits(now, &keys.key) && self.machine.load_key(&dataset, &keys.key, false).await? {
            return Ok(Some(Step::Unchanged));
        }
        let Some(previous) = keys.previous.as_ref().filter(|previous| fits(now, previous)) else { return Ok(None) };
        if !self.machine.load_key(&dataset, previous, false).await? {
            return Ok(None);
        }
        if read_only {
            return Ok(Some(Step::Unchanged));
        }
        self.machine.change_key(&dataset, &keys.key).await?;
        tracing::info!(volume = %self.id, "its key was changed");
        Ok(Some(Step::Changed))
    }
}

/// Whether a key is of the dataset's format. ZFS reads one of another format as something else.
pub(super) fn fits(now: &Properties, key: &Key) -> bool {
    now.get("keyformat").is_some_and(|format| format == key.format().as_str())
}

impl<M: Machine> Volumes<M> {
    /// Takes the key of a volume: of one that waits for it, of one that runs, whose key is changed to it, or of one that
    /// is yet to come.
    ///
    /// # Errors
    /// When it does not fit, the volume is not encrypted, or was published with another token.
    pub async fn provide_key(&self, id: VolumeId, token: Uuid, keys: Keys) -> Result<Step, VolumeError> {
        let known = self.volumes();
        if known.len() >= EARLY && !known.iter().any(|volume| volume.id == id) {
            let reason = format!("keys for {EARLY} volumes are kept already that no container has asked for");
            return Err(VolumeError::Invalid { id, reason });
        }
        let volume = self.volume(id);
        if let Some(awaited) = volume.keyring.awaited() {
            if awaited != token {
                return Err(VolumeError::OtherToken { id });
            }
            volume.keyring.put(token, keys);
            return volume.keyring.outcome(token, OUTCOME).await.unwrap_or(Ok(Step::Unchanged));
        }
        if volume.state().active.is_none() {
            volume.keyring.put(token, keys);
            return Ok(Step::Unchanged);
        }
        let _gate = volume.gate.lock().await;
        self.change_key(&volume, token, keys).await
    }

    /// Gives a running volume the key; the gate is held.
    async fn change_key(&self, volume: &Volume, token: Uuid, keys: Keys) -> Result<Step, VolumeError> {
        let id = volume.id;
        let Some(active) = volume.state().active.clone() else {
            volume.keyring.put(token, keys);
            return Ok(Step::Unchanged);
        };
        if active.read_only && active.request.spec.token == token {
            // What opens it is loaded, and can't be changed now: the next writable start does.
            volume.keyring.put(token, keys);
            return Ok(Step::Unchanged);
        }
        let spec = &active.request.spec;
        if spec.token != token {
            return Err(VolumeError::OtherToken { id });
        }
        if spec.encryption.is_none() {
            return Err(VolumeError::NotEncrypted { id });
        }
        // Deriving it from a passphrase takes a while, and the node repeats it with each publication.
        if volume.keyring.uses(token, &keys.key) {
            return Ok(Step::Unchanged);
        }
        let (dataset, failed) = (spec.dataset(), |fault| VolumeError::failed(id, "changing its key", fault));
        let now = self.machine.dataset(&dataset).await.map_err(failed)?.unwrap_or_default();
        let look = async |key: &Key| match fits(&now, key) {
            true => self.machine.load_key(&dataset, key, true).await.map_err(failed),
            false => Ok(false),
        };
        // For the same reason the one that is in use is not tried, and neither is another one then.
        let in_use = |key: &Key| volume.keyring.uses(token, key);
        let step = if !keys.previous.as_ref().is_some_and(in_use) && look(&keys.key).await? {
            Step::Unchanged
        } else if let Some(previous) = &keys.previous
            && (in_use(previous) || look(previous).await?)
        {
            self.machine.change_key(&dataset, &keys.key).await.map_err(failed)?;
            tracing::info!(volume = %id, "its key was changed");
            Step::Changed
        } else {
            return Err(VolumeError::WrongKey { id, previous: keys.previous.is_some() });
        };
        volume.keyring.put(token, keys);
        volume.keyring.settle(token, Ok(step));
        Ok(step)
    }
}
