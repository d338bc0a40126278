//! zpod in the cluster: the chart, as an administrator installs it.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use super::Cluster;

/// Where the chart is installed.
pub const NAMESPACE: &str = "zpod-system";

/// The chart's directory.
pub fn chart() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../charts/zpod")
}

impl Cluster {
    /// Installs the chart with its defaults and waits until all of it is ready; nothing when it is installed.
    ///
    /// # Errors
    /// When it is refused, or doesn't get ready.
    pub async fn install_chart(&self) -> Result<()> {
        if self.helm(&["status", "zpod", "-n", NAMESPACE]).await.is_ok() {
            return Ok(());
        }
        // The node plugin is privileged: it mounts for kubelet.
        self.apply(&format!(
            "{{apiVersion: v1, kind: Namespace, metadata: {{name: {NAMESPACE}, labels: \
             {{pod-security.kubernetes.io/enforce: privileged}}}}}}"
        ))
        .await?;
        let chart = chart().display().to_string();
        let install = ["install", "zpod", &chart, "-n", NAMESPACE, "--wait", "--timeout", "4m"];
        match self.helm(&install).await {
            Ok(_) => Ok(()),
            Err(error) => {
                let pods = self.kubectl(&["describe", "pods", "-n", NAMESPACE]).await;
                Err(error).with_context(|| pods.unwrap_or_else(|error| format!("{error:#}")))
            }
        }
    }
}
