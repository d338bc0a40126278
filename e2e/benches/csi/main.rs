//! What the CSI calls of `zpod --standalone` cost: latency and rate at 1, 8 and 64 clients, memory with 0, 1,000 and
//! 10,000 volumes, the time of a ListVolumes page. Beside it, in the same run and on the same file system, the floor:
//! what the bare system calls of a durable create and delete cost. And calls while other volumes share blocks in many
//! pieces.
//!
//! `ZPOD_BENCH_PARTS=rates,growth,shared` for a part.
//!
//! `cargo bench -p zpod-e2e --bench csi`; prints tables, writes `bench-results/csi.json`.

mod floor;
mod load;
mod server;
mod shared;
mod times;

use std::path::Path;

use anyhow::{Context as _, Result};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use serde_json::{Value, json};
use zpod_e2e::report::{self, Table};
use zpod_proto::csi::ListVolumesRequest;
use zpod_volume::Bytes;

use server::Server;

const CLIENTS: [usize; 3] = [1, 8, 64];
const CYCLES: usize = 2_000;
const VOLUMES: [usize; 3] = [0, 1_000, 10_000];
const PAGE: i32 = 100;

fn main() -> Result<()> {
    // Nothing else runs yet: the whole process is in it. Mounts and loop devices are gone with it.
    unshare(CloneFlags::CLONE_NEWNS).context("a mount namespace; root is needed")?;
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let result = runtime.block_on(run())?;
    report::save("csi", &result)
}

async fn run() -> Result<Value> {
    let parts = std::env::var("ZPOD_BENCH_PARTS").unwrap_or_else(|_| "rates,growth,shared".to_owned());
    let wanted = |part: &str| parts.split(',').any(|wanted| wanted == part);
    let shared = if wanted("shared") { shared::measure().await? } else { Vec::new() };
    let mut stores = Vec::new();
    for (name, dir) in [("tmpfs", "/dev/shm"), ("disk", "/var/tmp")].into_iter().filter(|_| wanted("rates")) {
        stores.push(json!({
            "store": name,
            "floor": floor::measure(Path::new(dir), CYCLES / 4)?,
            "rates": rates(name, Path::new(dir)).await?,
        }));
    }
    let growth = if wanted("growth") { growth(Path::new("/dev/shm")).await? } else { Vec::new() };
    Ok(json!({ "stores": stores, "growth": growth, "shared": shared }))
}

/// Latency and rate of each call, by number of clients.
async fn rates(store: &str, dir: &Path) -> Result<Vec<Value>> {
    let mut table = Table::new(
        &format!("{store}: milliseconds, p50 / p99"),
        &["clients", "create", "publish", "unpublish", "delete", "create+delete/s", "whole lives/s"],
    );
    let mut rows = Vec::new();
    for clients in CLIENTS {
        let server = Server::start(dir).await?;
        let life = load::lives(&server, clients, CYCLES, true).await?;
        let pair = load::lives(&server, clients, CYCLES, false).await?;
        let calls: Vec<_> = ["create", "publish", "unpublish", "delete"].iter().map(|call| life.of(call)).collect();
        let mut cells = vec![clients.to_string()];
        cells.extend(calls.iter().map(|call| format!("{:.2} / {:.2}", call.p50, call.p99)));
        cells.push(format!("{:.0}", pair.per_second));
        cells.push(format!("{:.0}", life.per_second));
        table.row(cells);
        rows.push(json!({
            "clients": clients,
            "millis": life.json(),
            "createDeletePerSecond": pair.per_second,
            "createDeleteMillis": pair.json(),
            "livesPerSecond": life.per_second,
        }));
    }
    table.print();
    Ok(rows)
}

/// Memory and page time as the number of volumes grows.
async fn growth(dir: &Path) -> Result<Vec<Value>> {
    let mut table = Table::new(
        "as volumes grow (tmpfs)",
        &["volumes", "resident MiB", "first page ms", "middle page ms", "last page ms", "GetCapacity ms"],
    );
    let server = Server::start(dir).await?;
    let mut rows = Vec::new();
    let mut made = 0;
    for volumes in VOLUMES {
        load::fill(&server, made, volumes).await?;
        made = volumes;
        let pages = pages(&server).await?;
        let capacity = load::capacity(&server, 50).await?;
        let resident = server.resident()?;
        let at = |part: usize| pages.get((pages.len().saturating_sub(1)) * part / 2).copied().unwrap_or_default();
        table.row(vec![
            volumes.to_string(),
            format!("{:.1}", resident.0 as f64 / Bytes::mib(1).0 as f64),
            format!("{:.2}", at(0)),
            format!("{:.2}", at(1)),
            format!("{:.2}", at(2)),
            format!("{capacity:.2}"),
        ]);
        rows.push(json!({
            "volumes": volumes,
            "residentBytes": resident.0,
            "pageMillis": { "first": at(0), "middle": at(1), "last": at(2) },
            "getCapacityMillis": capacity,
        }));
    }
    table.print();
    Ok(rows)
}

/// The time of each page of a whole listing, in milliseconds.
async fn pages(server: &Server) -> Result<Vec<f64>> {
    let mut csi = server.csi();
    let mut token = String::new();
    let mut times = Vec::new();
    loop {
        let request = ListVolumesRequest { max_entries: PAGE, starting_token: token };
        let begun = std::time::Instant::now();
        token = csi.controller.list_volumes(request).await?.into_inner().next_token;
        times.push(begun.elapsed().as_secs_f64() * 1e3);
        if token.is_empty() {
            return Ok(times);
        }
    }
}
