//! A backing in memory, for tests: the semantics of [`FileBacking`](super::file::FileBacking) without a file system,
//! held to them by the same tests, with faults on demand.

mod state;

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use zpod_volume::{Bytes, DiskLayout, Provisioning, SnapshotId, VolumeId};

use self::state::{Contents, Copied, Device, Piece, State, bytes_in};
use super::kept::Kept;
use super::ledger::{Ledger, Promise};
use super::overhead::Overhead;
use super::{Backing, BackingError, Capacity, CopySource, Copying, DeviceSpec, Exclusive, Outcome};

/// Devices that exist in memory only. Clones share them: one can stand for a restart of the driver.
#[derive(Debug, Clone)]
pub struct SimBacking {
    location: PathBuf,
    state: Arc<Mutex<State>>,
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
        let (devices, copies) = (HashMap::new(), HashMap::new());
        let longest = DiskLayout::disk_for(DiskLayout::partition_for(DiskLayout::MAX_CAPACITY)).0;
        let (shares, pieces, calls, fault) = (true, 0, 0, None);
        let state = State { devices, copies, ledger, size: size.0, longest, shares, pieces, fault, calls };
        Self { location: PathBuf::from("/sim"), state: Arc::new(Mutex::new(state)) }
    }

    /// Copies share no blocks, as on a file system without reflink.
    #[must_use]
    pub fn without_sharing(self) -> Self {
        self.state().shares = false;
        self
    }

    /// No disk can be longer, as on ext4.
    #[must_use]
    pub fn with_longest_disk(self, bytes: Bytes) -> Self {
        self.state().longest = bytes.0;
        self
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
        state.pieces += 1;
        let piece = Piece { number: state.pieces, contents: state.pieces, bytes };
        state.devices.get_mut(&id).map(|device| device.contents.insert(at, piece)).is_some()
    }

    /// What was written at `at`: the same number in a device and in its copies until one of them is written to.
    pub fn written_at(&self, id: VolumeId, at: u64) -> Option<u64> {
        Some(self.state().devices.get(&id)?.contents.get(&at)?.contents)
    }

    /// The note left for the guest.
    pub fn note(&self, id: VolumeId) -> Option<Vec<u8>> {
        self.state().devices.get(&id).map(|device| device.note.clone())
    }

    /// The snapshots that are kept.
    pub fn snapshots(&self) -> Vec<SnapshotId> {
        self.state().copies.keys().copied().collect()
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

    fn check_fits(&self, state: &State, spec: &DeviceSpec) -> Result<(), BackingError> {
        let (location, wanted, largest) = (self.location.display().to_string(), spec.layout.disk, Bytes(state.longest));
        if wanted > largest { Err(BackingError::TooLarge { location, wanted, largest }) } else { Ok(()) }
    }

    fn reserve(&self, state: &mut State, spec: &DeviceSpec) -> Result<(), BackingError> {
        state.measure();
        let free = state.free();
        let reserved = state.ledger.reserve(spec.id, spec.layout.partition, free);
        reserved.map_err(|available| self.no_room(spec.layout.partition, available))
    }

    fn no_room(&self, wanted: Bytes, available: Bytes) -> BackingError {
        BackingError::NoRoom { location: self.location.display().to_string(), wanted, available }
    }

    fn too_short(&self, kept: Kept) -> BackingError {
        let source = io::Error::new(io::ErrorKind::InvalidData, "it has another length; nothing was changed");
        BackingError::Io { what: "copy", path: self.location.join(kept.name()), source }
    }

    fn snapshot_missing(&self, id: SnapshotId) -> BackingError {
        BackingError::SnapshotMissing { id, file: self.location.join(Kept::from(id).name()) }
    }

    /// Whether a device exists as it is asked for.
    fn exists(&self, state: &State, spec: &DeviceSpec) -> Result<bool, BackingError> {
        self.check(spec)?;
        let Some(device) = state.devices.get(&spec.id) else { return Ok(false) };
        let promised = state.ledger.partition(spec.id).unwrap_or_default();
        if device.disk != spec.layout.disk.0 {
            return Err(self.mismatch(spec.id, Bytes(device.disk), spec.layout.disk));
        }
        if promised != spec.layout.partition {
            return Err(self.mismatch(spec.id, promised, spec.layout.partition));
        }
        Ok(true)
    }

    /// Copies what is before the end of a partition of that size, and has room promised for it.
    fn copy(
        &self,
        state: &mut State,
        (from, partition): (Kept, Bytes),
        to: Kept,
        promise: impl Fn(u64) -> Promise,
        how: &Copying<'_>,
    ) -> Result<Contents, BackingError> {
        if !state.shares && !how.full {
            return Err(BackingError::CannotShare { location: self.location.display().to_string() });
        }
        if let Kept::Volume(id) = from {
            let device = state.devices.get(&id).ok_or_else(|| self.missing(id))?;
            if !state.shares && device.openers > 0 {
                return Err(self.in_use(id, "simulated"));
            }
        }
        let end = DiskLayout::PARTITION_START + partition.0;
        let length = match from {
            Kept::Volume(id) => state.devices.get(&id).map(|device| device.disk),
            Kept::Snapshot(id) => state.copies.get(&id).map(|copied| copied.end),
        };
        if length.is_some_and(|length| length < end) {
            return Err(self.too_short(from));
        }
        let contents = state.contents(from).ok_or_else(|| match from {
            Kept::Volume(id) => self.missing(id),
            Kept::Snapshot(id) => self.snapshot_missing(id),
        })?;
        let mut contents: Contents = contents.range(..end).map(|(at, piece)| (*at, *piece)).collect();
        let bytes = bytes_in(&contents);
        let stopped = |done| !(how.progress)(Bytes(done), Bytes(bytes));
        if !state.shares && (stopped(0) || stopped(bytes)) {
            return Err(BackingError::Stopped);
        }
        if !state.shares {
            for piece in contents.values_mut() {
                state.pieces += 1;
                piece.number = state.pieces;
            }
        }
        state.measure();
        let (free, borrowed) = (state.free(), if state.shares { bytes } else { 0 });
        let needed = state.ledger.needed_to_copy(to, promise(bytes), from);
        let reserved = state.ledger.reserve_copy(to, promise(bytes), from, borrowed, free);
        reserved.map_err(|available| self.no_room(Bytes(needed), available))?;
        Ok(contents)
    }
}

impl Backing for SimBacking {
    fn create(&self, spec: &DeviceSpec) -> Result<Outcome, BackingError> {
        let mut state = self.call("create")?;
        if self.exists(&state, spec)? {
            return Ok(Outcome::Unchanged);
        }
        self.check_fits(&state, spec)?;
        self.reserve(&mut state, spec)?;
        let partition = spec.layout.partition.0;
        let thick = if spec.provisioning == Provisioning::Thick { partition } else { 0 };
        let device = Device { disk: spec.layout.disk.0, thick, table: partition, ..Device::default() };
        state.devices.insert(spec.id, device);
        state.ledger.took(spec.id, thick);
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
        self.check_fits(&state, spec)?;
        self.reserve(&mut state, spec)?;
        if let Some(device) = state.devices.get_mut(&spec.id) {
            device.disk = disk.max(spec.layout.disk.0);
            if spec.provisioning == Provisioning::Thick {
                device.thick = device.thick.max(spec.layout.partition.0);
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
        Ok(device.contents.range(DiskLayout::PARTITION_START..end).next().is_some())
    }

    fn device(&self, id: VolumeId) -> Result<PathBuf, BackingError> {
        let state = self.call("find")?;
        if state.devices.contains_key(&id) { Ok(self.path(id)) } else { Err(self.missing(id)) }
    }

    fn allocated(&self, id: VolumeId) -> Result<Bytes, BackingError> {
        let state = self.call("look at")?;
        state.devices.get(&id).map(|device| Bytes(device.taken())).ok_or_else(|| self.missing(id))
    }

    fn excess(&self, id: VolumeId) -> Result<Bytes, BackingError> {
        let state = self.call("look at")?;
        let taken = state.devices.get(&id).ok_or_else(|| self.missing(id))?.taken();
        Ok(Bytes(taken.saturating_sub(state.ledger.reserved(id).unwrap_or(taken))))
    }

    fn capacity(&self) -> Result<Capacity, BackingError> {
        let mut state = self.call("measure")?;
        state.measure();
        let free = state.free();
        let (capacity, longest) = (state.ledger.capacity(free), DiskLayout::largest_partition(Bytes(state.longest)));
        Ok(Capacity { largest: capacity.largest.min(longest), ..capacity })
    }

    fn look(&self) -> Result<(), BackingError> {
        self.call("look at").map(drop)
    }

    fn largest_disk(&self) -> Result<Bytes, BackingError> {
        Ok(Bytes(self.state().longest))
    }

    fn location(&self) -> &Path {
        &self.location
    }

    fn shares_blocks(&self) -> Result<bool, BackingError> {
        Ok(self.state().shares)
    }

    fn snapshot(&self, id: SnapshotId, source: &DeviceSpec, how: &Copying<'_>) -> Result<Outcome, BackingError> {
        let mut state = self.call("copy")?;
        self.check(source)?;
        let end = DiskLayout::PARTITION_START + source.layout.partition.0;
        if let Some(copied) = state.copies.get(&id) {
            return if copied.end == end { Ok(Outcome::Unchanged) } else { Err(self.too_short(id.into())) };
        }
        let (shares, from) = (state.shares, (source.id.into(), source.layout.partition));
        let contents = self.copy(&mut state, from, id.into(), |bytes| Promise::Copy { bytes, shares }, how)?;
        state.ledger.took(id, bytes_in(&contents));
        state.copies.insert(id, Copied { end, contents });
        Ok(Outcome::Changed)
    }

    fn destroy_snapshot(&self, id: SnapshotId) -> Result<Outcome, BackingError> {
        let mut state = self.call("remove")?;
        state.ledger.release(id);
        Ok(if state.copies.remove(&id).is_some() { Outcome::Changed } else { Outcome::Unchanged })
    }

    fn snapshot_allocated(&self, id: SnapshotId) -> Result<Bytes, BackingError> {
        let state = self.call("look at")?;
        state.copies.get(&id).map(|copied| Bytes(bytes_in(&copied.contents))).ok_or_else(|| self.snapshot_missing(id))
    }

    fn create_from(
        &self,
        spec: &DeviceSpec,
        source: CopySource,
        partition: Bytes,
        how: &Copying<'_>,
    ) -> Result<Outcome, BackingError> {
        let mut state = self.call("create")?;
        if partition > spec.layout.partition {
            return Err(self.mismatch(spec.id, partition, spec.layout.partition));
        }
        if self.exists(&state, spec)? {
            return Ok(Outcome::Unchanged);
        }
        self.check_fits(&state, spec)?;
        let (size, shares) = (spec.layout.partition, state.shares);
        let from = match source {
            CopySource::Device(id) => Kept::from(id),
            CopySource::Snapshot(id) => Kept::from(id),
        };
        let promise = |_| Promise::Partition { size, shares };
        let contents = self.copy(&mut state, (from, partition), spec.id.into(), promise, how)?;
        let thick = if spec.provisioning == Provisioning::Thick { size.0 } else { 0 };
        let device = Device { disk: spec.layout.disk.0, thick, table: size.0, contents, ..Device::default() };
        state.ledger.took(spec.id, device.taken());
        state.devices.insert(spec.id, device);
        Ok(Outcome::Changed)
    }

    fn write_note(&self, id: VolumeId, note: &[u8], _proof: &dyn Exclusive) -> Result<(), BackingError> {
        let mut state = self.call("leave a note in")?;
        if note.len() > DiskLayout::SPEC_BYTES {
            let source = io::Error::new(io::ErrorKind::InvalidInput, "the note is too long");
            return Err(BackingError::Io { what: "leave a note in", path: self.path(id), source });
        }
        let device = state.devices.get_mut(&id).ok_or_else(|| self.missing(id))?;
        if device.proofs == 0 {
            return Err(self.in_use(id, "the proof of exclusive use is another volume's"));
        }
        device.note = note.to_owned();
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

        fn guest_rewrites(&self, id: VolumeId, at: u64) {
            assert!(self.write(id, at, 4096));
        }

        fn contents(&self, id: VolumeId, at: u64) -> u64 {
            self.written_at(id, at).unwrap_or_default()
        }

        fn note(&self, id: VolumeId) -> Vec<u8> {
            self.note(id).unwrap()
        }

        fn opened_elsewhere(&self, id: VolumeId) -> Box<dyn Any> {
            Box::new(self.open_device(id).unwrap())
        }

        fn table(&self, id: VolumeId) -> Bytes {
            self.table(id).unwrap()
        }
    }

    conformance!(SimBacking::new(Bytes::gib(8), 1.0));

    mod without_sharing {
        use super::*;

        conformance!(SimBacking::new(Bytes::gib(8), 1.0).without_sharing());
    }

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
