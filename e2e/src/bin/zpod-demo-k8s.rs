//! `make demo-k8s`: the chart on a real control plane, and a claim whose pod finds ZFS at /data.

use std::process::ExitCode;

use anyhow::{Context as _, Result, ensure};
use tokio::runtime::Builder;
use zpod_e2e::accel::Accel;
use zpod_e2e::cluster::{self, Cluster};
use zpod_e2e::inputs;
use zpod_e2e::screen::Screen;

const NODE: &str = "node-a";
const CLAIM: &str = include_str!("../../manifests/claim.yaml");
const EXPANDED: &str = include_str!("../../manifests/claim-expanded.yaml");
const POD: &str = include_str!("../../manifests/pod.yaml");

/// Of an event's line.
const WIDTH: usize = 120;

fn main() -> ExitCode {
    let mut screen = Screen::new();
    // Before any thread, and on this one: what it starts dies with it.
    let result = cluster::isolate().and_then(|()| {
        Builder::new_current_thread().enable_all().build().context("make a runtime")?.block_on(async {
            tokio::select! {
                result = demo(&mut screen) => result,
                // Dropping the demo ends the cluster and removes its files.
                _ = tokio::signal::ctrl_c() => Err(anyhow::anyhow!("interrupted")),
            }
        })
    });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            screen.fail(&error);
            ExitCode::FAILURE
        }
    }
}

async fn demo(screen: &mut Screen) -> Result<()> {
    inputs::guest_image()?;
    screen.headline("zpod on Kubernetes: a claim, a pod, and ZFS inside the pod's own guest kernel");

    screen.begin("Control plane");
    let cluster = Cluster::start().await?;
    let version = cluster.kubectl_json(&["version"]).await?;
    let version = version["serverVersion"]["gitVersion"].as_str().unwrap_or_default().to_owned();
    screen.done(&format!("etcd, API server, controllers, scheduler: Kubernetes {version}"));
    let result = on_cluster(screen, &cluster).await;
    match result {
        Ok(()) => Ok(()),
        Err(error) => Err(error.context(cluster.diagnosis().await)),
    }
}

async fn on_cluster(screen: &mut Screen, cluster: &Cluster) -> Result<()> {
    screen.begin("A node");
    cluster.add_node(NODE).await?;
    screen.done("a real kubelet, with a runtime that boots guests for kata-zpod");
    screen.begin("helm install zpod charts/zpod");
    cluster.install_chart().await?;
    screen.done("controller and node are ready");
    screen.detail(&cluster.kubectl(&["get", "pods", "-A"]).await?);

    screen.begin("kubectl apply -f claim.yaml -f pod.yaml");
    cluster.apply(CLAIM).await?;
    cluster.apply(POD).await?;
    let accel = if Accel::detect().await? == Accel::Kvm { "with KVM" } else { "in pure emulation" };
    let first = cluster.wait_for_writer().await?;
    screen.done(&format!("Bound and Running, in a QEMU guest of its own, {accel}"));
    screen.detail(&cluster.kubectl(&["get", "pvc,pod,zfsvolumes"]).await?);
    screen.begin("kubectl logs writer");
    screen.done("/data is ZFS, from a pool made in the guest:");
    screen.detail(&first.log);

    screen.begin("kubectl apply -f claim-expanded.yaml");
    cluster.apply(EXPANDED).await?;
    cluster.wait_for_size("data", "2Gi").await?;
    screen.done("1Gi to 2Gi while the pod runs: nothing unmounted, the machine untouched");
    screen.detail(&cluster.kubectl(&["get", "pvc"]).await?);

    screen.begin("kubectl delete pod writer; apply it again");
    cluster.delete(POD).await?;
    cluster.apply(POD).await?;
    let second = cluster.wait_for_writer().await?;
    ensure!(first.sum == second.sum, "the first pod wrote {}, the next one reads {}", first.sum, second.sum);
    screen.done("another guest, the same checksum:");
    screen.detail(&second.sum);

    screen.begin("kubectl get zfsvolumes -o wide");
    let table = reported(cluster).await?;
    screen.done("what the guest says of its pool:");
    screen.detail(&table);
    screen.begin("kubectl get events");
    let events = events(cluster).await?;
    screen.done("what happened, for the claim's owner to read:");
    screen.detail(&events);

    screen.begin("Delete pod, claim, volume");
    cluster.delete(POD).await?;
    cluster.delete(CLAIM).await?;
    cluster.wait_for_no_volumes().await?;
    screen.done("no record, no disk is left");
    screen.finish("A claim on a real cluster, with ZFS in its pod's own guest:");
    Ok(())
}

/// The table, when the guest has spoken of its pool.
async fn reported(cluster: &Cluster) -> Result<String> {
    cluster
        .wait("the guest's report", async || {
            let volumes = cluster.kubectl_json(&["get", "zfsvolumes"]).await?;
            let health = volumes["items"][0]["status"]["pool"]["health"].as_str().unwrap_or_default().to_owned();
            ensure!(health == "Online", "the pool is {health:?}");
            cluster.kubectl(&["get", "zfsvolumes", "-o", "wide"]).await
        })
        .await
}

/// Events about the claim, in one line each.
async fn events(cluster: &Cluster) -> Result<String> {
    let columns = "custom-columns=REASON:.reason,MESSAGE:.message";
    let about = "involvedObject.kind=PersistentVolumeClaim,involvedObject.name=data";
    let table = cluster
        .kubectl(&["get", "events", "--field-selector", about, "--sort-by", ".lastTimestamp", "-o", columns])
        .await?;
    let short = |line: &str| match line.char_indices().nth(WIDTH) {
        Some((end, _)) => format!("{} …\n", line[..end].trim_end()),
        None => format!("{line}\n"),
    };
    Ok(table.lines().map(short).collect())
}
