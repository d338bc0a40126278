//! Snapshots, what is made from them, and clones.

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use zpod_e2e::cluster::Cluster;

use super::claims;

const CLAIM: &str = include_str!("../../manifests/claim.yaml");
const WRITER: &str = include_str!("../../manifests/pod.yaml");
const DENSE: &str = include_str!("../../manifests/dense.yaml");
const SNAPSHOT: &str = include_str!("../../manifests/snapshot.yaml");
const RESTORED: &str = include_str!("../../manifests/restored.yaml");
const CLONE: &str = include_str!("../../manifests/clone.yaml");
const DATABASE: &str = include_str!("../../manifests/database.yaml");
const GROUP: &str = include_str!("../../manifests/group-snapshot.yaml");

pub(crate) async fn the_snapshot_api_can_be_added(cluster: &Cluster) -> Result<()> {
    const CLASS: &str = "{apiVersion: snapshot.storage.k8s.io/v1, kind: VolumeSnapshotClass, metadata: {name: note}, \
                         driver: csi.nobody.example, deletionPolicy: Delete}";
    cluster.add_snapshots().await?;
    cluster.apply(CLASS).await?;
    // The second time it is there.
    cluster.add_snapshots().await?;
    let classes = cluster.kubectl(&["get", "volumesnapshotclasses", "-o", "name"]).await?;
    ensure!(classes.contains("/note"), "classes: {classes}");
    cluster.delete(CLASS).await?;
    Ok(())
}

/// Taken while the pod runs and restored larger under another class, it shows the instant, and goes on when its source and
/// the snapshot are gone.
pub(crate) async fn a_snapshot_of_a_running_pod_is_restored_larger_and_outlives_its_source(
    cluster: &Cluster,
) -> Result<()> {
    cluster.install_chart().await?;
    cluster.apply(CLAIM).await?;
    cluster.apply(WRITER).await?;
    let written = cluster.wait_for_writer().await?;
    cluster.apply(SNAPSHOT).await?;
    ready(cluster, "volumesnapshot/data").await?;
    let size = cluster.kubectl_json(&["get", "volumesnapshot", "data"]).await?["status"]["restoreSize"].clone();
    ensure!(size == "1Gi", "the least that a restored volume has is {size}");
    cluster.sh("writer", "echo later > /data/later && rm /data/file && sync").await?;

    cluster.apply(DENSE).await?;
    cluster.apply(RESTORED).await?;
    let restored = read(cluster, "restored", &written.sum).await?;
    ensure!(!restored.contains("later"), "what was written after the snapshot is in it: {restored}");
    let blocks: u64 = restored.lines().find_map(|line| line.split_whitespace().nth(1)?.parse().ok()).unwrap_or(0);
    ensure!((2_000_000..=2_097_152).contains(&blocks), "it is to have 2 GiB: {restored}");
    // It was read once now, and before under a class that keeps no access times.
    let read_since = "test $(stat -c %X /data/file) -gt $(stat -c %Y /data/file)";
    cluster.sh("restored", read_since).await.context("its class asks for atime=on")?;

    cluster.delete(WRITER).await?;
    cluster.delete(CLAIM).await?;
    claims::wait_for_volumes(cluster, 1).await.context("the source goes though there is a snapshot of it")?;
    cluster.delete(SNAPSHOT).await?;
    claims::wait_for_no_snapshots(cluster).await?;
    let again = cluster.sh("restored", "sha256sum /data/file").await?;
    ensure!(again.trim() == written.sum, "without its source it reads {again}");
    cluster.delete(RESTORED).await?;
    cluster.delete(DENSE).await?;
    cluster.wait_for_no_volumes().await
}

/// Beside the original, whose pod runs on.
pub(crate) async fn a_claim_is_cloned_while_its_pod_runs(cluster: &Cluster) -> Result<()> {
    cluster.install_chart().await?;
    cluster.apply(CLAIM).await?;
    cluster.apply(WRITER).await?;
    let written = cluster.wait_for_writer().await?;
    cluster.apply(CLONE).await?;
    read(cluster, "clone", &written.sum).await?;
    cluster.sh("clone", "rm /data/file && sync").await?;
    let original = cluster.sh("writer", "sha256sum /data/file").await?;
    ensure!(original.trim() == written.sum, "beside its clone the original reads {original}");
    cluster.delete(CLONE).await?;
    cluster.delete(WRITER).await?;
    cluster.delete(CLAIM).await?;
    cluster.wait_for_no_volumes().await
}

/// Two volumes of one running pod.
pub(crate) async fn a_group_is_taken_as_a_whole_and_goes_as_a_whole(cluster: &Cluster) -> Result<()> {
    cluster.install_chart().await?;
    cluster.apply(DATABASE).await?;
    cluster.wait_for_pod("default", "database", "Running").await?;
    cluster.apply(GROUP).await?;
    ready(cluster, "volumegroupsnapshot/database").await?;
    let members = cluster.kubectl_json(&["get", "zfssnapshots"]).await?;
    let members = members["items"].as_array().cloned().unwrap_or_default();
    let groups: Vec<_> = members.iter().map(|member| &member["spec"]["group"]["id"]).collect();
    ensure!(groups.len() == 2 && groups[0] == groups[1], "its members: {members:?}");
    ensure!(members.iter().all(|member| member["status"]["readyToUse"] == true), "its members: {members:?}");
    let snapshots = cluster.kubectl_json(&["get", "volumesnapshots"]).await?;
    ensure!(snapshots["items"].as_array().is_some_and(|all| all.len() == 2), "its snapshots: {snapshots}");
    cluster.delete(GROUP).await?;
    claims::wait_for_no_snapshots(cluster).await?;
    cluster.delete(DATABASE).await?;
    cluster.wait_for_no_volumes().await
}

/// Waits until a snapshot or a group can be used.
async fn ready(cluster: &Cluster, name: &str) -> Result<Value> {
    let what = format!("{name} is ready");
    let taken = cluster.wait(&what, async || {
        let snapshot = cluster.kubectl_json(&["get", name]).await?;
        ensure!(snapshot["status"]["readyToUse"] == true, "its status: {}", snapshot["status"]);
        Ok(snapshot)
    });
    match taken.await {
        Ok(snapshot) => Ok(snapshot),
        Err(error) => {
            let all = ["get", "zfssnapshots,volumesnapshotcontents,volumegroupsnapshotcontents", "-o", "yaml"];
            Err(error.context(cluster.kubectl(&all).await.unwrap_or_default()))
        }
    }
}

/// Waits until a reader has said what is in its volume: the file of that checksum.
async fn read(cluster: &Cluster, pod: &str, sum: &str) -> Result<String> {
    cluster.wait_for_pod("default", pod, "Running").await?;
    cluster
        .wait("the reader's log", async || {
            let log = cluster.kubectl(&["logs", pod]).await?;
            ensure!(log.contains(sum), "{pod} reads something else than {sum}: {log}");
            Ok(log)
        })
        .await
}
