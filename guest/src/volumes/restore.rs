//! Making a copy of another volume's disk a volume of its own.
//!
//! # Design
//! A copy has everything of its origin: the journal, the name and the GUID of the pool, and contents that are perhaps
//! those of a moment in the middle of much writing. In this order it becomes a volume of its own:
//!
//! 1. the pool is imported under the new name, and gets a new GUID;
//! 2. the dataset is rolled back to the mark, where a guest ran while the copy was made;
//! 3. size, properties and quota are set, and all of it is written out;
//! 4. the journal says `Created`, for this volume, and for this copy of it where the origin had the same id;
//! 5. marks are removed, and space is kept for it.
//!
//! Until the fourth step is done no container has seen the volume, and each step before it can be repeated: a start that
//! is cut short anywhere is begun again. From then on the disk is like any other, and nothing is ever rolled back again.
//!
//! The kernel has no two pools with one GUID (`spa_guid_exists`, spa_misc.c). So copies get theirs one at a time, and not
//! while their origin is being imported; where the origin itself is in use in the same guest, it is the origin's pool
//! whose GUID is changed first: that can be done at any time, and nobody here knows a pool by its GUID.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, PoisonError, Weak};

use tokio::sync::{Mutex, OwnedMutexGuard};
use zpod_volume::{Origin, PoolName, VolumeId};

use super::activate::Activation;
use crate::error::VolumeError;
use crate::journal::Journal;
use crate::machine::rollbacks::Later;
use crate::machine::{Disk, Fault, Machine};

/// Imports of pools that have one GUID, or may have it: a volume's own, and those of copies of it. One at a time: one that
/// meets another finds no pool, and one that is under way is seen by nobody.
#[derive(Debug, Default)]
pub(super) struct Imports(std::sync::Mutex<BTreeMap<VolumeId, Weak<Mutex<()>>>>);

impl Imports {
    /// Waits until nobody else imports what may have the GUID of this volume's pool.
    pub(super) async fn alone(&self, origin: VolumeId) -> OwnedMutexGuard<()> {
        let lock = {
            let mut locks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            locks.retain(|_, lock| lock.strong_count() > 0);
            let known = locks.get(&origin).and_then(Weak::upgrade);
            known.unwrap_or_else(|| {
                let lock = Arc::new(Mutex::new(()));
                locks.insert(origin, Arc::downgrade(&lock));
                lock
            })
        };
        lock.lock_owned().await
    }
}

impl<M: Machine> Activation<'_, M> {
    /// The first step, also where it was cut short in this machine or another.
    pub(super) async fn take_over(
        &self,
        disk: &Disk,
        devices: &[PathBuf],
        origin: &Origin,
        imported: bool,
    ) -> Result<(), VolumeError> {
        let pool = &self.request.spec.pool;
        self.progress.stage("waiting for its origin, or another copy, to be imported");
        let _alone = self.imports.alone(origin.volume).await;
        if !imported {
            self.progress.stage("importing the pool it is a copy of");
            if let Err(cause) = self.import_copy(devices, origin).await {
                return Err(self.unimportable(disk, cause).await);
            }
        }
        let done = match self.machine.reguid(pool).await {
            // What the origin's owner kept for a way back is of the origin's GUID: it can't be gone back to in a copy.
            Err(fault) if self.machine.discard_checkpoint(pool).await.is_ok() => {
                tracing::info!(volume = %self.id, "its pool had a checkpoint, which a copy can't keep: {fault}");
                self.machine.reguid(pool).await
            }
            done => done,
        };
        done.map_err(self.failed("giving its pool a GUID of its own"))
    }

    async fn import_copy(&self, devices: &[PathBuf], origin: &Origin) -> Result<(), Fault> {
        let (theirs, ours) = (PoolName::for_volume(origin.volume), &self.request.spec.pool);
        if self.machine.health(&theirs).await?.is_some() {
            self.machine.reguid(&theirs).await?;
        }
        let Err(first) = self.machine.import(&theirs, ours, devices, false).await else { return Ok(()) };
        // Cut short after the import: then the labels have the new name already.
        let Err(second) = self.machine.import(ours, ours, devices, false).await else { return Ok(()) };
        Err(Fault::new(format!("{first}; and {second}")))
    }

    /// The steps from the second on; gives the quota.
    pub(super) async fn adopt(&self, disk: &Disk, devices: &[PathBuf]) -> Result<u64, VolumeError> {
        let spec = &self.request.spec;
        let dataset = spec.dataset();
        // The copy may show the moment in which what was received took the place of the contents.
        self.end_swap().await?;
        self.unlock(&self.dataset().await?, false).await?;
        let origin = spec.origin.as_ref();
        if let Some((origin, mark)) = origin.and_then(|origin| Some((origin, origin.mark.as_ref()?))) {
            self.progress.stage("going back to the instant it is a copy of");
            let marks = self.machine.snapshots(&dataset).await.map_err(self.failed("looking for its mark"))?;
            if !marks.iter().any(|name| name == mark.as_str()) {
                let (origin, mark) = (origin.volume, mark.clone());
                return Err(VolumeError::NoMark { id: self.id, origin, mark });
            }
            let back = self.machine.rollback(&dataset, mark.as_str(), Later::DestroyedWithClones).await;
            back.map_err(self.failed("going back to the instant it is a copy of"))?;
        }
        // What the contents measure is another thing after the rollback.
        let now = self.dataset().await?;
        let quota = self.settle(devices, &now).await?;
        self.machine.sync(&spec.pool).await.map_err(self.failed("writing out its pool"))?;
        self.write_journal(disk, Journal::Created).await?;
        self.remove_leftover_marks(&now).await;
        self.delegate().await;
        self.note_children(&now);
        if spec.reservation.is_some() {
            // Only now there is room for it, without the marks.
            self.keep(&self.dataset().await?).await;
        }
        if let Some(origin) = origin {
            tracing::info!(volume = %self.id, "its contents are a copy of volume {}'s", origin.volume);
        }
        Ok(quota)
    }
}
