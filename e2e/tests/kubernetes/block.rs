//! Raw block volumes.

use anyhow::{Result, ensure};
use zpod_e2e::cluster::Cluster;

use super::claims;

const MANIFEST: &str = include_str!("../../manifests/block.yaml");

/// It has the claim's size exactly, and the next pod finds what the first one wrote.
pub(crate) async fn a_block_volume_is_a_device_and_keeps_its_data(cluster: &Cluster) -> Result<()> {
    cluster.install_chart().await?;
    cluster.apply(MANIFEST).await?;
    for _ in 0..2 {
        cluster.apply(MANIFEST).await?;
        cluster.wait_for_pod("default", "block", "Running").await?;
        let log = claims::wait_for_log(cluster, "default", "block", "treasure").await?;
        let lines: Vec<_> = log.lines().collect();
        ensure!(lines.first() == Some(&"block special file"), "the log is: {log}");
        ensure!(lines.get(1) == Some(&"268435456"), "the log is: {log}");
        cluster.kubectl(&["delete", "pod", "block", "--wait"]).await?;
    }
    cluster.delete(MANIFEST).await?;
    cluster.wait_for_no_volumes().await
}
