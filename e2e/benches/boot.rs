//! From power-on to the proxy being ready, and to an answer of the agent through it, against the same kernel with an
//! empty initramfs.
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
    let (mut empty, mut proxy, mut agent) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..boots {
        empty.push(until(Boot::Empty, "Kernel panic").await?);
        proxy.push(until(Boot::Zpod, "zpod-guest: proxy ready").await?);
        agent.push(until_answered().await?);
    }
    let floor = median(&empty);
    let mut table = Table::new(
        &format!("boot, accelerator {}: seconds from power-on", accel.argument()),
        &["", "median", "ratio", "all"],
    );
    let mut rows = serde_json::Map::new();
    for (key, name, times) in [
        ("emptyInitramfs", "empty initramfs, until its panic", &empty),
        ("proxyReady", "zpod-guest's proxy is ready (goal: 1.5)", &proxy),
        ("agentAnswers", "the agent answers through it", &agent),
    ] {
        let (median, ratio) = (median(times), (median(times) / floor * 100.0).round() / 100.0);
        let all = times.iter().map(|time| format!("{time:.2}")).collect::<Vec<_>>().join(" ");
        table.row(vec![name.into(), format!("{median:.2}"), format!("{ratio:.2}"), all]);
        rows.insert(key.into(), json!({ "seconds": median, "ratio": ratio, "all": times }));
    }
    table.print();
    report::save("boot", &json!({ "accel": accel.argument(), "boots": boots, "boot": rows }))
}

/// Until the console shows a text.
async fn until(boot: Boot, text: &str) -> Result<f64> {
    let guest = Guest::boot(boot).await?;
    guest.shows(text, Duration::from_secs(60)).await?;
    Ok(seconds(guest.power_on.elapsed()))
}

async fn until_answered() -> Result<f64> {
    let node = Node::idle()?;
    let pod = Sandbox::start_with(&node, Runtime::Rs, Boot::Zpod).await?;
    Ok(seconds(pod.boot_time))
}

fn seconds(time: Duration) -> f64 {
    (time.as_secs_f64() * 1000.0).round() / 1000.0
}
