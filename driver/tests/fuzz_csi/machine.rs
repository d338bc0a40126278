//! A virtual machine that is none: it has a volume's disk open, writes patterns to it, and perhaps has a guest that reports.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use zpod_proto::guest::{Health, VolumeStatus};
use zpod_volume::{Bytes, DiskLayout, VolumeSpec, note};

use crate::daemon::Node;
use crate::fake_guest::{Behaviour, FakeGuest};
use crate::model::{Content, PLACES, Volume};

/// One block of whatever file system is below.
const PATTERN: usize = 4096;

pub(crate) struct Machine {
    disk: File,
    guest: Option<FakeGuest>,
}

/// What the guest of a volume is told.
pub(crate) fn spec(node: &Node, id: &str, volume: &Volume) -> Option<VolumeSpec> {
    let published = volume.published.as_ref()?;
    if !volume.block {
        return node.entry(&published.target);
    }
    let mut bytes = vec![0; DiskLayout::SPEC_BYTES];
    File::open(node.device(id)).ok()?.read_exact_at(&mut bytes, DiskLayout::SPEC_OFFSET).ok()?;
    note::decode(&bytes).ok()
}

impl Machine {
    /// Starts it with a volume as it is published.
    pub(crate) fn start(node: &Node, id: &str, volume: &Volume, sandbox: &str, reports: bool) -> Self {
        let spec = spec(node, id, volume).unwrap_or_else(|| panic!("nobody tells a guest of volume {id}"));
        assert_eq!(spec.id.to_string(), id, "another volume is at its path");
        let path = match &volume.published {
            Some(published) if volume.block => published.target.clone(),
            _ => node.device(id),
        };
        let disk = OpenOptions::new().read(true).write(true).open(path).unwrap();
        let size = std::io::Seek::seek(&mut &disk, std::io::SeekFrom::End(0)).unwrap();
        let capacity = volume.capacity.unsigned_abs();
        let report = VolumeStatus {
            volume_id: id.to_owned(),
            token: spec.token.to_string(),
            health: Health::Online.into(),
            total_bytes: capacity,
            available_bytes: capacity,
            partition_bytes: DiskLayout::partition_for(Bytes(capacity)).0,
            disk_bytes: size,
            quota_bytes: capacity,
            block: volume.block,
            encrypted: volume.parameters.encryption.is_some(),
            ..VolumeStatus::default()
        };
        let start = || FakeGuest::start(&node.path("kata"), sandbox, Behaviour::Honest, vec![report]);
        Self { disk, guest: reports.then(start) }
    }

    /// Its guest is not heard any more.
    pub(crate) fn fall_silent(&mut self) {
        self.guest = None;
    }

    /// Writes a pattern, and has it on the disk.
    pub(crate) fn write(&self, place: usize, pattern: u64) {
        let bytes = pattern.to_le_bytes().repeat(PATTERN / 8);
        self.disk.write_all_at(&bytes, PLACES[place]).unwrap();
        self.disk.sync_all().unwrap();
    }
}

/// The patterns on a disk.
///
/// # Errors
/// When it can't be read, or what is there was never written by a machine.
pub(crate) fn content(path: &Path) -> Result<Content, String> {
    let file = File::open(path).map_err(|error| format!("{}: {error}", path.display()))?;
    let mut content = Content::default();
    for (pattern, place) in content.iter_mut().zip(PLACES) {
        let mut bytes = vec![0; PATTERN];
        file.read_exact_at(&mut bytes, place).map_err(|error| format!("{} at {place}: {error}", path.display()))?;
        *pattern = u64::from_le_bytes(bytes[..8].try_into().unwrap_or_default());
        if bytes != pattern.to_le_bytes().repeat(PATTERN / 8) {
            return Err(format!("{} at {place} has what nobody wrote", path.display()));
        }
    }
    Ok(content)
}
