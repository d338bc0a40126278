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
        let names = ["volumesnapshots", "volumesnapshotcontents", "volumesnapshotclasses"];
        for name in names {
            let crd = format!("crd/{name}.snapshot.storage.k8s.io");
            self.kubectl(&["wait", "--for=condition=Established", "--timeout=60s", &crd]).await?;
        }
        let arguments = [format!("--kubeconfig={}", self.kubeconfig.display()), "--v=2".to_owned()];
        let log = self.workdir.path().join("logs/snapshot-controller.log");
        let controller = Process::start(&inputs::kubernetes("snapshot-controller")?, arguments, &[], &log)
            .context("start the snapshot-controller")?;
        beside.push(controller);
        Ok(())
    }
}
