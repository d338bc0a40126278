//! Growth that a running guest can't see.

use anyhow::{Result, ensure};
use zpod_e2e::cluster::Cluster;

const MANIFEST: &str = include_str!("../../manifests/tight.yaml");

/// The claim says what to do, and the next start does it.
pub(crate) async fn a_growth_beyond_the_headroom_is_told_of_and_done_at_the_next_start(
    cluster: &Cluster,
) -> Result<()> {
    cluster.install_chart().await?;
    cluster.apply(MANIFEST).await?;
    cluster.wait_for_pod("default", "tight", "Running").await?;
    let patch = r#"{"spec":{"resources":{"requests":{"storage":"1Gi"}}}}"#;
    cluster.kubectl(&["patch", "pvc", "tight", "--type=merge", "-p", patch]).await?;
    cluster
        .wait("the claim says what to do", async || {
            let claim = cluster.kubectl_json(&["get", "pvc", "tight"]).await?;
            let conditions = claim["status"]["conditions"].as_array().cloned().unwrap_or_default();
            let told = |each: &serde_json::Value| {
                each["message"].as_str().is_some_and(|text| text.contains("restart the pod"))
            };
            ensure!(conditions.iter().any(told), "its status: {}", claim["status"]);
            Ok(())
        })
        .await?;
    cluster.kubectl(&["delete", "pod", "tight", "--wait"]).await?;
    cluster.apply(&MANIFEST.replace("storage: 256Mi", "storage: 1Gi")).await?;
    cluster.wait_for_pod("default", "tight", "Running").await?;
    cluster.wait_for_size("tight", "1Gi").await?;
    let df = cluster.sh("tight", "df -Pk /data").await?;
    let blocks: u64 = df.lines().last().and_then(|line| line.split_whitespace().nth(1)?.parse().ok()).unwrap_or(0);
    ensure!((1_000_000..=1_048_576).contains(&blocks), "it is to have 1 GiB: {df}");
    cluster.delete(MANIFEST).await?;
    cluster.wait_for_no_volumes().await
}
