//! Inline volumes of a pod.

use anyhow::{Result, ensure};
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
    ensure!(volume["status"]["capacity"] == "256Mi", "its object: {volume}; its pod says: {log}");
    cluster.delete(MANIFEST).await?;
    cluster.wait_for_no_volumes().await
}
