//! What the storage costs by itself: `cargo run --release -p zpod-storage --example measure -- DIR`, DIR on tmpfs.
#![allow(clippy::unwrap_used, reason = "a measurement that fails has nothing to report")]

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use zpod_storage::backing::file::FileBacking;
use zpod_storage::backing::{Backing, DeviceSpec};
use zpod_storage::catalog::{Catalog, Phase, Volume};
use zpod_volume::{Bytes, DiskLayout, Headroom, Provisioning, VolumeId, VolumeParameters};

const VOLUMES: usize = 10_000;

fn main() {
    let root = std::env::args().nth(1).unwrap_or_else(|| "/dev/shm".to_owned());
    let dir = tempfile::tempdir_in(root).unwrap();
    backing(dir.path());
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    runtime.block_on(catalog(dir.path()));
}

fn backing(dir: &Path) {
    let dir = dir.join("backing");
    std::fs::create_dir(&dir).unwrap();
    let backing = FileBacking::open(&dir, 1000.0).unwrap();
    let spec = |n: usize| DeviceSpec {
        id: VolumeId::from_name(&n.to_string()),
        layout: DiskLayout::new(Bytes::gib(1), Headroom::default()),
        provisioning: Provisioning::Thin,
    };
    let cycle = |name: &str| {
        let mut times = Vec::new();
        for n in 0..5_000 {
            let start = Instant::now();
            backing.create(&spec(VOLUMES + n)).unwrap();
            backing.destroy(spec(VOLUMES + n).id).unwrap();
            times.push(start.elapsed());
        }
        report(name, times, 1);
    };
    cycle("backing create+destroy, alone");
    for n in 0..VOLUMES {
        backing.create(&spec(n)).unwrap();
    }
    cycle("backing create+destroy, among 10,000");
    drop(backing);
    let start = Instant::now();
    let backing = FileBacking::open(&dir, 1000.0).unwrap();
    println!("backing open with 10,000: {:?}", start.elapsed());
    std::thread::sleep(Duration::from_secs(5));
    let start = Instant::now();
    backing.capacity().unwrap();
    println!("backing capacity, measured anew: {:?}; resident {} KiB", start.elapsed(), resident());
}

async fn catalog(dir: &Path) {
    let dir = dir.join("catalog");
    let catalog = Arc::new(zpod_storage::catalog::dir::open(&dir).unwrap().0);
    for clients in [1, 8, 64] {
        let start = Instant::now();
        let tasks: Vec<_> = (0..clients)
            .map(|client| {
                let catalog = Arc::clone(&catalog);
                tokio::spawn(async move {
                    let mut times = Vec::new();
                    for n in 0..4_000 / clients {
                        let start = Instant::now();
                        let volume = record(&format!("{client}-{n}"));
                        let id = volume.id;
                        catalog.create(volume).await.unwrap();
                        catalog.remove(id).await.unwrap();
                        times.push(start.elapsed());
                    }
                    times
                })
            })
            .collect();
        let mut times = Vec::new();
        for task in tasks {
            times.extend(task.await.unwrap());
        }
        println!("wall {:?}", start.elapsed());
        report(&format!("catalog create+remove, {clients} clients"), times, clients);
    }
    for n in 0..VOLUMES {
        catalog.create(record(&n.to_string())).await.unwrap();
    }
    let mut times = Vec::new();
    for n in 0..VOLUMES {
        let start = Instant::now();
        catalog.get(VolumeId::from_name(&n.to_string())).await.unwrap().unwrap();
        times.push(start.elapsed());
    }
    report("catalog get", times, 1);
    let (mut from, mut times) = (None, Vec::new());
    loop {
        let start = Instant::now();
        let page = catalog.list(from, 100).await.unwrap();
        times.push(start.elapsed());
        from = page.next;
        if from.is_none() {
            break;
        }
    }
    println!("catalog list, first and last page of 100: {:?} {:?}", times[0], times[times.len() - 1]);
    report("catalog list, page of 100", times, 1);
    drop(catalog);
    let before = resident();
    let start = Instant::now();
    let _catalog = zpod_storage::catalog::dir::open(&dir).unwrap().0;
    println!("catalog open with 10,000: {:?}; resident before {before}, after {} KiB", start.elapsed(), resident());
}

fn report(name: &str, mut times: Vec<Duration>, clients: usize) {
    times.sort();
    let total: Duration = times.iter().sum();
    let rate = times.len() as f64 * clients as f64 / total.as_secs_f64();
    println!("{name}: {rate:.0}/s, p50 {:?}, p99 {:?}", times[times.len() / 2], times[times.len() * 99 / 100]);
}

fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

fn record(name: &str) -> Volume {
    Volume {
        id: VolumeId::from_name(name),
        phase: Phase::Ready,
        initialized: true,
        written: true,
        table_capacity: Bytes::gib(1),
        labels: [("namespace".to_owned(), "default".to_owned())].into(),
        ..Volume::wanted(&format!("pvc-{name}"), Bytes::gib(1), VolumeParameters::default(), "node-1")
    }
}
