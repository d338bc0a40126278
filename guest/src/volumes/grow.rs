//! Growing a volume while it is in use, and what else is done to a running one.

use zpod_volume::{Bytes, DiskLayout, SECTOR, VolumeId};

use super::{Volumes, bounds::Bounds};
use crate::disk;
use crate::error::VolumeError;
use crate::machine::{Fault, Machine, Scrub};

/// What a volume has after it was grown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Grown {
    /// Its quota, or what was asked for where it has none.
    pub capacity: Bytes,
    /// Its partition.
    pub partition: Bytes,
}

impl<M: Machine> Volumes<M> {
    /// Grows a volume's partition, pool and quota. Never shrinks; can be repeated.
    ///
    /// # Errors
    /// When the volume is not here, its disk is too small, or a step fails.
    pub async fn grow(&self, id: VolumeId, capacity: Bytes, partition: Bytes) -> Result<Grown, VolumeError> {
        if capacity < DiskLayout::MIN_CAPACITY || capacity > DiskLayout::MAX_CAPACITY || partition < capacity {
            let reason = format!("a capacity of {capacity} in a partition of {partition} can't be");
            return Err(VolumeError::Invalid { id, reason });
        }
        let (volume, _) = self.known(id)?;
        let _gate = volume.gate.lock().await;
        let (_, mut active) = self.known(id)?;
        let failed = |step: &'static str| move |fault: Fault| VolumeError::failed(id, step, fault);

        if active.is_block() && active.request.spec.read_only {
            let reason =
                "it is a block device that is published read-only, which ZFS gives no other size; it grows when \
                          it is next published writable"
                    .to_owned();
            return Err(VolumeError::Refused { id, reason });
        }
        active.must_be_writable(id)?;
        let search =
            disk::Search { mirrored: active.mirror.is_some(), used: Some(&active.disk), ..disk::Search::new(id) };
        let whole = disk::find(&self.machine, search, |_| {}).await?;
        let disks = match &active.mirror {
            None => vec![whole],
            Some(_) => self.whole_halves(id, &active, &whole).await?,
        };
        let smallest = disks.iter().map(|disk| disk.size).min().unwrap_or_default();
        let largest = DiskLayout::largest_partition(smallest);
        let now = active.partition;
        if partition.round_down(SECTOR) > now && partition > largest {
            return Err(VolumeError::TooLarge { id, wanted: partition, largest, disk: smallest });
        }
        let (mut size, mut devices) = (None, Vec::new());
        for disk in &disks {
            let (settled, _) = disk::settle_partition(&self.machine, id, disk, partition).await?;
            size = Some(size.map_or(settled, |size: Bytes| size.min(settled)));
            devices.push(self.machine.link(id, disk).await.map_err(failed("naming its disk"))?);
        }
        let size = size.unwrap_or(now);
        active.partition = size;
        volume.state().active = Some(active.clone());

        let spec = &active.request.spec;
        // Also when the partition was large enough: an earlier call may have been cut short before this.
        self.machine.expand(&spec.pool, &devices).await.map_err(failed("growing its pool"))?;
        if let Some(key) = Bounds::of(spec).key()
            && active.quota < capacity.0
        {
            let change = [(key.to_owned(), capacity.0.to_string())];
            self.machine.set_dataset(&spec.dataset(), &change).await.map_err(failed("raising its quota"))?;
            active.quota = capacity.0;
        }
        // Where nothing bounds it now, something may later.
        active.request.spec.capacity = active.request.spec.capacity.max(capacity);
        let capacity = Bytes(active.quota.max(capacity.0));
        volume.remember(active.request.spec.clone());
        volume.state().active = Some(active);
        volume.state().details = None;
        tracing::info!(volume = %id, "grown: quota {capacity}, partition {size}");
        Ok(Grown { capacity, partition: size })
    }

    /// Writes out all that a volume holds in memory.
    ///
    /// # Errors
    /// When it is not here or the pool does not answer.
    pub async fn sync(&self, id: VolumeId) -> Result<(), VolumeError> {
        let (_, active) = self.known(id)?;
        if active.read_only {
            return Ok(());
        }
        let synced = self.machine.sync(&active.request.spec.pool).await;
        synced.map_err(|fault| VolumeError::failed(id, "writing out its pool", fault))
    }

    /// Starts, pauses or stops a scrub. What is so already is no error.
    ///
    /// # Errors
    /// When it is not here or ZFS refuses.
    pub async fn scrub(&self, id: VolumeId, action: Scrub) -> Result<(), VolumeError> {
        let (volume, active) = self.known(id)?;
        active.must_be_writable(id)?;
        let pool = &active.request.spec.pool;
        let failed = |fault| VolumeError::failed(id, "scrubbing its pool", fault);
        let running = self.machine.report(pool).await.map_err(failed)?.scrubbing();
        if running == (action == Scrub::Start) {
            return Ok(());
        }
        self.machine.scrub(pool, action).await.map_err(failed)?;
        // The node waits for this to be told.
        volume.state().details = None;
        Ok(())
    }
}
