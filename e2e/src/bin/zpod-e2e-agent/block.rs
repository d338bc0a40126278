//! Finds the block device behind a PCI path, as kata-agent's uevent matcher does.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use tokio::time::Instant;

/// `agent.hotplug_timeout` of kata-agent.
const HOTPLUG_TIMEOUT: Duration = Duration::from_secs(3);
const ROOT_COMPLEX: &str = "/sys/devices/pci0000:00";

/// The device node of a virtio-blk disk at a PCI path such as `10/00`: slots (with optional `.function`) from the root
/// bus downward, in hexadecimal.
pub(crate) async fn by_pci_path(path: &str) -> Result<String> {
    let deadline = Instant::now() + HOTPLUG_TIMEOUT;
    loop {
        // sysfs has the disk before devtmpfs has its node; the uevent that kata-agent waits for comes after both.
        let device = find(Path::new(ROOT_COMPLEX), path)?.map(|name| format!("/dev/{name}"));
        if let Some(device) = device.filter(|device| Path::new(device).exists()) {
            return Ok(device);
        }
        if Instant::now() >= deadline {
            bail!("Timeout after {HOTPLUG_TIMEOUT:?} waiting for the block device at PCI path {path}");
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn find(root: &Path, path: &str) -> Result<Option<String>> {
    let mut place = root.to_owned();
    let mut bus = "0000:00".to_owned();
    for (depth, slot) in path.split('/').enumerate() {
        if depth > 0 {
            match only_entry(&place.join("pci_bus")) {
                Some(below) => bus = below,
                None => return Ok(None),
            }
        }
        place.push(format!("{bus}:{}", address(slot)?));
    }
    let virtio = entries(&place).into_iter().find(|name| name.starts_with("virtio"));
    Ok(virtio.and_then(|name| only_entry(&place.join(name).join("block"))))
}

fn address(slot: &str) -> Result<String> {
    let (slot, function) = slot.split_once('.').unwrap_or((slot, "0"));
    let number = |text: &str| u8::from_str_radix(text, 16).with_context(|| format!("{text:?} is no PCI slot"));
    Ok(format!("{:02x}.{}", number(slot)?, number(function)?))
}

fn entries(dir: &PathBuf) -> Vec<String> {
    let items = fs::read_dir(dir).into_iter().flatten().flatten();
    items.filter_map(|item| item.file_name().into_string().ok()).collect()
}

fn only_entry(dir: &PathBuf) -> Option<String> {
    entries(dir).into_iter().next()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_behind_a_root_port_is_found_by_its_slots() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(find(dir.path(), "10/00").unwrap(), None);
        let port = dir.path().join("0000:00:10.0");
        fs::create_dir_all(port.join("pci_bus/0000:03")).unwrap();
        fs::create_dir_all(port.join("0000:03:00.0/virtio5/block/vdb")).unwrap();
        assert_eq!(find(dir.path(), "10/00").unwrap().as_deref(), Some("vdb"));
        assert!(find(dir.path(), "zz").is_err());
    }
}
