//! A volume of zpod's, and one as Kata's own CSI driver makes it.

use std::fs::{self, File};
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Result, bail};
use serde_json::json;
use zpod_e2e::csi::Publish;
use zpod_e2e::{Node, direct_volume, inputs};
use zpod_volume::Bytes;

const SIZE: Bytes = Bytes::mib(512);

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Kind {
    Ext4,
    Zfs,
}

impl Kind {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Ext4 => "ext4",
            Self::Zfs => "zfs",
        }
    }
}

#[derive(Debug, Clone)]
pub(crate) struct Volume {
    pub(crate) kind: Kind,
    pub(crate) name: String,
    pub(crate) target: PathBuf,
}

impl Volume {
    /// A published one. Both are sparse files in the same file system.
    pub(crate) async fn make(node: &mut Node, kind: Kind, number: usize) -> Result<Self> {
        let name = format!("{}-{number}", kind.name());
        let target = node.target("pod", &name)?;
        match kind {
            Kind::Zfs => {
                let volume = node.csi.create(&name, SIZE, &[]).await?;
                node.csi.publish(&volume, &target, &Publish::default()).await?;
            }
            Kind::Ext4 => {
                let device = node.dir().join(&name);
                File::create(&device)?.set_len(SIZE.0)?;
                // The options of k8s.io/mount-utils' SafeFormatAndMount, which that driver formats with.
                let mkfs = inputs::program("mkfs.ext4", "install e2fsprogs")?;
                let output = Command::new(mkfs).args(["-q", "-F", "-m0"]).arg(&device).output()?;
                if !output.status.success() {
                    bail!("mkfs.ext4: {}", String::from_utf8_lossy(&output.stderr));
                }
                let entry = direct_volume::entry(&node.direct_volume_dir(), &target);
                fs::create_dir_all(&target)?;
                fs::create_dir_all(&entry)?;
                let info = json!({"volume-type": "directvol", "device": device, "fstype": "ext4", "options": []});
                fs::write(entry.join("mountInfo.json"), info.to_string())?;
            }
        }
        Ok(Self { kind, name, target })
    }
}
