//! Files in the volumes of one container.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result};
use serde_json::{Value, json};
use zpod_e2e::report::{Table, median};
use zpod_e2e::{Container, Mount, Node, Runtime, Sandbox};

use crate::volume::{Kind, Volume};

const ROUNDS: usize = 3;
const SYNCS: usize = 200;
const MIB: usize = 64;

#[derive(Debug, Default)]
pub(crate) struct Files {
    /// Milliseconds of each write of 4 KiB with its fdatasync.
    syncs: Vec<f64>,
    /// MiB/s, with the fsync in the end.
    writes: Vec<f64>,
    /// MiB/s, with nothing of it in the guest's memory.
    reads: Vec<f64>,
}

/// In turns, in a guest that does nothing else.
pub(crate) async fn measure(node: &Node, volumes: &[Volume]) -> Result<BTreeMap<Kind, Files>> {
    let one = |kind| volumes.iter().find(|volume| volume.kind == kind).context("no volume");
    let (ext4, zfs) = (one(Kind::Ext4)?, one(Kind::Zfs)?);
    let container = || Container::new("files", [Mount::new(&ext4.target, "/ext4"), Mount::new(&zfs.target, "/zfs")]);
    let mut pod = Sandbox::start(node, Runtime::Rs).await?;
    let mut files: BTreeMap<Kind, Files> = BTreeMap::new();
    pod.run(container()).await?;
    for _ in 0..ROUNDS {
        for kind in [Kind::Ext4, Kind::Zfs] {
            let (name, files) = (kind.name(), files.entry(kind).or_default());
            let syncs = pod.sh("files", &format!("e2e sync /{name}/sync {SYNCS}")).await?;
            files.syncs.extend(syncs.lines().filter_map(|nanos| Some(nanos.parse::<f64>().ok()? / 1e6)));
            let nanos = pod.sh("files", &format!("rm -f /{name}/long; sync; e2e write /{name}/long {MIB}")).await?;
            files.writes.push(rate(&nanos)?);
        }
        // Unmounting and exporting empties the guest's caches.
        pod.remove("files").await?;
        pod.run(container()).await?;
        for kind in [Kind::Ext4, Kind::Zfs] {
            let nanos = pod.sh("files", &format!("e2e read /{}/long", kind.name())).await?;
            files.entry(kind).or_default().reads.push(rate(&nanos)?);
        }
    }
    pod.stop().await?;
    Ok(files)
}

fn rate(nanos: &str) -> Result<f64> {
    Ok(MIB as f64 / (nanos.parse::<f64>().with_context(|| format!("{nanos:?} is no time"))? / 1e9))
}

fn at(values: &[f64], percent: usize) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() * percent / 100).copied().unwrap_or(f64::NAN)
}

pub(crate) fn print(files: &BTreeMap<Kind, Files>, title: impl Fn(&str) -> String) {
    let head = ["", "4 KiB + fdatasync: p50 ms", "p99 ms", "write MiB/s", "read MiB/s"];
    let what = format!("files in one container, {MIB} MiB that don't compress, medians of {ROUNDS}");
    let mut table = Table::new(&title(&what), &head);
    for (kind, files) in files {
        table.row(vec![
            kind.name().to_owned(),
            format!("{:.2}", at(&files.syncs, 50)),
            format!("{:.2}", at(&files.syncs, 99)),
            format!("{:.0}", median(&files.writes)),
            format!("{:.0}", median(&files.reads)),
        ]);
    }
    table.print();
}

pub(crate) fn json(files: &BTreeMap<Kind, Files>) -> Value {
    let rows = files.iter().map(|(kind, files)| {
        json!({
            "volume": kind.name(),
            "syncedWrites": files.syncs.len(),
            "syncedWriteMillis": { "p50": at(&files.syncs, 50), "p99": at(&files.syncs, 99) },
            "writeMibPerSecond": files.writes,
            "readMibPerSecond": files.reads,
        })
    });
    Value::Array(rows.collect())
}
