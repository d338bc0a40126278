//! What is asked of the objects of volumes in more than one scenario.

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use zpod_e2e::cluster::Cluster;

/// The only volume there is.
pub(crate) async fn volume(cluster: &Cluster) -> Result<Value> {
    let volumes = cluster.kubectl_json(&["get", "zfsvolumes"]).await?;
    volumes["items"].get(0).cloned().context("there is no ZfsVolume")
}

/// Waits until there are so many volumes.
pub(crate) async fn wait_for_volumes(cluster: &Cluster, count: usize) -> Result<()> {
    cluster
        .wait(&format!("{count} volumes"), async || {
            let names = cluster.kubectl(&["get", "zfsvolumes", "-o", "name"]).await?;
            ensure!(names.lines().count() == count, "volumes: {names}");
            Ok(())
        })
        .await
}

/// Waits until there is no object of any snapshot.
pub(crate) async fn wait_for_no_snapshots(cluster: &Cluster) -> Result<()> {
    cluster
        .wait("no snapshots", async || {
            let kinds = "zfssnapshots,volumesnapshotcontents,volumegroupsnapshotcontents";
            let names = cluster.kubectl(&["get", kinds, "-o", "name"]).await?;
            ensure!(names.trim().is_empty(), "snapshots: {names}");
            Ok(())
        })
        .await
}

/// Waits until a pod's log contains this; gives the log.
pub(crate) async fn wait_for_log(cluster: &Cluster, namespace: &str, pod: &str, text: &str) -> Result<String> {
    cluster
        .wait(&format!("{text:?} in the log of {pod}"), async || {
            let log = cluster.kubectl(&["logs", "-n", namespace, pod]).await?;
            ensure!(log.contains(text), "the log is: {log}");
            Ok(log)
        })
        .await
}

/// Waits until the events of a claim or a pod of the namespace `default` have all these words.
pub(crate) async fn wait_for_events(cluster: &Cluster, kind: &str, name: &str, words: &[&str]) -> Result<()> {
    let selector = format!("involvedObject.name={name},involvedObject.kind={kind}");
    cluster
        .wait(&format!("events of {kind} {name} with {words:?}"), async || {
            let events = cluster.kubectl(&["get", "events", "--field-selector", &selector]).await?;
            let missing: Vec<_> = words.iter().filter(|&&word| !events.contains(word)).collect();
            ensure!(missing.is_empty(), "{missing:?} are not in the events: {events}");
            Ok(())
        })
        .await
}
