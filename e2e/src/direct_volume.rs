//! Kata's direct-volume entries, read as runtime-rs reads them (`KT/mount.rs`, `direct_volumes/rawblock_volume.rs`).

use std::collections::HashMap;
use std::fs;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::FileTypeExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE;
use serde::Deserialize;

/// `mountInfo.json`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct DirectVolume {
    /// Both runtimes take `directvol`.
    #[serde(rename = "volume-type")]
    pub volume_type: String,
    /// Block device or regular file.
    pub device: PathBuf,
    /// File system.
    #[serde(rename = "fstype")]
    pub fs_type: String,
    /// Ignored by runtime-rs; `fsGroup` and a few more in Go.
    #[serde(default)]
    pub metadata: HashMap<String, String>,
    /// Mount options.
    #[serde(default)]
    pub options: Vec<String>,
}

impl DirectVolume {
    /// Reads the entry of a target path.
    ///
    /// # Errors
    /// Where runtime-rs fails, and also where Kata *fails open*: without an entry, or with a broken one in Go, it
    /// would share the host's directory with the guest.
    pub fn read(dir: &Path, target: &Path) -> Result<Self> {
        let entry = entry(dir, target);
        let path = entry.join("mountInfo.json");
        let text = fs::read(&path).with_context(|| {
            format!("FAIL OPEN: no {}: Kata would share {} itself", path.display(), target.display())
        })?;
        let volume: Self =
            serde_json::from_slice(&text).with_context(|| format!("FAIL OPEN in Go: {}", path.display()))?;
        if volume.volume_type != "directvol" {
            bail!("{}: volume-type is {:?}, runtime-rs wants directvol", path.display(), volume.volume_type);
        }
        let kind = fs::metadata(&volume.device).with_context(|| format!("device {}", volume.device.display()))?;
        if !kind.is_file() && !kind.file_type().is_block_device() {
            bail!("{} is neither a file nor a block device", volume.device.display());
        }
        // Any other file is taken for a sandbox's id by Go (utils.go:135-148).
        for item in fs::read_dir(&entry)? {
            let name = item?.file_name();
            if name != "mountInfo.json" {
                bail!("{} has {name:?} in it", entry.display());
            }
        }
        if !fs::metadata(target).with_context(|| format!("target {}", target.display()))?.is_dir() {
            bail!("{} must be a directory", target.display());
        }
        Ok(volume)
    }
}

/// Where the entry of a target path is: padded URL-safe base64 of the path, verbatim.
pub fn entry(dir: &Path, target: &Path) -> PathBuf {
    dir.join(URL_SAFE.encode(target.as_os_str().as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_entry_is_called_what_it_is() {
        let error = DirectVolume::read(Path::new("/nowhere"), Path::new("/target")).unwrap_err();
        assert!(error.to_string().contains("FAIL OPEN"), "{error}");
    }

    #[test]
    fn the_name_is_padded_base64_of_the_path() {
        assert_eq!(entry(Path::new("/d"), Path::new("/a?")), Path::new("/d/L2E_"));
        assert_eq!(entry(Path::new("/d"), Path::new("/a")), Path::new("/d/L2E="));
    }
}
