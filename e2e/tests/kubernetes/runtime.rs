//! What the runtime below a pod does with its volumes.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use zpod_e2e::cluster::Cluster;
use zpod_e2e::csi::Csi;
use zpod_proto::csi;

use super::claims;

const NODE: &str = "node-a";
const LEFT_OUT: &str = include_str!("../../manifests/left-out.yaml");
const RESTARTING: &str = include_str!("../../manifests/restarting.yaml");
/// A volume counts as left out after a minute, and is looked for every half a minute.
const TOLD_WITHIN: Duration = Duration::from_secs(120);

/// The Go runtime as it is shipped: the pod runs with an empty directory. Whoever looks is told why, wherever he looks, until
/// the pod is gone; with the remedy that is told the next one has its volume.
pub(crate) async fn a_volume_that_the_runtime_leaves_out_is_told_of_wherever_one_looks(
    cluster: &Cluster,
) -> Result<()> {
    cluster.install_chart().await?;
    let disabled = cluster.disable_disks(NODE, "kata-zpod")?;
    cluster.apply(LEFT_OUT).await?;
    cluster.wait_for_pod("default", "left-out", "Running").await?;
    let runs = Instant::now();
    let log = claims::wait_for_log(cluster, "default", "left-out", "that is all").await?;
    let empty = log.contains(" /data tmpfs ro") && log.contains("files: 0") && log.contains("Read-only file system");
    ensure!(empty && !log.contains("writable"), "the log is: {log}");

    let told = healthy_is(cluster, "VolumeNotPluggedIn").await?;
    let message = told["message"].as_str().unwrap_or_default();
    ensure!(told["status"] == "False" && message.contains("disable_block_device_use"), "{told}");
    let condition = stats(cluster).await?.volume_condition.context("no condition")?;
    ensure!(condition.abnormal && condition.message == message, "{condition:?}");
    cluster
        .wait("an event on claim and pod", async || {
            let events = cluster.events_of("default", "left-out").await;
            let on = |kind: &str| events.lines().any(|line| line.contains("VolumeNotPluggedIn") && line.contains(kind));
            ensure!(on("pod/left-out") && on("persistentvolumeclaim/left-out"), "the events are: {events}");
            Ok(())
        })
        .await?;
    let took = runs.elapsed();
    println!("told of {took:?} after the pod was seen running");
    ensure!(took < TOLD_WITHIN, "it took {took:?}");

    drop(disabled);
    cluster.kubectl(&["delete", "pod", "left-out", "--wait"]).await?;
    healthy_is(cluster, "NotInUse").await?;
    let status = claims::volume(cluster).await?["status"].clone();
    ensure!(status["pool"].is_null(), "no guest has ever had it, and its status says: {status}");
    cluster.apply(LEFT_OUT).await?;
    claims::wait_for_log(cluster, "default", "left-out", "writable").await?;
    healthy_is(cluster, "PoolOnline").await?;
    cluster.delete(LEFT_OUT).await?;
    cluster.wait_for_no_volumes().await
}

/// Waits until the condition `Healthy` of the only volume has this reason; gives it.
async fn healthy_is(cluster: &Cluster, reason: &str) -> Result<Value> {
    cluster
        .wait(&format!("Healthy is so because of {reason}"), async || {
            let volume = claims::volume(cluster).await?;
            let conditions = volume["status"]["conditions"].as_array().cloned().unwrap_or_default();
            let healthy = conditions.iter().find(|each| each["type"] == "Healthy" && each["reason"] == reason);
            healthy.cloned().with_context(|| format!("the conditions are: {conditions:?}"))
        })
        .await
}

/// What kubelet is told of the only volume.
async fn stats(cluster: &Cluster) -> Result<csi::NodeGetVolumeStatsResponse> {
    let volume = claims::volume(cluster).await?;
    let target = volume["status"]["publication"]["targetPath"].as_str().context("it is not published")?;
    let volume_id = volume["metadata"]["name"].as_str().context("no name")?.to_owned();
    let socket = cluster.node_dir(NODE).join("var/lib/kubelet/plugins/csi.zpod.storage/csi.sock");
    let volume = csi::Volume { volume_id, ..Default::default() };
    Ok(Csi::new(&socket).stats(&volume, &PathBuf::from(target)).await?)
}

/// The most ordinary thing in Kubernetes: alone with a volume, and beside a container that shares one.
pub(crate) async fn a_container_starts_again_in_its_place_beside_one_that_goes_on(cluster: &Cluster) -> Result<()> {
    cluster.install_chart().await?;
    cluster.apply(RESTARTING).await?;
    let log = claims::wait_for_log(cluster, "default", "restarting", "the second sees").await?;
    ensure!(log.contains("start 2 and 2") && log.contains("the second sees 2"), "the log is: {log}");
    let pod = cluster.wait_for_pod("default", "restarting", "Running").await?;
    let restarts = |name: &str| {
        let all = pod["status"]["containerStatuses"].as_array().into_iter().flatten();
        all.filter(|status| status["name"] == name).find_map(|status| status["restartCount"].as_u64())
    };
    ensure!([restarts("first"), restarts("second")] == [Some(1), Some(0)], "its status: {}", pod["status"]);
    cluster.delete(RESTARTING).await?;
    cluster.wait_for_no_volumes().await
}
