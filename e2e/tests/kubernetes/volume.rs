//! A claim, the pods that use it, and its end.

use anyhow::{Context as _, Result, ensure};
use zpod_e2e::cluster::Cluster;

const CLAIM: &str = include_str!("../../manifests/claim.yaml");
const EXPANDED: &str = include_str!("../../manifests/claim-expanded.yaml");
const WRITER: &str = include_str!("../../manifests/pod.yaml");

pub(crate) async fn a_claim_waits_for_a_pod_and_keeps_its_data_for_the_next(cluster: &Cluster) -> Result<()> {
    cluster.install_chart().await?;
    cluster.apply(CLAIM).await?;
    let pending = cluster.kubectl_json(&["get", "pvc", "data"]).await?;
    ensure!(pending["status"]["phase"] == "Pending", "a claim that no pod uses is {}", pending["status"]);

    let first = run_writer(cluster).await?;
    let bound = cluster.kubectl_json(&["get", "pvc", "data"]).await?;
    ensure!(bound["status"]["phase"] == "Bound", "the claim of a running pod is {}", bound["status"]);
    cluster.delete(WRITER).await?;
    let second = run_writer(cluster).await?;
    ensure!(first == second, "the first pod wrote {first}, the next one reads {second}");

    // While that pod runs.
    cluster.apply(EXPANDED).await?;
    cluster.wait_for_size("data", "2Gi").await.context(cluster.events_of("default", "data").await)?;

    cluster.delete(WRITER).await?;
    cluster.delete(CLAIM).await?;
    cluster.wait_for_no_volumes().await
}

/// Runs the pod until its log says where /data is from; its file's checksum.
async fn run_writer(cluster: &Cluster) -> Result<String> {
    cluster.apply(WRITER).await?;
    Ok(cluster.wait_for_writer().await?.sum)
}
