//! What the cluster's parts do when others are gone.

use anyhow::{Result, ensure};
use zpod_e2e::cluster::Cluster;

const NOTE: &str = "{apiVersion: v1, kind: ConfigMap, metadata: {name: note, namespace: default}}";

pub(crate) async fn the_api_server_comes_back_with_what_it_knew(cluster: &Cluster) -> Result<()> {
    cluster.apply(NOTE).await?;
    cluster.stop_api_server().await;
    ensure!(cluster.kubectl(&["get", "configmap", "note"]).await.is_err(), "a killed API server answers");
    cluster.start_api_server().await?;
    cluster.kubectl(&["get", "configmap", "note"]).await?;
    cluster.delete(NOTE).await?;
    Ok(())
}

/// And the directories that it had.
pub(crate) async fn a_killed_node_comes_back_with_its_name(cluster: &Cluster) -> Result<()> {
    cluster.add_node("node-b").await?;
    let root = cluster.node_dir("node-b");
    ensure!(root.join("var/lib/kubelet").is_dir(), "{} is not the node's root", root.display());
    cluster.kill_node("node-b").await?;
    cluster.kubectl(&["delete", "node", "node-b"]).await?;
    cluster.add_node("node-b").await?;
    cluster.remove_node("node-b").await?;
    // The other one was not touched by any of it.
    cluster
        .wait("node-a alone", async || {
            let nodes = cluster.kubectl(&["get", "nodes", "-o", "name"]).await?;
            ensure!(nodes.trim() == "node/node-a", "nodes: {nodes}");
            Ok(())
        })
        .await
}
