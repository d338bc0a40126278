//! What calls cost while volumes share blocks in many pieces, and zpod has just been started and looks who shares what.
//! Nothing of that shall show in them. On an XFS in a sparse file below /var/tmp; needs root and mkfs.xfs.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use zpod_e2e::csi::{Csi, Publish};
use zpod_e2e::disk;
use zpod_e2e::report::Table;
use zpod_e2e::workdir::Workdir;
use zpod_proto::csi::{CreateSnapshotRequest, GetCapacityRequest, ProbeRequest};
use zpod_volume::Bytes;

use crate::server::Server;
use crate::times::Times;

/// Pieces of the volume that others share blocks with, and how many snapshots there are of it.
const SHARED: [(u64, usize); 4] = [(1, 1), (30_000, 1), (30_000, 28), (300_000, 1)];
const CALLS: usize = 200;
const NAMES: [&str; 6] = ["Probe", "GetCapacity", "publish", "stats", "unpublish", "metrics"];

/// Times of calls that have nothing to do with that volume, but stats of a small one beside it.
pub(crate) async fn measure() -> Result<Vec<Value>> {
    let mut columns = vec!["pieces", "snapshots", "extents"];
    columns.extend(NAMES);
    let mut table = Table::new("while blocks are shared, milliseconds, p50 / p99", &columns);
    let mut rows = Vec::new();
    for (pieces, snapshots) in SHARED {
        let times = of(pieces, snapshots).await?;
        let extents = pieces * (snapshots as u64 + 1);
        let mut cells = vec![pieces.to_string(), snapshots.to_string(), extents.to_string()];
        cells.extend(NAMES.map(|name| format!("{:.2} / {:.2}", times.of(name).p50, times.of(name).p99)));
        eprintln!("{}", cells.join("  "));
        table.row(cells);
        rows.push(json!({ "pieces": pieces, "snapshots": snapshots, "millis": times.json() }));
    }
    table.print();
    Ok(rows)
}

async fn of(pieces: u64, snapshots: usize) -> Result<Times> {
    let dir = Workdir::within("/var/tmp".as_ref())?;
    let at = dir.path().join("mnt");
    disk::mount_xfs(&at, 16 << 30)?;
    let times = calls(&at, pieces, snapshots).await;
    disk::unmount(&at)?;
    times
}

async fn calls(at: &Path, pieces: u64, snapshots: usize) -> Result<Times> {
    let server = Server::start(at).await?;
    let mut csi = server.csi();
    let shared = csi.create("shared", Bytes::gib(4), &[]).await?;
    let file = File::options().write(true).open(server.image(&shared.volume_id))?;
    // Every second block: no two of them join.
    for piece in 0..pieces {
        file.write_all_at(&[1; 4096], (2 << 20) + piece * 8192)?;
    }
    file.sync_all()?;
    drop(file);
    for number in 0..snapshots {
        let request = CreateSnapshotRequest {
            source_volume_id: shared.volume_id.clone(),
            name: format!("s{number}"),
            ..CreateSnapshotRequest::default()
        };
        csi.controller.create_snapshot(request).await?;
    }
    let other = csi.create("other", Bytes::gib(1), &[]).await?;
    // Nothing is known of what is shared but what the files say.
    let server = server.restart().await?;
    let (mut csi, target, mut times) = (server.csi(), server.target(0), Times::default());
    fs::create_dir_all(target.parent().context("a target path has a parent")?)?;
    for _ in 0..CALLS {
        round(&server, &mut csi, &other, &target, &mut times).await?;
    }
    Ok(times)
}

async fn round(
    server: &Server,
    csi: &mut Csi,
    volume: &zpod_proto::csi::Volume,
    target: &Path,
    times: &mut Times,
) -> Result<()> {
    let mut begun = Instant::now();
    let mut add = |times: &mut Times, name| {
        times.add(name, begun.elapsed());
        begun = Instant::now();
    };
    csi.identity.probe(ProbeRequest {}).await?;
    add(times, "Probe");
    csi.controller.get_capacity(GetCapacityRequest::default()).await?;
    add(times, "GetCapacity");
    csi.publish(volume, target, &Publish::default()).await?;
    add(times, "publish");
    csi.stats(volume, target).await?;
    add(times, "stats");
    csi.unpublish(volume, target).await?;
    add(times, "unpublish");
    scrape(server).await?;
    add(times, "metrics");
    Ok(())
}

async fn scrape(server: &Server) -> Result<()> {
    let mut stream = TcpStream::connect(server.metrics()).await?;
    stream.write_all(b"GET /metrics HTTP/1.1\r\nhost: zpod\r\nconnection: close\r\n\r\n").await?;
    let mut text = String::new();
    stream.read_to_string(&mut text).await?;
    ensure!(text.contains("zpod_node_available_bytes"), "no metrics: {text}");
    Ok(())
}
