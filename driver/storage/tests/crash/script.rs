//! Calls to a backing and a catalog, and what must be so after them.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use serde::{Deserialize, Serialize};
use zpod_storage::backing::file::FileBacking;
use zpod_storage::backing::{Backing, BackingError, DeviceSpec, Outcome};
use zpod_storage::catalog::dir::DirCatalog;
use zpod_storage::catalog::{Catalog, Phase, Volume};
use zpod_volume::{Bytes, DiskLayout, Provisioning, VolumeId, VolumeParameters};

const MIB: u64 = 1 << 20;

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
    let call = prop_oneof![
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
    written: bool,
}

/// What should be so.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
struct Model {
    devices: BTreeMap<u8, Device>,
    capacities: BTreeMap<u8, u64>,
}

impl Model {
    fn after(calls: &[Call]) -> Self {
        calls.iter().fold(Self::default(), Self::then)
    }

    fn then(mut self, call: &Call) -> Self {
        match *call {
            Call::Create { name, mib, .. } => {
                let new = Device { partition: mib * MIB, disk: (mib * 8 + 2) * MIB, written: false };
                self.devices.entry(name).or_insert(new);
            }
            Call::Destroy { name } => drop(self.devices.remove(&name)),
            Call::Grow { name, mib, disk_mib, .. } => {
                if let Some(device) = self.devices.get_mut(&name) {
                    device.partition = device.partition.max(mib * MIB);
                    device.disk = device.disk.max(disk_mib * MIB);
                }
            }
            Call::Table { .. } => {}
            Call::Write { name } => {
                if let Some(device) = self.devices.get_mut(&name) {
                    device.written = true;
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

    pub(crate) fn open(dir: &Path) -> Self {
        Self {
            dir: dir.to_owned(),
            backing: FileBacking::open(dir.join("backing"), 1.0).unwrap(),
            catalog: zpod_storage::catalog::dir::open(dir.join("state")).unwrap().0,
            runtime: tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap(),
        }
    }

    pub(crate) fn make(&self, call: &Call) {
        match *call {
            Call::Create { name, mib, thick } => match self.backing.create(&spec(name, mib, mib * 8 + 2, thick)) {
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
                assert!(!name.starts_with('.'), "{name} was left behind");
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
        let mut bytes = [0; 4096];
        File::open(&image).unwrap().read_exact_at(&mut bytes, DiskLayout::PARTITION_START).unwrap();
        let written = bytes == [name + 1; 4096];
        assert_eq!(self.backing.ever_written(&layout).unwrap(), written);
        assert!(zpod_volume::gpt::decode(&read_start(&image)).is_ok_and(|header| header.disk_guid == id(name).uuid()));
        Some(Device { partition, disk, written })
    }

    fn image(&self, name: u8) -> PathBuf {
        self.dir.join("backing").join(format!("{}.img", id(name)))
    }
}

fn read_start(image: &Path) -> Vec<u8> {
    let mut bytes = vec![0; zpod_volume::gpt::PRIMARY_BYTES];
    File::open(image).unwrap().read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

fn id(name: u8) -> VolumeId {
    VolumeId::from_name(&name.to_string())
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
