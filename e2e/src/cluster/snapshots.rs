//! The snapshot API: its CRDs and its controller, which a cluster's administrator installs once.

use anyhow::{Context as _, Result};

use super::Cluster;
use crate::inputs;
use crate::process::Process;

impl Cluster {
    /// Installs the snapshot CRDs and runs the snapshot-controller, as the administrator.
    ///
    /// # Errors
    /// When a part is missing or the API server refuses it.
    pub async fn add_snapshots(&self) -> Result<()> {
        let mut beside = self.beside.lock().await;
        if let Some(controller) = beside.first_mut() {
            return controller.must_run();
        }
        let crds = inputs::snapshot_crds()?;
        self.kubectl(&["apply", "-f", &crds.display().to_string()]).await?;
        for (group, prefix) in [("snapshot", "volumesnapshot"), ("groupsnapshot", "volumegroupsnapshot")] {
            for suffix in ["s", "contents", "classes"] {
                let crd = format!("crd/{prefix}{suffix}.{group}.storage.k8s.io");
                self.kubectl(&["wait", "--for=condition=Established", "--timeout=60s", &crd]).await?;
            }
        }
        let kubeconfig = format!("--kubeconfig={}", self.kubeconfig.display());
        let arguments = [&kubeconfig, "--v=2", "--feature-gates=CSIVolumeGroupSnapshot=true"].map(str::to_owned);
        let log = self.workdir.path().join("logs/snapshot-controller.log");
        let controller = Process::start(&inputs::kubernetes("snapshot-controller")?, arguments, &[], &log)
            .context("start the snapshot-controller")?;
        beside.push(controller);
        Ok(())
    }
}
