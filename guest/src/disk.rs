//! Finding a volume's disk: by the GUID in its partition table, never by the order of the bus.

use std::time::Duration;

use tokio::time::Instant;
use zpod_volume::{Bytes, DiskLayout, Half, SECTOR, VolumeId, gpt};

use crate::error::VolumeError;
use crate::machine::{Disk, Machine, Step};
use crate::place::Place;

/// How long a disk is waited for. Kata plugs it before it sends the request.
pub const WAIT: Duration = Duration::from_secs(30);

/// How often the disks are looked at: reading one sector run of each costs less than a millisecond.
const INTERVAL: Duration = Duration::from_millis(25);

/// Bytes that tell two views of one image from two images: a sector.
const NONCE_BYTES: usize = 512;

/// Disks named in an error; a pod has few.
const LISTED: usize = 32;

/// How long a disk may take to go: until then another one of the same volume may come to an end of its own. Kata's shims
/// don't wait for the guest, which takes some 0.1 s (measured with cloud-hypervisor).
const LEAVING: Duration = Duration::from_secs(5);

/// The disk that is looked for.
#[derive(Debug, Clone, Copy)]
pub struct Search<'a> {
    /// The volume whose it is.
    pub id: VolumeId,
    /// It is that of a mirror, and can be known by either half.
    pub mirrored: bool,
    /// Where the request says that it is.
    pub place: Option<&'a Place>,
    /// The one whose pool containers are using now.
    pub used: Option<&'a Disk>,
    /// How long it is waited for.
    pub wait: Duration,
}

impl<'a> Search<'a> {
    /// A disk of a volume, wherever it is.
    pub const fn new(id: VolumeId) -> Self {
        Self { id, mirrored: false, place: None, used: None, wait: WAIT }
    }

    /// Whether it is the one that it has to be, as far as is known.
    fn is_meant(&self, disk: &Disk) -> bool {
        self.used.is_some_and(|used| is_same(used, disk)) || self.place.is_none_or(|place| place.is_of(disk))
    }

    /// The one to use of those that are the volume's: the one in use, or else the one that the request names, or the last
    /// one that came.
    fn choose<'d>(&self, ours: &[&'d Disk]) -> Option<&'d Disk> {
        let used = ours.iter().find(|disk| self.used.is_some_and(|used| is_same(used, disk)));
        let place = || ours.iter().find(|disk| self.place.is_some_and(|place| place.is_of(disk)));
        let last = || ours.iter().max_by_key(|disk| disk.sequence);
        used.or_else(place).or_else(last).copied()
    }
}

/// Waits for the disk of a volume. `seen` is told what disks there are while it is not among them.
///
/// # Design
/// There may be another one of the same volume: one that is being taken away, or one that Kata's runtime-rs has forgotten
/// to take away. Two views of one image do no harm where one of them is used only; two images are a volume and a copy of it,
/// of which nobody here knows which is which. So each of the others has to show what is written through one of them now,
/// or to go.
///
/// # Errors
/// When it does not come, or there are two that are not one.
pub async fn find<M: Machine + ?Sized>(
    machine: &M,
    search: Search<'_>,
    mut seen: impl FnMut(&str),
) -> Result<Disk, VolumeError> {
    let id = search.id;
    let end = Instant::now() + search.wait;
    let mut leaving = None;
    let mut compared = Vec::new();
    loop {
        let disks = machine.disks().await.map_err(|fault| VolumeError::failed(id, "looking for its disk", fault))?;
        let ours = ours(machine, &disks, &search).await;
        let Some(chosen) = search.choose(&ours) else {
            if Instant::now() >= end {
                return Err(VolumeError::NoDisk { id, waited: search.wait, disks: list(&disks) });
            }
            seen(&list(&disks));
            tokio::time::sleep(INTERVAL).await;
            continue;
        };
        let over = Instant::now() >= *leaving.get_or_insert_with(|| Instant::now() + LEAVING);
        let here = search.is_meant(chosen);
        if here || over {
            let others: Vec<_> = ours.iter().filter(|disk| !is_same(disk, chosen)).copied().collect();
            // Comparing writes: it is done once for each set of disks, and a last time.
            let set: Vec<_> = ours.iter().map(|disk| (disk.name.clone(), disk.sequence)).collect();
            let one = others.is_empty() || ((over || compared != set) && are_one(machine, chosen, &others).await);
            if one {
                if !here {
                    tracing::warn!(volume = %id, "disk {} is not where the request says, and is the only one", chosen.name);
                }
                return Ok(chosen.clone());
            }
            if over {
                return Err(VolumeError::ManyDisks { id, disks: list(&disks) });
            }
            compared = set;
        }
        seen(&list(&disks));
        tokio::time::sleep(INTERVAL).await;
    }
}

/// Whether two are one appearance of a disk.
fn is_same(one: &Disk, other: &Disk) -> bool {
    (&one.name, one.sequence) == (&other.name, other.sequence)
}

async fn ours<'d, M: Machine + ?Sized>(machine: &M, disks: &'d [Disk], search: &Search<'_>) -> Vec<&'d Disk> {
    let mut ours = Vec::new();
    for disk in disks {
        // The middle of any other disk is what containers have written there.
        let second =
            search.mirrored && disk.table.is_err() && belongs(&half(machine, disk, Half::Second).await, search.id);
        if second || belongs(disk, search.id) {
            ours.push(disk);
        }
    }
    ours
}

/// Whether disks are views of one image: a number that nobody else knows is written through one of them, outside of what
/// anybody uses, and all show it at once.
async fn are_one<M: Machine + ?Sized>(machine: &M, chosen: &Disk, others: &[&Disk]) -> bool {
    let all: Vec<&Disk> = [chosen].into_iter().chain(others.iter().copied()).collect();
    let Some(writer) = all.iter().find(|disk| !disk.read_only) else { return false };
    let nonce = uuid::Uuid::new_v4().as_bytes().repeat(NONCE_BYTES / 16);
    if machine.write(writer, DiskLayout::NONCE_OFFSET, &nonce).await.is_err() {
        return false;
    }
    for disk in all {
        let shown = machine.read(disk, DiskLayout::NONCE_OFFSET, NONCE_BYTES).await;
        if !shown.is_ok_and(|shown| shown == nonce) {
            return false;
        }
    }
    true
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
/// size. Never shrinks, and writes no table where the disk is read-only.
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
    let size = if !disk.read_only && wanted > now && wanted <= DiskLayout::largest_partition(disk.size) {
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
