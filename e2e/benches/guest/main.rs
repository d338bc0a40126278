//! What a volume costs in a real guest: the start of its container with a fresh and with an existing pool, and of what
//! parts; durable writes, writing and reading. Beside it, in the same guests and on the same kind of disk, what Kata
//! does by itself: an ext4 direct volume as its own CSI driver (csi-kata-directvolume) makes one, formatted on the host
//! and mounted by the agent.
//!
//! `cargo bench -p zpod-e2e --bench guest`; prints tables, writes `bench-results/guest.json`. `ZPOD_BENCH_BOOTS` is the
//! number of guests (4). In emulation only the comparison says something.

mod files;
mod starts;
mod volume;

use anyhow::Result;
use serde_json::json;
use zpod_e2e::accel::Accel;
use zpod_e2e::{Node, Runtime, Sandbox, report};

use starts::{Starts, State};
use volume::{Kind, Volume};

/// Volumes of each kind that a guest makes.
const FRESH: usize = 2;

fn main() -> Result<()> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(run())
}

async fn run() -> Result<()> {
    let boots = std::env::var("ZPOD_BENCH_BOOTS").ok().and_then(|text| text.parse().ok()).unwrap_or(4);
    let accel = Accel::detect().await?.argument();
    let mut node = Node::start().await?;
    let mut starts = Starts::default();
    let mut volumes: Vec<Volume> = Vec::new();
    for boot in 0..boots {
        let mut pod = Sandbox::start(&node, Runtime::Rs).await?;
        starts.new_guest();
        starts.measure(&mut pod, None, State::Fresh).await?;
        // Every other guest begins with volumes that another one left, as in the second pod of a volume's life.
        if boot % 2 == 1 {
            starts.each(&mut pod, &volumes, State::Existing).await?;
        }
        let mut fresh = Vec::new();
        for number in 0..FRESH {
            for kind in [Kind::Ext4, Kind::Zfs] {
                fresh.push(Volume::make(&mut node, kind, boot * FRESH + number).await?);
            }
        }
        starts.each(&mut pod, &fresh, State::Fresh).await?;
        if boot % 2 == 0 {
            starts.each(&mut pod, &fresh, State::Existing).await?;
        }
        volumes = fresh;
        pod.stop().await?;
    }
    let title = |what: &str| format!("{what}; accelerator {accel}");
    starts.print(title);
    let files = files::measure(&node, &volumes).await?;
    files::print(&files, title);
    report::save(
        "guest",
        &json!({ "accel": accel, "boots": boots, "starts": starts.json(), "files": files::json(&files) }),
    )
}
