//! The plain manifests, for clusters without Helm.

use anyhow::{Context as _, Result, ensure};
use zpod_e2e::cluster::Cluster;
use zpod_e2e::cluster::chart::{NAMESPACE, manifest};

use super::chart;

const NODE: &str = "node-a";

/// As docs/install.md says it.
fn with_images(name: &str) -> Result<String> {
    let text = std::fs::read_to_string(manifest(name)).with_context(|| manifest(name))?;
    Ok(text.replace("REGISTRY/", "registry.invalid/"))
}

/// Applied, they run; the guest goes when it is asked for; and `kubectl delete` of the driver leaves every record, the
/// definitions and the namespace.
pub(crate) async fn deleting_the_plain_manifests_takes_no_record(cluster: &Cluster) -> Result<()> {
    for name in ["namespace", "crds"] {
        cluster.kubectl(&["apply", "--server-side", "-f", &manifest(name)]).await?;
    }
    let driver = with_images("zpod")?;
    cluster.apply_on_server(&driver).await?;
    let rollout = async || {
        for what in ["daemonset/zpod-node", "deployment/zpod-controller"] {
            let status = ["rollout", "status", what, "-n", NAMESPACE, "--timeout=3m"];
            if let Err(error) = cluster.kubectl(&status).await {
                let pods = cluster.kubectl(&["describe", "pods", "-n", NAMESPACE]).await;
                return Err(error).with_context(|| pods.unwrap_or_else(|error| format!("{error:#}")));
            }
        }
        Ok(())
    };
    rollout().await?;
    let guest = cluster.node_dir(NODE).join("opt/zpod/guest");
    ensure!(guest.join("initrd").exists(), "the installer put no initrd on the node");

    cluster.apply_on_server(&with_images("guest-uninstall")?).await?;
    rollout().await?;
    ensure!(!guest.is_symlink(), "uninstalled, and {} is there", guest.display());

    let (volume, record) = chart::record();
    cluster.apply(&record).await?;
    cluster.delete(&driver).await?;
    let left = cluster.kubectl(&["get", "daemonsets,deployments", "-n", NAMESPACE, "-o", "name"]).await?;
    ensure!(left.trim().is_empty(), "left behind: {left}");
    for object in [["zfsvolume", volume], ["namespace", NAMESPACE], ["crd", "zfsvolumes.zpod.storage"]] {
        let found = cluster.kubectl_json(&[&["get"], &object[..]].concat()).await?;
        ensure!(found["metadata"]["deletionTimestamp"].is_null(), "deleting the driver deletes {object:?}: {found}");
    }
    cluster.kubectl(&["delete", "zfsvolume", volume]).await?;
    Ok(())
}
