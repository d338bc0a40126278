//! Letting go of a volume: unmounting, and exporting the pool with its last user.
//!
//! # Design
//! The shim unplugs the disk as soon as RemoveContainer is answered, so the pool is exported before that. When somebody
//! still holds a mount (a process that outlived its container, a nested mount), it is unmounted lazily: nothing new can
//! reach it, nothing is torn from who has it. A pool that is then still busy stays imported, written out; bringing the
//! volume up again resumes it.

use std::path::Path;
use std::time::Duration;

use zpod_volume::VolumeId;

use super::{Active, Use, Volume, Volumes};
use crate::machine::{Fault, Machine};

/// How often a busy step is tried again, and how long is waited in between.
const RETRIES: u32 = 10;
const PAUSE: Duration = Duration::from_millis(100);

impl<M: Machine> Volumes<M> {
    /// Takes uses from a volume; with the last of them its pool is exported.
    pub(super) async fn release_uses(&self, volume: &Volume, uses: &[Use]) {
        let _gate = volume.gate.lock().await;
        for usage in uses {
            let last = {
                let mut state = volume.state();
                state.uses.remove(usage);
                let block = state.active.as_ref().is_some_and(Active::is_block);
                !block && !state.uses.iter().any(|other| other.mount_point == usage.mount_point)
            };
            if last {
                self.unmount(volume.id, &usage.mount_point).await;
            }
        }
        let (unused, running) = {
            let state = volume.state();
            (state.uses.is_empty(), state.run.is_some())
        };
        // Where the volume is being brought up again, whoever asked for it wants it to stay.
        if unused && !running {
            self.close(volume).await;
        }
    }

    /// Exports the pool of a volume that nobody uses; the gate is held.
    pub(super) async fn close(&self, volume: &Volume) {
        let Some(active) = volume.state().active.clone() else { return };
        let pool = &active.request.spec.pool;
        super::stream::cut_off(volume).await;
        // Even if the export fails, everything is on the disk by then.
        if active.read_only {
            // Nothing was written, and ZFS would wait for a transaction group that never comes.
        } else if let Err(fault) = self.machine.sync(pool).await {
            tracing::error!(volume = %volume.id, "writing out the pool failed: {fault}");
        }
        let replayed = self.log_is_replayed(&active).await;
        if !active.is_block() {
            self.unmount(volume.id, &active.base).await;
        }
        match patiently(|| self.machine.export(pool)).await {
            Ok(()) => {
                volume.state().active = None;
                tracing::info!(volume = %volume.id, "exported pool {pool}");
                if replayed {
                    self.note_export(&active).await;
                }
            }
            // Who has ZFS in a container may have exported it, destroyed it or given it another name.
            Err(fault) if self.machine.health(pool).await == Ok(None) => {
                volume.state().active = None;
                tracing::error!(volume = %volume.id, "pool {pool} is not imported any more, and nobody here has exported it: {fault}");
            }
            Err(fault) => tracing::error!(
                volume = %volume.id,
                "pool {pool} can't be exported and stays imported, written out: {fault}"
            ),
        }
    }

    async fn unmount(&self, id: VolumeId, target: &Path) {
        let Err(fault) = patiently(|| self.machine.unmount(target, false)).await else { return };
        tracing::warn!(volume = %id, "{fault}; unmounting it lazily");
        if let Err(fault) = self.machine.unmount(target, true).await {
            tracing::error!(volume = %id, "{fault}");
        }
    }
}

/// Tries again while somebody is still using it.
async fn patiently<T, F: Future<Output = Result<T, Fault>>>(mut step: impl FnMut() -> F) -> Result<T, Fault> {
    let mut tries = 0;
    loop {
        match step().await {
            Err(fault) if fault.busy && tries < RETRIES => {
                tries += 1;
                tokio::time::sleep(PAUSE).await;
            }
            result => return result,
        }
    }
}
