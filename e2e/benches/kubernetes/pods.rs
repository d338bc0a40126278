//! From a claim and its pod until the volume is published.
//!
//! No guest boots: hundreds of them don't fit on any machine here. The pods' RuntimeClass has a handler that zpod-node
//! takes and the node's runtime doesn't know, so kubelet does all of its part, up to the sandbox, which fails.

use std::collections::HashMap;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use k8s_openapi::api::core::v1::{PersistentVolume, PersistentVolumeClaim, Pod};
use kube::api::{DeleteParams, ListParams, PostParams};
use kube::{Api, Client};
use serde_json::{Value, json};
use zpod_e2e::cluster::Cluster;
use zpod_e2e::csi::{Csi, Publish};
use zpod_e2e::report::Table;
use zpod_proto::csi::Volume;

use crate::claims::{self, POSTING, Run, since};
use crate::driver::Driver;
use crate::{NODE, scaled};

/// A handler of the chart's that the test's nodes don't have.
const RUNTIME: &str = "{apiVersion: node.k8s.io/v1, kind: RuntimeClass, metadata: {name: unbooted}, \
                       handler: kata-zpod-clh}";
const DEADLINE: Duration = Duration::from_secs(600);
/// How often is looked whether volumes are published.
const LOOK: Duration = Duration::from_millis(5);
/// NodePublishVolume calls at the same time: kubelet makes as many as there are pods, but pods come one by one.
const CALLING: usize = 16;

/// Pods by the hundred through kubelet, calls by the thousand without it.
pub(crate) async fn measure(client: &Client, cluster: &Cluster, drivers: &[Driver<'_>]) -> Result<Value> {
    cluster.apply(RUNTIME).await?;
    let head = ["claims and pods", "driver", "create to published", "published/s"];
    let mut table = Table::new("claims with pods until published; milliseconds, p50 / p99", &head);
    let mut rows = Vec::new();
    for driver in drivers {
        let count = scaled(100);
        let run = with_pods(client, driver, count).await?;
        println!("  {count} pods {} {} ms, {:.1}/s", driver.name(), run.cell(), run.per_second());
        table.row(vec![count.to_string(), driver.name().to_owned(), run.cell(), format!("{:.1}", run.per_second())]);
        rows.push(json!({ "driver": driver.name(), "createToPublished": run.json() }));
    }
    table.print();

    let head = ["volumes", "NodePublishVolume", "calls/s", "NodeUnpublishVolume", "calls/s"];
    let mut table = Table::new(&format!("zpod-node called {CALLING} at a time; milliseconds, p50 / p99"), &head);
    let mut calls = Vec::new();
    for count in [100, 1_000] {
        let (publish, unpublish) = called(client, cluster, scaled(count)).await?;
        table.row(vec![
            scaled(count).to_string(),
            publish.cell(),
            format!("{:.0}", publish.per_second()),
            unpublish.cell(),
            format!("{:.0}", unpublish.per_second()),
        ]);
        calls.push(json!({ "publish": publish.json(), "unpublish": unpublish.json() }));
    }
    table.print();
    Ok(json!({ "throughKubelet": rows, "calls": calls }))
}

async fn with_pods(client: &Client, driver: &Driver<'_>, count: usize) -> Result<Run> {
    let claims: Api<PersistentVolumeClaim> = Api::default_namespaced(client.clone());
    let pods: Api<Pod> = Api::default_namespaced(client.clone());
    let begun = Instant::now();
    let posting = async {
        stream::iter(0..count)
            .map(|number| async move { Ok::<_, anyhow::Error>(number) })
            .buffer_unordered(POSTING)
            .map_ok(|number| {
                let (claims, pods) = (&claims, &pods);
                async move {
                    let name = format!("pod-{number}");
                    let (name, begun) = claims::post(claims, driver.waiting(), name).await?;
                    let made = pods.create(&PostParams::default(), &pod(&name, Some(&name))?).await?;
                    Ok((made.metadata.uid.unwrap_or_default(), begun))
                }
            })
            .try_buffer_unordered(POSTING)
            .try_collect::<HashMap<_, _>>()
            .await
    };
    let mut known = HashMap::new();
    let looking = async {
        loop {
            driver.published(&mut known)?;
            if known.keys().filter(|target| target.ends_with("/mount")).count() >= count {
                return Ok(());
            }
            if begun.elapsed() > DEADLINE {
                bail!("{} of {count} are published after {DEADLINE:?}", known.len());
            }
            tokio::time::sleep(LOOK).await;
        }
    };
    let (posted, ()) = tokio::try_join!(posting, looking)?;
    let ends: Vec<_> =
        known.iter().filter_map(|(target, end)| Some((*posted.get(target.split('/').nth(5)?)?, *end))).collect();
    let last = ends.iter().map(|(_, end)| *end).max().unwrap_or(begun);
    let millis = ends.into_iter().map(|(begin, end)| since(begin, end)).collect();
    delete_pods(&pods).await?;
    claims::delete_all(client).await?;
    Ok(Run { millis, seconds: last.duration_since(begun).as_secs_f64() })
}

/// One that uses a claim, or one that waits to be scheduled for ever.
fn pod(name: &str, claim: Option<&str>) -> Result<Pod> {
    let mut spec = json!({
        "runtimeClassName": "unbooted",
        "terminationGracePeriodSeconds": 0,
        "containers": [{"name": "sleep", "image": "busybox:1.37", "command": ["sleep", "1000000"]}],
    });
    match claim {
        Some(claim) => {
            spec["volumes"] = json!([{"name": "data", "persistentVolumeClaim": {"claimName": claim}}]);
            spec["containers"][0]["volumeMounts"] = json!([{"name": "data", "mountPath": "/data"}]);
        }
        None => spec["schedulingGates"] = json!([{"name": "zpod.example/never"}]),
    }
    serde_json::from_value(json!({"metadata": {"name": name}, "spec": spec})).context("describe a pod")
}

async fn delete_pods(pods: &Api<Pod>) -> Result<()> {
    let begun = Instant::now();
    pods.delete_collection(&DeleteParams::default(), &ListParams::default()).await?;
    while !pods.list_metadata(&ListParams::default().limit(1)).await?.items.is_empty() {
        if begun.elapsed() > DEADLINE {
            bail!("pods are left after {DEADLINE:?}");
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    Ok(())
}

/// NodePublishVolume and NodeUnpublishVolume on zpod-node's socket as kubelet calls them, each for a volume of its own
/// and a pod that exists.
async fn called(client: &Client, cluster: &Cluster, count: usize) -> Result<(Run, Run)> {
    claims::together(client, &Driver::Zpod(cluster), count).await?;
    let pods: Api<Pod> = Api::default_namespaced(client.clone());
    let caller = pods.create(&PostParams::default(), &pod("caller", None)?).await?;
    let uid = caller.metadata.uid.unwrap_or_default();
    let kubelet = cluster.node_dir(NODE).join("var/lib/kubelet");
    let csi = Csi::new(&kubelet.join("plugins/csi.zpod.storage/csi.sock"));

    let volumes: Api<PersistentVolume> = Api::all(client.clone());
    let mut calls = Vec::new();
    for object in volumes.list(&ListParams::default()).await?.items {
        let name = object.metadata.name.unwrap_or_default();
        let source = object.spec.and_then(|spec| spec.csi).context("a PersistentVolume of another driver")?;
        let mut context: HashMap<_, _> = source.volume_attributes.unwrap_or_default().into_iter().collect();
        for (key, value) in [("name", "caller"), ("namespace", "default"), ("uid", &uid)] {
            context.insert(format!("csi.storage.k8s.io/pod.{key}"), value.to_owned());
        }
        let place = format!("pods/{uid}/volumes/kubernetes.io~csi/{name}");
        // As kubelet does. With a file in it, kubelet doesn't clear it away as a forgotten pod's.
        fs::create_dir_all(kubelet.join(&place))?;
        fs::write(kubelet.join(&place).join("vol_data.json"), "{}")?;
        let target = Path::new("/var/lib/kubelet").join(place).join("mount");
        calls.push((Volume { volume_id: source.volume_handle, volume_context: context, ..Volume::default() }, target));
    }

    let publish = timed(&calls, async |volume: &Volume, target: &Path| {
        csi.clone().publish(volume, target, &Publish::default()).await
    });
    let publish = publish.await?;
    let unpublish = timed(&calls, async |volume: &Volume, target: &Path| csi.clone().unpublish(volume, target).await);
    let unpublish = unpublish.await?;
    fs::remove_dir_all(kubelet.join("pods").join(&uid)).context("remove the pod's directory")?;
    delete_pods(&pods).await?;
    claims::delete_all(client).await?;
    Ok((publish, unpublish))
}

type Call = (Volume, std::path::PathBuf);

async fn timed(calls: &[Call], call: impl AsyncFn(&Volume, &Path) -> Result<(), tonic::Status>) -> Result<Run> {
    let begun = Instant::now();
    let call = &call;
    let millis = stream::iter(calls)
        .map(|(volume, target)| async move {
            let begun = Instant::now();
            call(volume, target).await.with_context(|| format!("volume {}", volume.volume_id))?;
            Ok::<_, anyhow::Error>(since(begun, Instant::now()))
        })
        .buffer_unordered(CALLING)
        .try_collect()
        .await?;
    Ok(Run { millis, seconds: begun.elapsed().as_secs_f64() })
}
