//! What one of Kata's runtimes, and the VMM below it, does otherwise than another.

use std::path::Path;

use anyhow::{Context as _, Result, bail};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE;
use nix::sys::statvfs::{FsFlags, statvfs};
use zpod_proto::agent;

use super::Mount;
use crate::direct_volume::DirectVolume;

/// Whose manners the shim has, faults included (Kata 4.1.0).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Runtime {
    /// runtime-rs: a random mount point per container; the entry's options are in the OCI mount too. A disk is as
    /// read-only as the first mount of it. A device leaves the shim's table with the first of its containers, used or not
    /// (`try_remove_device`, device_manager.rs): the next start plugs it in again, and nobody unplugs the first. A block
    /// device is never looked up in that table, nor unplugged.
    Rs,
    /// Go: one mount point per device; DestroySandbox at the end.
    Go,
}

impl Runtime {
    /// Where it keeps its sandboxes.
    pub fn run_dir(self) -> &'static Path {
        Path::new(match self {
            Self::Rs => "/run/kata",
            Self::Go => "/run/vc/sbs",
        })
    }

    /// Whether it plugs a volume's disk in read-only: runtime-rs goes by the mount, Go by the entry's options.
    pub(super) fn plugs_read_only(self, mount: &Mount, volume: &DirectVolume) -> bool {
        match self {
            Self::Rs => mount.read_only,
            Self::Go => volume.options.iter().any(|option| option == "ro"),
        }
    }

    /// Whether the guest's discards reach what is behind a volume's disk: with Go where the entry has both of these
    /// (container.go:712), with runtime-rs never (`RawblockVolume` leaves `discard_unmap` false).
    pub(crate) fn passes_discards(self, volume: &DirectVolume) -> bool {
        let makes = volume.metadata.get("createFilesystem").is_some_and(|makes| makes == "true");
        self == Self::Go && makes && volume.options.iter().any(|option| option == "discard")
    }

    /// The mount that a container has in the place of a volume where Kata's configuration forbids disks.
    ///
    /// # Errors
    /// With runtime-rs, which then fails the container. The Go runtime leaves the disk out and shares the target path's
    /// directory (`checkBlockDeviceSupport`, container.go), which must not be one that can be written to.
    pub(super) fn without_disk(self, mount: &Mount) -> Result<agent::Mount> {
        if self == Self::Rs {
            bail!("unsupported driver type: block devices are disabled");
        }
        let target = mount.target.display();
        let found = statvfs(&mount.target).with_context(|| format!("look at {target}"))?;
        if !found.flags().contains(FsFlags::ST_RDONLY) {
            bail!("FAIL OPEN: Kata would share {target}, which can be written to");
        }
        // What is in it is not in the guest: those of the tests have no virtio-fs.
        Ok(agent::Mount {
            destination: mount.destination.clone(),
            source: "tmpfs".into(),
            r#type: "tmpfs".into(),
            options: vec!["ro".into()],
        })
    }
}

/// How the VMM takes disks, where that makes a difference.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Vmm {
    /// QEMU: one image may be plugged in twice (`share-rw=on`), and the shim waits until the guest has let go of a disk.
    Qemu,
    /// cloud-hypervisor: the shim does not wait. Since version 46 images are locked.
    CloudHypervisor {
        /// Whether an image that is plugged in is refused a second time.
        locks: bool,
    },
}

impl Runtime {
    /// The storage and the OCI mount for one volume of a container.
    pub(super) fn requests(
        self,
        mount: &Mount,
        volume: &DirectVolume,
        source: &str,
    ) -> (Vec<agent::Storage>, agent::Mount) {
        let mut cri: Vec<String> = vec!["rbind".into(), "rprivate".into()];
        cri.push(if mount.read_only { "ro" } else { "rw" }.into());
        let (mount_point, options, oci, fs_group) = match self {
            // utils.rs:31-45, 101-199.
            Self::Rs => {
                let random = uuid::Uuid::new_v4().simple().to_string();
                let name = Path::new(&mount.destination).file_name().unwrap_or_default().to_string_lossy();
                let place = "/run/kata-containers/shared/containers/passthrough";
                let mut options: Vec<_> = volume
                    .options
                    .iter()
                    .filter(|option| !["bind", "rbind"].contains(&option.as_str()))
                    .cloned()
                    .collect();
                if mount.read_only {
                    options.push("ro".into());
                }
                let point = format!("{place}/{}-{}-{name}", &random[..10], &random[10..18]);
                (point, options, [cri, volume.options.clone()].concat(), None)
            }
            // kata_agent.go:1887-2045, 2130-2157.
            Self::Go => {
                let point = format!("/run/kata-containers/sandbox/storage/{}", URL_SAFE.encode(source));
                let group = volume.metadata.get("fsGroup").and_then(|group| group.parse().ok());
                let always = volume.metadata.get("fsGroupChangePolicy").is_none_or(|policy| policy != "OnRootMismatch");
                let group = group.map(|group_id| agent::FsGroup { group_id, group_change_policy: u32::from(!always) });
                (point, volume.options.clone(), cri, group)
            }
        };
        let storage = agent::Storage {
            driver: "blk".into(),
            source: source.into(),
            fstype: volume.fs_type.clone(),
            options,
            mount_point: mount_point.clone(),
            fs_group,
            ..Default::default()
        };
        let bind = agent::Mount {
            destination: mount.destination.clone(),
            source: mount_point,
            r#type: "bind".into(),
            options: oci,
        };
        (vec![storage], bind)
    }
}
