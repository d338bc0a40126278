//! Volumes on disks that are plugged in read-only.
//!
//! # Design
//! Kata's runtime-rs plugs a disk in read-only when the first container that uses it mounts it so (`readOnly: true`), and
//! for the whole pod. A pool can be imported from it read-only, and shows what is there if the guest before has exported
//! it ([`crate::export`]); otherwise the last fsynced writes would be missing, and it is refused. So is whoever wants to
//! write. Nothing is set, grown, or given to a group, and `zpool sync` is never called: ZFS has no threads for a
//! read-only pool's transaction groups, and would wait for ever (`txg_wait_synced`).

use std::path::PathBuf;

use zpod_volume::{Bytes, DiskLayout, VolumeId};

use super::activate::{Activation, BASE_FLAGS};
use super::bounds::Bounds;
use super::{Active, Volume, Volumes, Wanted};
use crate::error::VolumeError;
use crate::journal::{self, Journal};
use crate::machine::{Disk, Health, Machine, MountFlags};
use crate::{disk, export};

const WRITER: &str = "a container wants to write; Kata's runtime-rs plugs it in read-only for the whole pod when the first \
                      container that uses it mounts it with readOnly: true: let the first one mount it writable, or set \
                      runtimeClassName to a class of Kata's Go runtime, such as kata-zpod";
const NEVER_MADE: &str = "its pool has not been made yet, or not been made this volume's own after it was copied; start a pod \
                          that mounts it writable first";
const NOT_EXPORTED: &str = "the guest that had its pool last has not exported it, since it was killed, or was one of a \
                            zpod that did not note it: read-only it would show a state without the last fsynced writes; start a pod that mounts \
                            it writable first, or set runtimeClassName to a class of Kata's Go runtime, such as kata-zpod";
const MIRROR: &str = "its pool is a mirror, which notes on its halves what each of them has; set runtimeClassName to a class \
                      of Kata's Go runtime, such as kata-zpod";
const CHANGE: &str = "its pool is imported read-only; try again when a pod mounts it writable";

impl Active {
    /// Whether it can be changed.
    pub(super) fn must_be_writable(&self, id: VolumeId) -> Result<(), VolumeError> {
        match self.read_only {
            true => Err(VolumeError::ReadOnly { id, disk: self.disk.name.clone(), reason: CHANGE }),
            false => Ok(()),
        }
    }
}

impl<M: Machine> Volumes<M> {
    /// Why a container can't have a volume that is up, if it wants to write and can't; the gate is held.
    pub(super) async fn writable_for(&self, volume: &Volume, wanted: &Wanted) -> Option<VolumeError> {
        let (active, unused) = {
            let state = volume.state();
            (state.active.clone()?, state.uses.is_empty())
        };
        if !active.read_only || wanted.flags.read_only {
            return None;
        }
        if unused {
            // The disk goes, and another one may come that can be written to.
            self.close(volume).await;
        }
        Some(VolumeError::ReadOnly { id: volume.id, disk: active.disk.name, reason: WRITER })
    }

    /// Whether the log of a pool's dataset has been replayed in this guest, as mounting it and making its block device do.
    pub(super) async fn log_is_replayed(&self, active: &Active) -> bool {
        let dataset = active.request.spec.dataset();
        let opened = match active.is_block() {
            true => self.machine.volume_device(&dataset).await.is_ok_and(|device| device.is_some()),
            false => true,
        };
        opened && !active.read_only && active.mirror.is_none()
    }

    /// Notes on its disk that a pool was exported. Where that can't be done, its next user mounts it writable.
    pub(super) async fn note_export(&self, active: &Active) {
        let (id, disk) = (active.request.spec.id, &active.disk);
        let label = self.machine.label(disk, DiskLayout::PARTITION_START).await;
        let noted = match label {
            Ok(Some(label)) if label.exported => {
                self.machine.write(disk, DiskLayout::EXPORT_OFFSET, &export::encode(id, &label)).await
            }
            Ok(_) => Ok(()),
            Err(fault) => Err(fault),
        };
        if let Err(fault) = noted {
            tracing::warn!(volume = %id, "its export is not noted on its disk, which can't be used read-only next: {fault}");
        }
    }
}

impl<M: Machine> Activation<'_, M> {
    /// What is known of a volume, unless its pool was imported from a disk that could be written to, and this one can't, or
    /// the other way round: then the pool is exported.
    pub(super) async fn in_the_same_mode(
        &self,
        previous: Option<Active>,
        disk: &Disk,
    ) -> Result<Option<Active>, VolumeError> {
        let other = match &previous {
            Some(active) => active.read_only != disk.read_only,
            // Left over from work that was cut short: nobody knows in which mode.
            None => disk.read_only,
        };
        let pool = &self.request.spec.pool;
        if other && self.used {
            let reason =
                "containers use its pool on a disk that is gone, and the one that came can't be used beside it: \
                          delete the pod; the data is safe"
                    .to_owned();
            return Err(VolumeError::Refused { id: self.id, reason });
        }
        if other && self.machine.health(pool).await.map_err(self.failed("looking at its pool"))?.is_some() {
            if let Some(active) = previous.as_ref().filter(|active| !active.is_block()) {
                let unmounted = self.machine.unmount(&active.base, false).await;
                unmounted.map_err(self.failed("unmounting it for a disk that can be written to, or no longer"))?;
            }
            let exported = self.machine.export(pool).await;
            exported.map_err(self.failed("exporting its pool for a disk that can be written to, or no longer"))?;
            self.volume.state().active = None;
        }
        Ok(previous.filter(|_| !other))
    }

    /// Brings it up from a disk that is read-only.
    pub(super) async fn run_read_only(
        &self,
        disk: Disk,
        health: Option<Health>,
        known: bool,
        base: PathBuf,
    ) -> Result<Active, VolumeError> {
        let result = self.open_read_only(disk, health, known, base).await;
        if result.is_err() && health.is_none() {
            // The next try may find a disk that can be written to.
            let _ = self.machine.export(&self.request.spec.pool).await;
        }
        result
    }

    async fn open_read_only(
        &self,
        disk: Disk,
        health: Option<Health>,
        known: bool,
        base: PathBuf,
    ) -> Result<Active, VolumeError> {
        let spec = &self.request.spec;
        let refused = |reason| Err(VolumeError::ReadOnly { id: self.id, disk: disk.name.clone(), reason });
        if spec.mirror.is_some() {
            return refused(MIRROR);
        }
        let (partition, _) = disk::settle_partition(self.machine, self.id, &disk, Bytes(0)).await?;
        let device = self.machine.link(self.id, &disk).await.map_err(self.failed("naming its disk"))?;
        if let Some(health) = health {
            self.resume(health, known).await?;
        } else {
            let read = async |offset, length| {
                let read = self.machine.read(&disk, offset, length).await;
                read.map_err(self.failed("reading what is noted on its disk"))
            };
            let journal = read(DiskLayout::JOURNAL_OFFSET, journal::BYTES).await?;
            if Journal::decode(&journal, self.id) != Journal::Created {
                return refused(NEVER_MADE);
            }
            let note = read(DiskLayout::EXPORT_OFFSET, export::BYTES).await?;
            let label = self.machine.label(&disk, DiskLayout::PARTITION_START).await;
            let label = label.map_err(self.failed("reading its label"))?;
            if !label.is_some_and(|label| export::is_last(&note, self.id, &label)) {
                return refused(NOT_EXPORTED);
            }
            self.progress.stage("importing its pool read-only");
            let _alone = self.imports.alone(self.id).await;
            let imported = self.machine.import(&spec.pool, &spec.pool, &[device], true).await;
            if let Err(cause) = imported {
                return Err(self.unimportable(&disk, cause).await);
            }
        }
        let now = self.dataset().await?;
        self.unlock(&now, true).await?;
        self.note_children(&now);
        if spec.mode.is_filesystem() {
            self.progress.stage("mounting it");
            let flags = MountFlags { read_only: true, ..BASE_FLAGS };
            self.machine.mount(&spec.dataset(), &base, flags).await.map_err(self.failed("mounting it"))?;
        }
        let quota = Bounds::of(spec).changes(&now).bound;
        Ok(Active { request: self.request.clone(), disk, partition, quota, base, mirror: None, read_only: true })
    }
}

#[cfg(test)]
mod tests;
