//! The cluster itself.

use anyhow::{Result, ensure};
use zpod_e2e::cluster::Cluster;

/// Also shows that a service account's token is there and the API server answers it at its Service's address.
pub(crate) async fn a_pod_runs_and_its_log_can_be_read(cluster: &Cluster) -> Result<()> {
    let pod = include_str!("smoke/pod.yaml");
    cluster.apply(pod).await?;
    cluster.wait_for_pod("default", "smoke", "Running").await?;
    let log = cluster
        .wait("the pod's log", async || {
            let log = cluster.kubectl(&["logs", "smoke"]).await?;
            ensure!(log.contains("it runs"), "the log is: {log}");
            Ok(log)
        })
        .await?;
    ensure!(log.contains("token: yes"), "no service account token: {log}");
    cluster.delete(pod).await?;
    Ok(())
}
