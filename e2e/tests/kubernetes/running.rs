//! What happens around a pod while it runs.

use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use zpod_e2e::cluster::Cluster;
use zpod_e2e::cluster::chart::{NAMESPACE, chart};

use super::claims::{volume, wait_for_events};
use super::kubectl::{json, plugin};

const SECOND: Duration = Duration::from_secs(1);
const KIND: &str = "zfsvolumes.zpod.storage";
const OUTAGE: Duration = Duration::from_secs(30);
const CLAIM: &str = include_str!("../../manifests/claim.yaml");
const EXPANDED: &str = include_str!("../../manifests/claim-expanded.yaml");
const GROUP: &str = include_str!("../../manifests/group.yaml");
const WRITER: &str = include_str!("../../manifests/pod.yaml");
/// Writes 88 % of a volume, then 5 % more, both of what can't be compressed.
const FILLER: &str = include_str!("../../manifests/filler.yaml");

/// The node plugin is replaced, the API server is away, and then the claim is deleted: the pod runs on, its volume grows, and
/// its data goes with the claim only when the pod has gone.
pub(crate) async fn a_pod_runs_on_whatever_happens_around_it(cluster: &Cluster) -> Result<()> {
    cluster.install_chart().await?;
    cluster.apply(CLAIM).await?;
    cluster.apply(WRITER).await?;
    cluster.wait_for_pod("default", "writer", "Running").await?;
    health(cluster, "Online").await?;

    cluster.kubectl(&["delete", "pod", "-n", NAMESPACE, "-l", "app.kubernetes.io/name=zpod-node", "--wait"]).await?;
    cluster.kubectl(&["rollout", "status", "daemonset/zpod-node", "-n", NAMESPACE, "--timeout=120s"]).await?;
    runs_on(cluster).await.context("after the node plugin was replaced")?;

    cluster.stop_api_server().await;
    tokio::time::sleep(OUTAGE).await;
    cluster.start_api_server().await?;
    cluster.apply(EXPANDED).await?;
    let grows = cluster.wait_for_size("data", "2Gi").await;
    grows.context("after the API server was away")?;
    runs_on(cluster).await.context("after the API server was away")?;

    let name = volume(cluster).await?["metadata"]["name"].as_str().context("no name")?.to_owned();
    let error =
        cluster.kubectl(&["patch", "zfsvolume", &name, "--type=merge", "-p", r#"{"spec":{"capacity":"1Gi"}}"#]).await;
    let error = error.err().map(|error| format!("{error:#}")).unwrap_or_default();
    ensure!(error.contains("volumes never shrink"), "the API server let a volume shrink: {error}");
    cluster.kubectl(&["delete", "pvc", "data", "--wait=false"]).await?;
    tokio::time::sleep(5 * SECOND).await;
    runs_on(cluster).await.context("after its claim was deleted")?;
    volume(cluster).await.context("the volume of a running pod is gone")?;
    cluster.delete(WRITER).await?;
    cluster.wait_for_no_volumes().await
}

/// Deleting the volume's object, or the definition of all such objects, is refused. Where it happens all the same, the pod runs
/// on, its data stays, and the record is adopted.
pub(crate) async fn a_record_that_was_deleted_by_hand_is_adopted(cluster: &Cluster) -> Result<()> {
    cluster.install_chart().await?;
    cluster.apply(CLAIM).await?;
    cluster.apply(WRITER).await?;
    cluster.wait_for_pod("default", "writer", "Running").await?;
    // The guest's word is in the status at once; that it is recorded comes behind.
    cluster
        .wait("its pool is recorded", async || {
            let volume = volume(cluster).await?;
            ensure!(volume["status"]["initialized"] == true, "status: {}", volume["status"]);
            Ok(())
        })
        .await?;
    let name = volume(cluster).await?["metadata"]["name"].as_str().context("no name")?.to_owned();
    let (object, definition) =
        (["delete", "zfsvolume", &name, "--wait=false"], ["delete", "crd", KIND, "--wait=false"]);
    for (deletion, why) in [
        (object, "PersistentVolumeClaim or VolumeSnapshot instead (default/data)"),
        (definition, "uninstall zpod first"),
    ] {
        let error = cluster.kubectl(&deletion).await.err().map(|error| format!("{error:#}")).unwrap_or_default();
        ensure!(error.contains(why), "{deletion:?}: {error}");
    }

    // As in a cluster where the chart was of a version before, or is not installed.
    cluster.kubectl(&["delete", "validatingadmissionpolicybinding", "zpod-deletion"]).await?;
    cluster.wait("the policy's end", async || cluster.kubectl(&object).await).await?;
    kept(cluster).await?;
    let file = cluster.dir().join("adopted.json");
    adopt(cluster, &[&name, "--file", &file.display().to_string()]).await?;
    cluster
        .kubectl(&["patch", "pvc", "data", "-p", r#"{"spec":{"resources":{"requests":{"storage":"2Gi"}}}}"#])
        .await?;
    cluster.wait_for_size("data", "2Gi").await.context("after its record was adopted")?;

    cluster.kubectl(&definition).await?;
    kept(cluster).await?;
    let file = cluster.dir().join("of-the-definition.json").display().to_string();
    let refused = plugin(cluster, &["adopt", "--file", &file], Stdio::null(), Stdio::piped()).await?;
    let text = String::from_utf8_lossy(&refused.stderr);
    ensure!(text.contains(&format!("kubectl zpod adopt --from {file}")), "the definition is being deleted: {text}");
    cluster.kubectl(&["wait", "--for=delete", &format!("crd/{KIND}"), "--timeout=60s"]).await?;
    let chart = chart().display().to_string();
    cluster.helm(&["upgrade", "zpod", &chart, "-n", NAMESPACE, "--reuse-values", "--wait", "--timeout", "3m"]).await?;
    cluster.kubectl(&["wait", "--for=condition=Established", &format!("crd/{KIND}"), "--timeout=60s"]).await?;
    adopt(cluster, &["--from", &file]).await?;

    cluster.delete(WRITER).await?;
    cluster.kubectl(&["delete", "pvc", "data"]).await?;
    cluster.wait_for_no_volumes().await
}

/// The volume's node says that it keeps what was deleted by hand, and the pod runs on.
async fn kept(cluster: &Cluster) -> Result<()> {
    cluster
        .wait("a volume deleted by hand says that it is kept", async || {
            let volume = volume(cluster).await?;
            let conditions = volume["status"]["conditions"].as_array().cloned().unwrap_or_default();
            let said = conditions.iter().find(|each| each["type"] == "Destroyed" && each["reason"] == "NotAskedFor");
            let message = said.with_context(|| format!("its conditions: {conditions:?}"))?["message"].to_string();
            ensure!(message.contains("kubectl zpod adopt"), "it says {message}");
            Ok(())
        })
        .await?;
    runs_on(cluster).await.context("after its record was deleted by hand")
}

async fn adopt(cluster: &Cluster, arguments: &[&str]) -> Result<()> {
    let adopted = plugin(cluster, &[&["adopt"], arguments].concat(), Stdio::null(), Stdio::piped()).await?;
    ensure!(adopted.status.success(), "{arguments:?}: {adopted:?}");
    let volume = volume(cluster).await?;
    let (metadata, status) = (&volume["metadata"], &volume["status"]);
    ensure!(metadata["deletionTimestamp"].is_null() && status["phase"] == "Ready", "it is adopted, and {volume}");
    ensure!(status["publication"]["pod"]["name"] == "writer" && status["initialized"] == true, "its status: {status}");
    runs_on(cluster).await.context("after its record was adopted")
}

/// Neither its user nor its group is root: the guest gives the volume to its fsGroup.
pub(crate) async fn a_pod_that_is_not_root_writes_to_its_volume(cluster: &Cluster) -> Result<()> {
    cluster.install_chart().await?;
    cluster.apply(GROUP).await?;
    cluster.wait_for_pod("default", "group", "Running").await?;
    cluster
        .wait("the file's owner", async || {
            let log = cluster.kubectl(&["logs", "group"]).await?;
            ensure!(log.trim() == "1000:2000", "the log is: {log}");
            Ok(())
        })
        .await?;
    cluster.delete(GROUP).await?;
    cluster.wait_for_no_volumes().await
}

/// What the guest notices is in the volume's status, on the claim and on the pod.
pub(crate) async fn a_volume_that_fills_is_told_of_on_its_claim_and_its_pod(cluster: &Cluster) -> Result<()> {
    cluster.install_chart().await?;
    cluster.apply(FILLER).await?;
    cluster.wait_for_pod("default", "filler", "Running").await?;
    for reason in ["VolumeFilling", "VolumeNearlyFull", "SnapshotsPaused"] {
        told_of(cluster, reason).await?;
    }
    let volume = volume(cluster).await?;
    ensure!(volume["status"]["pool"]["health"] == "Online", "its status: {}", volume["status"]["pool"]);

    // What is removed is held by the snapshot that was taken at the start, unless that goes too.
    cluster
        .wait("no snapshot is left", async || {
            let listed = json(cluster, &["snapshots", "filler"]).await?;
            let taken: Vec<_> = listed["pool"]["snapshots"].as_array().context("its guest can be asked")?.clone();
            for snapshot in taken.iter().filter_map(|snapshot| snapshot["name"].as_str()) {
                // The guest may have removed it meanwhile, for it makes room too.
                let remove = ["snapshots", "filler", "--remove", snapshot];
                plugin(cluster, &remove, Stdio::null(), Stdio::piped()).await?;
            }
            ensure!(taken.is_empty(), "{listed}");
            Ok(())
        })
        .await?;
    cluster.sh("filler", "rm /data/most /data/more; sync").await?;
    told_of(cluster, "SnapshotsResumed").await?;
    cluster.delete(FILLER).await?;
    cluster.wait_for_no_volumes().await
}

/// By an event of that reason on the claim and on the pod.
async fn told_of(cluster: &Cluster, reason: &str) -> Result<()> {
    wait_for_events(cluster, "PersistentVolumeClaim", "filler", &[reason]).await?;
    wait_for_events(cluster, "Pod", "filler", &[reason]).await
}

async fn health(cluster: &Cluster, wanted: &str) -> Result<()> {
    cluster
        .wait("the pool's health in the volume's status", async || {
            let volume = volume(cluster).await?;
            let health = &volume["status"]["pool"]["health"];
            ensure!(health == wanted, "it is {health}; status: {}", volume["status"]);
            Ok(())
        })
        .await
}

/// It is the same container, never started again, and its guest is heard.
async fn runs_on(cluster: &Cluster) -> Result<()> {
    let pod = cluster.wait_for_pod("default", "writer", "Running").await?;
    let status = &pod["status"]["containerStatuses"][0];
    ensure!(status["restartCount"] == 0, "its container was started again: {status}");
    health(cluster, "Online").await
}
