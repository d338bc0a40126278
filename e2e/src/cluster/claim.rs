//! The claim `data` and the pod `writer` of `e2e/manifests`, which tests and the demo share.

use anyhow::{Context as _, Result, ensure};

use super::Cluster;

/// What the pod says of its volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Written {
    /// All of its log.
    pub log: String,
    /// The line with its file's checksum.
    pub sum: String,
}

impl Cluster {
    /// Waits until `writer` runs, and its log says that /data is ZFS and what its file's checksum is.
    ///
    /// # Errors
    /// When it doesn't run, or doesn't say so.
    pub async fn wait_for_writer(&self) -> Result<Written> {
        self.wait_for_pod("default", "writer", "Running").await?;
        let log = self
            .wait("the pod's log", async || {
                let log = self.kubectl(&["logs", "writer"]).await?;
                ensure!(log.contains("/data/file"), "the log is: {log}");
                Ok(log)
            })
            .await?;
        let mount = log.lines().find(|line| line.contains(" /data ")).unwrap_or_default();
        ensure!(mount.split(' ').nth(2) == Some("zfs"), "/data is not ZFS: {log}");
        let sum = log.lines().find(|line| line.ends_with("/data/file")).context("no checksum")?.to_owned();
        Ok(Written { log, sum })
    }

    /// Waits until a claim has a size.
    ///
    /// # Errors
    /// When it doesn't get it.
    pub async fn wait_for_size(&self, claim: &str, size: &str) -> Result<()> {
        self.wait(&format!("claim {claim} has {size}"), async || {
            let claim = self.kubectl_json(&["get", "pvc", claim]).await?;
            ensure!(claim["status"]["capacity"]["storage"] == size, "it is {}", claim["status"]);
            Ok(())
        })
        .await
    }
}
