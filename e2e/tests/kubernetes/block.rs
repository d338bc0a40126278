//! Raw block volumes.

use std::path::PathBuf;

use anyhow::{Context as _, Result, ensure};
use zpod_e2e::cluster::Cluster;

use super::claims;

const MANIFEST: &str = include_str!("../../manifests/block.yaml");

/// It has the claim's size exactly, and the next pod finds what the first one wrote.
pub(crate) async fn a_block_volume_is_a_device_and_keeps_its_data(cluster: &Cluster) -> Result<()> {
    cluster.install_chart().await?;
    cluster.apply(MANIFEST).await?;
    for _ in 0..2 {
        cluster.apply(MANIFEST).await?;
        cluster.wait_for_pod("default", "block", "Running").await?;
        let log = claims::wait_for_log(cluster, "default", "block", "treasure").await?;
        let lines: Vec<_> = log.lines().collect();
        ensure!(lines.first() == Some(&"block special file"), "the log is: {log}");
        ensure!(lines.get(1) == Some(&"268435456"), "the log is: {log}");
        let kubelets = kept_by_kubelet(cluster).await?;
        for path in &kubelets {
            ensure!(path.symlink_metadata().is_ok(), "kubelet does not have {} while the pod runs", path.display());
        }
        cluster.kubectl(&["delete", "pod", "block", "--wait"]).await?;
        let what = "kubelet is done with the device";
        let gone = async || {
            let left = kubelets.iter().find(|path| path.symlink_metadata().is_ok());
            left.map_or(Ok(()), |left| Err(anyhow::anyhow!("{} is there", left.display())))
        };
        cluster.wait(what, gone).await?;
    }
    cluster.delete(MANIFEST).await?;
    cluster.wait_for_no_volumes().await
}

/// What kubelet has of a pod's device as long as it is not done with it. zpod-node takes a publication that nobody
/// unpublishes back only when none of this is left.
async fn kept_by_kubelet(cluster: &Cluster) -> Result<[PathBuf; 3]> {
    let pod = cluster.kubectl_json(&["get", "pod", "block"]).await?;
    let claim = cluster.kubectl_json(&["get", "pvc", "block"]).await?;
    let text = |value: &serde_json::Value| value.as_str().map(str::to_owned).context("a field is missing");
    let (uid, volume) = (text(&pod["metadata"]["uid"])?, text(&claim["spec"]["volumeName"])?);
    let root = cluster.node_dir(&text(&pod["spec"]["nodeName"])?).join("var/lib/kubelet");
    let devices = root.join("plugins/kubernetes.io/csi/volumeDevices");
    let target = devices.join("publish").join(&volume).join(&uid);
    Ok([target, devices.join(&volume).join("dev").join(&uid), root.join("pods").join(&uid)])
}
