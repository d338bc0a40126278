//! Pods that can't have their volume, and what they are told.

use anyhow::{Result, ensure};
use zpod_e2e::cluster::Cluster;

const WRONG_RUNTIME: &str = include_str!("../../manifests/wrong-runtime.yaml");
const SUBPATH: &str = include_str!("../../manifests/subpath.yaml");

/// It forgot its RuntimeClass.
pub(crate) async fn a_pod_on_another_runtime_is_told_what_to_write(cluster: &Cluster) -> Result<()> {
    is_refused(cluster, WRONG_RUNTIME, "wrong-runtime", "spec.runtimeClassName: kata-zpod").await
}

pub(crate) async fn a_pod_that_mounts_a_part_of_its_volume_is_told_which(cluster: &Cluster) -> Result<()> {
    is_refused(cluster, SUBPATH, "subpath", "subPath").await
}

/// No container of it ever starts, and an event says what to write instead.
async fn is_refused(cluster: &Cluster, manifest: &str, pod: &str, remedy: &str) -> Result<()> {
    cluster.install_chart().await?;
    cluster.apply(manifest).await?;
    cluster
        .wait("an event that says what to write", async || {
            let events = cluster.events_of("default", pod).await;
            ensure!(events.contains("FailedMount") && events.contains(remedy), "the events are: {events}");
            Ok(())
        })
        .await?;
    let status = cluster.kubectl_json(&["get", "pod", pod]).await?["status"].clone();
    let containers = status["containerStatuses"].as_array().cloned().unwrap_or_default();
    ensure!(containers.iter().all(|container| container["started"] != true), "{pod} has started: {status}");
    cluster.delete(manifest).await?;
    cluster.wait_for_no_volumes().await
}
