//! From power-on to an answer of the agent through zpod-guest, against the same kernel with an empty initramfs.
//!
//! `cargo bench -p zpod-e2e --bench boot`; prints a table, writes `bench-results/boot.json`. `ZPOD_BENCH_BOOTS` is the
//! number of boots of each (5); they alternate, so that a busy machine slows both.

use std::time::Duration;

use anyhow::Result;
use serde_json::json;
use zpod_e2e::accel::Accel;
use zpod_e2e::report::{self, Table, median};
use zpod_e2e::{Boot, Guest, Node, Runtime, Sandbox};

fn main() -> Result<()> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(run())
}

async fn run() -> Result<()> {
    let boots = std::env::var("ZPOD_BENCH_BOOTS").ok().and_then(|text| text.parse().ok()).unwrap_or(5);
    let accel = Accel::detect().await?;
    let (mut empty, mut zpod) = (Vec::new(), Vec::new());
    for _ in 0..boots {
        empty.push(boot_empty().await?);
        zpod.push(boot_zpod().await?);
    }
    let (empty_median, zpod_median) = (median(&empty), median(&zpod));
    let ratio = (zpod_median / empty_median * 100.0).round() / 100.0;
    let mut table =
        Table::new(&format!("boot, accelerator {}: seconds from power-on", accel.argument()), &["", "median", "all"]);
    let all = |times: &[f64]| times.iter().map(|time| format!("{time:.2}")).collect::<Vec<_>>().join(" ");
    table.row(vec!["empty initramfs, until its panic".into(), format!("{empty_median:.2}"), all(&empty)]);
    table.row(vec!["agent answers through zpod-guest".into(), format!("{zpod_median:.2}"), all(&zpod)]);
    table.row(vec!["ratio (goal: 1.5)".into(), format!("{ratio:.2}"), String::new()]);
    table.print();
    report::save(
        "boot",
        &json!({
            "accel": accel.argument(),
            "boots": boots,
            "emptyInitramfsSeconds": empty_median,
            "proxyReadySeconds": zpod_median,
            "ratio": ratio,
            "goalRatio": 1.5,
            "emptyInitramfsAll": empty,
            "proxyReadyAll": zpod,
        }),
    )
}

/// Until the kernel finds that there is nothing to start.
async fn boot_empty() -> Result<f64> {
    let guest = Guest::boot(Boot::Empty).await?;
    guest.shows("Kernel panic", Duration::from_secs(60)).await?;
    Ok(seconds(guest.power_on.elapsed()))
}

async fn boot_zpod() -> Result<f64> {
    let node = Node::idle()?;
    let pod = Sandbox::start(&node, Runtime::Rs).await?;
    Ok(seconds(pod.boot_time))
}

fn seconds(time: Duration) -> f64 {
    (time.as_secs_f64() * 1000.0).round() / 1000.0
}
