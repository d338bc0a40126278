//! What kubelet wants to know of file systems.

use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, Result};
use nix::sys::statvfs::statvfs;

use super::api;

/// Nanoseconds since 1970, as CRI counts.
pub(super) fn now() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
}

/// How full the file system at a path is.
pub(super) fn usage(path: &Path) -> Result<api::FilesystemUsage> {
    let stats = statvfs(path).with_context(|| format!("statfs {}", path.display()))?;
    let value = |value: u64| Some(api::UInt64Value { value });
    Ok(api::FilesystemUsage {
        timestamp: now(),
        fs_id: Some(api::FilesystemIdentifier { mountpoint: path.display().to_string() }),
        used_bytes: value((stats.blocks() - stats.blocks_free()) * stats.fragment_size()),
        inodes_used: value(stats.files() - stats.files_free()),
    })
}
