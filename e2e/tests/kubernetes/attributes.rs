//! VolumeAttributesClasses of a claim whose pod runs.

use anyhow::{Result, ensure};
use zpod_e2e::cluster::Cluster;

use super::claims;

const CLAIM: &str = include_str!("../../manifests/claim.yaml");
const WRITER: &str = include_str!("../../manifests/pod.yaml");
const CLASSES: &str = include_str!("../../manifests/attributes.yaml");

/// The guest has them at once; what no volume can be is told of on the claim.
pub(crate) async fn a_running_pod_gets_the_attributes_of_another_class(cluster: &Cluster) -> Result<()> {
    cluster.install_chart().await?;
    cluster.apply(CLASSES).await?;
    cluster.apply(CLAIM).await?;
    cluster.apply(WRITER).await?;
    cluster.wait_for_writer().await?;
    let before = read(cluster).await?;
    ensure!(read(cluster).await? == before, "by default access times are off");

    ask(cluster, "zpod-traced").await?;
    cluster
        .wait("the claim's class is the new one", async || {
            let claim = cluster.kubectl_json(&["get", "pvc", "data"]).await?;
            let class = &claim["status"]["currentVolumeAttributesClassName"];
            ensure!(class == "zpod-traced", "it is {class}; its status: {}", claim["status"]);
            Ok(())
        })
        .await?;
    ensure!(read(cluster).await? != before, "the guest has not set atime=on");
    let status = claims::volume(cluster).await?["status"].clone();
    ensure!(status["attributes"]["compression"] == "gzip", "the volume's status: {status}");

    ask(cluster, "zpod-mistaken").await?;
    cluster
        .wait("an event that names the unknown key", async || {
            let events = cluster.events_of("default", "data").await;
            ensure!(events.contains("speed"), "the events are: {events}");
            Ok(())
        })
        .await?;
    cluster.delete(WRITER).await?;
    cluster.delete(CLAIM).await?;
    cluster.delete(CLASSES).await?;
    cluster.wait_for_no_volumes().await
}

/// Reads the file, and says when it was read last.
async fn read(cluster: &Cluster) -> Result<String> {
    cluster.sh("writer", "cat /data/file > /dev/null && stat -c %x /data/file").await
}

async fn ask(cluster: &Cluster, class: &str) -> Result<()> {
    let patch = format!("{{\"spec\":{{\"volumeAttributesClassName\":\"{class}\"}}}}");
    cluster.kubectl(&["patch", "pvc", "data", "--type=merge", "-p", &patch]).await?;
    Ok(())
}
