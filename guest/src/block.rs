//! Telling which of the devices that a container is to have are volumes of ours.
//!
//! # Design
//! Kata passes no options along with a device, so it is the disk that tells: the partition table has the volume's id, and
//! the node has left a [`note`](zpod_volume::note) with the spec before the partition. The disk itself is found as
//! kata-agent finds it, by its place on the bus. **Fail closed**: a container never gets the raw disk of a pool. A disk
//! that does not come or can't be read, or that is one of zpod's without a sound note for a block device, is refused;
//! any other disk is the agent's.

use std::time::Duration;

use tokio::time::Instant;
use tonic::Code;
use zpod_proto::agent::Device;
use zpod_volume::note::{self, DecodeNoteError};
use zpod_volume::{DiskLayout, VolumeMode, VolumeSpec, gpt};

use crate::machine::{Disk, Fault, Machine};
use crate::place::Place;

/// How often the disks are looked at while one is missing.
const INTERVAL: Duration = Duration::from_millis(25);

/// Why a device is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the block device {path:?} of the container: {reason}")]
pub struct BlockError {
    path: String,
    reason: String,
    code: Code,
}

impl BlockError {
    fn new(device: &Device, code: Code, reason: impl Into<String>) -> Self {
        // What a person knows it by; as long as a path can be that the agent would take.
        Self { path: device.container_path.chars().take(256).collect(), reason: reason.into(), code }
    }

    /// The code under which it is reported.
    pub const fn code(&self) -> Code {
        self.code
    }
}

/// The spec of a device's volume; `None` where it is not one of ours.
///
/// # Errors
/// When its disk does not come in time, or is one of zpod's and not to be used so.
pub async fn identify<M: Machine + ?Sized>(
    machine: &M,
    device: &Device,
    deadline: Instant,
) -> Result<Option<VolumeSpec>, BlockError> {
    // What the agent can't find it refuses.
    let Some(place) = Place::of_device(device) else { return Ok(None) };
    let disk = find(machine, device, &place, deadline).await?;
    let read = async |offset, length| {
        let bytes = machine.read(&disk, offset, length).await;
        bytes.map_err(|fault: Fault| {
            let reason = format!("its disk {} can't be read, so that nobody knows whose it is: {fault}", disk.name);
            BlockError::new(device, Code::Internal, reason)
        })
    };
    // Too small for any volume.
    if disk.size < DiskLayout::MIN_CAPACITY {
        return Ok(None);
    }
    let table = gpt::decode(&read(0, gpt::PRIMARY_BYTES).await?).ok();
    let note = note::decode(&read(DiskLayout::SPEC_OFFSET, DiskLayout::SPEC_BYTES).await?);
    let refused = |reason: String| Err(BlockError::new(device, Code::FailedPrecondition, reason));
    let name = &disk.name;
    match (table, note) {
        (None, Err(_)) => Ok(None),
        (None, Ok(spec)) => {
            refused(format!("disk {name} is that of volume {}, and its partition table is damaged", spec.id))
        }
        (Some(table), _) if table.partition_start != DiskLayout::PARTITION_START => Ok(None),
        (Some(table), Err(DecodeNoteError::Absent)) => refused(format!(
            "disk {name} (GUID {}) is laid out as a volume of zpod's, and no node plugin has handed it out as a block \
             device; the container would get the disk of a pool",
            table.disk_guid
        )),
        (Some(table), Err(error)) => refused(format!("disk {name} (GUID {}): {error}", table.disk_guid)),
        (Some(table), Ok(spec)) if table.disk_guid != spec.id.uuid() => {
            refused(format!("disk {name} has the GUID {} and a note for volume {}", table.disk_guid, spec.id))
        }
        (Some(_), Ok(spec)) if spec.mode != VolumeMode::Block => {
            refused(format!("volume {} is a file system and can't be handed out as a block device", spec.id))
        }
        (Some(_), Ok(spec)) => Ok(Some(spec)),
    }
}

async fn find<M: Machine + ?Sized>(
    machine: &M,
    device: &Device,
    place: &Place,
    deadline: Instant,
) -> Result<Disk, BlockError> {
    let end = deadline.min(Instant::now() + crate::disk::WAIT);
    loop {
        let disks = machine.disks().await;
        let disks = disks.map_err(|fault| BlockError::new(device, Code::Internal, fault.text))?;
        if let Some(disk) = disks.iter().find(|disk| place.is_of(disk)) {
            return Ok(disk.clone());
        }
        if Instant::now() >= end {
            let id = if device.id.is_empty() { &device.vm_path } else { &device.id };
            let id: String = id.chars().take(64).collect();
            let reason = format!("no disk appeared at {} {id}; check that the node attached it", device.r#type);
            return Err(BlockError::new(device, Code::NotFound, reason));
        }
        tokio::time::sleep(INTERVAL).await;
    }
}

#[cfg(test)]
mod tests;
