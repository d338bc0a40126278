use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use uuid::Uuid;
use zpod_storage::catalog::{Condition, Publication, Volume};
use zpod_volume::{Bytes, DiskLayout, Half, TokenDigest, VolumeId, VolumeMode};

use super::observer::Observed;
use super::scrubs::{Candidate, Scrubs};
use super::stats::condition_of;
use crate::guest::{GuestClient, Health, VolumeReport, Wanted};

/// A guest that changes its mind all the time is written down no more often than this.
const RECORD_EVERY: Duration = Duration::from_secs(5);
/// A guest that does not grow, or does not take attributes, is asked again no more often than this.
const ASK_EVERY: Duration = Duration::from_secs(30);
/// A second sandbox that claims a volume is complained of in the log no more often than this.
const COMPLAIN_EVERY: Duration = Duration::from_secs(60);

/// The volumes published on this node in this boot, and what their guests said last. A few for each pod; the others
/// take no memory.
#[derive(Debug, Default)]
pub(super) struct Published {
    entries: Mutex<HashMap<VolumeId, Entry>>,
    /// Scans for sandboxes that have ended.
    scans: AtomicU64,
}

#[derive(Debug)]
struct Entry {
    target: PathBuf,
    /// Of the token of the publication, and the token itself where it is known: it is in no record.
    digest: Option<TokenDigest>,
    token: Option<Uuid>,
    /// The sandbox that showed the token first. Until it is gone no other one speaks for the volume, or hears of it.
    owner: Option<String>,
    /// The last scan for sandboxes that had ended when it was published. A publication that this process found has none,
    /// 0: nobody knows which sandboxes are older.
    scans: u64,
    /// When another one was last complained of.
    complained: Option<Instant>,
    /// There once it is published, not only reserved.
    observed: Option<Arc<Observed>>,
    block: bool,
    initialized: bool,
    partition: Bytes,
    condition: Option<Condition>,
    /// Of a mirror: the half that is recorded as lacking something.
    mirror: Option<Option<Half>>,
    heard: Option<Heard>,
    /// Its guest fell silent.
    silence: Option<Silence>,
    /// When it was published, or this process began.
    since: Instant,
    /// A container that mounts it has run, and no guest has told of it since.
    unheard: bool,
    /// It is older than this process, which does not know whether a guest has told of it.
    earlier: bool,
    recorded: Option<Instant>,
    /// The rollback that its guest was told to do, until what came of it is recorded.
    rollback: Option<Uuid>,
    /// Kata's entry may tell the next guest less than is recorded: it could not be written.
    stale: bool,
    grown: Option<Instant>,
    /// It has attributes that its note may be without.
    changed: bool,
    /// The sandbox that was told of them, and when one was tried last.
    told: Option<String>,
    telling: Option<Instant>,
    scrubs: Scrubs,
}

impl Entry {
    /// No guest has told of it since it was published. One that has shown its token has the volume's disk, though it tells of
    /// it only while a container uses it.
    fn was_never_heard(&self) -> bool {
        self.heard.is_none() && self.silence.is_none() && self.owner.is_none() && !self.earlier
    }
}

/// What a guest said of a volume, and the guest.
#[derive(Debug, Clone)]
pub(super) struct Heard {
    /// The guest.
    pub(super) guest: GuestClient,
    /// Its last words on this volume.
    pub(super) report: VolumeReport,
}

/// A guest that can't be heard any more, and what it said last.
#[derive(Debug, Clone)]
pub(super) struct Silence {
    /// Since when.
    pub(super) since: Instant,
    /// Its last words on this volume.
    pub(super) report: VolumeReport,
}

/// What a report asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Note {
    /// The token is wrong, or the volume is not published: the guest speaks of what isn't its own.
    Disbelieved,
    /// The token is right, but another sandbox showed it first, and lives.
    SecondClaim {
        /// The volume it speaks of.
        volume: Arc<Observed>,
        /// The sandbox that has it.
        owner: String,
        /// It is time to say so in the log.
        complain: bool,
    },
    /// Believed.
    Believed {
        /// The volume it speaks of.
        volume: Arc<Observed>,
        /// It is the first to say that the pool is there, that half of a mirror is lost, or what came of a rollback, which
        /// must be recorded; or Kata's entry does not say yet what is recorded.
        first: bool,
        /// The condition has changed, and it is time to record it.
        changed: bool,
        /// The volume is to be larger than the guest has made it.
        grow: bool,
        /// The volume has attributes that this guest may not know of.
        tell: bool,
    },
}

impl Published {
    fn entries(&self) -> MutexGuard<'_, HashMap<VolumeId, Entry>> {
        self.entries.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a target path for a volume. Gives the volume that has it, if that is another.
    pub(super) fn reserve(&self, id: VolumeId, target: &Path) -> Result<(), VolumeId> {
        let mut entries = self.entries();
        if let Some(other) = owner(&entries, target).filter(|other| *other != id) {
            return Err(other);
        }
        entries.entry(id).or_insert_with(|| Entry {
            target: target.to_owned(),
            digest: None,
            token: None,
            owner: None,
            scans: 0,
            complained: None,
            observed: None,
            block: false,
            initialized: false,
            partition: Bytes(0),
            condition: None,
            mirror: None,
            heard: None,
            silence: None,
            since: Instant::now(),
            unheard: false,
            earlier: false,
            recorded: None,
            rollback: None,
            stale: false,
            grown: None,
            changed: false,
            told: None,
            telling: None,
            scrubs: Scrubs::default(),
        });
        Ok(())
    }

    /// Notes a publication.
    pub(super) fn insert(&self, volume: &Volume, publication: &Publication) {
        let entry = Entry {
            target: publication.target_path.clone(),
            digest: Some(publication.token_digest),
            token: None,
            owner: None,
            scans: self.scans.load(Ordering::SeqCst),
            complained: None,
            observed: Some(Arc::new(Observed::new(volume, publication))),
            block: volume.mode == VolumeMode::Block,
            initialized: volume.initialized,
            partition: volume.layout().partition,
            condition: volume.condition.clone(),
            mirror: volume.is_mirrored().then_some(volume.behind),
            heard: None,
            silence: None,
            since: Instant::now(),
            unheard: false,
            earlier: false,
            recorded: None,
            rollback: volume.given_rollback().map(|rollback| rollback.id),
            stale: false,
            grown: None,
            changed: may_have_changed(volume),
            told: None,
            telling: None,
            scrubs: Scrubs::of(volume),
        };
        self.entries().insert(volume.id, entry);
    }

    /// Notes a changed record.
    pub(super) fn refresh(&self, volume: &Volume) {
        if let Some(entry) = self.entries().get_mut(&volume.id) {
            entry.initialized = volume.initialized;
            entry.partition = volume.layout().partition;
            entry.condition.clone_from(&volume.condition);
            if may_have_changed(volume) && !std::mem::replace(&mut entry.changed, true) {
                // Whoever has changed it is about to tell.
                entry.telling = Some(Instant::now());
            }
            entry.mirror = volume.is_mirrored().then_some(volume.behind);
            entry.rollback = volume.given_rollback().map(|rollback| rollback.id);
            if let Some(observed) = entry.observed.as_mut().filter(|observed| observed.capacity != volume.capacity) {
                *observed = Arc::new(Observed { capacity: volume.capacity, ..observed.as_ref().clone() });
            }
        }
    }

    pub(super) fn remove(&self, id: VolumeId) {
        self.entries().remove(&id);
    }

    /// The target paths of all volumes, those that are reserved too.
    pub(super) fn targets(&self) -> Vec<(VolumeId, PathBuf)> {
        self.entries().iter().map(|(id, entry)| (*id, entry.target.clone())).collect()
    }

    /// A volume that is published here, and the digest of its publication's token.
    pub(super) fn observed(&self, id: VolumeId) -> Option<(Arc<Observed>, TokenDigest)> {
        let entries = self.entries();
        let entry = entries.get(&id)?;
        Some((entry.observed.clone()?, entry.digest?))
    }

    /// Notes a publication that is older than this process knows of it. Its sandbox may be any.
    pub(super) fn take_up(&self, volume: &Volume, publication: &Publication) {
        self.insert(volume, publication);
        if let Some(entry) = self.entries().get_mut(&volume.id) {
            (entry.scans, entry.earlier) = (0, true);
        }
    }

    /// Keeps the token of a publication, if it is that.
    pub(super) fn keep_token(&self, id: VolumeId, token: Uuid) {
        let mut entries = self.entries();
        if let Some(entry) = entries.get_mut(&id).filter(|entry| entry.digest.is_some_and(|digest| digest.is_of(token)))
        {
            entry.token = Some(token);
        }
    }

    /// The token of a publication, where it is known.
    pub(super) fn token(&self, id: VolumeId) -> Option<Uuid> {
        self.entries().get(&id)?.token
    }

    /// All that are published, and what was heard of each.
    pub(super) fn looks(&self) -> Vec<super::Look> {
        let entries = self.entries();
        let look = |entry: &Entry| {
            let heard = entry.heard.as_ref().map(|heard| (heard.guest.sandbox().to_owned(), heard.report.clone()));
            Some(super::Look { volume: entry.observed.clone()?, heard })
        };
        entries.values().filter_map(look).collect()
    }

    /// Whether a volume that is published has two devices.
    pub(super) fn is_mirrored(&self, id: VolumeId) -> bool {
        self.entries().get(&id).is_some_and(|entry| entry.mirror.is_some())
    }

    /// Whether a volume is published as a block device.
    pub(super) fn is_block(&self, id: VolumeId) -> bool {
        self.entries().get(&id).is_some_and(|entry| entry.block)
    }

    /// Notes whether Kata's entry may tell the next guest less than is recorded.
    pub(super) fn set_stale(&self, id: VolumeId, stale: bool) {
        if let Some(entry) = self.entries().get_mut(&id) {
            entry.stale = stale;
        }
    }

    /// Whether it may.
    pub(super) fn is_stale(&self, id: VolumeId) -> bool {
        self.entries().get(&id).is_some_and(|entry| entry.stale)
    }

    /// What was heard of a volume.
    pub(super) fn heard(&self, id: VolumeId) -> Option<Heard> {
        self.entries().get(&id)?.heard.clone()
    }

    /// Looks at the volumes whose guests are heard and at what is known of their scrubs, in one instant.
    pub(super) fn scrubs<T>(&self, look: impl FnOnce(&mut [Candidate<'_>]) -> T) -> T {
        let mut entries = self.entries();
        let heard = entries.iter_mut().filter_map(|(id, entry)| Some((*id, entry.heard.as_ref()?, &mut entry.scrubs)));
        look(&mut heard.collect::<Vec<_>>())
    }

    /// Notes what a guest said of a volume.
    pub(super) fn note(&self, guest: &GuestClient, report: &VolumeReport) -> Note {
        let mut entries = self.entries();
        let entry =
            entries.get_mut(&report.id).filter(|entry| entry.digest.is_some_and(|digest| digest.is_of(report.token)));
        let Some((entry, volume)) = entry.and_then(|entry| entry.observed.clone().map(|volume| (entry, volume))) else {
            return Note::Disbelieved;
        };
        let now = Instant::now();
        if entry.owner.as_deref().is_some_and(|owner| owner != guest.sandbox()) {
            let complain = entry.complained.is_none_or(|last| now.duration_since(last) >= COMPLAIN_EVERY);
            if complain {
                entry.complained = Some(now);
            }
            return Note::SecondClaim { volume, owner: entry.owner.clone().unwrap_or_default(), complain };
        }
        entry.owner.get_or_insert_with(|| guest.sandbox().to_owned());
        entry.token = Some(report.token);
        let due = |last: Option<Instant>, every| last.is_none_or(|last| now.duration_since(last) >= every);
        // A loss is recorded at once; that it is over, or was another one, when there is time.
        let lost = entry.mirror.is_some_and(|behind| {
            halves_of(report, behind) != behind && (behind.is_none() || due(entry.recorded, RECORD_EVERY))
        });
        let stale = entry.stale && due(entry.recorded, RECORD_EVERY);
        let rolled_back = report.rolled_back.as_ref().is_some_and(|told| entry.rollback == Some(told.id));
        let first = report.health.is_imported() && !entry.initialized || lost || stale || rolled_back;
        let changed = entry.condition.as_ref() != Some(&condition_of(report)) && due(entry.recorded, RECORD_EVERY);
        let small = report.partition.0 > 0 && report.partition < entry.partition;
        let grow =
            small && DiskLayout::largest_partition(report.disk) >= entry.partition && due(entry.grown, ASK_EVERY);
        let untold = entry.changed && entry.told.as_deref() != Some(guest.sandbox());
        let tell = untold && report.health.is_imported() && due(entry.telling, ASK_EVERY);
        if tell {
            entry.telling = Some(now);
        }
        if first || changed {
            entry.recorded = Some(now);
        }
        if grow {
            entry.grown = Some(now);
        }
        (entry.silence, entry.unheard) = (None, false);
        entry.heard = Some(Heard { guest: guest.clone(), report: report.clone() });
        Note::Believed { volume, first, changed, grow, tell }
    }

    /// Notes that a sandbox was told of a volume's attributes.
    pub(super) fn told(&self, id: VolumeId, sandbox: &str) {
        if let Some(entry) = self.entries().get_mut(&id) {
            (entry.told, entry.telling) = (Some(sandbox.to_owned()), None);
        }
    }

    /// The silence of a guest that has had a volume.
    pub(super) fn silence(&self, id: VolumeId) -> Option<Silence> {
        self.entries().get(&id)?.silence.clone()
    }

    /// Those that have been published for so long, of which no guest has ever told, and of which that is not known to be wrong
    /// yet.
    pub(super) fn silent(&self, patience: Duration) -> Vec<(Arc<Observed>, TokenDigest)> {
        let silent = |entry: &Entry| {
            (entry.was_never_heard() && !entry.unheard && entry.since.elapsed() >= patience)
                .then(|| entry.observed.clone().zip(entry.digest))
                .flatten()
        };
        self.entries().values().filter_map(silent).collect()
    }

    /// Notes that a container runs with a publication of which no guest tells, until one does or the publication ends, and
    /// tells of it if that is new, which is the answer. It is told with the lock held: what a guest says, or that the volume
    /// is withdrawn, comes behind it then and takes it back.
    pub(super) fn set_unheard(&self, id: VolumeId, token: TokenDigest, tell: impl FnOnce()) -> bool {
        let mut entries = self.entries();
        let new = |entry: &&mut Entry| entry.digest == Some(token) && entry.was_never_heard() && !entry.unheard;
        let Some(entry) = entries.get_mut(&id).filter(new) else { return false };
        entry.unheard = true;
        tell();
        true
    }

    /// Whether a container has run with a volume of which no guest has told since.
    pub(super) fn is_unheard(&self, id: VolumeId) -> bool {
        self.entries().get(&id).is_some_and(|entry| entry.unheard)
    }

    /// Notes that a scan for sandboxes has ended, and gives its number.
    pub(super) fn scanned(&self) -> u64 {
        self.scans.fetch_add(1, Ordering::SeqCst) + 1
    }

    /// Whose guests are to be heard.
    pub(super) fn wanted(&self) -> Wanted {
        let entries = self.entries();
        let owners = entries.values().filter_map(|entry| entry.owner.clone()).collect();
        let waiting = entries.values().filter(|entry| entry.digest.is_some() && entry.owner.is_none());
        Wanted { owners, waiting_since: waiting.map(|entry| entry.scans).min() }
    }

    /// Notes that a sandbox is no more: whoever shows the token next may speak for its volumes.
    pub(super) fn gone(&self, sandbox: &str) {
        self.lost(sandbox);
        for entry in self.entries().values_mut() {
            entry.owner.take_if(|owner| owner == sandbox);
        }
    }

    /// Notes that a sandbox can't be heard any more. It keeps its volumes: it may be heard again.
    pub(super) fn lost(&self, sandbox: &str) {
        let since = Instant::now();
        for entry in self.entries().values_mut() {
            if let Some(heard) = entry.heard.take_if(|heard| heard.guest.sandbox() == sandbox) {
                entry.silence = Some(Silence { since, report: heard.report });
            }
        }
    }

    /// Forgets what this sandbox said of volumes other than these.
    pub(super) fn keep_only(&self, sandbox: &str, ids: &[VolumeId]) {
        for (id, entry) in self.entries().iter_mut() {
            let said = entry.heard.as_ref().is_some_and(|heard| heard.guest.sandbox() == sandbox);
            if said && !ids.contains(id) {
                entry.heard = None;
            }
        }
    }
}

/// Whether the note of a volume may say less than its record. What a file system's guest is told is always renewed.
fn may_have_changed(volume: &Volume) -> bool {
    volume.mode == VolumeMode::Block && !volume.attributes.is_empty()
}

/// Which half of a mirror lacks something, by what is recorded and what its guest says of a pool that it has.
pub(super) fn halves_of(report: &VolumeReport, recorded: Option<Half>) -> Option<Half> {
    match (report.behind, report.health) {
        (Some(half), health) if health.is_imported() => Some(half),
        (None, Health::Online | Health::Degraded) => None,
        _ => recorded,
    }
}

fn owner(entries: &HashMap<VolumeId, Entry>, target: &Path) -> Option<VolumeId> {
    entries.iter().find(|(_, entry)| entry.target == target).map(|(id, _)| *id)
}
