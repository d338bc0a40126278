//! zpod in the cluster: the chart, as an administrator installs it.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

use super::Cluster;
use crate::inputs;

/// Where the chart is installed.
pub const NAMESPACE: &str = "zpod-system";
/// Values that have no default. The nodes go by the images' names.
pub const IMAGES: &str = "image.repository=registry.invalid/zpod,guest.image.repository=registry.invalid/zpod-guest";

/// The chart's directory.
pub fn chart() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../charts/zpod")
}

/// The path of one of the plain manifests.
pub fn manifest(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/kubernetes").join(name).with_extension("yaml");
    path.display().to_string()
}

/// The runtime handlers that the chart tells zpod-node of: `NAME=go` or `NAME=rust`.
///
/// # Errors
/// When Helm can't render the chart, or none is in it.
pub(super) fn runtime_handlers() -> Result<Vec<String>> {
    let helm = inputs::kubernetes("helm")?;
    let output = Command::new(helm).args(["template", "zpod"]).arg(chart()).args(["--set", IMAGES]).output()?;
    ensure!(output.status.success(), "helm template: {}", String::from_utf8_lossy(&output.stderr));
    let rendered = String::from_utf8(output.stdout)?;
    let handlers = rendered.lines().filter_map(|line| line.trim().strip_prefix("- --runtime-handler="));
    let handlers: Vec<_> = handlers.map(str::to_owned).collect();
    ensure!(!handlers.is_empty(), "the chart tells zpod-node of no runtime handler");
    Ok(handlers)
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
        // What the chart makes of snapshots depends on what the cluster knows of them.
        self.add_snapshots().await?;
        self.kubectl(&["apply", "-f", &manifest("namespace")]).await?;
        let chart = chart().display().to_string();
        let install = ["install", "zpod", &chart, "-n", NAMESPACE, "--set", IMAGES, "--wait", "--timeout", "5m"];
        match self.helm(&install).await {
            Ok(_) => Ok(()),
            Err(error) => {
                let pods = self.kubectl(&["describe", "pods", "-n", NAMESPACE]).await;
                Err(error).with_context(|| pods.unwrap_or_else(|error| format!("{error:#}")))
            }
        }
    }

    /// Ends what a scenario that failed has left in the tenants' namespaces, lest the next ones fail by it.
    ///
    /// # Errors
    /// When something stays.
    pub async fn clear(&self) -> Result<()> {
        let namespaces = self.kubectl(&["get", "namespaces", "-o", "jsonpath={.items[*].metadata.name}"]).await?;
        let tenants = |name: &&str| !name.starts_with("kube-") && *name != NAMESPACE;
        for namespace in namespaces.split_whitespace().filter(tenants) {
            for kinds in ["statefulsets,pods,persistentvolumeclaims", "volumesnapshots,volumegroupsnapshots"] {
                let delete = ["delete", kinds, "--all", "-n", namespace, "--wait=false", "--ignore-not-found"];
                // There may be no snapshots in this cluster.
                let _ = self.kubectl(&delete).await;
            }
        }
        self.wait_for_no_volumes().await
    }

    /// Waits until there is no record and no file of any volume or snapshot.
    ///
    /// # Errors
    /// When something stays.
    pub async fn wait_for_no_volumes(&self) -> Result<()> {
        self.wait("nothing is left of any volume or snapshot", async || {
            let records = self.kubectl(&["get", "zfsvolumes,zfssnapshots,persistentvolumes", "-o", "name"]).await?;
            ensure!(records.trim().is_empty(), "records: {records}");
            for node in std::fs::read_dir(self.workdir.path().join("n")).context("list the nodes")?.flatten() {
                let files = std::fs::read_dir(node.path().join("var/lib/zpod/volumes")).into_iter().flatten().flatten();
                let names: Vec<_> = files.map(|file| file.path()).collect();
                let kept = |path: &&PathBuf| {
                    path.extension().is_some_and(|extension| extension == "img" || extension == "snap")
                };
                ensure!(!names.iter().any(|path| kept(&path)), "files: {names:?}");
            }
            Ok(())
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::direct_volume::DirectVolume;
    use crate::shim::Handler;

    /// What pods get that name the RuntimeClass of the documentation. That this is what discards need, and what comes of it,
    /// is shown in guests.
    #[test]
    fn the_runtime_of_the_charts_first_handler_passes_discards_on() {
        let handlers = runtime_handlers().unwrap();
        let first: Handler = handlers[0].parse().unwrap();
        assert_eq!(first.name, "kata-zpod");
        let entry = r#"{"volume-type": "directvol", "device": "/x", "fstype": "zfs", "options": ["discard"],
                        "metadata": {"createFilesystem": "true"}}"#;
        let entry: DirectVolume = serde_json::from_str(entry).unwrap();
        assert!(first.runtime.passes_discards(&entry), "{handlers:?}");
    }
}
