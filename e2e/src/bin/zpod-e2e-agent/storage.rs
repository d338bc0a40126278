//! Storages of a request, mounted and counted as `AG/storage/mod.rs` of kata-agent does.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, lchown};
use std::path::Path;

use anyhow::{Context as _, Result, anyhow, bail};
use nix::mount::{mount, umount};
use zpod_proto::agent::{FsGroup, Storage};

use crate::block;
use crate::mounts::{mounted_type, parse_options};

/// Mount points in use and by how many containers.
#[derive(Debug, Default)]
pub(crate) struct Storages {
    users: HashMap<String, usize>,
}

impl Storages {
    /// Mounts what is not mounted yet; gives the mount points to be handed to [`Storages::remove`].
    ///
    /// As in kata-agent, a failure leaves the storages before it referenced: nobody rolls them back.
    pub(crate) async fn add(&mut self, storages: Vec<Storage>) -> Result<Vec<String>> {
        let mut mounts = Vec::new();
        for mut storage in storages {
            let users = self.users.entry(storage.mount_point.clone()).or_default();
            *users += 1;
            if *users == 1
                && let Err(error) = mount_storage(&mut storage).await
            {
                self.users.remove(&storage.mount_point);
                return Err(error);
            }
            mounts.push(storage.mount_point);
        }
        Ok(mounts)
    }

    /// Gives up mount points; the last user unmounts. Errors are logged and no more, as kata-agent does.
    pub(crate) fn remove(&mut self, mounts: &[String]) {
        for path in mounts {
            let Some(users) = self.users.get_mut(path) else { continue };
            *users -= 1;
            if *users > 0 {
                continue;
            }
            self.users.remove(path);
            if let Err(error) = clean(Path::new(path)) {
                println!("agent stand-in: failed to clean up storage {path}: {error:#}");
            }
        }
    }
}

fn clean(path: &Path) -> Result<()> {
    if !path.exists() {
        return Ok(());
    }
    let text = path.to_string_lossy();
    if mounted_type(&text).is_some() {
        // Plain, as kata-agent's `remove_mounts`: busy is an error, two stacked mounts are one too many.
        umount(path)?;
    }
    if mounted_type(&text).is_some() {
        bail!("failed to umount mountpoint {text}");
    }
    if fs::read_dir(path)?.next().is_some() {
        bail!("directory is not empty when clean up storage");
    }
    let _ = fs::remove_dir(path);
    Ok(())
}

async fn mount_storage(storage: &mut Storage) -> Result<()> {
    match storage.driver.as_str() {
        "blk" if storage.source.starts_with("/dev") => {
            fs::metadata(&storage.source).with_context(|| format!("get metadata on file {:?}", storage.source))?;
        }
        "blk" => storage.source = block::by_pci_path(&storage.source).await?,
        "ephemeral" | "local" | "bind" => {}
        other => bail!("Failed to find the storage handler {other}"),
    }
    fs::create_dir_all(&storage.mount_point).context("Could not create mountpoint")?;
    if mounted_type(&storage.mount_point).as_deref() == Some(&storage.fstype) {
        return Ok(());
    }
    let (flags, _, data) = parse_options(&storage.options);
    let Storage { source, mount_point, fstype, .. } = &*storage;
    mount(Some(source.as_str()), mount_point.as_str(), Some(fstype.as_str()), flags, Some(data.as_str()))
        .map_err(|errno| anyhow!("failed to mount {source:?} to {mount_point:?}, with error: {errno}"))?;
    if let Some(group) = &storage.fs_group {
        set_group(Path::new(mount_point), group, storage.options.iter().any(|option| option == "ro"))?;
    }
    Ok(())
}

fn set_group(path: &Path, group: &FsGroup, read_only: bool) -> Result<()> {
    let metadata = path.symlink_metadata()?;
    let mut mask = if read_only { 0o440 } else { 0o660 };
    if metadata.is_symlink() {
        return Ok(());
    }
    if metadata.is_dir() {
        for entry in fs::read_dir(path)? {
            set_group(&entry?.path(), group, read_only)?;
        }
        mask |= 0o2110;
    }
    lchown(path, None, Some(group.group_id))?;
    fs::set_permissions(path, fs::Permissions::from_mode(metadata.mode() | mask))?;
    Ok(())
}
