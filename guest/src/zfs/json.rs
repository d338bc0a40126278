//! What the tools answer.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde::de::DeserializeOwned;
use zpod_volume::PoolName;

use crate::machine::{Fault, PoolReport, PoolState, Properties};

#[derive(Deserialize)]
struct Pools<P> {
    #[serde(default = "BTreeMap::new")]
    pools: BTreeMap<String, P>,
}

#[derive(Deserialize)]
struct Datasets {
    #[serde(default)]
    datasets: BTreeMap<String, Listed>,
}

/// An entry of `zpool list` or `zfs get`.
#[derive(Deserialize)]
struct Listed {
    #[serde(default)]
    properties: BTreeMap<String, Value>,
}

#[derive(Deserialize)]
struct Value {
    value: String,
}

/// An entry of `zpool status`. Numbers are strings there.
#[derive(Deserialize)]
struct Status {
    #[serde(default)]
    status: String,
    #[serde(default)]
    action: String,
    #[serde(default)]
    error_count: String,
    #[serde(default)]
    scan_stats: Scan,
    #[serde(default)]
    vdevs: BTreeMap<String, Vdev>,
}

#[derive(Deserialize, Default)]
struct Scan {
    #[serde(default)]
    function: String,
    #[serde(default)]
    state: String,
    #[serde(default)]
    scrub_pause: String,
}

#[derive(Deserialize)]
struct Vdev {
    #[serde(default)]
    read_errors: String,
    #[serde(default)]
    write_errors: String,
    #[serde(default)]
    checksum_errors: String,
    #[serde(default)]
    vdevs: BTreeMap<String, Vdev>,
}

fn parse<T: DeserializeOwned>(output: &[u8]) -> Result<T, Fault> {
    serde_json::from_slice(output)
        .map_err(|error| Fault::new(format!("the answer of the ZFS tools does not parse: {error}")))
}

fn pool_named<P: DeserializeOwned>(output: &[u8], pool: &PoolName) -> Result<P, Fault> {
    let mut pools: Pools<P> = parse(output)?;
    pools.pools.remove(pool.as_str()).ok_or_else(|| Fault::new(format!("pool {pool} is not imported")))
}

fn properties(listed: Listed) -> Properties {
    listed.properties.into_iter().map(|(key, value)| (key, value.value)).collect()
}

fn number(text: &str) -> u64 {
    text.parse().unwrap_or(0)
}

pub(super) fn pool(output: &[u8], pool: &PoolName) -> Result<PoolState, Fault> {
    let properties = properties(pool_named(output, pool)?);
    let get = |key: &str| properties.get(key).map_or(0, |value| number(value));
    Ok(PoolState { allocated: get("allocated"), expandable: get("expandsize") > 0, properties })
}

pub(super) fn dataset(output: &[u8], dataset: &str) -> Result<Option<Properties>, Fault> {
    let mut datasets: Datasets = parse(output)?;
    Ok(datasets.datasets.remove(dataset).map(properties))
}

pub(super) fn report(output: &[u8], pool: &PoolName) -> Result<PoolReport, Fault> {
    let status: Status = pool_named(output, pool)?;
    let mut report = PoolReport {
        message: [status.status.trim(), status.action.trim()].join(" ").trim().to_owned(),
        data_errors: number(&status.error_count),
        scrubbing: status.scan_stats.function == "SCRUB"
            && status.scan_stats.state == "SCANNING"
            && matches!(status.scan_stats.scrub_pause.as_str(), "" | "-"),
        ..PoolReport::default()
    };
    let mut left: Vec<_> = status.vdevs.values().collect();
    while let Some(vdev) = left.pop() {
        // Errors are counted where they happened: at the leaves.
        if vdev.vdevs.is_empty() {
            report.read_errors += number(&vdev.read_errors);
            report.write_errors += number(&vdev.write_errors);
            report.checksum_errors += number(&vdev.checksum_errors);
        }
        left.extend(vdev.vdevs.values());
    }
    Ok(report)
}
