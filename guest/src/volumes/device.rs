//! Block devices of volumes: finding them, and what df(1) would say of them.

use std::time::Duration;

use tokio::time::Instant;
use zpod_volume::VolumeId;

use super::{Active, Volumes};
use crate::error::VolumeError;
use crate::machine::{DeviceNumber, Fault, Machine, Properties, Usage};

/// How long the device is waited for: ZFS makes it by a task of its own once the dataset is there.
const WAIT: Duration = Duration::from_secs(20);
const INTERVAL: Duration = Duration::from_millis(10);

impl Active {
    /// Whether containers get it as a block device.
    pub(super) const fn is_block(&self) -> bool {
        !self.request.spec.mode.is_filesystem()
    }
}

impl<M: Machine> Volumes<M> {
    /// The device of a volume that a container uses.
    ///
    /// # Errors
    /// When the volume is not here, or has no such device.
    pub async fn block_device(&self, id: VolumeId) -> Result<DeviceNumber, VolumeError> {
        let (_, active) = self.known(id)?;
        let end = Instant::now() + WAIT;
        let failed = |fault| VolumeError::failed(id, "looking for its block device", fault);
        loop {
            let dataset = active.request.spec.dataset();
            match self.machine.volume_device(&dataset).await.map_err(failed)? {
                Some(device) => return Ok(device),
                None if Instant::now() >= end => {
                    let seconds = WAIT.as_secs();
                    let text = format!("ZFS has made none for {dataset} within {seconds} s; is it a file system?");
                    return Err(failed(Fault::new(text)));
                }
                None => tokio::time::sleep(INTERVAL).await,
            }
        }
    }
}

/// Usage of a block device: its size, and what of it was written to.
pub(super) fn usage(dataset: &Properties) -> Usage {
    let number = |key: &str| dataset.get(key).and_then(|value| value.parse::<u64>().ok()).unwrap_or(0);
    let total = number("volsize");
    // What refers to the blocks counts too, and copies of them do: it can be more than the device holds.
    let used = number("referenced").min(total);
    Usage { total_bytes: total, used_bytes: used, available_bytes: total - used, ..Usage::default() }
}
