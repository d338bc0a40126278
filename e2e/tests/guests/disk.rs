//! Volumes without a node: disks that the tests make and hand to guests themselves.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use anyhow::Result;
use uuid::Uuid;
use zpod_e2e::shim::Device;
use zpod_e2e::workdir::Workdir;
use zpod_e2e::{Boot, Container, Guest, Runtime, Sandbox};
use zpod_volume::{Bytes, Create, DiskLayout, Headroom, VolumeId, VolumeMode, VolumeSpec, gpt, note};

/// Where containers have it.
pub(crate) const DEVICE: &str = "/dev/xvda";

/// The disk of a block volume as a node makes it: a sparse file with a table and a note.
pub(crate) struct Disk {
    pub(crate) file: PathBuf,
    pub(crate) spec: VolumeSpec,
}

impl Disk {
    pub(crate) fn new(dir: &Path, name: &str, size: Bytes) -> Result<Self> {
        let id = VolumeId::from_name(name);
        let layout = DiskLayout::new(size, Headroom::default());
        let new = VolumeSpec::new(id, Uuid::new_v4(), Create::Fresh, size);
        let disk = Self { file: dir.join(name), spec: VolumeSpec { mode: VolumeMode::Block, ..new } };
        File::create(&disk.file)?.set_len(layout.disk.0)?;
        let table = gpt::encode(id, layout.partition, layout.disk);
        disk.write(0, &table.primary)?;
        disk.write(table.backup_offset, &table.backup)?;
        disk.publish()?;
        Ok(disk)
    }

    pub(crate) fn write(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        Ok(File::options().write(true).open(&self.file)?.write_all_at(bytes, offset)?)
    }

    /// Leaves the spec on the disk.
    pub(crate) fn publish(&self) -> Result<()> {
        self.write(DiskLayout::SPEC_OFFSET, &note::encode(&self.spec)?)
    }

    pub(crate) fn container(&self, id: &str) -> Container {
        Container { devices: vec![Device::new(&self.file, DEVICE)], ..Container::new(id, []) }
    }
}

pub(crate) async fn pod(dir: &Workdir) -> Result<Sandbox> {
    let (run, volumes) = (dir.subdirectory("kata")?, dir.subdirectory("direct-volumes")?);
    let id = Uuid::new_v4().simple().to_string();
    Sandbox::start_in(&run, volumes, id, "e2e", Runtime::Rs, Guest::boot(Boot::Zpod).await?).await
}
