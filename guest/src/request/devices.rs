//! Block devices in a CreateContainer request.
//!
//! # Design
//! kata-agent looks for the disk of each `Device` entry and writes its numbers into the OCI device of the same path, and
//! into the rules that name the host's numbers; beside that it adds a rule of its own (`add_devices`,
//! `update_spec_devices`, `insert_devices_cgroup_rule` in 4.1.0). An OCI device without an entry it makes as it stands.
//! So for a device of ours the entry goes, and what the agent would have done is done here, with the zvol's numbers.

use std::collections::BTreeMap;

use prost::Message as _;
use zpod_proto::agent::{Device, LinuxDevice, LinuxDeviceCgroup};

use super::{RequestError, once, replaced};
use crate::wire::{self, Edit};

/// The kinds of entries that are disks in the guest (`DRIVER_*_TYPE` in kata-types 4.1.0): virtio-blk, SCSI, virtio-mmio,
/// NVDIMM, virtio-blk on a channel of s390x. The agent knows no others.
const KINDS: [&str; 5] = ["blk", "scsi", "mmioblk", "nvdimm", "blk-ccw"];

/// How a block device is called in the OCI spec.
const BLOCK: &str = "b";

/// A block device of this machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Node {
    /// Major number.
    pub major: u32,
    /// Minor number.
    pub minor: u32,
    /// The container may only read it.
    pub read_only: bool,
}

/// Reads a device entry; `None` where it is no disk.
pub(super) fn disk(bytes: &[u8]) -> Result<Option<Device>, RequestError> {
    Ok(Some(Device::decode(bytes)?).filter(|device| KINDS.contains(&device.r#type.as_str())))
}

/// The payload of a CreateContainer frame with the devices at these paths of the container replaced.
///
/// # Errors
/// When it is not well-formed, or has no OCI device at one of the paths.
pub fn hand_out(frame: &[u8], nodes: &BTreeMap<String, Node>) -> Result<Vec<u8>, RequestError> {
    let mut left: Vec<&str> = nodes.keys().map(String::as_str).collect();
    let (mut specs, mut linuxes) = (false, false);
    let edited = wire::rewrite(frame, |field| {
        let (3, Some(message)) = (field.number, field.bytes(frame)) else { return Ok(Edit::Keep) };
        let edited = wire::rewrite(message, |field| match (field.number, field.bytes(message)) {
            (4, Some(entry)) => {
                let ours = disk(entry)?.is_some_and(|device| nodes.contains_key(&device.container_path));
                Ok(if ours { Edit::Drop } else { Edit::Keep })
            }
            (6, Some(oci)) => {
                once(&mut specs, "OCI")?;
                let edited = wire::rewrite(oci, |field| {
                    let (8, Some(part)) = (field.number, field.bytes(oci)) else { return Ok(Edit::Keep) };
                    once(&mut linuxes, "Linux")?;
                    let (edited, found) = linux(part, nodes)?;
                    left.retain(|path| !found.iter().any(|found| found == path));
                    Ok::<_, RequestError>(Edit::Replace(edited))
                })?;
                Ok(replaced(edited))
            }
            _ => Ok::<_, RequestError>(Edit::Keep),
        })?;
        Ok::<_, RequestError>(replaced(edited))
    })?;
    match left.first() {
        Some(path) => Err(RequestError::NoDevice((*path).to_owned())),
        None => Ok(edited.unwrap_or_else(|| frame.to_vec())),
    }
}

/// The `Linux` of an OCI spec with the devices' numbers replaced, and the paths of those that are in it.
fn linux(part: &[u8], nodes: &BTreeMap<String, Node>) -> Result<(Vec<u8>, Vec<String>), RequestError> {
    // The host's numbers first: the rules may stand before the devices.
    let (mut hosts, mut found) = (BTreeMap::new(), Vec::new());
    let with_devices = wire::rewrite(part, |field| {
        let (7, Some(bytes)) = (field.number, field.bytes(part)) else { return Ok(Edit::Keep) };
        let device = LinuxDevice::decode(bytes)?;
        let Some(node) = nodes.get(&device.path) else { return Ok(Edit::Keep) };
        if device.r#type != BLOCK || found.contains(&device.path) {
            return Err(RequestError::NoDevice(device.path));
        }
        hosts.insert((device.major, device.minor), *node);
        found.push(device.path);
        Ok(Edit::Replace(numbered(bytes, *node)?))
    })?;
    let part = with_devices.as_deref().unwrap_or(part);
    let with_rules = wire::rewrite(part, |field| match (field.number, field.bytes(part)) {
        (4, Some(resources)) => Ok(Edit::Replace(allowed(resources, &hosts)?)),
        _ => Ok::<_, RequestError>(Edit::Keep),
    })?;
    Ok((with_rules.unwrap_or_else(|| part.to_vec()), found))
}

/// `Resources` with rules for the devices.
fn allowed(resources: &[u8], hosts: &BTreeMap<(i64, i64), Node>) -> Result<Vec<u8>, RequestError> {
    let edited = wire::rewrite(resources, |field| {
        let (1, Some(bytes)) = (field.number, field.bytes(resources)) else { return Ok(Edit::Keep) };
        let rule = LinuxDeviceCgroup::decode(bytes)?;
        match hosts.get(&(rule.major, rule.minor)).filter(|_| rule.r#type == BLOCK) {
            Some(node) => Ok(Edit::Replace(numbered(bytes, *node)?)),
            None => Ok::<_, RequestError>(Edit::Keep),
        }
    })?;
    let mut out = edited.unwrap_or_else(|| resources.to_vec());
    for node in hosts.values() {
        let rule = LinuxDeviceCgroup {
            allow: true,
            r#type: BLOCK.to_owned(),
            major: node.major.into(),
            minor: node.minor.into(),
            access: if node.read_only { "rm" } else { "rwm" }.to_owned(),
        };
        wire::put_message(&mut out, 1, &rule.encode_to_vec());
    }
    Ok(out)
}

/// A device or a rule with other numbers: both have them in fields 3 and 4.
fn numbered(bytes: &[u8], node: Node) -> Result<Vec<u8>, RequestError> {
    let rest = wire::rewrite(bytes, |field| {
        Ok::<_, RequestError>(if matches!(field.number, 3 | 4) { Edit::Drop } else { Edit::Keep })
    })?;
    let mut out = rest.unwrap_or_else(|| bytes.to_vec());
    wire::put_number(&mut out, 3, node.major.into());
    wire::put_number(&mut out, 4, node.minor.into());
    Ok(out)
}
