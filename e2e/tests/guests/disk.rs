//! Volumes without a node: disks that the tests make and hand to guests themselves.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Result, ensure};
use serde_json::json;
use uuid::Uuid;
use zpod_e2e::shim::Device;
use zpod_e2e::workdir::Workdir;
use zpod_e2e::{Boot, Container, Guest, Mount, Runtime, Sandbox, direct_volume};
use zpod_volume::{Bytes, Create, DiskLayout, Headroom, Mark, Origin, VolumeId, VolumeMode, VolumeSpec, gpt, note};

/// Where containers have it.
pub(crate) const DEVICE: &str = "/dev/xvda";

/// The disk of a volume as a node makes it: a sparse file with a table and a note.
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

    /// Another volume's disk, of a copy of this one: its own table and note over the other's contents.
    pub(crate) fn copy(&self, dir: &Path, name: &str, mark: Option<Mark>) -> Result<Self> {
        let copy = Self::new(dir, name, self.spec.capacity)?;
        let done = Command::new("cp").arg("--sparse=always").args([&self.file, &copy.file]).status()?;
        ensure!(done.success(), "cp: {done}");
        let origin = Origin { volume: self.spec.id, mark, initialized: true, copy: None };
        let copy = Self { spec: VolumeSpec { create: Create::Never, origin: Some(origin), ..copy.spec }, ..copy };
        let layout = DiskLayout::new(self.spec.capacity, Headroom::default());
        let table = gpt::encode(copy.spec.id, layout.partition, layout.disk);
        copy.write(0, &table.primary)?;
        copy.write(table.backup_offset, &table.backup)?;
        copy.publish()?;
        Ok(copy)
    }

    pub(crate) fn write(&self, offset: u64, bytes: &[u8]) -> Result<()> {
        Ok(File::options().write(true).open(&self.file)?.write_all_at(bytes, offset)?)
    }

    /// Leaves the spec on the disk.
    pub(crate) fn publish(&self) -> Result<()> {
        self.write(DiskLayout::SPEC_OFFSET, &note::encode(&self.spec)?)
    }

    /// The mount of a file system, with Kata's entry for it.
    pub(crate) fn mount(&self, dir: &Workdir, destination: &str) -> Result<Mount> {
        let target = dir.subdirectory(&format!("pods/{}", self.spec.id))?;
        let entry = direct_volume::entry(&dir.subdirectory("direct-volumes")?, &target);
        fs::create_dir_all(&entry)?;
        let options = [self.spec.to_option()];
        let info = json!({"volume-type": "directvol", "device": self.file, "fstype": "zfs", "options": options});
        fs::write(entry.join("mountInfo.json"), info.to_string())?;
        Ok(Mount::new(target, destination))
    }

    pub(crate) fn container(&self, id: &str) -> Container {
        Container { devices: vec![Device::new(&self.file, DEVICE)], ..Container::new(id, []) }
    }
}

pub(crate) async fn pod(dir: &Workdir) -> Result<Sandbox> {
    let (run, volumes) = (dir.subdirectory("kata")?, dir.subdirectory("direct-volumes")?);
    let id = Uuid::new_v4().simple().to_string();
    Sandbox::start_in(&run, volumes, id, "e2e", Runtime::Rs, Guest::boot(Boot::FromTemplate).await?).await
}
