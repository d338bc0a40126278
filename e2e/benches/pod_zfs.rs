//! What ZFS in the pod costs and saves: a snapshot beside a writer, a thin clone in the pod against a clone by CSI, and a
//! stream of `zfs send` against reading the same file.
//!
//! `cargo bench -p zpod-e2e --bench pod_zfs`; prints tables, writes `bench-results/pod_zfs.json`. `ZPOD_BENCH_ROUNDS` is
//! how often each is measured (5). Root, mkfs.xfs. In emulation only the comparison says something.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use serde_json::{Value, json};
use tokio::time::sleep;
use zpod_e2e::accel::Accel;
use zpod_e2e::csi::Publish;
use zpod_e2e::report::{self, Table, median, percentile};
use zpod_e2e::shim::User;
use zpod_e2e::{Container, Mount, Node, Runtime, Sandbox, node};
use zpod_proto::csi::Volume;
use zpod_proto::guest::{DestroySnapshotRequest, TakeSnapshotRequest};
use zpod_volume::{Bytes, PoolName, VolumeId};

const SIZE: Bytes = Bytes::gib(1);
const CLASS: [(&str, &str); 2] = [("zfsAccess", "volume"), ("compression", "off")];
/// What is in the volume that is cloned and sent.
const MIB: usize = 128;
/// Writes of 4 KiB, each made durable, of a round.
const WRITES: usize = 400;
/// The most frequent schedule takes one an hour.
const BETWEEN_SNAPSHOTS: Duration = Duration::from_secs(1);

fn main() -> Result<()> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(run())
}

/// A volume in a pod whose container may mount.
struct Bench {
    node: Node,
    pod: Sandbox,
    volume: Volume,
    target: PathBuf,
    rounds: usize,
}

async fn run() -> Result<()> {
    let rounds = std::env::var("ZPOD_BENCH_ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(5);
    let accel = Accel::detect().await?.argument();
    let mut node = Node::start_on_xfs_with(&["--allow-zfs-access"]).await?;
    let (volume, target) = publish(&mut node, "pvc-bench").await?;
    let mut pod = Sandbox::start(&node, Runtime::Go).await?;
    let mounts = [Mount::new(&target, "/data")];
    pod.run(Container { capabilities: vec!["CAP_SYS_ADMIN"], ..Container::new("app", mounts) }).await?;
    let mut bench = Bench { node, pod, volume, target, rounds };
    let writer = bench.writer().await?;
    bench.pod.sh("app", &format!("e2e write /data/file {MIB}")).await?;
    let clones = bench.clones().await?;
    let streams = bench.streams().await?;
    println!("accelerator {accel}, {rounds} rounds");
    bench.end().await?;
    report::save("pod_zfs", &json!({ "accel": accel, "writer": writer, "clones": clones, "streams": streams }))
}

async fn publish(node: &mut Node, name: &str) -> Result<(Volume, PathBuf)> {
    let volume = node.csi.create(name, SIZE, &CLASS).await?;
    let target = node.target("pod", name)?;
    node.csi.publish(&volume, &target, &Publish::default()).await?;
    Ok((volume, target))
}

fn millis(since: Instant) -> f64 {
    (since.elapsed().as_secs_f64() * 1e5).round() / 100.0
}

/// A table of what was measured in each round, and the same for the file.
fn show(title: &str, rows: &[(&str, &[f64])]) -> Value {
    let mut table = Table::new(title, &["", "median", "least", "most"]);
    for (name, values) in rows {
        let cells = [median(values), percentile(values, 0), percentile(values, 100)];
        table.row([vec![(*name).to_owned()], cells.iter().map(|value| format!("{value:.1}")).collect()].concat());
    }
    table.print();
    rows.iter().map(|(name, values)| ((*name).to_owned(), json!(values))).collect::<serde_json::Map<_, _>>().into()
}

impl Bench {
    fn dataset(&self) -> Result<String> {
        Ok(format!("{}/data", PoolName::for_volume(self.volume.volume_id.parse::<VolumeId>()?)))
    }

    /// In the container, with the tools of ZFS; milliseconds, beside those of a shell that does nothing.
    async fn timed(&mut self, script: &str) -> Result<f64> {
        let begun = Instant::now();
        self.pod.sh("app", &format!("PATH=/opt/zpod/bin:$PATH; {script}")).await?;
        Ok(millis(begun))
    }

    /// Durable writes, in turns with nothing beside them and with a snapshot each second, as zpod-guest takes one when its
    /// schedule says so. The snapshots of a round stay until its end: what is written is shared with them.
    async fn writer(&mut self) -> Result<Value> {
        let mut control = self.pod.control().await?;
        let (mut quiet, mut beside, mut taken) = (Vec::new(), Vec::new(), Vec::new());
        for round in 0..self.rounds {
            quiet.extend(syncs(&self.begin_writer().await?.finish().await?.ok()?));
            let mut writer = Box::pin(self.begin_writer().await?.finish());
            let mut names = Vec::new();
            let printed = loop {
                let name = format!("bench-{round}-{}", names.len());
                let begun = Instant::now();
                let (volume_id, snapshot) = (self.volume.volume_id.clone(), name.clone());
                control.take_snapshot(TakeSnapshotRequest { volume_id, snapshot }).await?;
                taken.push(millis(begun));
                names.push(name);
                tokio::select! {
                    done = &mut writer => break done?.ok()?,
                    () = sleep(BETWEEN_SNAPSHOTS) => {}
                }
            };
            beside.extend(syncs(&printed));
            for snapshot in names {
                let volume_id = self.volume.volume_id.clone();
                control.destroy_snapshot(DestroySnapshotRequest { volume_id, snapshot }).await?;
            }
        }
        let head = ["4 KiB + fdatasync, ms", "writes", "p50", "p99", "worst"];
        let mut table = Table::new("a writer and snapshots", &head);
        for (name, values) in [("nothing beside it", &quiet), ("a snapshot each second", &beside)] {
            let cells = [50, 99, 100].map(|percent| format!("{:.2}", percentile(values, percent)));
            table.row([vec![name.to_owned(), values.len().to_string()], cells.to_vec()].concat());
        }
        table.print();
        let snapshots = show("taking a snapshot beside the writer, ms", &[("snapshot", &taken)]);
        Ok(json!({ "quietMillis": quiet, "besideSnapshotsMillis": beside, "snapshots": snapshots }))
    }

    async fn begin_writer(&mut self) -> Result<zpod_e2e::shim::Running> {
        let count = WRITES.to_string();
        self.pod.spawn("app", User::ROOT, &["/bin/e2e", "sync", "/data/sync", &count]).await
    }

    /// The same contents once more, for a process in the pod: by ZFS in its pool, and by CSI as a volume of its own.
    async fn clones(&mut self) -> Result<Value> {
        let dataset = self.dataset()?;
        let thin = format!(
            "zfs snapshot {dataset}@thin && zfs clone -o mountpoint=legacy {dataset}@thin {dataset}/thin && \
             mkdir -p /thin && mount -t zfs {dataset}/thin /thin && ls /thin/file"
        );
        let gone = format!("umount /thin && zfs destroy {dataset}/thin && zfs destroy {dataset}@thin");
        let (mut nothing, mut thins, mut made, mut starts, mut both) =
            <(Vec<_>, Vec<_>, Vec<_>, Vec<_>, Vec<_>)>::default();
        let mut allocated = Vec::new();
        for round in 0..self.rounds {
            nothing.push(self.timed("true").await?);
            thins.push(self.timed(&thin).await?);
            self.timed(&gone).await?;
            let (name, begun) = (format!("pvc-clone-{round}"), Instant::now());
            let clone = self.node.csi.clone_volume(&name, SIZE, &CLASS, &self.volume).await?;
            let target = self.node.target("pod", &name)?;
            self.node.csi.publish(&clone, &target, &Publish::default()).await?;
            made.push(millis(begun));
            let started = Instant::now();
            self.pod.run(Container::new("clone", [Mount::new(&target, "/thin")])).await?;
            self.pod.sh("clone", "ls /thin/file").await?;
            starts.push(millis(started));
            both.push(millis(begun));
            allocated.push(node::allocated(&self.node.device(&target)?)? as f64 / f64::from(1 << 20));
            self.pod.remove("clone").await?;
            self.node.csi.unpublish(&clone, &target).await?;
            self.node.csi.delete(&clone).await?;
        }
        let title = format!("a clone of {MIB} MiB beside its origin, until a process sees its files, ms");
        Ok(show(
            &title,
            &[
                ("a shell that does nothing", &nothing),
                ("in the pod: zfs snapshot, clone, mount", &thins),
                ("by CSI", &both),
                ("... of it: CreateVolume and publish", &made),
                ("... of it: a container that mounts it", &starts),
                ("by CSI: MiB the file maps, shared with its origin", &allocated),
            ],
        ))
    }

    /// MiB/s; with nothing of it in the guest's memory but for the last.
    async fn streams(&mut self) -> Result<Value> {
        let dataset = self.dataset()?;
        self.timed(&format!("zfs snapshot {dataset}@sent")).await?;
        let rate = |millis: f64| MIB as f64 / millis * 1000.0;
        let (mut read, mut sent, mut raw, mut received) = <(Vec<_>, Vec<_>, Vec<_>, Vec<_>)>::default();
        for _ in 0..self.rounds {
            for (values, script) in [
                (&mut read, "cat /data/file >/dev/null".to_owned()),
                (&mut sent, format!("zfs send {dataset}@sent >/dev/null")),
                (&mut raw, format!("zfs send -w {dataset}@sent >/dev/null")),
                (&mut received, format!("zfs send {dataset}@sent | zfs receive -u {dataset}/received")),
            ] {
                self.restart().await?;
                values.push(rate(self.timed(&script).await?));
            }
            self.timed(&format!("zfs destroy -r {dataset}/received")).await?;
        }
        Ok(show(
            &format!("{MIB} MiB that don't compress, MiB/s, a shell's start in it"),
            &[
                ("the file, read", &read),
                ("zfs send", &sent),
                ("zfs send -w", &raw),
                ("zfs send | zfs receive", &received),
            ],
        ))
    }

    /// The pool is exported with its last container, which empties the guest's caches.
    async fn restart(&mut self) -> Result<()> {
        self.pod.remove("app").await?;
        let mounts = [Mount::new(&self.target, "/data")];
        self.pod.run(Container { capabilities: vec!["CAP_SYS_ADMIN"], ..Container::new("app", mounts) }).await
    }

    async fn end(mut self) -> Result<()> {
        self.pod.stop().await?;
        self.node.csi.unpublish(&self.volume, &self.target).await?;
        self.node.csi.delete(&self.volume).await?;
        self.node.must_be_empty().context("after the bench")
    }
}

/// Milliseconds of each write.
fn syncs(nanos: &str) -> Vec<f64> {
    nanos.lines().filter_map(|nanos| Some(nanos.parse::<f64>().ok()? / 1e6)).collect()
}
