//! The calls of [`Backing`] on image files, step by step.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{FileType, OFlags};
use zpod_volume::{Bytes, DiskLayout, Provisioning, SnapshotId, VolumeId};

use super::copies::Source;
use super::proof::{Held, Proof, TakeError};
use super::{Fencing, FileBacking, Image, STAT_BLOCK, image, name_of};
use crate::backing::kept::Kept;
use crate::backing::ledger::Promise;
use crate::backing::{Backing, BackingError, Capacity, CopySource, Copying, DeviceSpec, Exclusive, Outcome};
use crate::crash;
use crate::directory;

/// What a note takes.
const NOTE: Bytes = Bytes(DiskLayout::SPEC_BYTES as u64);

impl FileBacking {
    /// Makes an image, from something where that is asked for, unless there is one. Has room promised for it first.
    fn make_new(
        &self,
        spec: &DeviceSpec,
        reserve: impl FnOnce() -> Result<Option<Source>, BackingError>,
        how: &Copying<'_>,
    ) -> Result<Outcome, BackingError> {
        self.check(spec)?;
        let stat = self.directory.stat(&name_of(spec.id)).map_err(|error| self.fail_on(spec.id, "look at", error))?;
        if let Some(stat) = stat {
            self.compare(spec, stat.st_size.unsigned_abs())?;
            // Whoever made it may have been killed before its name was durable.
            self.directory.sync().map_err(|error| self.fail("sync", error))?;
            return Ok(Outcome::Unchanged);
        }
        self.check_fits(spec)?;
        self.ledger().release(spec.id);
        let temporary = directory::temporary_name(spec.id);
        let made = reserve().and_then(|source| self.make(spec, &temporary, source.as_ref(), how));
        match made {
            Ok(taken) => self.ledger().took(spec.id, taken),
            Err(error) => {
                if let Err(error) = self.unbound(spec.id).and_then(|()| self.directory.remove(&temporary)) {
                    tracing::warn!(volume = %spec.id, %error, "a temporary file stays until the next start");
                }
                self.forget(spec.id);
                return Err(error);
            }
        }
        crash::point("create: named");
        // Where this fails the image stays, and so does its promise: the next try finds it.
        self.directory.sync().map_err(|error| self.fail("sync", error))?;
        crash::point("create: name durable");
        Ok(Outcome::Changed)
    }

    /// Makes the image under its temporary name and gives it its own.
    fn make(
        &self,
        spec: &DeviceSpec,
        temporary: &str,
        source: Option<&Source>,
        how: &Copying<'_>,
    ) -> Result<u64, BackingError> {
        let fail = |what| move |error| self.fail_taking(spec, what, error);
        let abilities = self.tried()?.abilities;
        let file = self.directory.fresh_file(temporary).map_err(fail("create"))?;
        crash::point("create: temporary file made");
        if abilities.nocow {
            image::disable_cow(&file).map_err(fail("disable copy-on-write of"))?;
        }
        self.bound(spec.id, &file, spec.layout.partition).map_err(fail("limit"))?;
        if let Some(source) = source {
            self.copy(spec.id.into(), source, &file, how)?;
            image::erase_note(&file).map_err(fail("erase a note in"))?;
        }
        image::fill(&file, spec, abilities.names.partition).map_err(fail("create"))?;
        let taken = file.metadata().map_err(fail("look at"))?.blocks() * STAT_BLOCK;
        crash::point("create: image durable");
        self.directory.rename_new(temporary, &name_of(spec.id)).map_err(fail("name"))?;
        Ok(taken)
    }

    /// Whether an image that exists is the one asked for.
    fn compare(&self, spec: &DeviceSpec, length: u64) -> Result<(), BackingError> {
        let (promised, DiskLayout { partition, disk, .. }) = (self.promised(spec.id)?, spec.layout);
        if length != disk.0 {
            return Err(self.mismatch(spec.id, Bytes(length), disk));
        }
        if promised != partition {
            return Err(self.mismatch(spec.id, promised, partition));
        }
        Ok(())
    }

    /// What an image was promised, by its own attribute.
    fn promised(&self, id: VolumeId) -> Result<Bytes, BackingError> {
        let image = self.image(id, OFlags::RDONLY)?;
        let promised = self.promise(&image).map_err(|error| self.fail_on(id, "use", error))?;
        // An image put there, or given its attribute, behind our back.
        if self.ledger().partition(id) != Some(promised) {
            let taken = self.taken(id)?;
            self.adopt_image(id, &image, promised, taken).map_err(|error| self.fail_on(id, "limit", error))?;
        }
        Ok(promised)
    }

    /// Limits an image to its promise again, after a step that failed.
    pub(super) fn bound_again(&self, id: VolumeId) {
        let bounded = self.image(id, OFlags::RDONLY).map_err(|error| error.to_string()).and_then(|image| {
            let partition = self.ledger().partition(id).unwrap_or_default();
            self.bound(id, &image, partition).map_err(|error| error.to_string())
        });
        if let Err(error) = bounded {
            tracing::warn!(volume = %id, error, "its limit is not what it should be until the next start");
        }
    }

    /// The image, of which the caller has a proof. Not any will do: it must be this image's, from here, and still hold.
    fn proven(&self, id: VolumeId) -> Result<Arc<Held>, BackingError> {
        let held = self.held(id).ok_or_else(|| self.in_use(id, "the proof of exclusive use is another volume's"))?;
        if !held.holds().map_err(|error| self.fail_on(id, "look at the lease of", error))? {
            return Err(self.in_use(id, "somebody is opening it at this moment"));
        }
        Ok(held)
    }

    fn enlarge(&self, spec: &DeviceSpec, image: &File, length: u64, promised: Bytes) -> Result<(), BackingError> {
        let fail = |what| move |error| self.fail_taking(spec, what, error);
        let DiskLayout { partition, disk, .. } = spec.layout;
        if partition > promised {
            self.bound(spec.id, image, partition).map_err(fail("raise the limit of"))?;
        }
        if disk.0 > length {
            image::lengthen(image, length, disk.0).map_err(fail("lengthen"))?;
            crash::point("grow: lengthened");
        }
        if spec.provisioning == Provisioning::Thick {
            image::allocate(image, partition).map_err(fail("take the space of"))?;
            crash::point("grow: space taken");
        }
        if partition > promised {
            image::set_promise(image, self.names(image).partition, partition).map_err(fail("promise"))?;
            crash::point("grow: promise recorded");
        }
        rustix::fs::fsync(image).map_err(|error| fail("sync")(error.into()))
    }
}

impl Backing for FileBacking {
    fn create(&self, spec: &DeviceSpec) -> Result<Outcome, BackingError> {
        let reserve = || {
            self.reserve(spec)?;
            crash::point("create: room promised");
            Ok(None)
        };
        self.make_new(spec, reserve, &Copying { full: false, progress: &|_, _| true })
    }

    fn destroy(&self, id: VolumeId) -> Result<Outcome, BackingError> {
        let proof = match self.exclusive(id) {
            Ok(proof) => proof,
            Err(BackingError::Missing { .. }) => {
                self.forget(id);
                // Whoever removed it may have been killed before that was durable.
                self.directory.sync().map_err(|error| self.fail("sync", error))?;
                return Ok(Outcome::Unchanged);
            }
            Err(error) => return Err(error),
        };
        crash::point("destroy: exclusive");
        self.unbound(id).map_err(|error| self.fail_on(id, "lift the limit of", error))?;
        crash::point("destroy: limit lifted");
        let taken = self.allocated(id).unwrap_or_default();
        if let Err(error) = self.directory.remove(&name_of(id)) {
            self.bound_again(id);
            return Err(self.fail_on(id, "remove", error));
        }
        crash::point("destroy: removed");
        // The space comes back with the last descriptor, and so must not be promised before.
        drop(proof);
        self.freed.note(taken.0);
        self.forget(id);
        crash::point("destroy: promise taken back");
        self.directory.sync().map_err(|error| self.fail("sync", error))?;
        crash::point("destroy: removal durable");
        Ok(Outcome::Changed)
    }

    fn grow(&self, spec: &DeviceSpec) -> Result<Outcome, BackingError> {
        self.check(spec)?;
        let promised = self.promised(spec.id)?;
        let image = self.image(spec.id, OFlags::RDWR)?;
        let length = self.length(spec.id, &image)?;
        if spec.layout.partition <= promised && spec.layout.disk.0 <= length {
            return Ok(Outcome::Unchanged);
        }
        self.check_fits(spec)?;
        self.reserve(spec)?;
        crash::point("grow: room promised");
        if let Err(error) = self.enlarge(spec, &image, length, promised) {
            // The attribute decides: it may have been written before the failure.
            let now = self.promise(&image).unwrap_or(spec.layout.partition);
            self.ledger().restore(spec.id, Some(now));
            self.bound_again(spec.id);
            return Err(error);
        }
        let taken = self.taken(spec.id)?;
        self.ledger().took(spec.id, taken);
        crash::point("grow: durable");
        Ok(Outcome::Changed)
    }

    fn exclusive(&self, id: VolumeId) -> Result<Box<dyn Exclusive>, BackingError> {
        // A look at it that goes on now ends with its step. Another one who wants this gets the same proof: to open it beside
        // him would break his lease.
        let opening = self.openings.enter(id.into());
        let held = match self.image(id, OFlags::RDWR)? {
            Image::Held(held) => held,
            Image::Opened(file) => {
                let fencing = self.abilities().map_or_else(|| Fencing::of(&file), |abilities| Ok(abilities.fencing));
                let fencing = fencing.map_err(|error| self.fail_on(id, "take a lease on", error))?;
                let held = Held::take(file, fencing).map_err(|error| match error {
                    TakeError::InUse(detail) => self.in_use(id, detail),
                    TakeError::Io(error) => self.fail_on(id, "take a lease on", error),
                })?;
                let held = Arc::new(held);
                self.held.put(id, &held);
                held
            }
        };
        drop(opening);
        if !held.holds().map_err(|error| self.fail_on(id, "look at the lease of", error))? {
            return Err(self.in_use(id, "somebody is opening it at this moment"));
        }
        Ok(Box::new(Proof::new(held, &self.held)))
    }

    fn write_table(&self, spec: &DeviceSpec, _proof: &dyn Exclusive) -> Result<(), BackingError> {
        self.check(spec)?;
        let id = spec.id;
        let held = self.proven(id)?;
        let (promised, length) = (self.promised(id)?, self.length(id, &held.file)?);
        if spec.layout.partition > promised {
            return Err(self.mismatch(id, promised, spec.layout.partition));
        }
        if spec.layout.disk.0 > length {
            return Err(self.mismatch(id, Bytes(length), spec.layout.disk));
        }
        image::write_tables(&held.file, id, spec.layout.partition, Bytes(length))
            .map_err(|error| self.fail_taking(spec, "write the partition table of", error))?;
        crash::point("table: durable");
        Ok(())
    }

    /// The guest's journal before the partition does not count: it says that a guest meant to make a pool, which is no
    /// reason not to make one. `zpool create` writes labels into the partition's first 512 KiB before anything else
    /// can be in the pool, so a pool there is never missed.
    fn ever_written(&self, spec: &DeviceSpec) -> Result<bool, BackingError> {
        let image = self.image(spec.id, OFlags::RDONLY)?;
        let end = DiskLayout::PARTITION_START.saturating_add(spec.layout.partition.0);
        let length = self.length(spec.id, &image)?;
        if length < end {
            return Err(self.mismatch(spec.id, Bytes(length), spec.layout.disk));
        }
        image::has_data(&image, DiskLayout::PARTITION_START, end)
            .map_err(|error| self.fail_on(spec.id, "look for data in", error))
    }

    fn device(&self, id: VolumeId) -> Result<PathBuf, BackingError> {
        let name = name_of(id);
        let path = self.directory.join(&name);
        let ours = self.directory.stat(&name).map_err(|error| self.fail_on(id, "look at", error))?;
        let found = std::fs::symlink_metadata(&path).ok();
        // The path is for another process: it must lead to the image that is meant, whatever is mounted there by now.
        match (ours, found) {
            (Some(ours), Some(found))
                if (ours.st_dev, ours.st_ino) == (found.dev(), found.ino())
                    && FileType::from_raw_mode(ours.st_mode) == FileType::RegularFile =>
            {
                Ok(path)
            }
            _ => Err(self.missing(id)),
        }
    }

    fn allocated(&self, id: VolumeId) -> Result<Bytes, BackingError> {
        let stat = self.directory.stat(&name_of(id)).map_err(|error| self.fail_on(id, "look at", error))?;
        let stat = stat.ok_or_else(|| self.missing(id))?;
        Ok(Bytes(stat.st_blocks.unsigned_abs() * STAT_BLOCK))
    }

    fn excess(&self, id: VolumeId) -> Result<Bytes, BackingError> {
        let taken = self.allocated(id)?;
        let ledger = self.ledger();
        Ok(ledger.reserved(id).map_or(Bytes(0), |reserved| self.beyond(reserved, ledger.shares(id), taken.0)))
    }

    fn capacity(&self) -> Result<Capacity, BackingError> {
        self.room()
    }

    /// Of the file system nothing but that it answers.
    fn look(&self) -> Result<(), BackingError> {
        self.free().map(drop)
    }

    fn largest_disk(&self) -> Result<Bytes, BackingError> {
        Ok(self.tried()?.abilities.largest_file)
    }

    fn location(&self) -> &Path {
        self.directory.path()
    }

    fn shares_blocks(&self) -> Result<bool, BackingError> {
        Ok(self.tried()?.abilities.reflink)
    }

    fn snapshot(&self, id: SnapshotId, source: &DeviceSpec, how: &Copying<'_>) -> Result<Outcome, BackingError> {
        self.keep(id, source, how)
    }

    fn destroy_snapshot(&self, id: SnapshotId) -> Result<Outcome, BackingError> {
        self.discard(id)
    }

    fn snapshot_allocated(&self, id: SnapshotId) -> Result<Bytes, BackingError> {
        let kept = Kept::from(id);
        let stat = self.directory.stat(&kept.name()).map_err(|error| self.fail_on(kept, "look at", error))?;
        let stat = stat.ok_or_else(|| BackingError::SnapshotMissing { id, file: self.directory.join(&kept.name()) })?;
        Ok(Bytes(stat.st_blocks.unsigned_abs() * STAT_BLOCK))
    }

    fn create_from(
        &self,
        spec: &DeviceSpec,
        source: CopySource,
        partition: Bytes,
        how: &Copying<'_>,
    ) -> Result<Outcome, BackingError> {
        if partition > spec.layout.partition {
            return Err(self.mismatch(spec.id, partition, spec.layout.partition));
        }
        let kept = match source {
            CopySource::Device(id) => Kept::from(id),
            CopySource::Snapshot(id) => Kept::from(id),
        };
        let reserve = || {
            let source = self.source(kept, partition, how)?;
            let shares = source.shares;
            let promise = Promise::Partition { size: spec.layout.partition, shares };
            self.reserve_copy(spec.id.into(), &source, |_| promise)?;
            Ok(Some(source))
        };
        self.make_new(spec, reserve, how)
    }

    fn write_note(&self, id: VolumeId, note: &[u8], _proof: &dyn Exclusive) -> Result<(), BackingError> {
        let held = self.proven(id)?;
        image::write_note(&held.file, note).map_err(|error| self.fail_wanting(id, NOTE, "leave a note in", error))?;
        crash::point("note: durable");
        Ok(())
    }
}
