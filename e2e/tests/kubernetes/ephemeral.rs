//! Inline volumes of a pod.

use anyhow::{Result, ensure};
use serde_json::Value;
use zpod_e2e::cluster::Cluster;

use super::claims;

const MANIFEST: &str = include_str!("../../manifests/ephemeral.yaml");

pub(crate) async fn an_inline_volume_begins_and_ends_with_its_pod(cluster: &Cluster) -> Result<()> {
    cluster.install_chart().await?;
    cluster.apply(MANIFEST).await?;
    cluster.wait_for_pod("default", "scratch", "Running").await?;
    let log = claims::wait_for_log(cluster, "default", "scratch", " zfs ").await?;
    let volume = claims::volume(cluster).await?;
    ensure!(volume["spec"]["ephemeral"] == true, "its object: {volume}");
    let node = volume["spec"]["nodeName"].as_str().unwrap_or_default();
    let node = cluster.kubectl_json(&["get", "node", node]).await?;
    let name = |object: &Value, of: &str| {
        object["metadata"][of].as_str().unwrap_or_default().chars().take(13).collect::<String>()
    };
    ensure!(name(&volume, "name") == name(&node, "uid"), "its name is not its node's: {volume}");
    ensure!(volume["status"]["capacity"] == "256Mi", "its object: {volume}; its pod says: {log}");
    cluster.delete(MANIFEST).await?;
    cluster.wait_for_no_volumes().await
}
