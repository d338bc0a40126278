//! Mirrors while they are in use: noticing a half that is lost, and one that has everything again.
//!
//! # Design
//! OpenZFS 2.3.2 calls a pool ONLINE whose device it has given up, until it is opened anew (`spa_vdev_state`): so it is
//! the devices that are looked at. A half that lacked something is believed to have everything when several looks in a
//! row, each after a transaction group was written out, found both devices in use, no resilver and no error: an import
//! begins its resilver a moment after it has returned (`SPA_ASYNC_RESILVER`).

use zpod_volume::{Half, VolumeId};

use super::{Halves, in_use, is_mended};
use crate::disk;
use crate::error::VolumeError;
use crate::journal::Journal;
use crate::machine::{Disk, Fault, Health, Machine};
use crate::volumes::{Active, Volume, Volumes};

/// Looks in a row after which a half is believed.
const CALM: u32 = 3;

impl<M: Machine> Volumes<M> {
    /// Looks at the halves of a volume's pool, and does what is due. Who has the gate comes first.
    pub(in crate::volumes) async fn watch_halves(&self, volume: &Volume) {
        let Ok(_gate) = volume.gate.try_lock() else { return };
        let Some(active) = volume.state().active.clone() else { return };
        let Some(before) = active.mirror.clone() else { return };
        match self.look_at_halves(volume.id, &active, before.clone()).await {
            Ok(now) if now == before => {}
            Ok(now) => {
                let mut state = volume.state();
                if now.behind != before.behind {
                    state.details = None;
                }
                if let Some(active) = state.active.as_mut() {
                    active.mirror = Some(now);
                }
            }
            Err(fault) => tracing::warn!(volume = %volume.id, "the halves of its pool can't be looked at: {fault}"),
        }
    }

    async fn look_at_halves(&self, id: VolumeId, active: &Active, mut halves: Halves) -> Result<Halves, Fault> {
        let pool = &active.request.spec.pool;
        if halves.behind.is_some() {
            self.machine.sync(pool).await?;
        }
        let report = self.machine.report(pool).await?;
        let lost = Half::BOTH.map(|half| !in_use(&report, &halves.paths[half.index()]));
        let lacks = |half: &Half| lost[half.index()] || is_mended(&report, &halves.paths[half.index()]);
        // Where both are lost neither has what the other one lacks.
        let lacking: Vec<_> = Half::BOTH.into_iter().filter(lacks).collect();
        if let (None, [half]) = (halves.behind, &lacking[..]) {
            tracing::error!(volume = %id, "the {half} of its disk is lost: what is written now is on the other one only");
            halves.behind = Some(*half);
            // Most often it can't be written to: then its node knows.
            let _ = self.write_half(id, &halves.disks[half.index()], Journal::Behind).await;
        }
        if lost.contains(&true) && self.machine.health(pool).await? == Some(Health::Online) {
            self.machine.resume(pool, false).await?;
        }
        let errors = report.data_errors > 0 || report.resilver.is_some_and(|resilver| resilver.errors > 0);
        let calm = !lost.contains(&true) && !report.resilvering() && !errors;
        halves.calm = if calm { halves.calm + 1 } else { 0 };
        let Some(half) = halves.behind.filter(|_| halves.calm >= CALM) else {
            return Ok(Halves { calm: halves.calm.min(CALM), ..halves });
        };
        self.write_half(id, &halves.disks[half.index()], Journal::Created).await?;
        tracing::warn!(volume = %id, "the {half} of its disk has everything again");
        Ok(Halves { behind: None, calm: 0, ..halves })
    }

    async fn write_half(&self, id: VolumeId, disk: &Disk, journal: Journal) -> Result<(), Fault> {
        let block = journal.encode(id, None).unwrap_or_default();
        self.machine.write(disk, zpod_volume::DiskLayout::JOURNAL_OFFSET, &block).await
    }

    /// Both halves of a disk, where neither lacks anything.
    pub(in crate::volumes) async fn whole_halves(
        &self,
        id: VolumeId,
        active: &Active,
        whole: &Disk,
    ) -> Result<Vec<Disk>, VolumeError> {
        let lacking = active.mirror.as_ref().and_then(|halves| halves.behind);
        let mut disks = Vec::new();
        for half in Half::BOTH {
            let disk = disk::half(&self.machine, whole, half).await;
            if lacking == Some(half) || !disk::belongs(&disk, id) {
                let reason = format!(
                    "the {half} of its disk is lost, or is being given what it lacks; it grows when both halves have \
                     everything"
                );
                return Err(VolumeError::Refused { id, reason });
            }
            disks.push(disk);
        }
        Ok(disks)
    }
}
