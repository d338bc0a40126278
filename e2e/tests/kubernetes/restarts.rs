//! zpod's own programs end in the middle of things.

use std::fmt::Write as _;

use anyhow::{Result, ensure};
use zpod_e2e::cluster::{Cluster, chart::NAMESPACE};

const CLAIMS: usize = 100;
const CLASSES: &str = include_str!("../../manifests/classes.yaml");
const STATEFUL_SET: &str = include_str!("../../manifests/statefulset.yaml");

pub(crate) async fn a_node_plugin_restarts_while_three_replicas_run(cluster: &Cluster) -> Result<()> {
    cluster.install_chart().await?;
    cluster.apply(STATEFUL_SET).await?;
    cluster.kubectl(&["rollout", "status", "statefulset/store", "--timeout=8m"]).await?;
    let before = starts(cluster).await?;
    let node = ["delete", "pods", "-n", NAMESPACE, "-l", "app.kubernetes.io/name=zpod-node", "--wait"];
    cluster.kubectl(&node).await?;
    cluster.kubectl(&["rollout", "status", "-n", NAMESPACE, "daemonset/zpod-node", "--timeout=3m"]).await?;
    let after = starts(cluster).await?;
    ensure!(before == after, "containers started before the restart {before}, and after it {after}");
    // The new one knows the volumes of the old: their pod can be replaced.
    cluster.kubectl(&["delete", "pod", "store-1", "--wait"]).await?;
    cluster.wait_for_pod("default", "store-1", "Running").await?;
    cluster
        .wait("what both pods of that name wrote", async || {
            let names = cluster.kubectl(&["logs", "store-1"]).await?;
            ensure!(names.lines().filter(|line| *line == "store-1").count() == 2, "the volume has: {names}");
            Ok(())
        })
        .await?;
    cluster.delete(STATEFUL_SET).await?;
    cluster.wait_for_no_volumes().await
}

/// When each container of the set was started.
async fn starts(cluster: &Cluster) -> Result<String> {
    let path = "jsonpath={.items[*].status.containerStatuses[*].state.running.startedAt}";
    cluster.kubectl(&["get", "pods", "-l", "app=store", "-o", path]).await
}

pub(crate) async fn a_burst_of_claims_outlives_the_controllers(cluster: &Cluster) -> Result<()> {
    cluster.install_chart().await?;
    cluster.apply(CLASSES).await?;
    let mut claims = String::new();
    for number in 0..CLAIMS {
        write!(
            claims,
            "---\n{{apiVersion: v1, kind: PersistentVolumeClaim, metadata: {{name: burst-{number}}}, spec: \
             {{storageClassName: zpod-immediate, accessModes: [ReadWriteOncePod], resources: {{requests: {{storage: \
             256Mi}}}}}}}}\n"
        )?;
    }
    cluster.apply(&claims).await?;
    let kill = ["delete", "pods", "-n", NAMESPACE, "-l", "app.kubernetes.io/name=zpod-controller", "--force"];
    cluster.kubectl(&[&kill[..], &["--grace-period=0"]].concat()).await?;
    cluster
        .wait("all claims are bound", async || {
            let phases = cluster.kubectl(&["get", "pvc", "-o", "jsonpath={.items[*].status.phase}"]).await?;
            let bound = phases.split(' ').filter(|phase| *phase == "Bound").count();
            ensure!(bound == CLAIMS, "{bound} of {CLAIMS} are");
            Ok(())
        })
        .await?;
    let volumes = cluster.kubectl(&["get", "zfsvolumes", "-o", "name"]).await?;
    ensure!(volumes.lines().count() == CLAIMS, "{CLAIMS} claims, and {} volumes", volumes.lines().count());
    cluster.delete(&claims).await?;
    cluster.delete(CLASSES).await?;
    cluster.wait_for_no_volumes().await
}
