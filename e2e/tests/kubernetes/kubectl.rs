//! `kubectl zpod` against a cluster: its objects, and the admin endpoint through the API server's proxy.

use std::fs::{self, File};
use std::process::{Output, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use tokio::process::Command;
use zpod_e2e::cluster::Cluster;
use zpod_e2e::inputs;

use super::claims::{volume, wait_for_events};

const CALL: Duration = Duration::from_secs(300);
const CLAIM: &str = include_str!("../../manifests/claim.yaml");
const WRITER: &str = include_str!("../../manifests/pod.yaml");

pub(super) async fn plugin(cluster: &Cluster, arguments: &[&str], stdin: Stdio, stdout: Stdio) -> Result<Output> {
    let mut command = Command::new(inputs::kubectl_zpod()?);
    command.args(arguments).arg("--kubeconfig").arg(cluster.kubeconfig()).kill_on_drop(true);
    command.stdin(stdin).stdout(stdout).stderr(Stdio::piped());
    let output = command.spawn()?.wait_with_output();
    let output = tokio::time::timeout(CALL, output).await.with_context(|| format!("{arguments:?} goes on"))??;
    print!("{}", String::from_utf8_lossy(&output.stderr));
    Ok(output)
}

pub(super) async fn json(cluster: &Cluster, arguments: &[&str]) -> Result<Value> {
    let all = [arguments, &["-o", "json"]].concat();
    let output = plugin(cluster, &all, Stdio::null(), Stdio::piped()).await?;
    let text = String::from_utf8_lossy(&output.stdout);
    serde_json::from_str(&text)
        .with_context(|| format!("{arguments:?}: {text}{}", String::from_utf8_lossy(&output.stderr)))
}

/// A running pod is looked at, changed, scrubbed and sent; what was sent makes another claim, whose first pod is the
/// plugin's own.
pub(crate) async fn a_volume_is_shown_changed_scrubbed_and_sent_by_kubectl(cluster: &Cluster) -> Result<()> {
    cluster.install_chart().await?;
    cluster.apply(CLAIM).await?;
    cluster.apply(WRITER).await?;
    let written = cluster.wait_for_writer().await?;
    cluster
        .wait("status shows the pool", async || {
            let status = json(cluster, &["status", "data"]).await?;
            let volume = &status["volumes"][0];
            ensure!(volume["claim"] == "data" && volume["pod"] == "writer" && volume["health"] == "Online", "{status}");
            Ok(())
        })
        .await?;
    let tree = plugin(cluster, &["status", "data", "--tree"], Stdio::null(), Stdio::piped()).await?;
    let tree = String::from_utf8(tree.stdout)?;
    ensure!(tree.contains("claim default/data") && tree.contains("└─ dataset zpod-"), "{tree}");

    let set = json(cluster, &["props", "set", "data", "compression=gzip-3"]).await?;
    ensure!(set["properties"][0]["value"] == "gzip-3", "{set}");
    let live = json(cluster, &["props", "get", "data", "compression", "--live"]).await?;
    ensure!(live["properties"][0]["value"] == "gzip-3", "the guest says {live}");

    let scrub = json(cluster, &["scrub", "data", "--wait", "--timeout", "4m"]).await?;
    ensure!(scrub["state"] == "Finished" && scrub["errors"] == 0, "{scrub}");

    let doctor = json(cluster, &["doctor", "--all"]).await?;
    let checks = doctor["nodes"][0]["checks"].as_array().context("no checks")?.clone();
    for name in ["ready", "backing-directory", "guest-image", "runtime-class", "guests"] {
        let check =
            checks.iter().find(|check| check["name"] == name).with_context(|| format!("no {name}: {doctor}"))?;
        ensure!(check["level"] != "fail", "{check}");
    }

    let file = cluster.dir().join("data.zfs");
    let sent =
        plugin(cluster, &["send", "data", "--snapshot", "one"], Stdio::null(), File::create(&file)?.into()).await?;
    ensure!(sent.status.success(), "{sent:?}");
    let again = plugin(cluster, &["send", "data", "--snapshot", "two"], Stdio::null(), Stdio::null()).await?;
    ensure!(again.status.success(), "{again:?}");
    let removed = json(cluster, &["send", "data", "--remove", "two"]).await?;
    let left = json(cluster, &["send", "data", "--list"]).await?;
    let names: Vec<_> = left["points"].as_array().into_iter().flatten().map(|point| &point["name"]).collect();
    ensure!(removed["snapshot"] == "zpod-send-two" && names == ["zpod-send-one"], "{removed} {left}");
    let taken = json(cluster, &["snapshot", "data", "before.1"]).await?;
    let listed = json(cluster, &["snapshots", "data"]).await?;
    let names: Vec<_> = listed["pool"]["snapshots"].as_array().into_iter().flatten().map(|one| &one["name"]).collect();
    ensure!(taken["snapshot"] == "before.1" && names == ["zpod-send-one", "before.1"], "{taken} {listed}");
    let destroyed = json(cluster, &["snapshots", "data", "--remove", "before.1"]).await?;
    ensure!(destroyed["snapshot"] == "before.1", "{destroyed}");
    for reason in ["SnapshotTaken", "SnapshotDestroyed"] {
        wait_for_events(cluster, "PersistentVolumeClaim", "data", &[reason, "before.1"]).await?;
    }
    cluster
        .wait("the last snapshot is in the status", async || {
            let status = volume(cluster).await?["status"].clone();
            let last = &status["pool"]["lastSnapshot"];
            ensure!(last["name"] == "before.1" && last["state"] == "Destroyed", "its status: {status}");
            Ok(())
        })
        .await?;
    let bytes = fs::metadata(&file)?.len();
    ensure!(bytes > 1 << 20, "a stream of {bytes} bytes with a file of 1 MiB in it");

    cluster.apply(&CLAIM.replace("name: data", "name: copy")).await?;
    let refused = plugin(cluster, &["receive", "data"], File::open(&file)?.into(), Stdio::piped()).await?;
    ensure!(String::from_utf8_lossy(&refused.stderr).contains("pod default/writer uses data"), "{refused:?}");
    let received = plugin(cluster, &["receive", "copy"], File::open(&file)?.into(), Stdio::piped()).await?;
    ensure!(received.status.success(), "{received:?}");
    let pods = cluster.kubectl(&["get", "pods", "-o", "name"]).await?;
    cluster.delete(WRITER).await?;
    cluster
        .wait("the plugin's pod is gone", async || {
            let pods = cluster.kubectl(&["get", "pods", "-o", "name"]).await?;
            ensure!(!pods.contains("zpod-transfer"), "{pods}");
            Ok(())
        })
        .await
        .context(pods)?;
    let reader = WRITER.replace("claimName: data", "claimName: copy");
    cluster.apply(&reader).await?;
    let copied = cluster.wait_for_writer().await?;
    ensure!(copied.log.lines().last() == written.log.lines().last(), "{} {}", copied.log, written.log);
    cluster.delete(&reader).await?;
    cluster.delete(CLAIM).await?;
    cluster.delete(&CLAIM.replace("name: data", "name: copy")).await?;
    cluster.wait_for_no_volumes().await
}
