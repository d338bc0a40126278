//! Clients that call.

use std::fs;
use std::time::Instant;

use anyhow::Result;
use zpod_e2e::csi::{Csi, Publish};
use zpod_proto::csi::GetCapacityRequest;
use zpod_volume::Bytes;

use crate::server::Server;
use crate::times::Times;

const SIZE: Bytes = Bytes::gib(1);
/// Clients that fill the catalog, where nothing is timed.
const FILLERS: usize = 32;

/// `lives` volumes are made and deleted by so many clients; with `published` each is published in between.
pub(crate) async fn lives(server: &Server, clients: usize, lives: usize, published: bool) -> Result<Times> {
    let begun = Instant::now();
    let mut tasks = Vec::new();
    for client in 0..clients {
        let mut csi = server.csi();
        let target = server.target(client);
        if let Some(parent) = target.parent() {
            fs::create_dir_all(parent)?;
        }
        tasks.push(tokio::spawn(async move {
            let mut times = Times::default();
            for life in 0..lives / clients {
                let name = format!("pvc-bench-{client}-{life}");
                let volume = timed(&mut times, "create", csi.create(&name, SIZE, &[])).await?;
                if published {
                    timed(&mut times, "publish", csi.publish(&volume, &target, &Publish::default())).await?;
                    timed(&mut times, "unpublish", csi.unpublish(&volume, &target)).await?;
                }
                timed(&mut times, "delete", csi.delete(&volume)).await?;
            }
            anyhow::Ok(times)
        }));
    }
    let mut all = Times::default();
    for task in tasks {
        all.merge(task.await??);
    }
    all.per_second = (lives / clients * clients) as f64 / begun.elapsed().as_secs_f64();
    Ok(all)
}

/// Makes the volumes numbered `from` up to `to`.
pub(crate) async fn fill(server: &Server, from: usize, to: usize) -> Result<()> {
    let mut tasks = Vec::new();
    for filler in 0..FILLERS {
        let mut csi: Csi = server.csi();
        tasks.push(tokio::spawn(async move {
            for number in (from..to).skip(filler).step_by(FILLERS) {
                csi.create(&format!("pvc-fill-{number}"), SIZE, &[]).await?;
            }
            anyhow::Ok(())
        }));
    }
    for task in tasks {
        task.await??;
    }
    Ok(())
}

/// Milliseconds of one GetCapacity, over `calls`.
pub(crate) async fn capacity(server: &Server, calls: usize) -> Result<f64> {
    let mut csi = server.csi();
    csi.controller.get_capacity(GetCapacityRequest::default()).await?;
    let begun = Instant::now();
    for _ in 0..calls {
        csi.controller.get_capacity(GetCapacityRequest::default()).await?;
    }
    Ok(begun.elapsed().as_secs_f64() * 1e3 / calls as f64)
}

async fn timed<T, E>(
    times: &mut Times,
    call: &'static str,
    answer: impl Future<Output = Result<T, E>>,
) -> Result<T, E> {
    let begun = Instant::now();
    let answer = answer.await?;
    times.add(call, begun.elapsed());
    Ok(answer)
}
