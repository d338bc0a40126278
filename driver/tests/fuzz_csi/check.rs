//! What must hold after every call: what is there is what the model has, nothing less and nothing more.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE;
use zpod_proto::csi::{GetCapacityRequest, ListSnapshotsRequest, ListVolumesRequest};
use zpod_volume::{Bytes, Create, DiskLayout};

use crate::call::{Call, Reply};
use crate::machine;
use crate::model::{Judged, Sure, Volume};
use crate::world::World;

/// The kernel takes its time with what nobody has any more.
const SETTLED: Duration = Duration::from_secs(10);

type Names = BTreeSet<String>;

fn names(dir: &Path) -> Names {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect()
}

fn same<T: Ord + std::fmt::Debug>(what: &str, found: &BTreeSet<T>, known: &BTreeSet<T>) -> Judged {
    let lost = known.difference(found).collect::<Vec<_>>();
    let leaked = found.difference(known).collect::<Vec<_>>();
    if lost.is_empty() && leaked.is_empty() {
        return Ok(());
    }
    Err(format!("{what}: lost {lost:?}, leaked {leaked:?}"))
}

/// The names in zpod's directories before there was a volume.
#[derive(Debug, Default)]
pub(crate) struct Baseline([Names; OF_ZPOD.len()]);

const OF_DISK: &str = "volumes";
const OF_ENTRIES: &str = "direct-volumes";
const OF_ZPOD: [&str; 4] = [OF_DISK, OF_ENTRIES, "state/volumes", "state/snapshots"];

impl Baseline {
    pub(crate) fn of(world: &World) -> Self {
        Self(OF_ZPOD.map(|dir| names(&world.node.path(dir))))
    }
}

impl World {
    /// All of it, of a model that explains the answers. What is there tells which one.
    pub(crate) async fn check(&mut self) -> Judged {
        loop {
            match self.check_model().await {
                Ok(()) => {
                    self.settle_model();
                    return Ok(());
                }
                Err(_) if self.try_next_model() => {}
                Err(wrong) => return Err(wrong),
            }
        }
    }

    /// What the kernel or a task of zpod is still at is waited for.
    async fn check_model(&mut self) -> Judged {
        self.check_answers().await?;
        self.check_records()?;
        self.check_targets()?;
        self.check_contents()?;
        let begun = Instant::now();
        loop {
            let settled = self.check_leftovers();
            if settled.is_ok() || begun.elapsed() > SETTLED {
                return settled;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Lists are complete and have nothing twice; what is promised is there.
    async fn check_answers(&mut self) -> Judged {
        let (mut volumes, mut token) = (BTreeSet::new(), String::new());
        let max_entries = self.random.i32(0..6);
        loop {
            let request = ListVolumesRequest { max_entries, starting_token: token };
            let Reply::ListVolumes(page) = self.ask(Call::ListVolumes(request)).await? else { unreachable!() };
            for volume in page.entries.into_iter().filter_map(|entry| entry.volume) {
                let twice = !volumes.insert((volume.volume_id, volume.capacity_bytes));
                if twice {
                    return Err("ListVolumes has a volume twice".into());
                }
            }
            token = page.next_token;
            if token.is_empty() {
                break;
            }
        }
        let known = self.model.volumes.iter().map(|(id, volume)| (id.clone(), volume.capacity)).collect();
        same("ListVolumes", &volumes, &known)?;
        let (mut snapshots, mut token) = (BTreeSet::new(), String::new());
        loop {
            let request = ListSnapshotsRequest { max_entries, starting_token: token, ..Default::default() };
            let Reply::ListSnapshots(page) = self.ask(Call::ListSnapshots(request)).await? else { unreachable!() };
            for snapshot in page.entries.into_iter().filter_map(|entry| entry.snapshot) {
                let twice = !snapshots.insert((snapshot.snapshot_id, snapshot.source_volume_id, snapshot.size_bytes));
                if twice {
                    return Err("ListSnapshots has a snapshot twice".into());
                }
            }
            token = page.next_token;
            if token.is_empty() {
                break;
            }
        }
        let known = self.model.snapshots.iter();
        let known = known.map(|(id, snapshot)| (id.clone(), snapshot.volume.clone(), snapshot.size)).collect();
        same("ListSnapshots", &snapshots, &known)?;
        self.check_capacity().await
    }

    async fn check_capacity(&mut self) -> Judged {
        let Reply::Capacity(capacity) = self.ask(Call::Capacity(GetCapacityRequest::default())).await? else {
            unreachable!()
        };
        let offered = capacity.available_capacity;
        let partition = |capacity: i64| DiskLayout::partition_for(Bytes(capacity.unsigned_abs())).0;
        let promised = self.model.volumes.values().map(|volume| partition(volume.capacity)).sum::<u64>();
        let more = if offered > 0 { partition(offered) } else { 0 };
        let room = (self.disk.room() as f64 * self.model.overprovision) as u64;
        if more > 0 && promised + more > room {
            return Err(format!("{promised} are promised and {more} more are offered, of {room}"));
        }
        if let Some(refused) = self.model.refused.take()
            && refused <= offered
        {
            return Err(format!("there was no room for {refused}, and {offered} are offered"));
        }
        self.model.offered = Some(offered.min(capacity.maximum_volume_size.unwrap_or(offered)));
        Ok(())
    }

    /// A record and a file for each volume and snapshot, and for nothing else.
    fn check_records(&self) -> Judged {
        for (dir, ids) in [
            ("state/volumes", self.model.volumes.keys().cloned().collect::<Names>()),
            ("state/snapshots", self.model.snapshots.keys().cloned().collect()),
        ] {
            let path = self.node.path(dir);
            let found = names(&path).into_iter().filter_map(|name| Some(name.strip_suffix(".json")?.to_owned()));
            same(dir, &found.collect(), &ids)?;
            for id in ids {
                let json = fs::read(path.join(format!("{id}.json"))).map_err(|error| format!("{dir}/{id}: {error}"))?;
                let record: serde_json::Value = serde_json::from_slice(&json).map_err(|error| error.to_string())?;
                if record["phase"] != "Ready" {
                    return Err(format!("{dir}/{id} is {}", record["phase"]));
                }
                let published = self.model.volumes.get(&id).and_then(|volume| volume.published.as_ref());
                let target = record["publication"]["targetPath"].as_str().map(PathBuf::from);
                let target = target.map(|target| target.canonicalize().unwrap_or(target));
                if dir == "state/volumes" && target.as_ref() != published.map(|published| &published.target) {
                    return Err(format!("volume {id} is recorded at {target:?}, published at {published:?}"));
                }
            }
        }
        let images = self.model.volumes.keys().map(|id| format!("{id}.img"));
        let copies = self.model.snapshots.keys().map(|id| format!("{id}.snap"));
        let found = names(&self.node.path(OF_DISK)).into_iter().filter(|name| !name.starts_with('.'));
        let found = found.filter(|name| !self.baseline.0[0].contains(name));
        same("files", &found.collect(), &images.chain(copies).collect())
    }

    /// Target paths, mounts and entries of Kata: of what is published, one each.
    fn check_targets(&self) -> Judged {
        let published = self.model.volumes.values().filter_map(|volume| Some((volume, volume.published.as_ref()?)));
        let published = published.collect::<Vec<_>>();
        let pods = self.node.path("pods");
        let targets = published.iter().map(|(_, published)| published.target.display().to_string());
        let targets = targets.collect::<Names>();
        let found = names(&pods).into_iter().map(|name| pods.join(name).display().to_string());
        same("target paths", &found.collect(), &targets)?;
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let mounts = mounts.lines().filter_map(|line| line.split(' ').nth(4)).map(str::to_owned);
        let mounts = mounts.filter(|path| Path::new(path).parent() == Some(&pods)).collect::<Vec<_>>();
        let once = mounts.iter().cloned().collect::<Names>();
        same("mounts", &once, &targets)?;
        if once.len() != mounts.len() {
            return Err(format!("mounts on top of each other: {mounts:?}"));
        }
        let entries = published.iter().filter(|(volume, _)| !volume.block);
        let entries = entries.map(|(_, published)| URL_SAFE.encode(published.target.to_str().unwrap())).collect();
        let found = names(&self.node.path(OF_ENTRIES)).into_iter().filter(|name| !name.starts_with('.'));
        let found = found.filter(|name| !self.baseline.0[1].contains(name));
        same("entries of Kata", &found.collect(), &entries)
    }

    /// Every byte that was written, where it was written and in what was copied since; and what guests may do with it.
    fn check_contents(&self) -> Judged {
        for (id, volume) in &self.model.volumes {
            let found = machine::content(&self.node.device(id))?;
            if found != volume.content {
                return Err(format!("volume {id} has {found:?}, not {:?}", volume.content));
            }
            if volume.published.is_some() {
                let spec = machine::spec(&self.node, id, volume).ok_or(format!("no guest is told of volume {id}"))?;
                check_create(id, volume, spec.create)?;
            }
        }
        for (id, snapshot) in &self.model.snapshots {
            let found = machine::content(&self.node.path(OF_DISK).join(format!("{id}.snap")))?;
            if found != snapshot.content {
                return Err(format!("snapshot {id} has {found:?}, not {:?}", snapshot.content));
            }
        }
        Ok(())
    }

    /// Nothing half made, no loop device of nobody, no image that zpod still has open.
    fn check_leftovers(&self) -> Judged {
        for (dir, before) in OF_ZPOD.into_iter().zip(&self.baseline.0) {
            let hidden = names(&self.node.path(dir)).into_iter().filter(|name| name.starts_with('.'));
            same(dir, &hidden.filter(|name| !before.contains(name)).collect(), &Names::new())?;
        }
        same("half made entries", &names(&self.node.path(OF_ENTRIES).join(".zpod")), &Names::new())?;
        let blocks = self.model.volumes.iter().filter(|(_, volume)| volume.block);
        let blocks = blocks.filter(|(_, volume)| volume.published.is_some() || volume.used);
        let blocks = blocks.map(|(id, _)| id.clone()).collect();
        let loops = fs::read_dir("/sys/block").unwrap().flatten();
        let loops = loops.filter_map(|entry| fs::read_to_string(entry.path().join("loop/backing_file")).ok());
        let root = self.node.path("");
        let loops = loops.filter(|file| Path::new(file).starts_with(&root) && file.trim_end().ends_with(".img"));
        let loops = loops.filter_map(|file| Some(Path::new(file.trim_end()).file_stem()?.to_str()?.to_owned()));
        same("loop devices", &loops.collect(), &blocks)?;
        let open = fs::read_dir(self.daemon().proc("fd")).map_err(|error| error.to_string())?.flatten();
        let open = open.filter_map(|entry| Some(fs::read_link(entry.path()).ok()?.display().to_string()));
        let image = |path: &String| path.contains(".img") || path.contains(".snap") || path.ends_with("(deleted)");
        same("files that zpod has open", &open.filter(image).collect(), &Names::new())
    }
}

/// A guest makes a pool only where there never was one.
fn check_create(id: &str, volume: &Volume, create: Create) -> Judged {
    // What a block device's guest is told is as old as its publication.
    let initialized = if volume.block { volume.told } else { volume.is_initialized() };
    let allowed = match (initialized, create) {
        (Sure::Yes, create) => create == Create::Never,
        (Sure::No, Create::Never) => false,
        (Sure::Maybe, Create::Never) => true,
        // What was written since it was published counts from the next time on.
        (_, Create::Fresh) => volume.blank,
        (_, Create::Resume) => !volume.blank,
    };
    if allowed { Ok(()) } else { Err(format!("the guest of volume {id} is told {create:?}, of {volume:?}")) }
}
