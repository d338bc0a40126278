//! Calls to a backing and a catalog, and what must be so after them.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::ErrorKind;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use serde::{Deserialize, Serialize};
use zpod_storage::backing::file::FileBacking;
use zpod_storage::backing::{Backing, BackingError, CopySource, Copying, DeviceSpec, Outcome};
use zpod_storage::catalog::dir::DirCatalog;
use zpod_storage::catalog::{Catalog, Phase, Volume};
use zpod_volume::{Bytes, DiskLayout, Provisioning, SnapshotId, VolumeId, VolumeParameters};

const MIB: u64 = 1 << 20;
const ANY: Copying<'static> = Copying { full: true, progress: &|_, _| true };

/// One call. Each can be made again and again.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) enum Call {
    Create {
        name: u8,
        mib: u64,
        thick: bool,
    },
    Destroy {
        name: u8,
    },
    Grow {
        name: u8,
        mib: u64,
        disk_mib: u64,
        thick: bool,
    },
    /// Writes the partition table for what was promised.
    Table {
        name: u8,
    },
    /// What a guest does; nothing where there is no device.
    Write {
        name: u8,
    },
    /// Keeps a copy of a device.
    Snapshot {
        snapshot: u8,
        of: u8,
    },
    Discard {
        snapshot: u8,
    },
    /// Makes a device of a snapshot, not smaller than it was.
    Restore {
        name: u8,
        snapshot: u8,
        mib: u64,
        thick: bool,
    },
    /// Makes a device of another.
    Clone {
        name: u8,
        of: u8,
        thick: bool,
    },
    /// Leaves the guest a note.
    Note {
        name: u8,
    },
    Record {
        name: u8,
    },
    /// Sets the capacity in the record.
    Update {
        name: u8,
        to: u64,
    },
    Remove {
        name: u8,
    },
}

pub(crate) fn calls() -> impl Strategy<Value = Vec<Call>> {
    let name = 0u8..2;
    let call =
        prop_oneof![
            (name.clone(), 1u64..8, any::<bool>()).prop_map(|(name, mib, thick)| Call::Create { name, mib, thick }),
            name.clone().prop_map(|name| Call::Destroy { name }),
            (name.clone(), 1u64..16, 70u64..90, any::<bool>()).prop_map(|(name, mib, disk_mib, thick)| Call::Grow {
                name,
                mib,
                disk_mib,
                thick
            }),
            name.clone().prop_map(|name| Call::Table { name }),
            name.clone().prop_map(|name| Call::Write { name }),
            (name.clone(), name.clone()).prop_map(|(snapshot, of)| Call::Snapshot { snapshot, of }),
            name.clone().prop_map(|snapshot| Call::Discard { snapshot }),
            (name.clone(), name.clone(), 1u64..12, any::<bool>())
                .prop_map(|(name, snapshot, mib, thick)| Call::Restore { name, snapshot, mib, thick }),
            (name.clone(), name.clone(), any::<bool>()).prop_map(|(name, of, thick)| Call::Clone { name, of, thick }),
            name.clone().prop_map(|name| Call::Note { name }),
            name.clone().prop_map(|name| Call::Record { name }),
            (name.clone(), 1u64..4).prop_map(|(name, to)| Call::Update { name, to }),
            name.prop_map(|name| Call::Remove { name }),
        ];
    proptest::collection::vec(call, 1..12)
}

/// A device as it should be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Device {
    partition: u64,
    disk: u64,
    /// Who has written to it, or to what it was made from; zero where nobody has.
    written: u8,
}

impl Device {
    /// What is made from it, as large at least.
    fn copied(self, mib: u64) -> Self {
        let mib = mib.max(self.partition / MIB);
        Self { partition: mib * MIB, disk: disk_mib(mib) * MIB, ..self }
    }
}

fn disk_mib(mib: u64) -> u64 {
    mib * 8 + 2
}

/// What should be so.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Model {
    devices: BTreeMap<u8, Device>,
    /// Partition, and who has written to it.
    snapshots: BTreeMap<u8, (u64, u8)>,
    capacities: BTreeMap<u8, u64>,
}

impl Model {
    fn after(calls: &[Call]) -> Self {
        calls.iter().fold(Self::default(), Self::then)
    }

    fn then(mut self, call: &Call) -> Self {
        match *call {
            Call::Create { name, mib, .. } => {
                let new = Device { partition: mib * MIB, disk: disk_mib(mib) * MIB, written: 0 };
                self.devices.entry(name).or_insert(new);
            }
            Call::Destroy { name } => drop(self.devices.remove(&name)),
            Call::Grow { name, mib, disk_mib, .. } => {
                if let Some(device) = self.devices.get_mut(&name) {
                    device.partition = device.partition.max(mib * MIB);
                    device.disk = device.disk.max(disk_mib * MIB);
                }
            }
            Call::Table { .. } | Call::Note { .. } => {}
            Call::Snapshot { snapshot, of } => {
                if let Some(device) = self.devices.get(&of) {
                    self.snapshots.entry(snapshot).or_insert((device.partition, device.written));
                }
            }
            Call::Discard { snapshot } => drop(self.snapshots.remove(&snapshot)),
            Call::Restore { name, snapshot, mib, .. } => {
                if let Some((partition, written)) = self.snapshots.get(&snapshot) {
                    let device = Device { partition: *partition, disk: 0, written: *written };
                    self.devices.entry(name).or_insert(device.copied(mib));
                }
            }
            Call::Clone { name, of, .. } => {
                if let Some(device) = self.devices.get(&of).copied() {
                    self.devices.entry(name).or_insert(device.copied(0));
                }
            }
            Call::Write { name } => {
                if let Some(device) = self.devices.get_mut(&name) {
                    device.written = name + 1;
                }
            }
            Call::Record { name } => drop(self.capacities.entry(name).or_insert(0)),
            Call::Update { name, to } => {
                if let Some(capacity) = self.capacities.get_mut(&name) {
                    *capacity = to;
                }
            }
            Call::Remove { name } => drop(self.capacities.remove(&name)),
        }
        self
    }
}

/// A backing and a catalog in a directory.
pub(crate) struct World {
    dir: PathBuf,
    backing: FileBacking,
    catalog: DirCatalog,
    runtime: tokio::runtime::Runtime,
}

impl World {
    pub(crate) fn prepare(dir: &Path) {
        std::fs::create_dir(dir.join("backing")).unwrap();
    }

    /// A child that another test has just forked has all that is open here, until it becomes its program.
    fn backing(dir: &Path) -> FileBacking {
        let begun = std::time::Instant::now();
        loop {
            match FileBacking::open(dir.join("backing"), 1.0) {
                Err(BackingError::Io { source, .. }) if source.kind() == std::io::ErrorKind::ResourceBusy => {
                    assert!(begun.elapsed().as_secs() < 60, "{source}");
                    std::thread::sleep(std::time::Duration::from_millis(10));
                }
                backing => return backing.unwrap(),
            }
        }
    }

    pub(crate) fn open(dir: &Path) -> Self {
        Self {
            dir: dir.to_owned(),
            backing: Self::backing(dir),
            catalog: zpod_storage::catalog::dir::open(dir.join("state")).unwrap().0,
            runtime: tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap(),
        }
    }

    pub(crate) fn make(&self, call: &Call) {
        let make =
            |spec: DeviceSpec, source, partition| match self.backing.create_from(&spec, source, Bytes(partition), &ANY)
            {
                Ok(_) => {}
                Err(
                    BackingError::Missing { .. } | BackingError::SnapshotMissing { .. } | BackingError::Mismatch { .. },
                ) => {}
                Err(error) => panic!("{call:?}: {error}"),
            };
        match *call {
            Call::Create { name, mib, thick } => match self.backing.create(&spec(name, mib, disk_mib(mib), thick)) {
                Ok(_) | Err(BackingError::Mismatch { .. }) => {}
                Err(error) => panic!("{call:?}: {error}"),
            },
            Call::Destroy { name } => drop(self.backing.destroy(id(name)).unwrap()),
            Call::Grow { name, mib, disk_mib, thick } => {
                match self.backing.grow(&spec(name, mib, disk_mib.max(mib + 2), thick)) {
                    Ok(_) | Err(BackingError::Missing { .. }) => {}
                    Err(error) => panic!("{call:?}: {error}"),
                }
            }
            Call::Table { name } => match self.backing.exclusive(id(name)) {
                Ok(proof) => {
                    let now = spec(name, 1, 3, false);
                    self.backing.write_table(&now, proof.as_ref()).unwrap();
                }
                Err(BackingError::Missing { .. }) => {}
                Err(error) => panic!("{call:?}: {error}"),
            },
            Call::Snapshot { snapshot, of } => {
                let now = self.device(of).map_or(1, |device| device.partition / MIB);
                match self.backing.snapshot(snapshot_id(snapshot), &spec(of, now, now + 2, false), &ANY) {
                    Ok(_) | Err(BackingError::Missing { .. }) => {}
                    // It is there, of another size.
                    Err(BackingError::Io { source, .. }) if source.kind() == ErrorKind::InvalidData => {}
                    Err(error) => panic!("{call:?}: {error}"),
                }
            }
            Call::Discard { snapshot } => drop(self.backing.destroy_snapshot(snapshot_id(snapshot)).unwrap()),
            Call::Restore { name, snapshot, mib, thick } => {
                let partition = self.snapshot(snapshot).map_or(MIB, |(partition, _)| partition);
                let mib = mib.max(partition / MIB);
                make(spec(name, mib, disk_mib(mib), thick), CopySource::Snapshot(snapshot_id(snapshot)), partition);
            }
            Call::Clone { name, of, thick } => {
                let partition = self.device(of).map_or(MIB, |device| device.partition);
                let mib = partition / MIB;
                make(spec(name, mib, disk_mib(mib), thick), CopySource::Device(id(of)), partition);
            }
            Call::Note { name } => match self.backing.exclusive(id(name)) {
                Ok(proof) => self.backing.write_note(id(name), b"note", proof.as_ref()).unwrap(),
                Err(BackingError::Missing { .. }) => {}
                Err(error) => panic!("{call:?}: {error}"),
            },
            Call::Write { name } => {
                if let Ok(file) = File::options().write(true).open(self.image(name)) {
                    file.write_all_at(&[name + 1; 4096], DiskLayout::PARTITION_START).unwrap();
                }
            }
            Call::Record { name } => drop(self.runtime.block_on(self.catalog.create(record(name))).unwrap()),
            Call::Update { name, to } => self.runtime.block_on(async {
                if let Some(volume) = self.catalog.get(id(name)).await.unwrap() {
                    self.catalog.update(Volume { capacity: Bytes(to), ..volume }).await.unwrap();
                }
            }),
            Call::Remove { name } => self.runtime.block_on(self.catalog.remove(id(name))).unwrap(),
        }
    }

    /// Checks that everything is as after `done`, and what `cut_short` touches may be as after that, too.
    pub(crate) fn check(&self, done: &[Call], cut_short: Option<&Call>) {
        let before = Model::after(done);
        let after = cut_short.map_or_else(|| before.clone(), |call| before.clone().then(call));
        let mut promised = 0;
        for name in 0..2 {
            let found = self.device(name);
            let (old, new) = (before.devices.get(&name).copied(), after.devices.get(&name).copied());
            // A disk may be longer already than its promise says: that costs nothing.
            let between = old.zip(new).map(|(old, new)| Device { disk: new.disk, ..old });
            assert!([old, new, between].contains(&found), "{name}: {found:?}, neither {old:?} nor {new:?}; {done:?}");
            promised += found.map_or(0, |device| device.partition + MIB);
            // What shares blocks is kept some room to rewrite them in: all of it, for it is small.
            promised += found.filter(|_| self.shares(name)).map_or(0, |device| device.partition);
            let found = self.snapshot(name);
            let (old, new) = (before.snapshots.get(&name).copied(), after.snapshots.get(&name).copied());
            assert!([old, new].contains(&found), "{name}: {found:?}, neither {old:?} nor {new:?}; {done:?}");
            if found.is_some() {
                promised += self.backing.snapshot_allocated(snapshot_id(name)).unwrap().0;
            }
        }
        let capacity = self.backing.capacity().unwrap();
        assert_eq!(capacity.total.0 - capacity.available.0, promised, "what was promised; {done:?} {cut_short:?}");
        let volumes = self.runtime.block_on(self.catalog.list(None, 10)).unwrap().records;
        let found: BTreeMap<u8, u64> =
            volumes.iter().map(|volume| (volume.name.parse().unwrap(), volume.capacity.0)).collect();
        assert!(found == before.capacities || found == after.capacities, "{found:?}; {before:?} {after:?}");
        for dir in ["backing", "state/volumes"] {
            for entry in std::fs::read_dir(self.dir.join(dir)).unwrap() {
                let name = entry.unwrap().file_name().into_string().unwrap();
                let spare = dir == "state/volumes" && name.starts_with(".spare-");
                assert!(!name.starts_with('.') || spare, "{name} was left behind");
            }
        }
    }

    /// What there is, found by asking the backing.
    fn device(&self, name: u8) -> Option<Device> {
        let image = self.image(name);
        let Ok(metadata) = std::fs::metadata(&image) else {
            assert!(matches!(self.backing.device(id(name)), Err(BackingError::Missing { .. })));
            return None;
        };
        let disk = metadata.len();
        let asked = |mib| self.backing.create(&spec(name, mib, disk / MIB, false));
        let partition = (1..=disk / MIB - 2).find(|mib| matches!(asked(*mib), Ok(Outcome::Unchanged)))? * MIB;
        let layout = spec(name, partition / MIB, disk / MIB, false);
        let written = first_byte(&image);
        assert_eq!(self.backing.ever_written(&layout).unwrap(), written != 0);
        assert!(zpod_volume::gpt::decode(&read_start(&image)).is_ok_and(|header| header.disk_guid == id(name).uuid()));
        Some(Device { partition, disk, written })
    }

    /// The partition of a snapshot, and who has written to it.
    fn snapshot(&self, name: u8) -> Option<(u64, u8)> {
        let file = self.dir.join("backing").join(format!("{}.snap", snapshot_id(name)));
        let metadata = std::fs::metadata(&file).ok();
        assert_eq!(metadata.is_some(), self.backing.snapshot_allocated(snapshot_id(name)).is_ok());
        Some((metadata?.len() - DiskLayout::PARTITION_START, first_byte(&file)))
    }

    /// Whether a device says that it may share blocks.
    fn shares(&self, name: u8) -> bool {
        let names = ["user.zpod.shared", "trusted.zpod.shared"];
        names.iter().any(|attribute| rustix::fs::getxattr(self.image(name), *attribute, &mut [0; 32]).is_ok())
    }

    fn image(&self, name: u8) -> PathBuf {
        self.dir.join("backing").join(format!("{}.img", id(name)))
    }
}

/// What is in the first block of the partition.
fn first_byte(file: &Path) -> u8 {
    let mut bytes = [0; 4096];
    File::open(file).unwrap().read_exact_at(&mut bytes, DiskLayout::PARTITION_START).unwrap();
    assert!(bytes.iter().all(|byte| *byte == bytes[0]));
    bytes[0]
}

fn read_start(image: &Path) -> Vec<u8> {
    let mut bytes = vec![0; zpod_volume::gpt::PRIMARY_BYTES];
    File::open(image).unwrap().read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

fn id(name: u8) -> VolumeId {
    VolumeId::from_name(&name.to_string())
}

fn snapshot_id(name: u8) -> SnapshotId {
    SnapshotId::from_name(&name.to_string())
}

fn spec(name: u8, mib: u64, disk_mib: u64, thick: bool) -> DeviceSpec {
    let layout = DiskLayout { capacity: Bytes::mib(mib), partition: Bytes::mib(mib), disk: Bytes::mib(disk_mib) };
    let provisioning = if thick { Provisioning::Thick } else { Provisioning::Thin };
    DeviceSpec { id: id(name), layout, provisioning }
}

fn record(name: u8) -> Volume {
    Volume {
        id: id(name),
        phase: Phase::Ready,
        initialized: true,
        written: true,
        ..Volume::wanted(&name.to_string(), Bytes(0), VolumeParameters::default(), "node-1")
    }
}
