//! Devices of a request: their numbers in the guest, as `AG/device/mod.rs` of kata-agent finds and uses them.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::MetadataExt as _;

use anyhow::{Context as _, Result, anyhow, bail};
use nix::sys::stat::{major, minor};
use zpod_proto::agent::{Device, LinuxDeviceCgroup, Spec};

use crate::block;

/// Waits for each device and gives the OCI device of the same path its numbers, and the rules that name the host's. An
/// OCI device that no entry speaks of stays as it is. No rule is enforced here.
pub(crate) async fn add(devices: &[Device], spec: &mut Spec) -> Result<()> {
    let linux = spec.linux.as_mut().ok_or_else(|| anyhow!("Spec didn't contain linux field"))?;
    let mut updates = HashMap::new();
    for device in devices {
        let path = match device.r#type.as_str() {
            "blk" => block::by_pci_path(&device.id).await?,
            "mmioblk" => device.vm_path.clone(),
            other => bail!("Failed to find the device handler {other}"),
        };
        let node = fs::metadata(&path).with_context(|| format!("VM device path {path:?}"))?.rdev();
        let numbers = (i64::try_from(major(node))?, i64::try_from(minor(node))?);
        if updates.insert(device.container_path.as_str(), numbers).is_some() {
            bail!("Conflicting device updates for {}", device.container_path);
        }
        if let Some(resources) = &mut linux.resources {
            let (major, minor) = numbers;
            let (kind, access) = ("b".to_owned(), "rwm".to_owned());
            resources.devices.push(LinuxDeviceCgroup { allow: true, r#type: kind, major, minor, access });
        }
    }
    for device in &mut linux.devices {
        let Some((major, minor)) = updates.remove(device.path.as_str()) else { continue };
        let host = (device.major, device.minor);
        (device.major, device.minor) = (major, minor);
        for rule in linux.resources.iter_mut().flat_map(|resources| &mut resources.devices) {
            if rule.r#type == device.r#type && (rule.major, rule.minor) == host {
                (rule.major, rule.minor) = (major, minor);
            }
        }
    }
    if !updates.is_empty() {
        bail!("Missing devices in OCI spec: {:?}", updates.keys());
    }
    Ok(())
}
