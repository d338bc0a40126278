//! Bringing a volume up: its disk, its pool, its properties, its place of our own.

use std::path::PathBuf;

use zpod_volume::{Bytes, Create, DiskLayout, Mirror, Origin, PoolName, VolumeId};

use super::bounds::Bounds;
use super::device;
use super::marks::remove_marks;
use super::mirror::Halves;
use super::restore::Imports;
use super::{Active, Request, Volume, progress::Progress};
use crate::disk;
use crate::error::VolumeError;
use crate::journal::{self, Journal};
use crate::lost::Seen;
use crate::machine::{Disk, Fault, Health, Machine, MountFlags, Properties};
use crate::place::Place;

pub(super) struct Activation<'a, M> {
    pub(super) machine: &'a M,
    pub(super) id: VolumeId,
    pub(super) volume: &'a Volume,
    pub(super) request: &'a Request,
    pub(super) progress: &'a Progress,
    /// The largest of the pod's volumes.
    pub(super) arc_max: Option<Bytes>,
    /// Imports that must not meet.
    pub(super) imports: &'a Imports,
    /// Where the request says that its disk is.
    pub(super) place: Option<&'a Place>,
    /// Containers use its pool now.
    pub(super) used: bool,
}

/// How a pool came to be there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Opened {
    /// It was made now, with the properties and quota of the spec.
    Made,
    /// It was there.
    Found,
    /// It was there, and its contents are another volume's still.
    Copied,
}

/// A volume's pool, imported.
pub(super) struct Pool {
    /// Its disk, or one half of it.
    pub(super) disk: Disk,
    pub(super) partition: Bytes,
    /// The devices it uses.
    pub(super) devices: Vec<PathBuf>,
    pub(super) opened: Opened,
    pub(super) mirror: Option<Halves>,
}

/// Flags of our own mount: nothing is run from it.
pub(super) const BASE_FLAGS: MountFlags =
    MountFlags { read_only: false, noexec: true, nosuid: true, nodev: true, noatime: true };

impl<M: Machine> Activation<'_, M> {
    pub(super) async fn run(&self, previous: Option<Active>, base: PathBuf) -> Result<Active, VolumeError> {
        let spec = &self.request.spec;
        self.progress.stage("loading ZFS");
        self.machine.zfs_ready().await.map_err(self.failed("loading ZFS"))?;
        self.progress.stage("waiting for its disk");
        let search = disk::Search {
            mirrored: spec.mirror.is_some(),
            place: self.place,
            used: previous.as_ref().filter(|_| self.used).map(|active| &active.disk),
            ..disk::Search::new(self.id)
        };
        let disk = disk::find(self.machine, search, |seen| self.progress.detail(seen)).await?;
        let previous = self.in_the_same_mode(previous, &disk).await?;
        let health = self.machine.health(&spec.pool).await.map_err(self.failed("looking at its pool"))?;
        // What is known of the halves of a pool that is imported still is newer than what the node says.
        let lacking = previous.as_ref().filter(|_| health.is_some()).and_then(|active| active.mirror.as_ref()?.behind);
        let known = previous.as_ref().is_some_and(|active| active.disk.sequence == disk.sequence);
        if let Some(active) = previous.filter(|active| active.request == *self.request)
            && known
            && matches!(health, Some(Health::Online | Health::Degraded))
        {
            if spec.mode.is_filesystem() {
                // A release that could not export the pool has unmounted it before.
                let flags = MountFlags { read_only: active.read_only, ..BASE_FLAGS };
                self.machine.mount(&spec.dataset(), &active.base, flags).await.map_err(self.failed("mounting it"))?;
            }
            return Ok(active);
        }
        self.machine.limit_arc(self.arc_max).await.map_err(self.failed("bounding the ARC"))?;
        if disk.read_only {
            return self.run_read_only(disk, health, known, base).await;
        }

        let pool = match spec.mirror {
            Some(Mirror { behind }) => self.open_mirror(&disk, lacking.or(behind), health, known).await?,
            None => self.open_disk(disk, health, known).await?,
        };
        let Pool { disk, partition, devices, opened, mirror } = pool;
        let quota = match opened {
            Opened::Made => {
                // In a pool that was just made nobody has rights that would have to be taken away.
                if !spec.zfs_access.is_none() {
                    self.delegate().await;
                }
                Bounds::of(spec).bound()
            }
            Opened::Found => {
                self.end_swap().await?;
                let now = self.dataset().await?;
                self.unlock(&now, false).await?;
                let now = self.roll_back(now).await?;
                let quota = self.settle(&devices, &now).await?;
                self.remove_leftover_marks(&now).await;
                self.keep(&now).await;
                self.delegate().await;
                self.note_children(&now);
                quota
            }
            Opened::Copied => self.adopt(&disk, &devices).await?,
        };

        if !spec.mode.is_filesystem() {
            return Ok(Active {
                request: self.request.clone(),
                disk,
                partition,
                quota,
                base,
                mirror,
                read_only: false,
            });
        }
        self.progress.stage("mounting it");
        self.machine.mount(&spec.dataset(), &base, BASE_FLAGS).await.map_err(self.failed("mounting it"))?;
        if let Some(group) = self.request.fs_group {
            self.progress.stage("giving its files to the pod's group (fsGroup)");
            self.machine
                .own(&base, group)
                .await
                .map_err(self.failed("giving its files to the pod's group (fsGroup)"))?;
        }
        Ok(Active { request: self.request.clone(), disk, partition, quota, base, mirror, read_only: false })
    }

    /// The pool of a volume that has a disk for itself.
    async fn open_disk(&self, disk: Disk, health: Option<Health>, known: bool) -> Result<Pool, VolumeError> {
        let spec = &self.request.spec;
        let (partition, _) = disk::settle_partition(self.machine, self.id, &disk, spec.partition).await?;
        let device = self.machine.link(self.id, &disk).await.map_err(self.failed("naming its disk"))?;
        if let Some(health) = health {
            self.resume(health, known).await?;
        }
        let devices = vec![device];
        let opened = self.open(&disk, partition, &devices, health.is_some()).await?;
        Ok(Pool { disk, partition, devices, opened, mirror: None })
    }

    pub(super) fn failed(&self, step: &'static str) -> impl Fn(Fault) -> VolumeError + use<M> {
        let id = self.id;
        move |fault| VolumeError::failed(id, step, fault)
    }

    /// A pool that is imported already: left over from a container that was here before, whose disk may have been
    /// unplugged and plugged again since, or from work that was cut short.
    pub(super) async fn resume(&self, health: Health, known: bool) -> Result<(), VolumeError> {
        let pool = &self.request.spec.pool;
        if known && matches!(health, Health::Online | Health::Degraded) {
            return Ok(());
        }
        self.progress.stage("resuming its pool on the disk that came back");
        let resumed = self.machine.resume(pool, health == Health::Suspended).await;
        let now = self.machine.health(pool).await.map_err(self.failed("looking at its pool"))?;
        match (resumed, now) {
            (Ok(()), Some(Health::Online | Health::Degraded)) => {
                tracing::warn!(volume = %self.id, "the pool was left imported and was resumed on its disk");
                Ok(())
            }
            (resumed, now) => Err(VolumeError::Stuck {
                id: self.id,
                health: now.unwrap_or(health),
                cause: resumed.err().map_or_else(|| "no error was reported".to_owned(), |fault| fault.text),
            }),
        }
    }

    /// Imports the pool, or makes it where that is allowed and nothing can be lost (DESIGN: create once).
    async fn open(
        &self,
        disk: &Disk,
        partition: Bytes,
        devices: &[PathBuf],
        imported: bool,
    ) -> Result<Opened, VolumeError> {
        let spec = &self.request.spec;
        let block = self.machine.read(disk, DiskLayout::JOURNAL_OFFSET, journal::BYTES).await;
        let block = block.map_err(self.failed("reading its journal"))?;
        let journal = Journal::decode(&block, self.id);
        if let Some(origin) = &spec.origin
            && is_still_its_origins(journal, &block, origin)
        {
            return self.open_copy(&block, disk, devices, origin, imported).await;
        }
        let blank = !imported && disk::is_blank(self.machine, self.id, disk, partition).await?;
        match journal {
            Journal::Blank if blank && spec.create == Create::Fresh => {
                // Without its key nothing is begun.
                self.new_key().await?;
                self.write_journal(disk, Journal::Creating).await?;
                self.make(devices, false).await?;
            }
            Journal::Creating if imported => {}
            Journal::Creating => {
                let cause = match blank {
                    true => Some(Fault::new("there are no labels on it yet")),
                    false => self.import(devices).await.err(),
                };
                match cause {
                    None => {}
                    Some(cause) if spec.create == Create::Never => {
                        return Err(VolumeError::HalfMade { id: self.id, disk: disk.name.clone(), cause });
                    }
                    Some(cause) => {
                        tracing::warn!(volume = %self.id, "making the pool was cut short, it is made again: {cause}");
                        self.make(devices, true).await?;
                    }
                }
            }
            // What only a half can be is no state of a whole disk: nothing is made over it.
            _ if blank => {
                return Err(VolumeError::Blank { id: self.id, disk: disk.name.clone() });
            }
            Journal::Behind | Journal::Rebuilding => {
                let reason = format!("disk {} is half of a mirror, and the node says it is a whole volume", disk.name);
                return Err(VolumeError::Refused { id: self.id, reason });
            }
            Journal::Blank | Journal::Created | Journal::Foreign => {
                if !imported && let Err(cause) = self.import(devices).await {
                    return Err(self.unimportable(disk, cause).await);
                }
                return Ok(Opened::Found);
            }
        }
        self.finish(&[disk]).await
    }

    /// The same on a disk with another's journal, which is the origin's or nobody's that is known.
    async fn open_copy(
        &self,
        journal: &[u8],
        disk: &Disk,
        devices: &[PathBuf],
        origin: &Origin,
        imported: bool,
    ) -> Result<Opened, VolumeError> {
        match Journal::decode(journal, origin.volume) {
            Journal::Created => {
                self.take_over(disk, devices, origin, imported).await?;
                Ok(Opened::Copied)
            }
            // No container has ever started on what was being made there: there is nothing to take over.
            Journal::Creating if self.request.spec.create != Create::Never => {
                self.new_key().await?;
                self.write_journal(disk, Journal::Creating).await?;
                self.make(devices, true).await?;
                self.finish(&[disk]).await
            }
            Journal::Creating => {
                let cause = Fault::new("the volume it is a copy of was never finished either");
                Err(VolumeError::HalfMade { id: self.id, disk: disk.name.clone(), cause })
            }
            Journal::Blank | Journal::Foreign | Journal::Behind | Journal::Rebuilding => {
                Err(VolumeError::NotItsCopy { id: self.id, disk: disk.name.clone(), origin: origin.volume })
            }
        }
    }

    pub(super) async fn import(&self, devices: &[PathBuf]) -> Result<(), Fault> {
        self.progress.stage("importing its pool");
        let pool = &self.request.spec.pool;
        let _alone = self.imports.alone(self.id).await;
        self.machine.import(pool, pool, devices, false).await
    }

    /// Why its pool can't be imported, with what its label says has become of it.
    pub(super) async fn unimportable(&self, disk: &Disk, cause: Fault) -> VolumeError {
        let spec = &self.request.spec;
        let origin = spec.origin.as_ref().map(|origin| PoolName::for_volume(origin.volume));
        let names: Vec<_> = [Some(&spec.pool), origin.as_ref()].into_iter().flatten().map(PoolName::as_str).collect();
        let seen = match self.machine.label(disk, DiskLayout::PARTITION_START).await {
            Ok(label) => Seen::of(label.as_ref(), &names),
            Err(_) => Seen::Nothing,
        };
        let (pool, seen) = (spec.pool.to_string(), Box::new(seen));
        VolumeError::Import { id: self.id, pool, disk: disk.name.clone(), seen, cause }
    }

    pub(super) async fn make(&self, devices: &[PathBuf], force: bool) -> Result<(), VolumeError> {
        self.progress.stage("making its pool");
        let spec = &self.request.spec;
        let properties: Vec<_> = pairs(&spec.pool_creation_properties).chain(pairs(&spec.pool_properties)).collect();
        self.machine.create_pool(&spec.pool, devices, &properties, force).await.map_err(self.failed("making its pool"))
    }

    /// What is left to do after the pool was made: the dataset, and the note that all is done.
    pub(super) async fn finish(&self, disks: &[&Disk]) -> Result<Opened, VolumeError> {
        let spec = &self.request.spec;
        self.progress.stage("making its dataset");
        let dataset = spec.dataset();
        let found = self.machine.dataset(&dataset).await.map_err(self.failed("looking for its dataset"))?;
        let opened = if found.is_some() { Opened::Found } else { Opened::Made };
        if opened == Opened::Made {
            let mut properties: Vec<_> = pairs(&spec.dataset_properties).collect();
            properties.extend(Bounds::of(spec).at_creation());
            let size = (!spec.mode.is_filesystem()).then_some(spec.capacity);
            if size.is_some() {
                properties.extend(pairs(&spec.volume_creation_properties));
            }
            let key = self.new_key().await?;
            let encryption = spec.encryption.zip(key.as_ref());
            let made = self.machine.create_dataset(&dataset, size, &properties, encryption).await;
            made.map_err(self.failed("making its dataset"))?;
            self.key_is_used();
        }
        self.machine.sync(&spec.pool).await.map_err(self.failed("writing out its pool"))?;
        for disk in disks {
            self.write_journal(disk, Journal::Created).await?;
        }
        Ok(opened)
    }

    pub(super) async fn write_journal(&self, disk: &Disk, journal: Journal) -> Result<(), VolumeError> {
        let copy = self.request.spec.origin.as_ref().and_then(|origin| origin.copy);
        let block = journal.encode(self.id, copy).unwrap_or_default();
        let written = self.machine.write(disk, DiskLayout::JOURNAL_OFFSET, &block).await;
        written.map_err(self.failed("writing its journal"))
    }

    /// Properties of the dataset.
    pub(super) async fn dataset(&self) -> Result<Properties, VolumeError> {
        let dataset = self.request.spec.dataset();
        let now = self.machine.dataset(&dataset).await.map_err(self.failed("reading its properties"))?;
        let now = now.ok_or(VolumeError::NoDataset { id: self.id, dataset })?;
        let wanted = if self.request.spec.mode.is_filesystem() { "filesystem" } else { "volume" };
        match now.get("type") {
            Some(found) if found != wanted => {
                let (wanted, found) = (wanted.to_owned(), found.clone());
                Err(VolumeError::Differs { id: self.id, property: "type", wanted, found })
            }
            _ => Ok(now),
        }
    }

    /// Brings size, properties and quota of a pool that was there to what the spec says; gives the quota.
    pub(super) async fn settle(&self, devices: &[PathBuf], now: &Properties) -> Result<u64, VolumeError> {
        let spec = &self.request.spec;
        self.progress.stage("setting its properties");
        let pool = self.machine.pool(&spec.pool).await.map_err(self.failed("reading its pool's properties"))?;
        if pool.expandable {
            self.machine.expand(&spec.pool, devices).await.map_err(self.failed("growing its pool"))?;
        }
        for (key, value) in different(&pool.properties, pairs(&spec.pool_properties)) {
            let set = self.machine.set_pool(&spec.pool, &key, &value).await;
            set.map_err(self.failed("setting its pool's properties"))?;
        }
        let dataset = spec.dataset();
        let bounds = Bounds::of(spec).changes(now);
        let changes: Vec<_> = different(now, pairs(&spec.dataset_properties)).chain(bounds.first).collect();
        let [before, after] = device::read_only(spec, now, !changes.is_empty());
        for changes in [&before[..], &changes, &after[..]].into_iter().filter(|changes| !changes.is_empty()) {
            let set = self.machine.set_dataset(&dataset, changes).await;
            set.map_err(self.failed("setting its properties"))?;
        }
        // Not worth a pod that does not start; so below.
        if let Some(reason) = bounds.refused {
            tracing::warn!(volume = %self.id, "{reason}");
        }
        Ok(bounds.bound)
    }

    /// Keeps the space for the volume that its spec says.
    pub(super) async fn keep(&self, now: &Properties) {
        let spec = &self.request.spec;
        if let Some(kept) = Bounds::of(spec).changes(now).then
            && let Err(fault) = self.machine.set_dataset(&spec.dataset(), &[kept]).await
        {
            tracing::warn!(volume = %self.id, "the space that is to be kept for it is not there: {fault}");
        }
    }

    /// Removes marks that the node or a guest left behind: nobody copies the disk of a volume that is being brought up.
    pub(super) async fn remove_leftover_marks(&self, now: &Properties) {
        // Most volumes never had a snapshot, and are spared the look.
        if now.get("snapshots_changed").is_some_and(|when| when == "-") {
            return;
        }
        if let Err(fault) = remove_marks(self.machine, &self.request.spec.dataset(), |_| true).await {
            tracing::warn!(volume = %self.id, "a mark stays until the next start: {fault}");
        }
    }
}

/// Whether what is on the disk is not this volume's own yet: another volume's, or, where both have one id, another copy's.
fn is_still_its_origins(journal: Journal, block: &[u8], origin: &Origin) -> bool {
    match journal {
        Journal::Foreign => true,
        Journal::Creating | Journal::Created => origin.copy.is_some_and(|copy| !journal::is_of_copy(block, copy)),
        Journal::Blank | Journal::Behind | Journal::Rebuilding => false,
    }
}

fn pairs(map: &Properties) -> impl Iterator<Item = (String, String)> {
    map.iter().map(|(key, value)| (key.clone(), value.clone()))
}

fn different(
    now: &Properties,
    wanted: impl Iterator<Item = (String, String)>,
) -> impl Iterator<Item = (String, String)> {
    wanted.filter(|(key, value)| now.get(key).is_none_or(|now| !same(key, now, value)))
}

/// Whether two values of a property are one: `128K` may be written as `131072`, and `xattr=sa` as `on`, which has meant
/// the same since OpenZFS 2.3.
fn same(key: &str, now: &str, wanted: &str) -> bool {
    let size = |text: &str| match text.strip_suffix(['K', 'M']) {
        Some(digits) => Some(digits.parse::<u64>().ok()? << if text.ends_with('K') { 10 } else { 20 }),
        None => text.parse().ok(),
    };
    let plain = |text| if key == "xattr" && text == "sa" { "on" } else { text };
    plain(now) == plain(wanted) || (size(now).is_some() && size(now) == size(wanted))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_compared_as_zfs_means_them() {
        assert!(same("recordsize", "131072", "128K"));
        assert!(same("compression", "lz4", "lz4"));
        assert!(same("xattr", "on", "sa"));
        assert!(!same("xattr", "on", "dir"));
        assert!(!same("compression", "lz4", "zstd"));
        assert!(!same("recordsize", "131072", "1M"));
    }
}
