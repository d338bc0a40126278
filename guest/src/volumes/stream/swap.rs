//! Receiving all of an encrypted volume.
//!
//! # Design
//! ZFS replaces no encrypted dataset by another one, since it would have to know two keys at once
//! (`recv_begin_check_existing_impl`). So the stream becomes a dataset of its own beside the volume's, `zpod-recv`; once it is
//! whole, and the volume's key opens it, it takes the name of the volume's dataset, which is `zpod-old` from then on and is
//! destroyed. Killed between the two renames, the next start goes back to the old contents: the stream has to be sent
//! again. Who has the volume mounted meanwhile goes on with the old contents until the container ends.

use zpod_volume::VolumeId;

use super::super::activate::Activation;
use super::super::bounds::Bounds;
use super::super::delegation::NOBODY;
use super::super::unlock::fits;
use super::super::{Active, Volume, Volumes};
use super::header::Header;
use crate::error::VolumeError;
use crate::machine::{DELEGATED, Fault, Machine, MountFlags};

/// What is received, and what was replaced.
const NEW: &str = "zpod-recv";
const OLD: &str = "zpod-old";
/// What guests of before called it. A dataset of that name beside the volume's may be the tenant's own.
const OLD_BEFORE: &str = "old";

/// Flags of our own mount.
const FLAGS: MountFlags = MountFlags { read_only: false, noexec: true, nosuid: true, nodev: true, noatime: true };

fn sibling(active: &Active, name: &str) -> String {
    format!("{}/{name}", active.request.spec.pool)
}

/// The dataset that all of an encrypted volume is received into.
pub(super) fn new_dataset(active: &Active) -> String {
    sibling(active, NEW)
}

impl<M: Machine> Volumes<M> {
    /// Whether some of an encrypted volume was received.
    pub(super) async fn has_new(&self, active: &Active) -> Result<bool, Fault> {
        match active.request.spec.encryption {
            Some(_) => Ok(self.machine.dataset(&new_dataset(active)).await?.is_some()),
            None => Ok(false),
        }
    }

    /// Whether a stream with all of an encrypted volume can be received.
    pub(super) async fn fits_apart(&self, id: VolumeId, active: &Active, header: &Header) -> Result<(), VolumeError> {
        let failed = |fault| VolumeError::failed(id, "receiving into it", fault);
        let now = self.machine.dataset(&active.request.spec.dataset()).await.map_err(failed)?.unwrap_or_default();
        if now.get("usedbychildren").is_some_and(|used| used != "0") {
            let reason =
                "there are datasets below the volume's own, which would be destroyed with its contents; destroy \
                          them, or move them elsewhere (zfs rename), first"
                    .to_owned();
            return Err(VolumeError::Refused { id, reason });
        }
        let there = self.has_new(active).await.map_err(failed)?;
        if header.resuming && !there {
            let reason = "the stream goes on with one that broke off, and none is waiting for more here".to_owned();
            return Err(VolumeError::Refused { id, reason });
        }
        if there && !header.resuming {
            tracing::warn!(volume = %id, "another stream broke off before; what came of it is dropped");
            self.machine.destroy(&new_dataset(active)).await.map_err(failed)?;
        }
        Ok(())
    }

    /// Lets what was received take the place of the volume's dataset.
    pub(super) async fn swap(&self, volume: &Volume) -> Result<(), VolumeError> {
        let id = volume.id;
        let failed = |fault| VolumeError::failed(id, "taking what was received for its contents", fault);
        let _gate = volume.gate.lock().await;
        let (_, active) = self.known(id)?;
        let spec = &active.request.spec;
        let (data, new, old) = (spec.dataset(), new_dataset(&active), sibling(&active, OLD));
        let now = self.machine.dataset(&new).await.map_err(failed)?.unwrap_or_default();
        let key = volume.keyring.keys(spec.token).map(|keys| keys.key).filter(|key| fits(&now, key));
        let opened = match &key {
            Some(key) => self.machine.load_key(&new, key, false).await.map_err(failed)?,
            None => false,
        };
        if !opened {
            // Nobody could ever read it here.
            self.machine.destroy(&new).await.map_err(failed)?;
            let reason = "what was received is encrypted with another key than this volume's, and was dropped; give \
                          both volumes' Secrets the same encryptionKey"
                .to_owned();
            return Err(VolumeError::Refused { id, reason });
        }
        let size = now.get("volsize").and_then(|size| size.parse::<u64>().ok()).unwrap_or(0);
        let mut properties: Vec<_> =
            spec.dataset_properties.iter().map(|(key, value)| (key.clone(), value.clone())).collect();
        if active.is_block() {
            let wanted = active.quota.max(spec.capacity.0);
            properties.extend((size < wanted).then(|| ("volsize".to_owned(), wanted.to_string())));
        } else {
            properties.push(("mountpoint".to_owned(), "legacy".to_owned()));
            properties.extend(Bounds::of(spec).changes(&now).first);
        }
        self.machine.set_dataset(&new, &properties).await.map_err(failed)?;
        self.machine.sync(&spec.pool).await.map_err(failed)?;

        self.machine.rename(&data, &old).await.map_err(failed)?;
        if let Err(fault) = self.machine.rename(&new, &data).await {
            self.machine.rename(&old, &data).await.map_err(failed)?;
            return Err(failed(fault));
        }
        if !spec.zfs_access.is_none() {
            // Nobody has rights over what was received: the next start gives them.
            self.machine.note(&spec.pool, DELEGATED, NOBODY).await.map_err(failed)?;
        }
        if !active.is_block() {
            self.machine.unmount(&active.base, true).await.map_err(failed)?;
            self.machine.mount(&data, &active.base, FLAGS).await.map_err(failed)?;
        }
        if let Err(fault) = self.machine.destroy(&old).await {
            tracing::warn!(volume = %id, "what was replaced stays until the volume is next brought up: {fault}");
        }
        self.machine.sync(&spec.pool).await.map_err(failed)?;
        // What was replaced has taken the room for it until now.
        self.keep(spec).await.map_err(failed)?;
        volume.state().details = None;
        Ok(())
    }
}

impl<M: Machine> Activation<'_, M> {
    /// Ends what a crash cut short.
    pub(in super::super) async fn end_swap(&self) -> Result<(), VolumeError> {
        let spec = &self.request.spec;
        if spec.encryption.is_none() {
            return Ok(());
        }
        let (data, old) = (spec.dataset(), format!("{}/{OLD}", spec.pool));
        let failed = self.failed("ending the receiving of it");
        let there = async |dataset: &str| Ok(self.machine.dataset(dataset).await.map_err(&failed)?.is_some());
        if !there(&data).await? {
            for old in [old, format!("{}/{OLD_BEFORE}", spec.pool)] {
                if there(&old).await? {
                    tracing::warn!(volume = %self.id, "receiving was cut short: the volume has its old contents");
                    return self.machine.rename(&old, &data).await.map_err(failed);
                }
            }
            return Ok(());
        }
        if !there(&old).await? {
            return Ok(());
        }
        if let Err(fault) = self.machine.destroy(&old).await {
            tracing::warn!(volume = %self.id, "what a receive has replaced stays: {fault}");
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::tests::{disks, guest, prepare, wanted};
    use super::*;
    use crate::key::{Key, Keys};
    use uuid::Uuid;
    use zpod_volume::{Bytes, Create, Encryption, VolumeMode};

    #[tokio::test(start_paused = true)]
    async fn what_was_received_is_bounded_as_the_volume_is_and_as_much_is_kept_for_it() {
        for (mode, bound) in [(VolumeMode::Filesystem, "refquota"), (VolumeMode::Block, "volsize")] {
            let disks = disks(&["a"]);
            let volumes = guest(&disks);
            let mut volume = wanted("a", Create::Fresh, "/m1");
            volume.fs_group = volume.fs_group.filter(|_| mode.is_filesystem());
            volume.spec.mode = mode;
            volume.spec.encryption = Some(Encryption::Aes256Gcm);
            volume.spec.reservation = Some(Bytes::mib(512));
            let (id, pool) = (volume.spec.id, volume.spec.pool.clone());
            let keys = Keys { key: Key::new(vec![b'k'; 32]).unwrap(), previous: None };
            volumes.provide_key(id, Uuid::from_u128(7), keys).await.unwrap();
            let _ = prepare(&volumes, "c1", volume).await.unwrap();
            let mut stream = crate::machine::Properties::new();
            if !mode.is_filesystem() {
                stream.insert("volsize".into(), Bytes::mib(256).0.to_string());
            }
            disks.lock().unwrap()[0].pool.as_mut().unwrap().datasets.insert(format!("{pool}/{NEW}"), stream);
            volumes.swap(&volumes.volume(id)).await.unwrap();
            let now = volumes.properties(id).await.unwrap().0;
            assert_eq!((now[bound].as_str(), now["refreservation"].as_str()), ("1073741824", "536870912"), "{mode:?}");
        }
    }
}
