//! Commands inside pods: `kubectl exec` needs a streaming server, which our CRI server has not.

use anyhow::{Context as _, Result};

use super::Cluster;
use crate::cri::client::Client;
use crate::cri::node;

impl Cluster {
    /// What a shell command prints in the first container of a pod.
    ///
    /// # Errors
    /// When the pod doesn't run, or the command fails.
    pub async fn sh(&self, pod: &str, script: &str) -> Result<String> {
        let object = self.kubectl_json(&["get", "pod", pod]).await?;
        let on = object["spec"]["nodeName"].as_str().with_context(|| format!("pod {pod} is on no node"))?;
        let container = object["spec"]["containers"][0]["name"].as_str().context("a pod without containers")?;
        Client::new(&node::socket(&self.node_dir(on))).sh("default", pod, container, script).await
    }
}
