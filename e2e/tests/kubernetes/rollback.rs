//! `kubectl zpod rollback`: from the command to the next pod's files, the status and the events.

use std::process::Stdio;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use zpod_e2e::cluster::Cluster;

use super::claims;
use super::kubectl::{json, plugin};

const CLAIM: &str = include_str!("../../manifests/claim.yaml");
const WRITER: &str = include_str!("../../manifests/pod.yaml");
const PROGRAM: &str = include_str!("../../manifests/deployment.yaml");

/// The pod of the Deployment that runs, but for that one.
async fn program(cluster: &Cluster, but: &str) -> Result<String> {
    cluster
        .wait("the program's pod", async || {
            let pods = cluster.kubectl_json(&["get", "pods", "-l", "app=program"]).await?;
            let running = |pod: &&Value| {
                let (status, metadata) = (&pod["status"], &pod["metadata"]);
                status["phase"] == "Running" && metadata["deletionTimestamp"].is_null() && metadata["name"] != but
            };
            let pod = pods["items"].as_array().into_iter().flatten().find(running);
            Ok(pod.with_context(|| format!("none runs: {pods}"))?["metadata"]["name"].as_str().unwrap_or("").to_owned())
        })
        .await
}

async fn refused(cluster: &Cluster, arguments: &[&str], want: &str) -> Result<()> {
    let output = plugin(cluster, arguments, Stdio::null(), Stdio::piped()).await?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(!output.status.success() && said.contains(want), "{arguments:?}: {want:?} is not in {said}");
    Ok(())
}

/// Waits until no pod has the volume.
async fn unused(cluster: &Cluster) -> Result<()> {
    cluster
        .wait("no pod has the volume", async || {
            let publication = claims::volume(cluster).await?["status"]["publication"].clone();
            ensure!(publication.is_null(), "{publication}");
            Ok(())
        })
        .await
}

async fn rollback(cluster: &Cluster) -> Result<Value> {
    Ok(claims::volume(cluster).await?["status"]["rollback"].clone())
}

/// A pod with an owner is ended and made anew with the files of before; without a pod the next one has them. What is in the
/// way is said, and nothing is changed.
pub(crate) async fn a_volume_goes_back_to_a_snapshot_with_its_next_pod(cluster: &Cluster) -> Result<()> {
    cluster.install_chart().await?;
    cluster.apply(CLAIM).await?;
    cluster.apply(PROGRAM).await?;
    let first = program(cluster, "").await?;
    for name in ["one", "two"] {
        cluster.sh(&first, &format!("echo {name} > /data/file && sync")).await?;
        json(cluster, &["snapshot", "data", name]).await?;
    }
    cluster.sh(&first, "echo three > /data/file && sync").await?;

    refused(cluster, &["rollback", "data@one", "--yes"], "--restart ends the pod").await?;
    refused(cluster, &["rollback", "data@one", "--restart", "--yes"], "destroyed: two").await?;
    refused(cluster, &["rollback", "data@none", "--restart", "--yes"], "it has no snapshot none").await?;
    refused(cluster, &["rollback", "data@one", "--restart", "--destroy-newer"], "newer snapshots are destroyed: two")
        .await?;
    refused(cluster, &["rollback", "data", "--cancel"], "nothing to take back").await?;
    ensure!(rollback(cluster).await?.is_null(), "{}", rollback(cluster).await?);
    ensure!(program(cluster, "").await? == first && cluster.sh(&first, "cat /data/file").await?.trim() == "three");

    let done = json(cluster, &["rollback", "data@one", "--restart", "--destroy-newer", "--yes"]).await?;
    ensure!(done["state"] == "RolledBack" && done["plan"]["newer"][0] == "two", "{done}");
    let second = program(cluster, &first).await?;
    ensure!(cluster.sh(&second, "cat /data/file").await?.trim() == "one");
    let status = rollback(cluster).await?;
    ensure!(status["state"] == "RolledBack" && status["id"] == done["id"] && status["endTime"].is_string(), "{status}");
    for name in ["data", second.as_str()] {
        cluster
            .wait("an event that tells of it", async || {
                let events = cluster.events_of("default", name).await;
                ensure!(events.contains("RolledBack") && events.contains("snapshot one"), "the events are: {events}");
                Ok(())
            })
            .await?;
    }
    let listed = json(cluster, &["snapshots", "data"]).await?;
    ensure!(listed["pool"]["snapshots"].as_array().is_some_and(|all| all.len() == 1), "{listed}");

    // Without a pod. It can be taken back until the next one starts.
    cluster.sh(&second, "echo mine > /data/file && sync").await?;
    cluster.delete(PROGRAM).await?;
    unused(cluster).await?;
    let asked = json(cluster, &["rollback", "data@one", "--yes"]).await?;
    ensure!(asked["state"] == "Pending" && rollback(cluster).await?["state"] == "Pending", "{asked}");
    unused(cluster).await?;
    // No pod of the plugin's own is the start with which it goes back.
    for arguments in [&["rollback", "data@one", "--yes"][..], &["snapshot", "data"]] {
        refused(cluster, arguments, "goes back to snapshot one with its next pod").await?;
    }
    let shown = json(cluster, &["status", "data"]).await?;
    ensure!(shown["volumes"][0]["rollback"]["state"] == "Pending", "{shown}");
    let canceled = json(cluster, &["rollback", "data", "--cancel"]).await?;
    ensure!(canceled["state"] == "Canceled" && canceled["id"] == asked["id"], "{canceled}");
    ensure!(rollback(cluster).await?.is_null());
    let asked = json(cluster, &["rollback", "data@one", "--yes"]).await?;
    cluster.apply(WRITER).await?;
    cluster.wait_for_writer().await?;
    let file = cluster.sh("writer", "cat /data/file").await?;
    ensure!(file.trim() == "one", "{file}");
    ensure!(asked["state"] == "Pending", "{asked}");
    cluster
        .wait("what came of it is recorded", async || {
            let status = rollback(cluster).await?;
            ensure!(status["state"] == "RolledBack" && status["id"] == asked["id"], "{status}");
            Ok(())
        })
        .await?;
    refused(cluster, &["rollback", "data@one", "--restart", "--yes"], "no owner that would make it anew").await?;
    cluster.delete(WRITER).await?;
    cluster.delete(CLAIM).await?;
    cluster.wait_for_no_volumes().await
}
