//! The chart, as an administrator uses it.

use anyhow::{Context as _, Result, bail, ensure};
use zpod_e2e::cluster::Cluster;
use zpod_e2e::cluster::chart::{IMAGES, NAMESPACE, chart};

const NODE: &str = "node-a";
const VOLUME: &str = "11111111-1111-4111-8111-111111111111";

/// A record of nobody's node, so that no node plugin touches it.
pub(crate) fn record() -> (&'static str, String) {
    let manifest = format!(
        "apiVersion: zpod.storage/v1alpha1\nkind: ZfsVolume\nmetadata: {{name: {VOLUME}}}\nspec:\n  volumeName: policy\n  \
         nodeName: node-of-nobody\n  capacity: 1Gi\n  parameters: {{backing: file, provisioning: thin, headroom: 8x, quota: \
         refquota}}\n"
    );
    (VOLUME, manifest)
}

/// Every container of the chart runs with the privileges that the chart gives it, and what the chart brings to a node
/// goes with it. The volumes' records stay.
pub(crate) async fn the_chart_is_installed_upgraded_and_uninstalled(cluster: &Cluster) -> Result<()> {
    cluster.install_chart().await?;
    cluster
        .wait("the node says what room it has", async || {
            let node = cluster.kubectl_json(&["get", "zfsnode", NODE]).await?;
            ensure!(node["status"]["backing"]["total"].is_string(), "its object is {node}");
            Ok(())
        })
        .await?;
    let guest = cluster.node_dir(NODE).join("opt/zpod/guest");
    let initrd = guest.join("initrd");
    ensure!(initrd.exists(), "the installer put no initrd on the node");
    a_node_plugin_changes_its_own_objects_only(cluster).await?;
    a_record_of_what_was_never_made_can_be_deleted(cluster).await?;
    no_right_is_missing(cluster).await?;

    let (chart, replicas) = (chart().display().to_string(), "controller.replicas=1");
    let upgrade = ["upgrade", "zpod", &chart, "-n", NAMESPACE, "--wait", "--timeout", "3m"];
    cluster.helm3(&[&upgrade[..], &["--set", IMAGES, "--set", replicas]].concat()).await?;
    ensure!(initrd.exists(), "an upgrade took the initrd from the node");

    cluster.helm(&[&upgrade[..], &["--reuse-values", "--set", "guest.uninstall=true"]].concat()).await?;
    cluster.kubectl(&["rollout", "status", "daemonset/zpod-node", "-n", NAMESPACE, "--timeout=3m"]).await?;
    ensure!(!guest.is_symlink(), "uninstalled, and {} is there", guest.display());

    let uninstall = ["uninstall", "zpod", "-n", NAMESPACE, "--wait", "--timeout", "3m"];
    if let Err(error) = cluster.helm(&uninstall).await {
        let pods = cluster.kubectl(&["describe", "pods", "-n", NAMESPACE]).await;
        return Err(error).with_context(|| pods.unwrap_or_else(|error| format!("{error:#}")));
    }
    ensure!(!guest.is_symlink(), "{} came back", guest.display());
    let kinds = "deployments,daemonsets,jobs,roles,rolebindings,networkpolicies";
    let left = cluster.kubectl(&["get", kinds, "-n", NAMESPACE, "-o", "name"]).await?;
    ensure!(left.trim().is_empty(), "left behind: {left}");
    cluster.kubectl(&["get", "zfsvolume", VOLUME]).await.context("uninstalling took the volumes' records")?;
    cluster.kubectl(&["delete", "zfsvolume", VOLUME]).await?;
    Ok(())
}

/// RBAC can't say "of its own node"; the chart's admission policy does.
async fn a_node_plugin_changes_its_own_objects_only(cluster: &Cluster) -> Result<()> {
    cluster.apply(&record().1).await?;
    let account = format!("--as=system:serviceaccount:{NAMESPACE}:zpod-node");
    let of = |node: &str| format!("--as-user-extra=authentication.kubernetes.io/node-name={node}");
    let (own, other) = (of("node-of-nobody"), of(NODE));
    // Nothing changes by it, and it is looked at all the same.
    let same = r#"{"metadata":{"finalizers":null}}"#;
    let write = ["patch", "zfsvolume", VOLUME, "--type=merge", "-p", same, &account];
    let annotate = ["annotate", "--overwrite", "zfsvolume", VOLUME, "touched=yes", &account];
    let label = ["label", "--overwrite", "zfsvolume", VOLUME, "zpod.storage/group=x", &account];
    let owners = r#"{"metadata":{"ownerReferences":[{"apiVersion":"v1","kind":"Node","name":"gone","uid":"u"}]}}"#;
    let own_it = ["patch", "zfsvolume", VOLUME, "--type=merge", "-p", owners, &account];
    let finalizers = r#"{"metadata":{"finalizers":["other.example/keeps-it"]}}"#;
    let keep = ["patch", "zfsvolume", VOLUME, "--type=merge", "-p", finalizers, &account];
    let destroy = ["patch", "zfsvolume", VOLUME, "--type=merge", "-p", r#"{"spec":{"destroy":true}}"#, &account];
    cluster.kubectl(&[&write[..], &[&own]].concat()).await.context("its own object")?;
    for (what, arguments, extra, want) in [
        ("an object of another node", &write[..], Some(&other), "may change objects of its own node only"),
        ("a token that names no node", &write[..], None, "must be bound to its pod"),
        ("the spec", &destroy[..], Some(&own), "may not change the spec"),
        ("annotations", &annotate[..], Some(&own), "may not write labels and annotations"),
        ("labels", &label[..], Some(&own), "may not write labels and annotations"),
        ("owners", &own_it[..], Some(&own), "may not write owner references"),
        ("finalizers", &keep[..], Some(&own), "touch no other finalizer"),
    ] {
        let extra: Vec<&str> = extra.map(String::as_str).into_iter().collect();
        let Err(refused) = cluster.kubectl(&[arguments, &extra].concat()).await else {
            bail!("a node plugin changed {what}");
        };
        let text = format!("{refused:#}");
        ensure!(text.contains(want), "{what}: {text}");
    }
    let adopt = ["patch", "zfsvolume", VOLUME, "--type=merge", "-p", r#"{"spec":{"adopt":{"phase":"Ready"}}}"#];
    let error = cluster.kubectl(&adopt).await.err().map(|error| format!("{error:#}")).unwrap_or_default();
    ensure!(
        error.contains("adopt is set when the object is made, and never after"),
        "anybody may add it later: {error}"
    );
    inline_volumes_begin_as_their_node_does(cluster, &account, &own).await
}

/// No node makes an object under a name that another node needs.
async fn inline_volumes_begin_as_their_node_does(cluster: &Cluster, account: &str, own: &str) -> Result<()> {
    let uid = "--as-user-extra=authentication.kubernetes.io/node-uid=0f8b3c52-7d1e-4f0a-9c3e-2b1a5d6e7f80";
    let (own_name, other_name) = ("0f8b3c52-7d1e-8000-8000-000000000001", "1f8b3c52-7d1e-8000-8000-000000000001");
    let known = "ephemeral: true\n  adopt: {phase: Ready, initialized: true}";
    for (name, spec, refused) in [
        (own_name, "ephemeral: true", None),
        (other_name, "ephemeral: true", Some("must begin as the UID of its node does")),
        (own_name, known, Some("adopts nothing")),
    ] {
        let object = record().1.replace(VOLUME, name).replace("capacity: 1Gi", &format!("capacity: 1Gi\n  {spec}"));
        let file = cluster.dir().join(format!("{name}.yaml"));
        std::fs::write(&file, object)?;
        let made = cluster.kubectl(&["create", "-f", &file.display().to_string(), account, own, uid]).await;
        match (made, refused) {
            (Ok(_), None) => drop(cluster.kubectl(&["delete", "zfsvolume", name]).await?),
            (Err(error), Some(why)) => ensure!(format!("{error:#}").contains(why), "{spec}: {error:#}"),
            (Ok(_), Some(_)) => bail!("a node plugin made {name}: {spec}"),
            (Err(error), None) => return Err(error.context(format!("make {name}"))),
        }
    }
    Ok(())
}

/// Its node refuses it, and lets it go when somebody deletes it: there is no data that it stands for.
async fn a_record_of_what_was_never_made_can_be_deleted(cluster: &Cluster) -> Result<()> {
    let name = "22222222-2222-4222-8222-222222222222";
    let held = format!("metadata: {{name: {name}, finalizers: [zpod.storage/device]}}");
    let record = record().1.replace(&format!("metadata: {{name: {VOLUME}}}"), &held);
    cluster.apply(&record.replace("node-of-nobody", NODE).replace("capacity: 1Gi", "capacity: 100Ti")).await?;
    cluster
        .wait("its node refuses it", async || {
            let volume = cluster.kubectl_json(&["get", "zfsvolume", name]).await?;
            ensure!(volume["status"]["phase"] == "Refused", "it is {volume}");
            Ok(())
        })
        .await?;
    cluster.kubectl(&["delete", "zfsvolume", name, "--timeout=60s"]).await?;
    Ok(())
}

/// What zpod itself says of access that its operator does not allow: no word of the API server's.
const NOT_ALLOWED: &str = "is forbidden here";

/// Nobody was refused anything by the API server, in whatever ran before this.
async fn no_right_is_missing(cluster: &Cluster) -> Result<()> {
    let pods = ["-l", "app.kubernetes.io/part-of=zpod", "--all-containers", "--prefix", "--max-log-requests=50"];
    let logs = cluster.kubectl(&[&["logs", "-n", NAMESPACE, "--tail=-1"], &pods[..]].concat()).await?;
    let is_refusal = |line: &&str| line.replace(NOT_ALLOWED, "").to_lowercase().contains("forbidden");
    let refused: Vec<_> = logs.lines().filter(is_refusal).collect();
    ensure!(refused.is_empty(), "{}", refused.join("\n"));
    Ok(())
}
