//! VolumeAttributesClasses of a claim whose pod runs.

use anyhow::{Result, ensure};
use serde_json::Value;
use zpod_e2e::cluster::Cluster;

use super::claims::{self, wait_for_events};
use super::kubectl::json;

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
    let of_zfs =
        cluster.sh("writer", "for path in /dev/zfs /opt/zpod; do test -e $path && echo $path; done; true").await?;
    ensure!(of_zfs.trim().is_empty(), "its class does not ask for it, and there is {of_zfs}");

    become_of(cluster, "zpod-traced").await?;
    ensure!(read(cluster).await? != before, "the guest has not set atime=on");
    let status = claims::volume(cluster).await?["status"].clone();
    ensure!(status["attributes"]["compression"] == "gzip", "the volume's status: {status}");

    become_of(cluster, "zpod-hourly").await?;
    cluster
        .wait("the guest takes a snapshot", async || {
            let listed = json(cluster, &["snapshots", "data"]).await?;
            let names: Vec<_> = listed["pool"]["snapshots"].as_array().into_iter().flatten().collect();
            let taken = |one: &&Value| one["name"].as_str().is_some_and(|name| name.starts_with("zpod-auto-hourly-"));
            ensure!(names.iter().any(taken), "{listed}");
            Ok(())
        })
        .await?;
    ensure!(cluster.sh("writer", "ls /data/.zfs/snapshot").await?.contains("zpod-auto-hourly-"), "it can't be browsed");

    for (class, words) in [
        ("zpod-mistaken", &["speed"][..]),
        ("zpod-yearly", &["snapshotSchedule: \"yearly=1\" is not allowed", "hourly, daily, weekly, monthly"]),
        ("zpod-asking", &["zfsAccess"]),
    ] {
        ask(cluster, class).await?;
        wait_for_events(cluster, "PersistentVolumeClaim", "data", &[&["VolumeModifyFailed"], words].concat()).await?;
    }
    cluster.delete(WRITER).await?;
    cluster.delete(CLAIM).await?;
    cluster.delete(CLASSES).await?;
    cluster.wait_for_no_volumes().await
}

/// Reads the file, and says when it was read last.
async fn read(cluster: &Cluster) -> Result<String> {
    cluster.sh("writer", "cat /data/file > /dev/null && stat -c %x /data/file").await
}

/// Waits until the claim is of that class.
async fn become_of(cluster: &Cluster, class: &str) -> Result<()> {
    ask(cluster, class).await?;
    cluster
        .wait("the claim's class is the new one", async || {
            let claim = cluster.kubectl_json(&["get", "pvc", "data"]).await?;
            let now = &claim["status"]["currentVolumeAttributesClassName"];
            ensure!(now == class, "it is {now}; its status: {}", claim["status"]);
            Ok(())
        })
        .await
}

async fn ask(cluster: &Cluster, class: &str) -> Result<()> {
    let patch = format!("{{\"spec\":{{\"volumeAttributesClassName\":\"{class}\"}}}}");
    cluster.kubectl(&["patch", "pvc", "data", "--type=merge", "-p", &patch]).await?;
    Ok(())
}
