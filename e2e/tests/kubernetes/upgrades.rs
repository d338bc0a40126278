//! Upgrades of the chart from one set of values to another: what the API server lets nobody change.
//!
//! No pod runs: the objects are what is looked at.

use std::path::PathBuf;

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};
use zpod_e2e::cluster::Cluster;
use zpod_e2e::cluster::chart::{IMAGES, NAMESPACE, chart, manifest};

/// No pod starts, and nothing of kinds that this cluster doesn't know.
const QUIET: [&str; 4] = [
    r#"node.nodeSelector={"no": "where"}"#,
    r#"controller.nodeSelector={"no": "where"}"#,
    r#"metrics.podMonitor={"enabled": false}"#,
    r#"metrics.prometheusRule={"enabled": false}"#,
];

async fn upgrade(cluster: &Cluster, more: &[&str]) -> Result<String> {
    let chart = chart().display().to_string();
    let always = ["upgrade", "--install", "zpod", &chart, "-n", NAMESPACE, "--set", IMAGES];
    let quiet = QUIET.map(|value| ["--set-json", value]).concat();
    cluster.helm(&[&always[..], &quiet, more].concat()).await
}

async fn uninstall(cluster: &Cluster) -> Result<()> {
    cluster.helm(&["uninstall", "zpod", "-n", NAMESPACE, "--wait", "--timeout", "3m"]).await.map(drop)
}

async fn prepare(cluster: &Cluster) -> Result<()> {
    cluster.add_snapshots().await?;
    cluster.kubectl(&["apply", "-f", &manifest("namespace")]).await?;
    upgrade(cluster, &[]).await.map(drop)
}

/// From the defaults to each, and back.
pub(crate) async fn the_chart_is_upgraded_between_all_values_that_its_tests_accept(cluster: &Cluster) -> Result<()> {
    prepare(cluster).await?;
    let list = chart().join("tests/accepted");
    let list = std::fs::read_dir(&list).with_context(|| list.display().to_string())?;
    let mut files = list.map(|file| Ok(file?.path())).collect::<Result<Vec<PathBuf>>>()?;
    files.sort();
    for file in files {
        let file = file.display().to_string();
        upgrade(cluster, &["-f", &file]).await.with_context(|| format!("from the defaults to {file}"))?;
        upgrade(cluster, &[]).await.with_context(|| format!("from {file} to the defaults"))?;
    }
    let modes = cluster.kubectl_json(&["get", "csidriver", "csi.zpod.storage"]).await?["spec"].clone();
    ensure!(modes["volumeLifecycleModes"] == json!(["Persistent", "Ephemeral"]), "the driver is {modes}");
    uninstall(cluster).await
}

/// What docs/install.md lists, and nothing else, can't change in place.
pub(crate) async fn a_field_that_can_not_change_is_refused_before_anything_is_changed(cluster: &Cluster) -> Result<()> {
    prepare(cluster).await?;
    let attributes = |compression: &str| {
        format!(r#"volumeAttributesClasses=[{{"name": "fast", "parameters": {{"compression": "{compression}"}}}}]"#)
    };
    let group = r#"volumeGroupSnapshotClasses=[{"name": "zpod", "parameters": {"allowCopy": "true"}}]"#;
    upgrade(cluster, &["--set-json", &attributes("lz4"), "--set-json", group]).await?;
    let before = revision(cluster).await?;

    let classes = |fields: &str| format!(r#"storageClasses=[{{"name": "zpod", {fields}}}]"#);
    let attributes = attributes("zstd");
    let refused = [
        ("parameters", classes(r#""parameters": {"compression": "zstd"}"#), "kubectl delete storageclass zpod"),
        ("reclaimPolicy", classes(r#""reclaimPolicy": "Retain""#), "kubectl delete storageclass zpod"),
        ("volumeBindingMode", classes(r#""volumeBindingMode": "Immediate""#), "kubectl delete storageclass zpod"),
        ("parameters", attributes, "another name"),
        (
            "deletionPolicy",
            group.replace("}}", r#"}, "deletionPolicy": "Retain"}"#),
            "kubectl delete volumegroupsnapshotclass zpod",
        ),
        ("parameters", group.replace("true", "false"), "kubectl delete volumegroupsnapshotclass zpod"),
        (
            "handler",
            r#"runtimeClasses=[{"name": "kata-zpod", "handler": "other", "create": true}]"#.to_owned(),
            "kubectl delete runtimeclass kata-zpod",
        ),
    ];
    for (field, values, remedy) in refused {
        let Err(error) = upgrade(cluster, &["--set-json", &values]).await else { bail!("{values} was taken") };
        let text = format!("{error:#}");
        let told = text.contains(field) && text.contains(remedy) && text.contains("Nothing was changed");
        ensure!(told, "{values} is refused with: {text}");
    }
    ensure!(revision(cluster).await? == before, "what was refused has made a revision");

    changes_in_place(cluster, &classes(CLASS)).await?;
    inline_volumes_follow_no_value(cluster).await?;
    cluster.kubectl(&["delete", "storageclass", "zpod"]).await?;
    let class = classes(r#""parameters": {"compression": "zstd"}"#);
    upgrade(cluster, &["--set-json", &class]).await.context("the remedy that the refusal names")?;
    uninstall(cluster).await
}

const CLASS: &str = r#""default": true, "allowVolumeExpansion": false, "mountOptions": ["noatime"], "labels": {"a": "b"},
    "allowedTopologies": [{"matchLabelExpressions": [{"key": "csi.zpod.storage/node", "values": ["node-a"]}]}]"#;

/// What is not refused does change.
async fn changes_in_place(cluster: &Cluster, class: &str) -> Result<()> {
    let snapshots = r#"volumeSnapshotClasses=[{"name": "zpod", "deletionPolicy": "Retain", "parameters": {"allowCopy": "true"},
        "labels": {"velero.io/csi-volumesnapshot-class": "true"}}]"#;
    let runtimes = r#"runtimeClasses=[{"name": "kata-zpod", "handler": "kata-zpod", "create": true,
        "overhead": {"memory": "1Gi"}, "nodeSelector": {"a": "b"}}]"#;
    upgrade(cluster, &["--set-json", class, "--set-json", snapshots, "--set-json", runtimes]).await?;
    let class = cluster.kubectl_json(&["get", "storageclass", "zpod"]).await?;
    ensure!(class["mountOptions"] == json!(["noatime"]) && class["allowVolumeExpansion"] == false, "it is {class}");
    ensure!(class["allowedTopologies"].is_array() && class["metadata"]["labels"]["a"] == "b", "it is {class}");
    let snapshots = cluster.kubectl_json(&["get", "volumesnapshotclass", "zpod"]).await?;
    let changed = snapshots["deletionPolicy"] == "Retain" && snapshots["parameters"]["allowCopy"] == "true";
    ensure!(changed && snapshots["metadata"]["labels"]["velero.io/csi-volumesnapshot-class"] == "true", "{snapshots}");
    let runtime = cluster.kubectl_json(&["get", "runtimeclass", "kata-zpod"]).await?;
    ensure!(runtime["overhead"]["podFixed"]["memory"] == "1Gi", "it is {runtime}");
    upgrade(cluster, &[]).await.map(drop)
}

/// Charts before this one made a driver without inline volumes where `node.ephemeralMaxSize` was 0.
async fn inline_volumes_follow_no_value(cluster: &Cluster) -> Result<()> {
    let name = "csi.zpod.storage";
    let get = async || cluster.kubectl_json(&["get", "csidriver", name]).await;
    let mut old = get().await?;
    old["spec"]["volumeLifecycleModes"] = json!(["Persistent"]);
    for field in ["uid", "resourceVersion", "creationTimestamp", "managedFields"] {
        old["metadata"].as_object_mut().and_then(|metadata| metadata.remove(field));
    }
    cluster.replace(&old).await?;
    upgrade(cluster, &["--set", "node.ephemeralMaxSize=0"]).await.context("as it was")?;
    ensure!(get().await?["spec"]["volumeLifecycleModes"] == json!(["Persistent"]), "it changed what can't be changed");
    let Err(error) = upgrade(cluster, &[]).await else { bail!("a driver without inline volumes got them") };
    let text = format!("{error:#}");
    ensure!(text.contains(&format!("kubectl delete csidriver {name}")), "it is refused with: {text}");
    cluster.kubectl(&["delete", "csidriver", name]).await?;
    upgrade(cluster, &[]).await.context("the remedy that the refusal names")?;
    let driver = get().await?;
    ensure!(driver["spec"]["volumeLifecycleModes"] == json!(["Persistent", "Ephemeral"]), "it is {driver}");
    Ok(())
}

/// Of the release.
async fn revision(cluster: &Cluster) -> Result<Value> {
    let status = cluster.helm(&["status", "zpod", "-n", NAMESPACE, "-o", "json"]).await?;
    let status: Value = serde_json::from_str(&status).context("helm status")?;
    Ok(status["version"].clone())
}
