//! ZFS itself in a pod's container: `zfsAccess: volume`.

use std::process::Stdio;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;
use zpod_e2e::cluster::Cluster;
use zpod_e2e::cluster::chart::{NAMESPACE, chart};
use zpod_volume::Bytes;

use super::claims::{volume, wait_for_events};
use super::kubectl::{json, plugin};

const MANIFEST: &str = include_str!("../../manifests/zfs-access.yaml");
const NAME: &str = "tools";
const CLAIM: &str = "PersistentVolumeClaim";
const BLOB: u64 = 20 << 20;
/// Without more rights than any container has: a stream brings a child its files. The way to another child leads elsewhere.
const WORK: &str = "set -e; PATH=/opt/zpod/bin:$PATH; D=$(zfs list -H -o name | grep '/data$')
    head -c BLOB /dev/urandom > /data/blob; echo kept > /data/file; sync
    zfs snapshot $D@mine
    zfs send $D@mine | zfs receive -u $D/child
    zfs create -u $D/astray && ln -s /run /data/astray
    rm /data/blob; sync
    zfs list -H -o name -t all";

/// Where it is forbidden the claim says so. Where it is allowed, what a pod makes with the tools is there in the next one, and
/// what can't be mounted and what snapshots hold is told of. Forbidden again, the next pod gets nothing, and is told why.
pub(crate) async fn a_pod_with_zfs_of_its_own_leaves_its_datasets_to_the_next(cluster: &Cluster) -> Result<()> {
    cluster.install_chart().await?;
    cluster.apply(MANIFEST).await?;
    let refused = ["ProvisioningFailed", "parameter zfsAccess: \"volume\"", "allowed is: none", "zfsAccess.allowed"];
    wait_for_events(cluster, CLAIM, NAME, &refused).await?;
    let claim = cluster.kubectl_json(&["get", "pvc", NAME]).await?;
    ensure!(claim["status"]["phase"] == "Pending", "what is forbidden was made: {claim}");

    allow(cluster, true).await?;
    cluster.wait_for_pod("default", NAME, "Running").await?;
    let made = cluster.sh(NAME, &WORK.replace("BLOB", &BLOB.to_string())).await?;
    for name in ["/data", "/data@mine", "/data/child", "/data/child@mine", "/data/astray"] {
        ensure!(made.lines().any(|line| line.ends_with(name)), "{name} is not in {made}");
    }
    the_snapshots_are_listed(cluster).await?;
    what_holds_the_room_is_shown(cluster).await?;

    cluster.kubectl(&["delete", "pod", NAME, "--wait"]).await?;
    cluster.apply(MANIFEST).await?;
    cluster.wait_for_pod("default", NAME, "Running").await?;
    let found =
        cluster.sh(NAME, "cat /data/child/file; wc -c < /data/child/blob; grep -c ' /data/child zfs ' /proc/mounts");
    let (found, wanted) = (found.await?, format!("kept\n{BLOB}\n1"));
    ensure!(found.trim() == wanted, "in the next pod there is {found}");
    for kind in [CLAIM, "Pod"] {
        wait_for_events(cluster, kind, NAME, &["DatasetNotMounted", "/data/astray", "docs/pod-zfs.md"]).await?;
    }
    cluster
        .wait("the condition says what is not mounted", async || {
            let status = volume(cluster).await?["status"].clone();
            let conditions = status["conditions"].as_array().cloned().unwrap_or_default();
            let told = |each: &Value| each["type"] == "Healthy" && each["reason"] == "DatasetNotMounted";
            ensure!(conditions.iter().any(told), "its conditions: {conditions:?}");
            Ok(())
        })
        .await?;

    cluster.kubectl(&["delete", "pod", NAME, "--wait"]).await?;
    allow(cluster, false).await?;
    cluster.apply(MANIFEST).await?;
    wait_for_events(cluster, "Pod", NAME, &["FailedMount", "zfsAccess: \"volume\" is forbidden here"]).await?;
    cluster.delete(MANIFEST).await?;
    cluster.wait_for_no_volumes().await
}

/// As who operates the cluster says. The controller and the node plugins start again.
async fn allow(cluster: &Cluster, allowed: bool) -> Result<()> {
    let (chart, value) = (chart().display().to_string(), format!("zfsAccess.allowed={allowed}"));
    let upgrade = ["upgrade", "zpod", &chart, "-n", NAMESPACE, "--reuse-values", "--wait", "--timeout", "3m"];
    cluster.helm(&[&upgrade[..], &["--set", &value]].concat()).await?;
    Ok(())
}

/// The container's own, and that of the schedule.
async fn the_snapshots_are_listed(cluster: &Cluster) -> Result<()> {
    cluster
        .wait("the scheduled snapshot is listed beside the container's own", async || {
            let listed = json(cluster, &["snapshots", NAME]).await?;
            let all = listed["pool"]["snapshots"].as_array().cloned().unwrap_or_default();
            let names: Vec<_> = all.iter().filter_map(|snapshot| snapshot["name"].as_str()).collect();
            let scheduled = names.iter().any(|name| name.starts_with("zpod-auto-hourly-"));
            ensure!(scheduled && names.contains(&"mine"), "{listed}");
            Ok(())
        })
        .await?;
    let set = json(cluster, &["props", "get", NAME, "snapshotSchedule", "zfsAccess", "quota"]).await?;
    let values: Vec<_> = set["properties"].as_array().into_iter().flatten().map(|each| each["value"].clone()).collect();
    ensure!(values == ["refquota", "hourly=24", "volume"], "{set}");
    let refused = plugin(cluster, &["snapshot", NAME, "zpod-mine"], Stdio::null(), Stdio::piped()).await?;
    let why = String::from_utf8_lossy(&refused.stderr).into_owned();
    ensure!(refused.status.code() == Some(2) && why.contains("not zpod- at the beginning"), "{why}");
    Ok(())
}

/// In the status, and in the columns of kubectl.
async fn what_holds_the_room_is_shown(cluster: &Cluster) -> Result<()> {
    let (by_snapshots, by_children) = cluster
        .wait("what snapshots and children hold is in the status", async || {
            let pool = volume(cluster).await?["status"]["pool"].clone();
            let held = |key: &str| -> Result<String> {
                let text = pool[key].as_str().with_context(|| format!("no {key}: {pool}"))?;
                ensure!(text.parse::<Bytes>()?.0 >= BLOB, "{key} is {text}: {pool}");
                Ok(text.to_owned())
            };
            Ok((held("usedBySnapshots")?, held("usedByChildren")?))
        })
        .await?;
    let table = cluster.kubectl(&["get", "zfsvolumes", "-o", "wide"]).await?;
    let (header, row) = table.split_once('\n').context("no row")?;
    ensure!(header.contains("SNAPSHOTS") && row.contains(&by_snapshots), "{by_snapshots}, {by_children}: {table}");
    Ok(())
}
