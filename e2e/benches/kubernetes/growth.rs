//! Memory of zpod's processes, and the time of a list, as volumes grow.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::fd::AsRawFd as _;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use k8s_openapi::api::core::v1::Pod;
use kube::api::{ListParams, Patch, PatchParams, PostParams};
use kube::{Api, Client, Resource as _};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use zpod_e2e::cluster::Cluster;
use zpod_e2e::cluster::chart::NAMESPACE;
use zpod_e2e::csi::Csi;
use zpod_e2e::report::Table;
use zpod_kubernetes::crd::{FINALIZER, Manager, ZfsVolume};
use zpod_proto::csi::ListVolumesRequest;
use zpod_volume::{PoolName, VolumeId};

use crate::claims::{POSTING, since};
use crate::{NODE, scaled};

const VOLUMES: [usize; 4] = [0, 1_000, 3_000, 10_000];
const PAGE: i32 = 500;
/// Every so many volumes one is on the node that is there: 300 of 10,000.
const OURS: usize = 33;
const OTHER_NODES: usize = 100;
const SETTLE: Duration = Duration::from_secs(5);
const MIB: f64 = 1024.0;

pub(crate) async fn measure(client: &Client, cluster: &Cluster) -> Result<Value> {
    let head =
        ["ZfsVolumes", "on the node", "zpod-controller MiB", "zpod-node MiB", "pages", "first / middle / last ms"];
    let title = format!(
        "as ZfsVolumes grow: resident (of it anonymous) MiB, the larger of two controllers; ListVolumes of {PAGE}"
    );
    let mut table = Table::new(&title, &head);
    let mut rows = Vec::new();
    let mut made = 0;
    let mut row = |count: String, ours: String, pages: &[f64]| -> Result<Value> {
        let (controller, node) = (Memory::of("zpod-controller")?, Memory::of("zpod-node")?);
        let at = |part: usize| pages.get(pages.len().saturating_sub(1) * part / 2).copied().unwrap_or_default();
        println!("  {count}: controller {}, node {}", controller.cell(), node.cell());
        table.row(vec![
            count.clone(),
            ours,
            controller.cell(),
            node.cell(),
            pages.len().to_string(),
            format!("{:.1} / {:.1} / {:.1}", at(0), at(1), at(2)),
        ]);
        Ok(json!({
            "volumes": count, "controller": controller.json(), "node": node.json(), "pages": pages.len(),
            "pageMillis": {"first": at(0), "middle": at(1), "last": at(2)},
        }))
    };
    for count in VOLUMES.map(|count| if count == 0 { 0 } else { scaled(count) }) {
        fill(client, made, count).await?;
        made = count;
        ready(client, count).await?;
        tokio::time::sleep(SETTLE).await;
        let pages = pages(client, cluster).await?;
        rows.push(row(count.to_string(), count.div_ceil(OURS).to_string(), &pages)?);
    }
    // What they hold at start is not what is left of what they have seen.
    restart(client).await?;
    let pages = pages(client, cluster).await?;
    rows.push(row(format!("{made}, restarted"), made.div_ceil(OURS).to_string(), &pages)?);
    table.print();
    Ok(rows.into())
}

/// Makes the volumes numbered `from` up to `to`, each with what its controller, its node and its guest would write.
async fn fill(client: &Client, from: usize, to: usize) -> Result<()> {
    let volumes: Api<ZfsVolume> = Api::all(client.clone());
    let begun = Instant::now();
    stream::iter(from..to)
        .map(|number| {
            let volumes = &volumes;
            async move { make(volumes, number).await.with_context(|| format!("ZfsVolume {number}")) }
        })
        .buffer_unordered(POSTING)
        .try_collect::<()>()
        .await?;
    if to > from {
        println!("  {} ZfsVolumes made in {:.0} s", to - from, begun.elapsed().as_secs_f64());
    }
    Ok(())
}

async fn make(volumes: &Api<ZfsVolume>, number: usize) -> Result<()> {
    let title = format!("pvc-{}", VolumeId::from_name(&format!("bench-{number}")));
    let id = VolumeId::from_name(&title);
    let name = id.to_string();
    let ours = number.is_multiple_of(OURS);
    let node = if ours { NODE.to_owned() } else { format!("elsewhere-{:03}", number % OTHER_NODES) };
    let object = json!({
        "metadata": {"name": name, "finalizers": [FINALIZER]},
        "spec": {
            "volumeName": title, "nodeName": node, "capacity": "1Gi",
            "parameters": {
                "backing": "file", "provisioning": "thin", "headroom": "10x", "quota": "refquota",
                "properties": {"compression": "zstd"},
            },
            "claim": {
                "namespace": "production", "name": format!("data-database-{number}"), "uid": name,
                "persistentVolume": title,
            },
        },
    });
    let params = PostParams { field_manager: Some(Manager::Controller.name().to_owned()), ..PostParams::default() };
    volumes.create(&params, &serde_json::from_value(object)?).await?;
    let condition = |kind: &str, reason: &str, message: &str| {
        json!({
            "type": kind, "status": "True", "reason": reason, "message": message,
            "lastTransitionTime": "2026-01-01T00:00:00Z", "observedGeneration": 1,
        })
    };
    if !ours {
        // The node that is there writes this itself, and makes the device.
        let status = json!({
            "phase": "Ready", "capacity": "1Gi", "initialCapacity": "1Gi", "tableCapacity": "1Gi", "initialized": true,
            "written": true, "observedGeneration": 1, "revision": 5,
            "publication": {
                "targetPath": format!("/var/lib/kubelet/pods/{name}/volumes/kubernetes.io~csi/{title}/mount"),
                "token": name, "bootId": name,
                "pod": {"namespace": "production", "name": format!("database-{number}"), "uid": name},
            },
            "conditions": [condition("Ready", "DeviceMade", &format!("the device is on node {node}"))],
        });
        apply(volumes, &name, Manager::Node, status).await?;
    }
    let pool = json!({
        "name": PoolName::for_volume(id).to_string(), "health": "Online", "used": "123Mi", "available": "901Mi",
        "allocated": "125Mi", "compressRatio": "1.43x", "readErrors": 0, "writeErrors": 0, "checksumErrors": 0,
        "dataErrors": 0, "lastScrub": {"state": "Finished", "endTime": "2026-01-01T00:00:00Z", "errors": 0},
    });
    let status = json!({"pool": pool, "conditions": [condition("Healthy", "Online", "the pool is healthy")]});
    apply(volumes, &name, Manager::State, status).await
}

async fn apply(volumes: &Api<ZfsVolume>, name: &str, manager: Manager, status: Value) -> Result<()> {
    let body = json!({
        "apiVersion": ZfsVolume::api_version(&()), "kind": ZfsVolume::kind(&()), "metadata": {"name": name},
        "status": status,
    });
    let params = PatchParams::apply(manager.name()).force();
    volumes.patch_status(name, &params, &Patch::Apply(body)).await?;
    Ok(())
}

/// Waits until the node that is there has made its devices.
async fn ready(client: &Client, count: usize) -> Result<()> {
    let volumes: Api<ZfsVolume> = Api::all(client.clone());
    let ours = ListParams::default().fields(&format!("spec.nodeName={NODE}"));
    let begun = Instant::now();
    loop {
        let objects = volumes.list(&ours).await?.items;
        let ready = objects.iter().filter(|object| object.status.as_ref().is_some_and(|status| status.phase.is_some()));
        let ready = ready.count();
        if ready == count.div_ceil(OURS) {
            return Ok(());
        }
        ensure!(begun.elapsed() < Duration::from_secs(300), "{ready} of {} devices are made", count.div_ceil(OURS));
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
}

/// The time of each page of a whole listing, in milliseconds, on one controller's socket.
async fn pages(client: &Client, cluster: &Cluster) -> Result<Vec<f64>> {
    let mut all = Vec::new();
    // Each controller lists: both shall have the memory that it takes.
    for dir in sockets(client, cluster).await? {
        let dir = File::open(&dir).with_context(|| format!("open {}", dir.display()))?;
        // The path itself is longer than a socket's may be.
        let socket = PathBuf::from(format!("/proc/self/fd/{}/csi.sock", dir.as_raw_fd()));
        let mut csi = Csi::new(&socket);
        let (mut token, mut times, mut listed) = (String::new(), Vec::new(), 0);
        loop {
            let request = ListVolumesRequest { max_entries: PAGE, starting_token: token };
            let begun = Instant::now();
            let page = csi.controller.list_volumes(request).await.context("ListVolumes")?.into_inner();
            times.push(since(begun, Instant::now()));
            listed += page.entries.len();
            token = page.next_token;
            if token.is_empty() {
                break;
            }
        }
        println!("  {listed} volumes listed in {:.0} ms", times.iter().sum::<f64>());
        all = times;
    }
    Ok(all)
}

async fn sockets(client: &Client, cluster: &Cluster) -> Result<Vec<PathBuf>> {
    let pods: Api<Pod> = Api::namespaced(client.clone(), NAMESPACE);
    let controllers = pods.list(&ListParams::default().labels("app.kubernetes.io/name=zpod-controller")).await?;
    let running = controllers.items.into_iter().filter(|pod| pod.metadata.deletion_timestamp.is_none());
    let kubelet = cluster.node_dir(NODE).join("var/lib/kubelet/pods");
    let dirs: Vec<_> = running
        .filter_map(|pod| Some(kubelet.join(pod.metadata.uid?).join("volumes/kubernetes.io~empty-dir/socket")))
        .collect();
    ensure!(!dirs.is_empty(), "there is no controller");
    Ok(dirs)
}

/// Kills zpod's processes and waits until kubelet has started them again and they have read what there is.
async fn restart(client: &Client) -> Result<()> {
    let old: Vec<_> = ["zpod-controller", "zpod-node"].into_iter().flat_map(processes).collect();
    for pid in &old {
        kill(Pid::from_raw(*pid), Signal::SIGKILL).context("kill a process of this cluster")?;
    }
    let pods: Api<Pod> = Api::namespaced(client.clone(), NAMESPACE);
    let begun = Instant::now();
    loop {
        tokio::time::sleep(Duration::from_millis(500)).await;
        let is_ready = |pod: &Pod| {
            let conditions = pod.status.as_ref().and_then(|status| status.conditions.as_ref());
            conditions.into_iter().flatten().any(|each| each.type_ == "Ready" && each.status == "True")
        };
        let all_ready = pods.list(&ListParams::default()).await?.items.iter().all(is_ready);
        let new: Vec<_> = ["zpod-controller", "zpod-node"].into_iter().flat_map(processes).collect();
        if all_ready && new.len() == old.len() && new.iter().all(|pid| !old.contains(pid)) {
            break;
        }
        ensure!(begun.elapsed() < Duration::from_secs(120), "zpod has not come back: {new:?} after {old:?}");
    }
    // The Lease of the killed leader runs out within 30 s, and the next one looks for orphans.
    tokio::time::sleep(Duration::from_secs(45)).await;
    Ok(())
}

/// Resident memory, in KiB.
#[derive(Debug, Clone, Copy, Default)]
struct Memory {
    resident: u64,
    anonymous: u64,
    peak: u64,
}

impl Memory {
    /// Of the largest process of that name.
    fn of(name: &str) -> Result<Self> {
        let all = processes(name).into_iter().map(|pid| {
            let status = fs::read_to_string(format!("/proc/{pid}/status")).context("read a process's status")?;
            let of = |key: &str| -> Option<u64> {
                let line = status.lines().find_map(|line| line.strip_prefix(key))?;
                line.trim_start_matches(':').trim().trim_end_matches(" kB").parse().ok()
            };
            let found = of("VmRSS").zip(of("RssAnon")).zip(of("VmHWM"));
            let ((resident, anonymous), peak) = found.context("no memory in a process's status")?;
            Ok(Self { resident, anonymous, peak })
        });
        let all = all.collect::<Result<Vec<_>>>()?;
        all.into_iter().max_by_key(|memory| memory.resident).with_context(|| format!("{name} does not run"))
    }

    fn cell(self) -> String {
        format!("{:.1} ({:.1})", self.resident as f64 / MIB, self.anonymous as f64 / MIB)
    }

    fn json(self) -> Value {
        let bytes = |kib: u64| kib << 10;
        json!({"resident": bytes(self.resident), "anonymous": bytes(self.anonymous), "peak": bytes(self.peak)})
    }
}

/// Processes of a name that come from this one: another cluster may run on this machine.
fn processes(name: &str) -> Vec<i32> {
    let mut parents = BTreeMap::new();
    let mut named = Vec::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else { continue };
        // `pid (name) state parent ...`; a process may end meanwhile.
        let stat = fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
        let Some((head, tail)) = stat.rsplit_once(") ") else { continue };
        let parent = tail.split(' ').nth(1).and_then(|text| text.parse::<i32>().ok()).unwrap_or_default();
        parents.insert(pid, parent);
        if head.split_once('(').is_some_and(|(_, found)| found == name) {
            named.push(pid);
        }
    }
    let own = std::process::id().cast_signed();
    let is_ours = |pid: &i32| std::iter::successors(Some(*pid), |pid| parents.get(pid).copied()).any(|pid| pid == own);
    named.retain(is_ours);
    named
}
