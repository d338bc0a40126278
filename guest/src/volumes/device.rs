//! Block devices of volumes: finding them, and what df(1) would say of them.

use std::time::Duration;

use tokio::time::Instant;
use zpod_volume::{VolumeId, VolumeSpec};

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

/// What to set, before anything else and after it, for a block device to be as writable as its publication is. A file
/// system's mounts are read-only instead: where its owner has set the property on the dataset or on its pool, it goes. A
/// device that is read-only can't be given another size.
pub(super) fn read_only(spec: &VolumeSpec, now: &Properties, changes: bool) -> [Vec<(String, String)>; 2] {
    let set = |value: &str| vec![("readonly".to_owned(), value.to_owned())];
    let is = now.get("readonly").is_some_and(|value| value == "on");
    match (spec.mode.is_filesystem(), is, spec.read_only) {
        (_, false, false) | (true, false, true) => [vec![], vec![]],
        (true, true, _) | (false, true, false) => [set("off"), vec![]],
        (false, false, true) => [vec![], set("on")],
        (false, true, true) if changes => [set("off"), set("on")],
        (false, true, true) => [vec![], vec![]],
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

#[cfg(test)]
mod tests {
    use super::*;
    use uuid::Uuid;
    use zpod_volume::{Bytes, Create, VolumeMode};

    #[test]
    fn a_device_is_as_writable_as_its_publication_and_is_changed_while_it_is_writable() {
        let new = VolumeSpec::new(VolumeId::from_name("a"), Uuid::nil(), Create::Never, Bytes::gib(1));
        for (now, read_only, changes, want) in [
            ("off", false, true, ["", ""]),
            ("off", true, true, ["", "on"]),
            ("on", false, false, ["off", ""]),
            ("on", true, false, ["", ""]),
            ("on", true, true, ["off", "on"]),
        ] {
            let block = VolumeSpec { mode: VolumeMode::Block, read_only, ..new.clone() };
            let now: Properties = [("readonly".to_owned(), now.to_owned())].into();
            let values = |spec: &VolumeSpec| {
                super::read_only(spec, &now, changes).map(|set| set.first().map_or("", |(_, value)| value).to_owned())
            };
            assert_eq!(values(&block), want, "{now:?} {read_only} {changes}");
            // A file system's dataset is writable, whatever its owner has made of the property.
            let off = if now["readonly"] == "on" { "off" } else { "" };
            assert_eq!(values(&VolumeSpec { read_only, ..new.clone() }), [off, ""]);
        }
    }

    #[test]
    fn a_device_never_holds_more_than_its_size() {
        let of = |size: u64, held: u64| {
            let now = [("volsize", size), ("referenced", held)];
            usage(&now.map(|(key, value)| (key.to_owned(), value.to_string())).into())
        };
        assert_eq!((of(100, 30).used_bytes, of(100, 30).available_bytes), (30, 70));
        assert_eq!((of(100, 130).used_bytes, of(100, 130).available_bytes), (100, 0));
        assert_eq!(of(100, 1).total_inodes, 0);
    }
}
