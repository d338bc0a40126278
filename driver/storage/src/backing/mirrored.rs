//! Volumes with two devices, each of which can have all of the data: one in each of two providers.
//!
//! # Design
//! Each half is a device like any other, with its own table, promise and limit, and made, grown and destroyed like any
//! other. What is done to a volume is done to both; room is what both have. A half whose image is gone or whose disk is
//! dead is **lost**: what needs no more than one half goes on without it ([`BackingError::is_lost`]), all else fails.
//! Nothing here decides which half has the newest data: that is its guest's to say, and its record's to keep.
//!
//! # Limitations
//! Neither half is ever copied: snapshots of both would have to show one instant.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use zpod_volume::{Bytes, Half, SnapshotId, VolumeId};

use super::{Backing, BackingError, Capacity, CopySource, Copying, DeviceSpec, Exclusive, Outcome};
use crate::crash;

/// Two providers, on two disks.
#[derive(Debug, Clone)]
pub struct Mirrored([Side; 2]);

/// The provider of one half.
#[derive(Debug, Clone)]
enum Side {
    There(Arc<dyn Backing>),
    /// Its disk is dead or not mounted: every half that it has is lost.
    Gone {
        path: PathBuf,
        reason: String,
    },
}

/// Proofs for the halves that are there.
#[derive(Debug)]
struct Proofs(#[expect(dead_code, reason = "held, not read: what counts is that they live")] Vec<Box<dyn Exclusive>>);

impl Exclusive for Proofs {}

impl Mirrored {
    /// The two of them, in the order of the halves.
    pub fn new(first: Arc<dyn Backing>, second: Arc<dyn Backing>) -> Self {
        Self([Side::There(first), Side::There(second)])
    }

    /// The same where the second one can't be used: volumes that have a half there go on without it.
    pub fn without_second(first: Arc<dyn Backing>, path: &Path, reason: impl Into<String>) -> Self {
        Self([Side::There(first), Side::Gone { path: path.to_owned(), reason: reason.into() }])
    }

    /// That two directories are on two file systems: losing one must not mean losing the other.
    ///
    /// # Errors
    /// When they are on one, or can't be looked at.
    pub fn check_apart(first: &Path, second: &Path) -> Result<(), BackingError> {
        let device = |path: &Path| {
            let metadata = fs::metadata(path);
            metadata.map(|metadata| metadata.dev()).map_err(|source| BackingError::Io {
                what: "look at",
                path: path.to_owned(),
                source,
            })
        };
        if device(first)? != device(second)? {
            return Ok(());
        }
        let why = format!("it is on the same file system as {}; mount another disk there", first.display());
        let source = io::Error::new(io::ErrorKind::InvalidInput, why);
        Err(BackingError::Io { what: "use for mirrors", path: second.to_owned(), source })
    }

    fn side(&self, half: Half) -> Result<&dyn Backing, BackingError> {
        match &self.0[half.index()] {
            Side::There(backing) => Ok(backing.as_ref()),
            Side::Gone { path, reason } => Err(BackingError::Gone { path: path.clone(), reason: reason.clone() }),
        }
    }

    /// The device that is one half of a volume, if it is there.
    ///
    /// # Errors
    /// Otherwise.
    pub fn image(&self, id: VolumeId, half: Half) -> Result<PathBuf, BackingError> {
        self.side(half)?.device(id)
    }

    /// The same of one that can be opened, and is nobody's.
    ///
    /// # Errors
    /// [`BackingError::is_lost`] where it can't be used as things are.
    pub fn half(&self, id: VolumeId, half: Half) -> Result<PathBuf, BackingError> {
        let device = self.side(half)?.device(id)?;
        self.side(half)?.exclusive(id)?;
        Ok(device)
    }

    /// Whether one half was ever written to.
    ///
    /// # Errors
    /// As [`Backing::ever_written`].
    pub fn half_ever_written(&self, spec: &DeviceSpec, half: Half) -> Result<bool, BackingError> {
        self.side(half)?.ever_written(spec)
    }

    /// Makes a device in the place of a half that is gone. One that is there is left as it is.
    ///
    /// # Errors
    /// As [`Backing::create`].
    pub fn replace(&self, spec: &DeviceSpec, half: Half) -> Result<Outcome, BackingError> {
        self.side(half)?.create(spec)
    }

    /// Does the same to each half that is not lost. At least one has to be there.
    fn each<T>(&self, work: impl Fn(&dyn Backing) -> Result<T, BackingError>) -> Result<Vec<T>, BackingError> {
        let (mut done, mut lost) = (Vec::new(), None);
        for half in Half::BOTH {
            match self.side(half).and_then(&work) {
                Ok(outcome) => done.push(outcome),
                Err(error) if error.is_lost() => lost = lost.or(Some(error)),
                Err(error) => return Err(error),
            }
        }
        match lost {
            Some(error) if done.is_empty() => Err(error),
            _ => Ok(done),
        }
    }

    /// Makes the second half beside the first one, which this call has made or found.
    fn create_second(&self, spec: &DeviceSpec, first: Outcome) -> Result<Outcome, BackingError> {
        let source = match self.side(Half::Second).and_then(|side| side.create(spec)) {
            Ok(second) => return Ok(either(first, second)),
            Err(error) => error,
        };
        // Taken back only if it was made just now: nothing else can be on it.
        if first == Outcome::Changed && self.side(Half::First)?.destroy(spec.id).is_ok() {
            return Err(source);
        }
        Err(BackingError::HalfMade { id: spec.id, half: Half::Second, source: Box::new(source) })
    }

    fn no_copies(&self, what: &'static str) -> BackingError {
        let source = io::Error::new(io::ErrorKind::Unsupported, "it has two halves, which can't be copied as one");
        BackingError::Io { what, path: self.location().to_owned(), source }
    }
}

fn either(first: Outcome, second: Outcome) -> Outcome {
    if first == Outcome::Unchanged { second } else { first }
}

impl Backing for Mirrored {
    fn create(&self, spec: &DeviceSpec) -> Result<Outcome, BackingError> {
        let first = self.side(Half::First)?.create(spec)?;
        crash::point("mirror: first half made");
        self.create_second(spec, first)
    }

    /// Both, or neither is touched: an old half that stays would be in the way of another volume of that name.
    fn destroy(&self, id: VolumeId) -> Result<Outcome, BackingError> {
        for half in Half::BOTH {
            match self.side(half)?.exclusive(id) {
                Ok(_) | Err(BackingError::Missing { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        let first = self.side(Half::First)?.destroy(id)?;
        crash::point("mirror: first half destroyed");
        let second = self.side(Half::Second)?.destroy(id)?;
        Ok(either(first, second))
    }

    fn grow(&self, spec: &DeviceSpec) -> Result<Outcome, BackingError> {
        let first = self.side(Half::First)?.grow(spec)?;
        crash::point("mirror: first half grown");
        Ok(either(first, self.side(Half::Second)?.grow(spec)?))
    }

    fn exclusive(&self, id: VolumeId) -> Result<Box<dyn Exclusive>, BackingError> {
        Ok(Box::new(Proofs(self.each(|side| side.exclusive(id))?)))
    }

    fn write_table(&self, spec: &DeviceSpec, proof: &dyn Exclusive) -> Result<(), BackingError> {
        // There is no proof for a half that is lost.
        self.each(|side| side.device(spec.id).and_then(|_| side.write_table(spec, proof))).map(drop)
    }

    /// Of a half that is lost nobody knows: then no pool is made.
    fn ever_written(&self, spec: &DeviceSpec) -> Result<bool, BackingError> {
        let written = self.each(|side| side.ever_written(spec))?;
        Ok(written.len() < 2 || written.contains(&true))
    }

    fn shares_blocks(&self) -> Result<bool, BackingError> {
        Ok(false)
    }

    fn largest_disk(&self) -> Result<Bytes, BackingError> {
        Ok(self.side(Half::First)?.largest_disk()?.min(self.side(Half::Second)?.largest_disk()?))
    }

    fn look(&self) -> Result<(), BackingError> {
        self.each(|side| side.look()).map(drop)
    }

    fn snapshot(&self, _: SnapshotId, _: &DeviceSpec, _: &Copying<'_>) -> Result<Outcome, BackingError> {
        Err(self.no_copies("copy"))
    }

    fn destroy_snapshot(&self, _: SnapshotId) -> Result<Outcome, BackingError> {
        Err(self.no_copies("remove a copy of"))
    }

    fn snapshot_allocated(&self, _: SnapshotId) -> Result<Bytes, BackingError> {
        Err(self.no_copies("look at a copy of"))
    }

    fn create_from(&self, _: &DeviceSpec, _: CopySource, _: Bytes, _: &Copying<'_>) -> Result<Outcome, BackingError> {
        Err(self.no_copies("copy into"))
    }

    fn write_note(&self, _: VolumeId, _: &[u8], _: &dyn Exclusive) -> Result<(), BackingError> {
        Err(self.no_copies("leave a note in"))
    }

    /// Of one that is there.
    fn device(&self, id: VolumeId) -> Result<PathBuf, BackingError> {
        let mut devices = self.each(|side| side.device(id))?;
        Ok(devices.swap_remove(0))
    }

    fn allocated(&self, id: VolumeId) -> Result<Bytes, BackingError> {
        Ok(Bytes(self.each(|side| side.allocated(id))?.iter().map(|bytes| bytes.0).sum()))
    }

    fn excess(&self, id: VolumeId) -> Result<Bytes, BackingError> {
        Ok(Bytes(self.each(|side| side.excess(id))?.iter().map(|bytes| bytes.0).sum()))
    }

    fn capacity(&self) -> Result<Capacity, BackingError> {
        let [first, second] = [self.side(Half::First)?.capacity()?, self.side(Half::Second)?.capacity()?];
        Ok(Capacity {
            total: first.total.min(second.total),
            available: first.available.min(second.available),
            largest: first.largest.min(second.largest),
        })
    }

    fn location(&self) -> &Path {
        match &self.0[Half::Second.index()] {
            Side::There(backing) => backing.location(),
            Side::Gone { path, .. } => path,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::conformance::{MIB, id, spec, thin};
    use super::super::file::FileBacking;
    use super::super::sim::SimBacking;
    use super::*;
    use zpod_volume::Provisioning;

    fn pair(first: u64, second: u64) -> ([SimBacking; 2], Mirrored) {
        let sides = [SimBacking::new(Bytes::mib(first), 1.0), SimBacking::new(Bytes::mib(second), 1.0)];
        let mirrored = Mirrored::new(Arc::new(sides[0].clone()), Arc::new(sides[1].clone()));
        (sides, mirrored)
    }

    fn there(sides: &[SimBacking; 2]) -> [bool; 2] {
        [0, 1].map(|index| sides[index].device(id("a")).is_ok())
    }

    #[test]
    fn what_is_done_to_a_mirror_is_done_to_both_halves() {
        let (sides, mirrored) = pair(1000, 1000);
        let (small, large) = (thin("a", 16), spec("a", 32, 130, Provisioning::Thin));
        assert_eq!((mirrored.create(&small).unwrap(), mirrored.create(&small).unwrap()), {
            (Outcome::Changed, Outcome::Unchanged)
        });
        assert_eq!(there(&sides), [true, true]);
        assert_eq!((mirrored.grow(&large).unwrap(), mirrored.grow(&large).unwrap()), {
            (Outcome::Changed, Outcome::Unchanged)
        });
        let proof = mirrored.exclusive(id("a")).unwrap();
        mirrored.write_table(&large, proof.as_ref()).unwrap();
        assert_eq!([0, 1].map(|index| sides[index].table(id("a"))), [Some(Bytes::mib(32)); 2]);
        drop(proof);
        assert!(!mirrored.ever_written(&large).unwrap());
        assert_eq!((mirrored.destroy(id("a")).unwrap(), mirrored.destroy(id("a")).unwrap()), {
            (Outcome::Changed, Outcome::Unchanged)
        });
        assert_eq!(there(&sides), [false, false]);
    }

    #[test]
    fn either_half_counts_as_written_and_in_use_and_a_lost_one_as_written() {
        for half in [0, 1] {
            let (sides, mirrored) = pair(1000, 1000);
            let spec = thin("a", 16);
            mirrored.create(&spec).unwrap();
            assert!(sides[half].write(id("a"), 2 * MIB, 4096));
            assert!(mirrored.ever_written(&spec).unwrap());
            let opener = sides[half].open_device(id("a"));
            assert!(matches!(mirrored.exclusive(id("a")), Err(BackingError::InUse { .. })));
            assert!(matches!(mirrored.destroy(id("a")), Err(BackingError::InUse { .. })));
            assert_eq!(there(&sides), [true, true], "neither is destroyed while one is in use");
            drop(opener);
            sides[half].destroy(id("a")).unwrap();
            assert!(mirrored.ever_written(&spec).unwrap(), "nobody knows of the lost one");
            assert!(mirrored.exclusive(id("a")).is_ok() && mirrored.device(id("a")).is_ok());
            assert!(mirrored.grow(&thin("a", 32)).is_err());
            let lost = Half::BOTH[half];
            assert!(mirrored.half(id("a"), lost).unwrap_err().is_lost());
            assert!(mirrored.half(id("a"), lost.other()).is_ok());
            assert_eq!(mirrored.replace(&spec, lost).unwrap(), Outcome::Changed);
            assert_eq!(there(&sides), [true, true]);
        }
    }

    #[test]
    fn images_in_two_directories_are_a_mirror_and_one_is_enough_to_go_on() {
        let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        let [first, second] = [0, 1].map(|index| Arc::new(FileBacking::open(dirs[index].path(), 1000.0).unwrap()));
        let mirrored = Mirrored::new(first.clone(), second.clone());
        let spec = thin("a", 16);
        mirrored.create(&spec).unwrap();
        let images = Half::BOTH.map(|half| mirrored.half(id("a"), half).unwrap());
        assert!(images.iter().zip(&dirs).all(|(image, dir)| image.starts_with(dir.path())), "{images:?}");
        for half in Half::BOTH {
            let image = &images[half.index()];
            let opened = fs::File::open(image).unwrap();
            assert!(matches!(mirrored.exclusive(id("a")), Err(BackingError::InUse { .. })));
            drop(opened);
            fs::remove_file(image).unwrap();
            let proof = mirrored.exclusive(id("a")).unwrap();
            mirrored.write_table(&spec, proof.as_ref()).unwrap();
            drop(proof);
            assert!(mirrored.half(id("a"), half).unwrap_err().is_lost());
            assert_eq!(mirrored.replace(&spec, half).unwrap(), Outcome::Changed);
            assert_eq!(mirrored.half(id("a"), half).unwrap(), *image);
        }
        assert_eq!(mirrored.destroy(id("a")).unwrap(), Outcome::Changed);
        assert!(!images.iter().any(|image| image.exists()));
    }

    #[test]
    fn a_mirror_has_the_room_that_both_have_and_leaves_nothing_behind_where_one_has_none() {
        for sizes in [(1000, 100), (100, 1000)] {
            let (sides, mirrored) = pair(sizes.0, sizes.1);
            assert!(mirrored.capacity().unwrap().available <= Bytes::mib(100));
            assert!(matches!(mirrored.create(&thin("a", 500)), Err(BackingError::NoRoom { .. })));
            assert_eq!(there(&sides), [false, false]);
        }
        // What an earlier call has made is never taken back, and so the record has to stay.
        let (sides, mirrored) = pair(1000, 100);
        sides[0].create(&thin("a", 500)).unwrap();
        assert!(matches!(mirrored.create(&thin("a", 500)), Err(BackingError::HalfMade { .. })));
        assert_eq!(there(&sides), [true, false]);
    }

    #[test]
    fn a_dead_disk_keeps_nobody_from_what_is_on_the_other_one_and_nothing_is_made_or_destroyed() {
        let (sides, mirrored) = pair(1000, 1000);
        mirrored.create(&thin("a", 16)).unwrap();
        let dead = Mirrored::without_second(Arc::new(sides[0].clone()), Path::new("/dead"), "not mounted");
        assert!(dead.half(id("a"), Half::Second).unwrap_err().is_lost());
        let proof = dead.exclusive(id("a")).unwrap();
        dead.write_table(&thin("a", 16), proof.as_ref()).unwrap();
        drop(proof);
        assert!(dead.ever_written(&thin("a", 16)).unwrap());
        assert!(dead.replace(&thin("a", 16), Half::Second).is_err() && dead.grow(&thin("a", 32)).is_err());
        assert!(dead.destroy(id("a")).is_err());
        assert_eq!(there(&sides), [true, true]);
        let error = dead.create(&thin("b", 16)).unwrap_err().to_string();
        assert!(error.contains("not mounted") && sides[0].device(id("b")).is_err(), "{error}");
    }

    #[test]
    fn nothing_copies_a_half() {
        let (_, mirrored) = pair(1000, 1000);
        mirrored.create(&thin("a", 16)).unwrap();
        let how = Copying { full: true, progress: &|_, _| true };
        assert!(mirrored.snapshot(SnapshotId::from_name("s"), &thin("a", 16), &how).is_err());
        assert!(mirrored.create_from(&thin("b", 16), CopySource::Device(id("a")), Bytes::mib(16), &how).is_err());
    }

    #[test]
    fn two_directories_of_one_file_system_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let error = Mirrored::check_apart(dir.path(), dir.path()).unwrap_err().to_string();
        assert!(error.contains("the same file system"), "{error}");
        assert!(Mirrored::check_apart(dir.path(), Path::new("/proc")).is_ok());
    }
}
