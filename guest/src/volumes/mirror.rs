//! Volumes whose disk is two halves, each on a disk of its own of the host: the pool is a mirror of the two.
//!
//! # Design
//! Each half is laid out as a disk of its own, with table, journal and partition, so that either is enough. What may be
//! done with what is on them is decided in one place ([`plan`]).
//!
//! A half alone can't know whether the other one went on without it, and importing it then would silently go back in
//! time. So a half that lacks something says so: its journal is `Behind` (or `Rebuilding`) before a container starts and
//! as soon as ZFS gives it up, and says `Created` again when it was resilvered. Where it can't be written to, its node
//! knows, which was told and passes it on ([`Mirror::behind`](zpod_volume::Mirror)). Such a half is never imported alone.
//!
//! A half that is blank, in a volume that is not, is a new image in the place of a lost one. It takes the lost one's place
//! at once: detach, attach, resilver. One that holds anything else is left alone.
//!
//! # Limitations
//! What is written in the seconds between a loss and the node's record of it has one copy, and the lost half does not say
//! that it lacks it.

use std::path::PathBuf;

use zpod_volume::{Bytes, Create, DiskLayout, Half};

use super::activate::{Activation, Opened, Pool};
use crate::disk;
use crate::error::VolumeError;
use crate::journal::{self, Journal};
use crate::machine::{Disk, Fault, Health, Machine, PoolReport};

mod plan;
#[cfg(test)]
mod tests;
mod watch;

use plan::{Complete, Plan, Seen};

/// The halves of a pool that is imported.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Halves {
    pub(super) disks: [Disk; 2],
    /// The paths by which ZFS knows them.
    paths: [PathBuf; 2],
    /// The one that lacks something, as far as is known. As long as there is one the other has everything, whatever
    /// becomes of it.
    pub(super) behind: Option<Half>,
    /// How often in a row there was nothing that they lack.
    calm: u32,
}

/// A half that can be used.
struct Side {
    disk: Disk,
    partition: Bytes,
    device: PathBuf,
    seen: Seen,
}

impl<M: Machine> Activation<'_, M> {
    /// The pool of a volume whose disk is two halves.
    pub(super) async fn open_mirror(
        &self,
        whole: &Disk,
        behind: Option<Half>,
        health: Option<Health>,
        known: bool,
    ) -> Result<Pool, VolumeError> {
        let disks =
            [disk::half(self.machine, whole, Half::First).await, disk::half(self.machine, whole, Half::Second).await];
        let mut sides = [None, None];
        for half in Half::BOTH {
            match self.side(&disks[half.index()], health.is_some()).await {
                Ok(side) => sides[half.index()] = Some(side),
                Err(error) => tracing::error!(volume = %self.id, "the {half} of its disk can't be used: {error}"),
            }
        }
        if let Some(health) = health {
            self.resume(health, known).await?;
        }
        let seen = [0, 1].map(|index| sides[index].as_ref().map(|side: &Side| side.seen));
        let plan = plan::plan(seen, self.request.spec.create, behind, health.is_some());
        let plan = plan.map_err(|reason| VolumeError::Refused { id: self.id, reason: reason.to_string() })?;
        let opened = self.carry_out(plan, &sides).await?;
        let paths = [0, 1].map(|index| self.machine.path(self.id, &disks[index]));
        let mut halves = Halves { disks, paths, behind: None, calm: 0 };
        if opened == Opened::Found {
            self.take_stock(&mut halves, &sides, behind).await?;
        }
        // What can be used has room for what the smaller one has room for.
        let partition = sides.iter().flatten().map(|side| side.partition).min().unwrap_or_default();
        let whole = sides.iter().zip(Half::BOTH).filter(|(_, half)| halves.behind != Some(*half));
        let devices = whole.filter_map(|(side, _)| Some(side.as_ref()?.device.clone())).collect();
        Ok(Pool { disk: halves.disks[0].clone(), partition, devices, opened, mirror: Some(halves) })
    }

    /// Looks at a half, and lets the kernel know of its partition.
    async fn side(&self, disk: &Disk, imported: bool) -> Result<Side, VolumeError> {
        if !disk::belongs(disk, self.id) {
            let reason = match &disk.table {
                Ok(table) => format!("its GUID is {}", table.disk_guid),
                Err(reason) => reason.clone(),
            };
            return Err(VolumeError::Table { id: self.id, disk: disk.name.clone(), reason });
        }
        // Before anything is written to it.
        let block = self.machine.read(disk, DiskLayout::JOURNAL_OFFSET, journal::BYTES).await;
        let journal = Journal::decode(&block.map_err(self.failed("reading its journal"))?, self.id);
        let (partition, _) = disk::settle_partition(self.machine, self.id, disk, self.request.spec.partition).await?;
        let blank = !imported && disk::is_blank(self.machine, self.id, disk, partition).await?;
        let device = self.machine.link(self.id, disk).await.map_err(self.failed("naming its disk"))?;
        Ok(Side { disk: disk.clone(), partition, device, seen: Seen { journal, blank } })
    }

    async fn carry_out(&self, plan: Plan, sides: &[Option<Side>; 2]) -> Result<Opened, VolumeError> {
        let usable: Vec<&Side> = sides.iter().flatten().collect();
        let (disks, devices): (Vec<_>, Vec<_>) = usable.iter().map(|side| (&side.disk, side.device.clone())).unzip();
        match plan {
            Plan::Keep => return Ok(Opened::Found),
            Plan::Import(Complete(complete)) => {
                // The pool is as these know it. The other one is opened by the path that they know.
                let whole =
                    sides.iter().zip(complete).filter(|(_, complete)| *complete).filter_map(|(side, _)| side.as_ref());
                let whole: Vec<_> = whole.map(|side| side.device.clone()).collect();
                return match (self.import(&whole).await, disks.first()) {
                    (Err(cause), Some(disk)) => Err(self.unimportable(disk, cause).await),
                    (imported, _) => imported.map(|()| Opened::Found).map_err(self.failed("importing its pool")),
                };
            }
            Plan::Make => {
                // Without its key nothing is begun. Both say so before either has a label.
                self.new_key().await?;
                for disk in &disks {
                    self.write_journal(disk, Journal::Creating).await?;
                }
                self.make(&devices, false).await?;
            }
            Plan::Resume { .. } if self.is_imported().await? => {}
            Plan::Resume { labels } => {
                let cause = match labels {
                    false => Some(Fault::new("there are no labels on it yet")),
                    true => match self.import(&devices).await {
                        Ok(()) if self.is_whole(&devices).await? => None,
                        Ok(()) => {
                            let gone = self.machine.export(&self.request.spec.pool).await;
                            gone.map_err(self.failed("exporting a pool that was half made"))?;
                            Some(Fault::new("it has one half only"))
                        }
                        Err(cause) => Some(cause),
                    },
                };
                match cause {
                    None => {}
                    Some(cause) if self.request.spec.create == Create::Never => {
                        let disk = disks.first().map(|disk| disk.name.clone()).unwrap_or_default();
                        return Err(VolumeError::HalfMade { id: self.id, disk, cause });
                    }
                    Some(cause) => {
                        tracing::warn!(volume = %self.id, "making the pool was cut short, it is made again: {cause}");
                        self.new_key().await?;
                        for disk in &disks {
                            self.write_journal(disk, Journal::Creating).await?;
                        }
                        self.make(&devices, true).await?;
                    }
                }
            }
        }
        // Both journals are about to say that their half has everything.
        if !self.is_whole(&devices).await? {
            let reason =
                "one half of its disk failed while its pool was made; nothing was lost, since no container has \
                          started on it; repair the disk"
                    .to_owned();
            return Err(VolumeError::Refused { id: self.id, reason });
        }
        self.finish(&disks).await
    }

    async fn is_imported(&self) -> Result<bool, VolumeError> {
        let health = self.machine.health(&self.request.spec.pool).await.map_err(self.failed("looking at its pool"))?;
        Ok(health.is_some())
    }

    /// Whether the pool uses both.
    async fn is_whole(&self, devices: &[PathBuf]) -> Result<bool, VolumeError> {
        let report = self.report().await?;
        Ok(devices.len() == 2 && devices.iter().all(|device| in_use(&report, device)))
    }

    async fn report(&self) -> Result<PoolReport, VolumeError> {
        self.machine.report(&self.request.spec.pool).await.map_err(self.failed("looking at the halves of its pool"))
    }

    /// Finds out which half lacks something, lets it say so, and gives a new one what the other has.
    async fn take_stock(
        &self,
        halves: &mut Halves,
        sides: &[Option<Side>; 2],
        behind: Option<Half>,
    ) -> Result<(), VolumeError> {
        self.progress.stage("looking at the halves of its pool");
        let report = self.report().await?;
        let lacks = Half::BOTH.map(|half| {
            let index = half.index();
            let says = |journal| !matches!(journal, Journal::Created | Journal::Creating);
            sides[index].as_ref().is_none_or(|side| says(side.seen.journal))
                || !in_use(&report, &halves.paths[index])
                || behind == Some(half)
                || is_mended(&report, &halves.paths[index])
        });
        halves.behind = match lacks {
            [false, false] => None,
            [true, false] => Some(Half::First),
            [false, true] => Some(Half::Second),
            [true, true] => {
                let reason = "ZFS uses neither half of its disk as it should be used; nothing was changed".to_owned();
                return Err(VolumeError::Refused { id: self.id, reason });
            }
        };
        let Some(half) = halves.behind else {
            // Cut short between the two when the pool was made.
            for side in sides.iter().flatten().filter(|side| side.seen.journal == Journal::Creating) {
                self.write_journal(&side.disk, Journal::Created).await?;
            }
            return Ok(());
        };
        let whole = sides[half.other().index()].as_ref().filter(|side| side.seen.journal == Journal::Created);
        let (Some(whole), lacking) = (whole, &sides[half.index()]) else {
            return Err(VolumeError::Refused { id: self.id, reason: plan::Refusal::Incomplete.to_string() });
        };
        tracing::error!(volume = %self.id, "the {half} of its disk lacks some of what the other one has");
        let Some(lacking) = lacking else { return Ok(()) };
        // Not worth a pod that does not start: the other half has everything, and its node knows.
        if let Err(error) = self.tend(&report, whole, lacking).await {
            tracing::error!(volume = %self.id, "the {half} of its disk is not given what it lacks: {error}");
        }
        Ok(())
    }

    async fn tend(&self, report: &PoolReport, whole: &Side, lacking: &Side) -> Result<(), VolumeError> {
        let pool = &self.request.spec.pool;
        if !in_use(report, &lacking.device) && lacking.seen.may_be_rebuilt() {
            self.progress.stage("putting a new half in the place of the lost one");
            self.write_journal(&lacking.disk, Journal::Rebuilding).await?;
            for leaf in report.leaves.iter().filter(|leaf| leaf.path != whole.device) {
                self.machine.detach(pool, leaf.guid).await.map_err(self.failed("taking out the lost half"))?;
            }
            let force = lacking.seen.journal == Journal::Rebuilding;
            let attached = self.machine.attach(pool, &whole.device, &lacking.device, force).await;
            attached.map_err(self.failed("putting in the new half"))?;
            tracing::warn!(volume = %self.id, "a new half takes the place of the lost one, and is resilvered");
        } else if matches!(lacking.seen.journal, Journal::Created | Journal::Creating) {
            self.write_journal(&lacking.disk, Journal::Behind).await?;
        }
        Ok(())
    }
}

/// Whether the pool uses a device.
fn in_use(report: &PoolReport, path: &PathBuf) -> bool {
    report.leaves.iter().any(|leaf| leaf.path == *path && leaf.health == Health::Online)
}

/// Whether a device is being given what it lacks.
fn is_mended(report: &PoolReport, path: &PathBuf) -> bool {
    report.resilvering() && report.leaves.iter().any(|leaf| leaf.path == *path && leaf.mended)
}
