//! File systems without a node: images that the tests make, copy and hand to guests themselves, as a node does it.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use uuid::Uuid;
use zpod_e2e::workdir::Workdir;
use zpod_e2e::{Mount, direct_volume};
use zpod_volume::{Bytes, Create, DiskLayout, Headroom, Mark, Origin, VolumeId, VolumeSpec, gpt};

/// The image of a volume, and what guests are told of it.
pub(crate) struct Image {
    pub(crate) spec: VolumeSpec,
    pub(crate) file: PathBuf,
    target: PathBuf,
    entry: PathBuf,
}

impl Image {
    /// A new volume.
    pub(crate) fn new(dir: &Workdir, name: &str, size: Bytes) -> Result<Self> {
        let mut spec = VolumeSpec::new(VolumeId::from_name(name), Uuid::new_v4(), Create::Fresh, size);
        spec.pool_creation_properties = [("ashift".into(), "12".into())].into();
        let image = Self::of(dir, spec)?;
        File::create_new(&image.file)?;
        image.lay_out()?;
        Ok(image)
    }

    /// A volume that is made from a copy of this one, taken now. It may have its name: then this one is gone.
    pub(crate) fn copy(&self, dir: &Workdir, name: &str, size: Bytes, mark: Option<Mark>) -> Result<Self> {
        let new = VolumeSpec::new(VolumeId::from_name(name), Uuid::new_v4(), Create::Never, size);
        let origin = Origin { volume: self.spec.id, mark, initialized: true, copy: None };
        let origin = origin.of_new_copy(new.id);
        let spec = VolumeSpec { encryption: self.spec.encryption, origin: Some(origin), ..new };
        let image = Self::of(dir, spec)?;
        let copied = Command::new("cp").arg("--sparse=always").args([&self.file, &image.file]).status()?;
        ensure!(copied.success(), "cp: {copied}");
        image.lay_out()?;
        Ok(image)
    }

    fn of(dir: &Workdir, spec: VolumeSpec) -> Result<Self> {
        let target = dir.subdirectory(&format!("pods/{}", spec.id))?;
        let entry = direct_volume::entry(&dir.subdirectory("direct-volumes")?, &target);
        let file = dir.path().join(spec.id.to_string());
        let file = if file.exists() { file.with_extension("again") } else { file };
        Ok(Self { file, spec, target, entry })
    }

    /// Size and tables, whatever was there.
    fn lay_out(&self) -> Result<()> {
        let layout = DiskLayout::new(self.spec.capacity, Headroom::default());
        let file = File::options().write(true).open(&self.file)?;
        file.set_len(layout.disk.0)?;
        let table = gpt::encode(self.spec.id, layout.partition, layout.disk);
        file.write_all_at(&table.primary, 0)?;
        file.write_all_at(&table.backup, table.backup_offset)?;
        self.publish()
    }

    /// Leaves the spec, as it is now, for Kata.
    pub(crate) fn publish(&self) -> Result<()> {
        fs::create_dir_all(&self.entry)?;
        let info = serde_json::json!({
            "volume-type": "directvol", "device": self.file, "fstype": "zfs", "options": [self.spec.to_option()],
        });
        fs::write(self.entry.join("mountInfo.json"), info.to_string()).context("write mountInfo.json")
    }

    /// The same volume, published again for another pod, that a guest has reported in between.
    pub(crate) fn publish_again(&mut self) -> Result<()> {
        self.spec.token = Uuid::new_v4();
        (self.spec.create, self.spec.origin) = (Create::Never, None);
        self.publish()
    }

    pub(crate) fn id(&self) -> String {
        self.spec.id.to_string()
    }

    pub(crate) fn mount(&self, at: &str) -> Mount {
        Mount::new(&self.target, at)
    }
}
