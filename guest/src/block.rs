//! Telling which of the devices that a container is to have are volumes of ours.
//!
//! # Design
//! Kata passes no options along with a device, so it is the disk that tells: the partition table has the volume's id, and
//! the node has left a [`note`](zpod_volume::note) with the spec before the partition. The disk itself is found as
//! kata-agent finds it, by its place on the bus. **Fail closed**: a container never gets the raw disk of a pool. A disk
//! that does not come or can't be read, or that is one of zpod's without a sound note for a block device, is refused;
//! any other disk is the agent's.

use std::path::Path;
use std::time::Duration;

use tokio::time::Instant;
use tonic::Code;
use zpod_proto::agent::Device;
use zpod_volume::note::{self, DecodeNoteError};
use zpod_volume::{DiskLayout, VolumeMode, VolumeSpec, gpt};

use crate::machine::{Disk, Fault, Machine};

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

/// Where a disk is, as the agent's request says it.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Place {
    /// Slots from the root bus on, bridges first.
    Pci(Vec<Slot>),
    /// The end of the device's directory: host, channel, id and LUN.
    Scsi(String),
    /// The channel device in front of the virtio device.
    Ccw(String),
    /// Its name.
    Name(String),
}

/// A slot and function of a PCI bus.
type Slot = (u8, u8);

impl Place {
    /// Reads an entry of the request; `None` for one that the agent would not find either.
    fn of(device: &Device) -> Option<Self> {
        match device.r#type.as_str() {
            // `pci::Path` in the agent: slots of two hexadecimal digits, with or without a function.
            "blk" => device.id.split('/').map(slot).collect::<Option<Vec<_>>>().map(Self::Pci),
            "scsi" => {
                let (id, lun) = device.id.split_once(':')?;
                let number = |text: &str| text.parse::<u16>().ok();
                Some(Self::Scsi(format!("0:0:{}:{}", number(id)?, number(lun)?)))
            }
            "mmioblk" => device
                .vm_path
                .strip_prefix("/dev/")
                .filter(|name| !name.contains('/'))
                .map(|name| Self::Name(name.to_owned())),
            // The agent takes any path. What is not the name of a disk is never found, and so refused.
            "nvdimm" => Some(Self::Name(device.vm_path.strip_prefix("/dev/").unwrap_or_default().to_owned())),
            "blk-ccw" => ccw(&device.id).map(Self::Ccw),
            _ => None,
        }
    }

    /// Whether the disk is there.
    fn is_of(&self, disk: &Disk) -> bool {
        match self {
            Self::Name(name) => disk.name == *name,
            Self::Ccw(bus) => disk.place.iter().rev().nth(3).is_some_and(|part| part == bus.as_str()),
            Self::Scsi(end) => disk.place.iter().rev().nth(2).is_some_and(|part| part == end.as_str()),
            Self::Pci(slots) => {
                let Some((root, found)) = pci(&disk.place) else { return false };
                // With more than one root bus the path begins with its number (`pcipath_from_dev_tree_path`).
                let numbered = slots.split_first().filter(|(first, _)| **first == (root, 0));
                (root == 0 && found == *slots) || numbered.is_some_and(|(_, rest)| rest.len() > 1 && found == rest)
            }
        }
    }
}

/// `02`, `02.1`
fn slot(text: &str) -> Option<Slot> {
    let (slot, function) = text.split_once('.').unwrap_or((text, "0"));
    let short = slot.len() <= 2 && function.len() <= 1;
    let hex = |text: &str| u8::from_str_radix(text, 16).ok().filter(|_| !text.starts_with('+'));
    if short { Some((hex(slot)?, hex(function)?)) } else { None }
}

/// `0.0.2`, as sysfs writes it: channel subsystem 0, subchannel set, number of the device (`ccw::Device` in the agent).
fn ccw(text: &str) -> Option<String> {
    let mut parts = text.split('.');
    let (subsystem, set, number) = (parts.next()?, parts.next()?, parts.next()?);
    let number = u16::from_str_radix(number, 16).ok().filter(|_| !number.starts_with('+'))?;
    let sound = parts.next().is_none() && subsystem == "0" && matches!(set, "0" | "1" | "2" | "3");
    sound.then(|| format!("0.{set}.{number:04x}"))
}

/// Number of the root bus, and the slots on the way to a disk, from its directory in sysfs.
fn pci(place: &Path) -> Option<(u8, Vec<Slot>)> {
    let mut root = None;
    let mut slots = Vec::new();
    for part in place.iter().filter_map(|part| part.to_str()) {
        if let Some(bus) = part.strip_prefix("pci0000:") {
            root = u8::from_str_radix(bus, 16).ok();
        } else if root.is_some() {
            // `0000:01:02.0`; what follows is the virtio device.
            let Some(at) = part.splitn(3, ':').nth(2).and_then(slot) else { break };
            slots.push(at);
        }
    }
    Some((root?, slots))
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
    let Some(place) = Place::of(device) else { return Ok(None) };
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
