//! What zpod costs on a real cluster: claims until they are Bound, pods until their volume is published, memory and
//! lists as volumes grow. Beside it, in the same run, a CSI driver that does nothing: the floor.
//!
//! `cargo bench -p zpod-e2e --bench kubernetes`; prints tables, writes `bench-results/kubernetes.json`.
//! `ZPOD_BENCH_SCALE=0.1` makes everything a tenth as large, `ZPOD_BENCH_PARTS=claims,pods,growth` chooses.

mod claims;
mod driver;
mod floor;
mod growth;
mod pods;

use anyhow::{Context as _, Result};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};
use serde_json::{Value, json};
use zpod_e2e::cluster::{self, Cluster};
use zpod_e2e::report;

use driver::Driver;
use floor::Floor;

const NODE: &str = "node-a";
const CLASSES: &str = include_str!("../../manifests/classes.yaml");

fn main() -> Result<()> {
    cluster::isolate()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let result = runtime.block_on(run())?;
    report::save("kubernetes", &result)
}

async fn run() -> Result<Value> {
    let parts = std::env::var("ZPOD_BENCH_PARTS").unwrap_or_else(|_| "claims,pods,growth".to_owned());
    let parts: Vec<_> = parts.split(',').collect();
    let cluster = Cluster::start().await?;
    cluster.add_node(NODE).await?;
    cluster.install_chart().await?;
    cluster.apply(CLASSES).await?;
    let config = Kubeconfig::read_from(cluster.kubeconfig())?;
    let config = Config::from_custom_kubeconfig(config, &KubeConfigOptions::default()).await?;
    let client = Client::try_from(config).context("connect")?;
    let result = measure(&parts, &cluster, &client).await;
    match result {
        Ok(result) => Ok(result),
        Err(error) => Err(error.context(cluster.diagnosis().await)),
    }
}

async fn measure(parts: &[&str], cluster: &Cluster, client: &Client) -> Result<Value> {
    let mut result = json!({});
    let mut drivers = [Driver::Floor(Box::new(Floor::start(cluster).await?)), Driver::Zpod(cluster)];
    if parts.contains(&"claims") {
        result["claims"] = claims::measure(client, &mut drivers, &[driver::CHART, driver::UNLIMITED]).await?.into();
    } else {
        for driver in &mut drivers {
            driver.limit(driver::UNLIMITED).await?;
            claims::warm_up(client, driver).await?;
        }
    }
    if parts.contains(&"pods") {
        result["pods"] = pods::measure(client, cluster, &drivers).await?;
    }
    drop(drivers);
    if parts.contains(&"growth") {
        result["growth"] = growth::measure(client, cluster).await?;
    }
    Ok(result)
}

/// A size for this run.
fn scaled(size: usize) -> usize {
    let scale = std::env::var("ZPOD_BENCH_SCALE").ok().and_then(|text| text.parse().ok()).unwrap_or(1.0);
    ((size as f64 * scale) as usize).max(1)
}
