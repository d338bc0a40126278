//! Where a disk is on which bus, as Kata's requests say it and as the kernel shows it.

use std::path::Path;

use zpod_proto::agent::Device;

use crate::machine::Disk;

/// Where a disk is, as the agent's request says it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
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
pub type Slot = (u8, u8);

impl Place {
    /// Reads an entry of the request; `None` for one that the agent would not find either.
    pub fn of_device(device: &Device) -> Option<Self> {
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

    /// Reads where a storage's disk is; `None` where the request does not say it in a way that is known.
    pub fn of_storage(driver: &str, source: &str) -> Option<Self> {
        let device = match source.starts_with("/dev/") {
            true => return source.strip_prefix("/dev/").map(|name| Self::Name(name.to_owned())),
            false => Device { id: source.to_owned(), r#type: driver.to_owned(), ..Device::default() },
        };
        Self::of_device(&device)
    }

    /// Whether the disk is there.
    pub fn is_of(&self, disk: &Disk) -> bool {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_storage_says_where_its_disk_is_as_a_device_does() {
        for (driver, source, want) in [
            ("blk", "02/01", Some(Place::Pci(vec![(2, 0), (1, 0)]))),
            ("blk", "08", Some(Place::Pci(vec![(8, 0)]))),
            ("blk", "/dev/vdb", Some(Place::Name("vdb".into()))),
            ("mmioblk", "/dev/vdb", Some(Place::Name("vdb".into()))),
            ("scsi", "0:1", Some(Place::Scsi("0:0:0:1".into()))),
            ("blk", "anywhere", None),
            ("virtio-fs", "02", None),
        ] {
            assert_eq!(Place::of_storage(driver, source), want, "{driver} {source}");
        }
    }
}
