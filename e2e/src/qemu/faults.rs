//! Disks that fail while a guest uses them: QEMU's blkdebug filter, put between a disk and its file at run time.

use std::path::Path;

use anyhow::{Context as _, Result};
use serde_json::{Value, json};

use super::Guest;

/// What a disk that fails answers with EIO.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Every write. Flushes work: QEMU flushes when it puts the disk back on its file.
    Writes,
    /// Every read and write.
    All,
    /// Reads of what holds this byte.
    ReadsAt(u64),
}

impl Fault {
    /// blkdebug's rules. Those of event `none` hold from the beginning.
    fn rules(self) -> Value {
        let rule = |kind: &str| json!({"event": "none", "iotype": kind, "errno": 5});
        match self {
            Self::Writes => json!([rule("write"), rule("write-zeroes")]),
            Self::All => json!([rule("read"), rule("write"), rule("write-zeroes")]),
            Self::ReadsAt(byte) => json!([{"event": "none", "iotype": "read", "errno": 5, "sector": byte / 512}]),
        }
    }
}

impl Guest {
    /// From now on a disk that is plugged in fails.
    ///
    /// # Errors
    /// When it is not plugged in, or QEMU refuses.
    pub async fn break_disk(&mut self, device: &Path, fault: Fault) -> Result<()> {
        let port = self.port(device)?;
        let filter = json!({
            "driver": "blkdebug", "node-name": format!("broken{port}"), "image": format!("file{port}"),
            "inject-error": fault.rules(),
        });
        self.qmp.execute("blockdev-add", filter).await?;
        self.put_on(port, &format!("broken{port}")).await
    }

    /// A disk that failed works again.
    ///
    /// # Errors
    /// When it is not plugged in or did not fail.
    pub async fn mend_disk(&mut self, device: &Path) -> Result<()> {
        let port = self.port(device)?;
        self.put_on(port, &format!("file{port}")).await?;
        self.qmp.execute("blockdev-del", json!({"node-name": format!("broken{port}")})).await?;
        Ok(())
    }

    /// QEMU's word for the state of the virtual machine: `running`, or `io-error` where a disk's error stopped it.
    ///
    /// # Errors
    /// When QEMU does not answer.
    pub async fn state(&mut self) -> Result<String> {
        let status = self.qmp.execute("query-status", json!({})).await?;
        Ok(status["status"].as_str().context("QEMU tells no status")?.to_owned())
    }

    /// Lets a virtual machine that was stopped go on.
    ///
    /// # Errors
    /// When QEMU refuses.
    pub async fn go_on(&mut self) -> Result<()> {
        self.qmp.execute("cont", json!({})).await.map(drop)
    }

    async fn put_on(&mut self, port: usize, below: &str) -> Result<()> {
        let options = json!({"driver": "raw", "node-name": format!("node{port}"), "file": below});
        self.qmp.execute("blockdev-reopen", json!({"options": [options]})).await.map(drop)
    }
}
