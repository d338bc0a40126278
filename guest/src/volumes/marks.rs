//! Marks: ZFS snapshots of a volume's dataset, each an instant that a copy of its disk can be rolled back to.
//!
//! # Design
//! The node takes a mark, copies the disk while containers go on writing, and removes the mark. A copy shows the disk as
//! after a power failure, which is what ZFS is made for; the mark in it is older than the copy began, and so whole. A mark
//! that a crash of the node or of the guest left behind goes at the next activation: by then no copy is being made of
//! what this guest holds.
//!
//! A snapshot needs as much free space as the volume is to have kept for it and has filled
//! (`dsl_dataset_snapshot_reserve_space`): of a pool that is hardly larger than the volume there is none to be taken. So
//! nothing is kept while there is a mark.

use zpod_volume::{Mark, VolumeId};

use super::Volumes;
use super::bounds::Bounds;
use crate::error::VolumeError;
use crate::machine::{Fault, Machine, Properties, Step};

impl<M: Machine> Volumes<M> {
    /// Takes a mark of a volume, and writes out all that its pool holds in memory.
    ///
    /// # Errors
    /// When the volume is not here, or ZFS refuses.
    pub async fn mark(&self, id: VolumeId, mark: &Mark) -> Result<Step, VolumeError> {
        let (volume, _) = self.known(id)?;
        let _gate = volume.gate.lock().await;
        let (_, active) = self.known(id)?;
        active.must_be_writable(id)?;
        let (spec, failed) = (&active.request.spec, |fault| VolumeError::failed(id, "marking the instant", fault));
        let dataset = spec.dataset();
        let there = self.machine.snapshots(&dataset).await.map_err(failed)?;
        let step = if there.iter().any(|name| name == mark.as_str()) { Step::Unchanged } else { Step::Changed };
        if step == Step::Changed {
            if active.is_block() {
                // What containers have written lies in the kernel's cache first, as with any disk.
                self.machine.flush_volume(&dataset).await.map_err(failed)?;
            }
            if spec.reservation.is_some() {
                self.machine.set_dataset(&dataset, &[Bounds::nothing_kept()]).await.map_err(failed)?;
            }
            self.machine.snapshot(&dataset, mark.as_str()).await.map_err(failed)?;
        }
        // The snapshot is on the disk; what the tools and the labels say of it is too when this returns.
        self.machine.sync(&spec.pool).await.map_err(failed)?;
        tracing::info!(volume = %id, "marked as {mark}");
        Ok(step)
    }

    /// Removes a mark of a volume.
    ///
    /// # Errors
    /// When the volume is not here, or ZFS refuses. One that is not there is no error.
    pub async fn unmark(&self, id: VolumeId, mark: &Mark) -> Result<Step, VolumeError> {
        let (volume, _) = self.known(id)?;
        let _gate = volume.gate.lock().await;
        let (_, active) = self.known(id)?;
        let (spec, failed) = (&active.request.spec, |fault| VolumeError::failed(id, "removing a mark", fault));
        let dataset = spec.dataset();
        let removed = remove_marks(&self.machine, &dataset, |name| name == mark.as_str()).await.map_err(failed)?;
        if spec.reservation.is_some() {
            let now = self.machine.dataset(&dataset).await.map_err(failed)?.unwrap_or_default();
            // Where another mark still takes the room, the last one's end brings it back, or the next start.
            if let Some(kept) = Bounds::of(spec).changes(&now).then
                && let Err(fault) = self.machine.set_dataset(&dataset, &[kept]).await
            {
                tracing::warn!(volume = %id, "the space that is to be kept for it is not there yet: {fault}");
            }
        }
        Ok(if removed == 0 { Step::Unchanged } else { Step::Changed })
    }

    /// Every property of a running volume, of its dataset and of its pool.
    ///
    /// # Errors
    /// When it is not here, or can't be asked.
    pub async fn properties(&self, id: VolumeId) -> Result<(Properties, Properties), VolumeError> {
        let (_, active) = self.known(id)?;
        let spec = &active.request.spec;
        let found = self.machine.properties(&spec.pool, &spec.dataset()).await;
        found.map_err(|fault| VolumeError::failed(id, "reading its properties", fault))
    }
}

/// Whether the node marks an instant with a snapshot of that name.
pub(super) fn is_mark(name: &str) -> bool {
    name.parse::<Mark>().is_ok()
}

/// Removes the marks of a dataset that are wanted no more, and no other snapshot; gives their number. One that can't be
/// removed, such as one that a tenant holds, keeps no other: the first error is given at the end.
pub(super) async fn remove_marks<M: Machine>(
    machine: &M,
    dataset: &str,
    unwanted: impl Fn(&str) -> bool + Send,
) -> Result<usize, Fault> {
    let (mut removed, mut failed) = (0, None);
    for name in machine.snapshots(dataset).await? {
        if is_mark(&name) && unwanted(&name) {
            match machine.destroy_snapshot(dataset, &name).await {
                Ok(()) => removed += 1,
                Err(fault) => failed = failed.or(Some(fault)),
            }
        }
    }
    failed.map_or(Ok(removed), Err)
}

#[cfg(test)]
mod tests {
    use super::super::tests::{count, disks, guest, prepare, wanted};
    use super::*;
    use std::time::Duration;
    use zpod_volume::{Create, SnapshotId};

    #[tokio::test(start_paused = true)]
    async fn space_that_is_kept_for_a_volume_is_lent_to_its_marks() {
        let volumes = guest(&disks(&["a"]));
        let mut volume = wanted("a", Create::Fresh, "/m1");
        volume.spec.reservation = Some(zpod_volume::Bytes::gib(1));
        let id = volume.spec.id;
        let _ = prepare(&volumes, "c1", volume.clone()).await.unwrap();
        let kept = async || volumes.properties(id).await.unwrap().0["refreservation"].clone();
        assert_eq!(kept().await, "1073741824");
        let marks = ["s", "t"].map(|name| Mark::for_snapshot(SnapshotId::from_name(name)));
        for mark in &marks {
            volumes.mark(id, mark).await.unwrap();
            assert_eq!(kept().await, "none");
        }
        for (mark, left) in marks.iter().zip(["none", "1073741824"]) {
            volumes.unmark(id, mark).await.unwrap();
            assert_eq!(kept().await, left);
        }
        // One that was left behind.
        volumes.mark(id, &marks[0]).await.unwrap();
        volumes.release_all().await;
        volume.spec.create = Create::Never;
        let _ = prepare(&volumes, "c1", volume).await.unwrap();
        assert_eq!(kept().await, "1073741824");
    }

    #[tokio::test(start_paused = true)]
    async fn a_mark_that_its_tenant_holds_keeps_no_other_one() {
        let volumes = guest(&disks(&["a"]));
        let mut volume = wanted("a", Create::Fresh, "/m1");
        let (id, dataset) = (volume.spec.id, volume.spec.dataset());
        let _ = prepare(&volumes, "c1", volume.clone()).await.unwrap();
        let mut marks = ["s", "t", "u"].map(|name| Mark::for_snapshot(SnapshotId::from_name(name)).to_string());
        marks.sort_unstable();
        for mark in &marks {
            volumes.mark(id, &mark.parse().unwrap()).await.unwrap();
        }
        volumes.machine().pinned.lock().unwrap().insert(marks[0].clone());
        volumes.release_all().await;
        volume.spec.create = Create::Never;
        let _ = prepare(&volumes, "c1", volume).await.unwrap();
        assert_eq!(volumes.machine().snapshots(&dataset).await.unwrap(), marks[..1]);
        assert!(volumes.unmark(id, &marks[0].parse().unwrap()).await.is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn a_mark_is_taken_once_and_removed_once_and_nothing_else_with_it() {
        let disks = disks(&["a"]);
        let volumes = guest(&disks);
        let volume = wanted("a", Create::Fresh, "/m1");
        let (id, dataset) = (volume.spec.id, volume.spec.dataset());
        let mark = Mark::for_snapshot(SnapshotId::from_name("s"));
        assert_eq!(volumes.mark(id, &mark).await.unwrap_err().code(), tonic::Code::NotFound);
        let _ = prepare(&volumes, "c1", volume).await.unwrap();
        volumes.machine().snapshot(&dataset, "zpod-send-x").await.unwrap();
        assert_eq!(volumes.mark(id, &mark).await, Ok(Step::Changed));
        assert_eq!(volumes.machine().steps().last().unwrap(), "sync");
        assert_eq!(volumes.mark(id, &mark).await, Ok(Step::Unchanged));
        assert_eq!(volumes.machine().snapshots(&dataset).await.unwrap(), ["zpod-send-x", mark.as_str()]);
        assert_eq!(volumes.unmark(id, &mark).await, Ok(Step::Changed));
        assert_eq!(volumes.unmark(id, &mark).await, Ok(Step::Unchanged));
        assert_eq!(volumes.machine().snapshots(&dataset).await.unwrap(), ["zpod-send-x"]);
        assert_eq!((count(&volumes, "snapshot"), count(&volumes, "destroy snapshot")), (2, 1));
        assert_eq!(volumes.properties(id).await.unwrap().0["refquota"], "1073741824");
        assert!(volumes.status(Duration::ZERO).await.iter().all(|volume| !volume.encrypted && !volume.block));
    }
}
