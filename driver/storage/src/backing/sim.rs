//! A backing in memory, for tests: the semantics of [`FileBacking`](super::file::FileBacking) without a file system,
//! held to them by the same tests, with faults on demand.

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use zpod_volume::{Bytes, DiskLayout, Provisioning, SnapshotId, VolumeId};

use super::ledger::Ledger;
use super::overhead::Overhead;
use super::{Backing, BackingError, Capacity, CopySource, Copying, DeviceSpec, Exclusive, Outcome};

/// Devices that exist in memory only. Clones share them: one can stand for a restart of the driver.
#[derive(Debug, Clone)]
pub struct SimBacking {
    location: PathBuf,
    state: Arc<Mutex<State>>,
}

#[derive(Debug)]
struct State {
    devices: HashMap<VolumeId, Device>,
    ledger: Ledger,
    size: u64,
    /// Calls still to come before the one that fails, and how it fails.
    fault: Option<(u64, io::ErrorKind)>,
    calls: u64,
}

#[derive(Debug, Default)]
struct Device {
    disk: u64,
    taken: u64,
    /// Where something was written, in bytes from the start.
    written: Vec<u64>,
    table: u64,
    openers: usize,
    proofs: usize,
}

impl State {
    fn free(&self) -> u64 {
        self.size.saturating_sub(self.devices.values().map(|device| device.taken).sum())
    }

    fn measure(&mut self) {
        let promises = self.ledger.promises();
        let taken: Vec<u64> =
            promises.iter().map(|(id, _)| self.devices.get(id).map_or(0, |device| device.taken)).collect();
        let free = self.free();
        self.ledger.measured(free, &promises, &taken);
    }
}

/// Stands for another process that has a device open.
#[derive(Debug)]
pub struct Opener(SimBacking, VolumeId);

impl Drop for Opener {
    fn drop(&mut self) {
        if let Some(device) = self.0.state().devices.get_mut(&self.1) {
            device.openers -= 1;
        }
    }
}

#[derive(Debug)]
struct Proof(SimBacking, VolumeId);

impl Exclusive for Proof {}

impl Drop for Proof {
    fn drop(&mut self) {
        if let Some(device) = self.0.state().devices.get_mut(&self.1) {
            device.proofs -= 1;
        }
    }
}

impl SimBacking {
    /// A place of that size.
    pub fn new(size: Bytes, overprovision: f64) -> Self {
        let mut ledger = Ledger::new(overprovision, Overhead::NONE);
        ledger.measured(size.0, &[], &[]);
        let state = State { devices: HashMap::new(), ledger, size: size.0, fault: None, calls: 0 };
        Self { location: PathBuf::from("/sim"), state: Arc::new(Mutex::new(state)) }
    }

    /// Lets the `nth` call from now on fail, before it has changed anything. The first is 1.
    pub fn fail_call(&self, nth: u64, kind: io::ErrorKind) {
        self.state().fault = Some((nth, kind));
    }

    /// How many calls there have been.
    pub fn calls(&self) -> u64 {
        self.state().calls
    }

    /// What a guest does that writes `bytes` bytes at `at`. False where there is no such device.
    pub fn write(&self, id: VolumeId, at: u64, bytes: u64) -> bool {
        let mut state = self.state();
        let Some(device) = state.devices.get_mut(&id) else { return false };
        device.written.push(at);
        device.taken = device.taken.saturating_add(bytes);
        true
    }

    /// What a virtual machine does that has the device. Nothing where there is no such device.
    pub fn open_device(&self, id: VolumeId) -> Option<Opener> {
        self.state().devices.get_mut(&id)?.openers += 1;
        Some(Opener(self.clone(), id))
    }

    /// The partition in the device's table.
    pub fn table(&self, id: VolumeId) -> Option<Bytes> {
        self.state().devices.get(&id).map(|device| Bytes(device.table))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins a call: counts it, and fails where it shall.
    fn call(&self, what: &'static str) -> Result<MutexGuard<'_, State>, BackingError> {
        let mut state = self.state();
        state.calls += 1;
        if let Some((left, kind)) = state.fault {
            state.fault = (left > 1).then_some((left - 1, kind));
            if left <= 1 {
                let source = io::Error::new(kind, "simulated fault");
                return Err(BackingError::Io { what, path: self.location.clone(), source });
            }
        }
        Ok(state)
    }

    fn path(&self, id: VolumeId) -> PathBuf {
        self.location.join(format!("{id}.img"))
    }

    fn missing(&self, id: VolumeId) -> BackingError {
        BackingError::Missing { id, device: self.path(id) }
    }

    fn in_use(&self, id: VolumeId, detail: &str) -> BackingError {
        BackingError::InUse { id, device: self.path(id), detail: detail.to_owned() }
    }

    fn mismatch(&self, id: VolumeId, found: Bytes, wanted: Bytes) -> BackingError {
        BackingError::Mismatch { id, device: self.path(id), found, wanted }
    }

    fn check(&self, spec: &DeviceSpec) -> Result<(), BackingError> {
        let largest = DiskLayout::largest_partition(spec.layout.disk);
        if spec.layout.partition > largest || spec.layout.partition.0 == 0 {
            return Err(self.mismatch(spec.id, largest, spec.layout.partition));
        }
        Ok(())
    }

    fn reserve(&self, state: &mut State, spec: &DeviceSpec) -> Result<(), BackingError> {
        state.measure();
        let free = state.free();
        state.ledger.reserve(spec.id, spec.layout.partition, free).map_err(|available| BackingError::NoRoom {
            location: self.location.display().to_string(),
            wanted: spec.layout.partition,
            available,
        })
    }
}

impl Backing for SimBacking {
    fn create(&self, spec: &DeviceSpec) -> Result<Outcome, BackingError> {
        let mut state = self.call("create")?;
        self.check(spec)?;
        if let Some(device) = state.devices.get(&spec.id) {
            let promised = state.ledger.partition(spec.id).unwrap_or_default();
            if device.disk != spec.layout.disk.0 {
                return Err(self.mismatch(spec.id, Bytes(device.disk), spec.layout.disk));
            }
            if promised != spec.layout.partition {
                return Err(self.mismatch(spec.id, promised, spec.layout.partition));
            }
            return Ok(Outcome::Unchanged);
        }
        self.reserve(&mut state, spec)?;
        let partition = spec.layout.partition.0;
        let taken = if spec.provisioning == Provisioning::Thick { partition } else { 0 };
        let device = Device { disk: spec.layout.disk.0, taken, table: partition, ..Device::default() };
        state.devices.insert(spec.id, device);
        state.ledger.took(spec.id, taken);
        Ok(Outcome::Changed)
    }

    fn destroy(&self, id: VolumeId) -> Result<Outcome, BackingError> {
        let mut state = self.call("destroy")?;
        match state.devices.get(&id) {
            None => Ok(Outcome::Unchanged),
            Some(device) if device.openers > 0 => Err(self.in_use(id, "simulated")),
            Some(_) => {
                state.devices.remove(&id);
                state.ledger.release(id);
                Ok(Outcome::Changed)
            }
        }
    }

    fn grow(&self, spec: &DeviceSpec) -> Result<Outcome, BackingError> {
        let mut state = self.call("grow")?;
        self.check(spec)?;
        let disk = state.devices.get(&spec.id).ok_or_else(|| self.missing(spec.id))?.disk;
        let promised = state.ledger.partition(spec.id).unwrap_or_default();
        if spec.layout.partition <= promised && spec.layout.disk.0 <= disk {
            return Ok(Outcome::Unchanged);
        }
        self.reserve(&mut state, spec)?;
        if let Some(device) = state.devices.get_mut(&spec.id) {
            device.disk = disk.max(spec.layout.disk.0);
            if spec.provisioning == Provisioning::Thick {
                device.taken = device.taken.max(spec.layout.partition.0);
            }
        }
        Ok(Outcome::Changed)
    }

    fn exclusive(&self, id: VolumeId) -> Result<Box<dyn Exclusive>, BackingError> {
        let mut state = self.call("take")?;
        let device = state.devices.get_mut(&id).ok_or_else(|| self.missing(id))?;
        if device.openers > 0 {
            return Err(self.in_use(id, "simulated"));
        }
        device.proofs += 1;
        Ok(Box::new(Proof(self.clone(), id)))
    }

    fn write_table(&self, spec: &DeviceSpec, _proof: &dyn Exclusive) -> Result<(), BackingError> {
        let mut state = self.call("write the partition table of")?;
        self.check(spec)?;
        let promised = state.ledger.partition(spec.id).unwrap_or_default();
        let device = state.devices.get_mut(&spec.id).ok_or_else(|| self.missing(spec.id))?;
        if device.proofs == 0 {
            return Err(self.in_use(spec.id, "the proof of exclusive use is another volume's"));
        }
        if spec.layout.partition > promised {
            return Err(self.mismatch(spec.id, promised, spec.layout.partition));
        }
        if spec.layout.disk.0 > device.disk {
            return Err(self.mismatch(spec.id, Bytes(device.disk), spec.layout.disk));
        }
        device.table = spec.layout.partition.0;
        Ok(())
    }

    fn ever_written(&self, spec: &DeviceSpec) -> Result<bool, BackingError> {
        let state = self.call("look for data in")?;
        let device = state.devices.get(&spec.id).ok_or_else(|| self.missing(spec.id))?;
        let end = DiskLayout::PARTITION_START + spec.layout.partition.0;
        if device.disk < end {
            return Err(self.mismatch(spec.id, Bytes(device.disk), spec.layout.disk));
        }
        Ok(device.written.iter().any(|at| (DiskLayout::PARTITION_START..end).contains(at)))
    }

    fn device(&self, id: VolumeId) -> Result<PathBuf, BackingError> {
        let state = self.call("find")?;
        if state.devices.contains_key(&id) { Ok(self.path(id)) } else { Err(self.missing(id)) }
    }

    fn allocated(&self, id: VolumeId) -> Result<Bytes, BackingError> {
        let state = self.call("look at")?;
        state.devices.get(&id).map(|device| Bytes(device.taken)).ok_or_else(|| self.missing(id))
    }

    fn excess(&self, id: VolumeId) -> Result<Bytes, BackingError> {
        let state = self.call("look at")?;
        let taken = state.devices.get(&id).ok_or_else(|| self.missing(id))?.taken;
        Ok(Bytes(taken.saturating_sub(state.ledger.reserved(id).unwrap_or(taken))))
    }

    fn capacity(&self) -> Result<Capacity, BackingError> {
        let mut state = self.call("measure")?;
        state.measure();
        let free = state.free();
        Ok(state.ledger.capacity(free))
    }

    fn location(&self) -> &Path {
        &self.location
    }

    fn shares_blocks(&self) -> bool {
        false
    }

    fn snapshot(&self, _: SnapshotId, _: &DeviceSpec, _: &Copying<'_>) -> Result<Outcome, BackingError> {
        Err(BackingError::CannotShare { location: self.location().display().to_string() })
    }

    fn destroy_snapshot(&self, _: SnapshotId) -> Result<Outcome, BackingError> {
        Ok(Outcome::Unchanged)
    }

    fn snapshot_allocated(&self, id: SnapshotId) -> Result<Bytes, BackingError> {
        Err(BackingError::SnapshotMissing { id, file: self.location().join(id.to_string()) })
    }

    fn create_from(&self, _: &DeviceSpec, _: CopySource, _: Bytes, _: &Copying<'_>) -> Result<Outcome, BackingError> {
        Err(BackingError::CannotShare { location: self.location().display().to_string() })
    }

    fn write_note(&self, _: VolumeId, _: &[u8], _: &dyn Exclusive) -> Result<(), BackingError> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::any::Any;

    use super::super::conformance::{Rig, conformance, thin};
    use super::*;

    impl Rig for SimBacking {
        fn backing(&self) -> &dyn Backing {
            self
        }

        fn guest_writes(&self, id: VolumeId, at: u64) {
            assert!(self.write(id, at, 4096));
        }

        fn opened_elsewhere(&self, id: VolumeId) -> Box<dyn Any> {
            Box::new(self.open_device(id).unwrap())
        }

        fn table(&self, id: VolumeId) -> Bytes {
            self.table(id).unwrap()
        }
    }

    conformance!(SimBacking::new(Bytes::gib(8), 1.0));

    #[test]
    fn a_fault_comes_at_the_call_asked_for_and_changes_nothing() {
        let sim = SimBacking::new(Bytes::gib(1), 1.0);
        sim.fail_call(2, io::ErrorKind::StorageFull);
        sim.create(&thin("a", 16)).unwrap();
        assert!(matches!(sim.create(&thin("b", 16)), Err(BackingError::Io { .. })));
        assert!(matches!(sim.device(thin("b", 16).id), Err(BackingError::Missing { .. })));
        assert_eq!(sim.create(&thin("b", 16)).unwrap(), Outcome::Changed);
        assert_eq!(sim.calls(), 4);
    }
}
