//! Finding a volume's disk: by the GUID in its partition table, never by the order of the bus.

use std::time::Duration;

use tokio::time::Instant;
use zpod_volume::{Bytes, DiskLayout, Half, SECTOR, VolumeId, gpt};

use crate::error::VolumeError;
use crate::machine::{Disk, Machine, Step};

/// How long a disk is waited for. Kata plugs it before it sends the request.
pub const WAIT: Duration = Duration::from_secs(30);

/// How often the disks are looked at: reading one sector run of each costs less than a millisecond.
const INTERVAL: Duration = Duration::from_millis(25);

/// Disks named in an error; a pod has few.
const LISTED: usize = 32;

/// Waits for the disk of a volume. One of a mirror can be known by either half. `seen` is told what disks there are while
/// it is not among them.
///
/// # Errors
/// When it does not come, or there are two of it.
pub async fn find<M: Machine + ?Sized>(
    machine: &M,
    id: VolumeId,
    mirrored: bool,
    wait: Duration,
    mut seen: impl FnMut(&str),
) -> Result<Disk, VolumeError> {
    let end = Instant::now() + wait;
    loop {
        let disks = machine.disks().await.map_err(|fault| VolumeError::failed(id, "looking for its disk", fault))?;
        let mut ours = Vec::new();
        for disk in &disks {
            // The middle of any other disk is what containers have written there.
            let second = mirrored && disk.table.is_err() && belongs(&half(machine, disk, Half::Second).await, id);
            if second || belongs(disk, id) {
                ours.push(disk);
            }
        }
        match (ours.pop(), ours.is_empty()) {
            (Some(disk), true) => return Ok(disk.clone()),
            (Some(_), false) => return Err(VolumeError::ManyDisks { id, disks: list(&disks) }),
            (None, _) if Instant::now() >= end => {
                return Err(VolumeError::NoDisk { id, waited: wait, disks: list(&disks) });
            }
            (None, _) => seen(&list(&disks)),
        }
        tokio::time::sleep(INTERVAL).await;
    }
}

/// A half of a disk, and what its table says.
pub async fn half<M: Machine + ?Sized>(machine: &M, disk: &Disk, half: Half) -> Disk {
    let half = disk.half(half);
    let table = match machine.read(&half, 0, gpt::PRIMARY_BYTES).await {
        Ok(bytes) => gpt::decode(&bytes).map_err(|error| error.to_string()),
        Err(fault) => Err(fault.text),
    };
    Disk { table, ..half }
}

/// Whether this is the disk, or the half, of a volume.
pub fn belongs(disk: &Disk, id: VolumeId) -> bool {
    disk.table.as_ref().is_ok_and(|table| table.disk_guid == id.uuid())
}

fn list(disks: &[Disk]) -> String {
    let shown = disks.iter().take(LISTED).map(|disk| match &disk.table {
        Ok(table) => format!("{} ({}, GUID {})", disk.name, disk.size, table.disk_guid),
        Err(reason) => format!("{} ({}, {reason})", disk.name, disk.size),
    });
    let shown: Vec<_> = shown.collect();
    if shown.is_empty() { "no disk at all".to_owned() } else { shown.join(", ") }
}

/// Sees to it that table and kernel show a partition of at least `wanted`, where the disk has the room, and gives its
/// size. Never shrinks.
pub async fn settle_partition<M: Machine + ?Sized>(
    machine: &M,
    id: VolumeId,
    disk: &Disk,
    wanted: Bytes,
) -> Result<(Bytes, Step), VolumeError> {
    let failed = |what: &'static str| move |fault| VolumeError::failed(id, what, fault);
    let table = disk.table.as_ref().map_err(|reason| VolumeError::Table {
        id,
        disk: disk.name.clone(),
        reason: reason.clone(),
    })?;
    if table.partition_start != DiskLayout::PARTITION_START || table.partition_bytes > disk.size.0 {
        let reason = format!("its partition lies at {}, {} bytes long", table.partition_start, table.partition_bytes);
        return Err(VolumeError::Table { id, disk: disk.name.clone(), reason });
    }
    let now = Bytes(table.partition_bytes);
    let wanted = wanted.round_down(SECTOR);
    let size = if wanted > now && wanted <= DiskLayout::largest_partition(disk.size) {
        let table = gpt::encode(id, wanted, disk.size);
        // The backup first: whichever table is whole after a crash is one that the partition fits.
        machine.write(disk, table.backup_offset, &table.backup).await.map_err(failed("writing the backup table"))?;
        machine.write(disk, 0, &table.primary).await.map_err(failed("writing the partition table"))?;
        wanted
    } else {
        now
    };
    let step = machine
        .partition(disk, DiskLayout::PARTITION_START, size)
        .await
        .map_err(failed("telling the kernel of its partition"))?;
    Ok((size, step))
}

/// Bytes at each end of a partition that hold ZFS's labels: two of 256 KiB (`VDEV_LABELS`, vdev_impl.h in OpenZFS).
const LABELS: usize = 512 << 10;
const LABEL: u64 = 256 << 10;

/// Whether the places of ZFS's labels were never written to.
pub async fn is_blank<M: Machine + ?Sized>(
    machine: &M,
    id: VolumeId,
    disk: &Disk,
    partition: Bytes,
) -> Result<bool, VolumeError> {
    let end = DiskLayout::PARTITION_START + partition.round_down(LABEL).0;
    for offset in [DiskLayout::PARTITION_START, end.saturating_sub(LABELS as u64)] {
        let labels = machine
            .read(disk, offset, LABELS)
            .await
            .map_err(|fault| VolumeError::failed(id, "reading its labels", fault))?;
        if labels.iter().any(|byte| *byte != 0) {
            return Ok(false);
        }
    }
    Ok(true)
}
