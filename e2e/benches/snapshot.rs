//! What snapshots and clones cost on a file system where files share blocks: by size of the volume, by what is in it,
//! and by the number of extents that lies in, which is what it follows. Beside it the bare clone of the same file by
//! FICLONE and fsync, and what a guest's writes cost before a snapshot and after it.
//!
//! Needs root, mkfs.xfs, xfs_io, and 16 GiB free below /var/tmp, which it gives back: an XFS in a sparse file there, on a
//! loop device, in a mount namespace of its own. `ZPOD_BENCH_SCALE=0.1` for a tenth of the data and of the space;
//! `ZPOD_BENCH_DISK=/dev/...` for a disk of 40 GiB instead, **whose contents are lost**, such as a zram device, where the
//! data takes no space.
//!
//! `cargo bench -p zpod-e2e --bench snapshot`; prints tables, writes `bench-results/snapshot.json`.

use std::env;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use serde_json::{Value, json};
use zpod_e2e::inputs;
use zpod_e2e::report::{self, Table};
use zpod_e2e::workdir::Workdir;
use zpod_storage::backing::file::FileBacking;
use zpod_storage::backing::{Backing as _, CopySource, Copying, DeviceSpec};
use zpod_volume::{Bytes, DiskLayout, Headroom, Provisioning, SnapshotId, VolumeId};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const ROUNDS: usize = 5;
const SHARED: Copying<'static> = Copying { full: false, progress: &|_, _| true };

/// A volume: what a person calls it, how large it is, how much is in it, and in pieces of what size, with holes between.
const VOLUMES: [(&str, u64, u64, Option<u64>); 5] = [
    ("1 GiB, 1 MiB in it", 1, MIB, None),
    ("100 GiB, 1 MiB in it", 100, MIB, None),
    ("100 GiB, 10 GiB in it", 100, 10 * GIB, None),
    ("100 GiB, 1 GiB in it, each 128 KiB by itself", 100, GIB, Some(128 << 10)),
    ("100 GiB, 1 GiB in it, each 16 KiB by itself", 100, GIB, Some(16 << 10)),
];

fn main() -> Result<()> {
    // Nothing else runs yet: the whole process is in it. Mounts and loop device are gone with it.
    unshare(CloneFlags::CLONE_NEWNS).context("a mount namespace; root is needed")?;
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)?;
    let dir = Workdir::within(Path::new("/var/tmp"))?;
    let at = make_xfs(dir.path())?;
    let mut table = Table::new(
        "snapshots on XFS, milliseconds, p50 / worst",
        &["volume", "extents", "bare FICLONE", "snapshot", "clone of it", "destroy snapshot"],
    );
    let mut rows = Vec::new();
    let scale: f64 = env::var("ZPOD_BENCH_SCALE").map_or(Ok(1.0), |scale| scale.parse())?;
    for (name, gib, data, piece) in VOLUMES {
        let data = ((data as f64 * scale) as u64).max(MIB);
        let row = volume(&at, name, gib, data, piece)?;
        let cell = |key: &str| format!("{} / {}", row[key]["p50"], row[key]["worst"]);
        let mut cells = vec![name.to_owned(), row["extents"].to_string()];
        cells.extend(["bare", "snapshot", "clone", "destroy"].map(cell));
        eprintln!("{}", cells.join("  "));
        table.row(cells);
        rows.push(row);
    }
    table.print();
    let writes = writes(&at)?;
    report::save("snapshot", &json!({ "volumes": rows, "writes": writes }))
}

fn make_xfs(dir: &Path) -> Result<PathBuf> {
    let at = dir.join("mnt");
    fs::create_dir(&at)?;
    let (disk, options) = match env::var_os("ZPOD_BENCH_DISK") {
        Some(disk) => (PathBuf::from(disk), "discard"),
        None => {
            let disk = dir.join("disk");
            File::create(&disk)?.set_len(40 * GIB)?;
            (disk, "loop,discard")
        }
    };
    run(Command::new(inputs::program("mkfs.xfs", "install xfsprogs")?).args(["-q", "-f"]).arg(&disk))?;
    run(Command::new(inputs::program("mount", "install mount")?).args(["-o", options]).args([&disk, &at]))?;
    Ok(at)
}

fn run(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("{command:?}"))?;
    ensure!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?)
}

fn open(at: &Path) -> Result<FileBacking> {
    // 100 GiB are promised on a disk of 40: what is measured is time.
    Ok(FileBacking::open(at, 20.0)?)
}

fn spec(name: &str, gib: u64) -> DeviceSpec {
    let layout = DiskLayout::new(Bytes::gib(gib), Headroom::NONE);
    DeviceSpec { id: VolumeId::from_name(name), layout, provisioning: Provisioning::Thin }
}

/// Times in milliseconds.
fn times(mut times: Vec<Duration>) -> Value {
    times.sort();
    let millis = |at: usize| (times[at].as_secs_f64() * 100_000.0).round() / 100.0;
    json!({ "p50": millis(times.len() / 2), "worst": millis(times.len() - 1) })
}

fn volume(at: &Path, name: &str, gib: u64, data: u64, piece: Option<u64>) -> Result<Value> {
    let backing = open(at)?;
    let (of, copy, id) = (spec(name, gib), spec("copy", gib), SnapshotId::from_name(name));
    backing.create(&of)?;
    let path = backing.device(of.id)?;
    let file = File::options().write(true).open(&path)?;
    let step = piece.unwrap_or(MIB);
    let (bytes, stride) = (vec![7; step as usize], if piece.is_some() { 2 * step } else { step });
    for n in 0..data / step {
        file.write_all_at(&bytes, DiskLayout::PARTITION_START + n * stride)?;
    }
    file.sync_all()?;
    let mut measured: [Vec<Duration>; 4] = Default::default();
    let mut timed = |which: usize, work: &mut dyn FnMut() -> Result<()>| {
        let started = Instant::now();
        let result = work();
        measured[which].push(started.elapsed());
        result
    };
    for _ in 0..ROUNDS {
        let bare = at.join("bare");
        timed(0, &mut || {
            let clone = File::create(&bare)?;
            rustix::fs::ioctl_ficlone(&clone, File::open(&path)?)?;
            Ok(clone.sync_all()?)
        })?;
        fs::remove_file(&bare)?;
        timed(1, &mut || Ok(backing.snapshot(id, &of, &SHARED).map(|_| ())?))?;
        let from = CopySource::Snapshot(id);
        timed(2, &mut || Ok(backing.create_from(&copy, from, of.layout.partition, &SHARED).map(|_| ())?))?;
        timed(3, &mut || Ok(backing.destroy_snapshot(id).map(|_| ())?))?;
        backing.destroy(copy.id)?;
    }
    let extents = extents(&path)?;
    drop(file);
    backing.destroy(of.id)?;
    let [bare, snapshot, clone, destroy] = measured.map(times);
    Ok(json!({
        "volume": name, "extents": extents, "bare": bare, "snapshot": snapshot, "clone": clone, "destroy": destroy,
    }))
}

fn extents(file: &Path) -> Result<u64> {
    let program = inputs::program("xfs_io", "install xfsprogs")?;
    let said = run(Command::new(program).args(["-r", "-c", "stat"]).arg(file))?;
    let line = said.lines().find_map(|line| line.strip_prefix("fsxattr.nextents = ")).context("no nextents")?;
    Ok(line.trim().parse()?)
}

/// What a guest's writes cost that rewrite what is shared, and a snapshot that has to wait for writes.
fn writes(at: &Path) -> Result<Value> {
    let backing = open(at)?;
    let (of, id) = (spec("writes", 10), SnapshotId::from_name("writes"));
    backing.create(&of)?;
    let file = File::options().write(true).open(backing.device(of.id)?)?;
    let write = |sync: bool| -> Result<f64> {
        let (bytes, started) = (vec![8; MIB as usize], Instant::now());
        for n in 0..512 {
            file.write_all_at(&bytes, DiskLayout::PARTITION_START + n * MIB)?;
        }
        if sync {
            file.sync_all()?;
        }
        Ok((512.0 / started.elapsed().as_secs_f64()).round())
    };
    write(true)?;
    let (mut own, mut shared, mut waits) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..5 {
        own.push(write(true)?);
        backing.snapshot(id, &of, &SHARED)?;
        shared.push(write(true)?);
        backing.destroy_snapshot(id)?;
        write(false)?;
        let started = Instant::now();
        backing.snapshot(id, &of, &SHARED)?;
        waits.push(started.elapsed());
        backing.destroy_snapshot(id)?;
    }
    let median = |mut values: Vec<f64>| {
        values.sort_by(f64::total_cmp);
        values[values.len() / 2]
    };
    let (own, shared, waits) = (median(own), median(shared), times(waits));
    println!("512 MiB rewritten in order and synced: {own} MiB/s its own, {shared} MiB/s shared with a snapshot");
    println!("a snapshot while 512 MiB are not written out yet: {} / {} ms", waits["p50"], waits["worst"]);
    Ok(json!({ "ownMibPerSecond": own, "sharedMibPerSecond": shared, "snapshotOfDirty512MibMillis": waits }))
}
