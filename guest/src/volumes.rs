//! The volumes of this guest: which pools are imported, and which containers have them mounted where.
//!
//! # Design
//! State is kept by volume; who uses a volume is a set of (container, mount point). Kata's Go runtime gives every
//! container the same mount point for a volume, runtime-rs each container another one: either way a mount point is
//! unmounted with its last user, and the pool exported with the last mount point.
//!
//! A pool is brought up by a task of its own, which goes on when the caller's time is up: a retry finds it further. One
//! long operation runs on a volume at a time (its *gate*); volumes don't wait for each other.
//!
//! Beside the containers' mounts each dataset is mounted once at a place of ours ([`Active::base`]): ownership is
//! settled there before any container sees the volume, and usage is read there.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::Instant;
use zpod_volume::{Bytes, VolumeId, VolumeSpec};

use crate::error::VolumeError;
use crate::machine::{Disk, Machine, MountFlags, Usage};
use crate::place::Place;

mod activate;
pub mod attributes;
mod bounds;
mod children;
mod delegation;
mod device;
mod grow;
mod keyring;
mod marks;
mod mirror;
mod progress;
mod read_only;
mod release;
mod restore;
mod resume;
pub mod rollback;
pub mod schedule;
mod snapshots;
pub mod status;
pub mod stream;
#[cfg(test)]
mod tests;
mod unlock;

use keyring::Keyring;
use progress::Progress;

/// How long a pool stays imported that nobody came to use, such as after an overrun that was never retried.
const IDLE: Duration = Duration::from_secs(60);

/// How long a release is waited for. It goes on afterwards.
const RELEASE: Duration = Duration::from_secs(20);

/// A volume that a container asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    /// What the node says about it.
    pub spec: VolumeSpec,
    /// The group that is to own it.
    pub fs_group: Option<u32>,
    /// Where it goes; for a block device its path in the container.
    pub mount_point: PathBuf,
    /// How it is mounted there.
    pub flags: MountFlags,
    /// Where the request says that its disk is.
    pub place: Option<Place>,
}

/// A container's use of a volume at a mount point.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Use {
    container: String,
    mount_point: PathBuf,
}

impl Use {
    fn of(container: &str, wanted: &Wanted) -> Self {
        Self { container: container.to_owned(), mount_point: wanted.mount_point.clone() }
    }
}

/// What one call has added: to be taken back if the container does not come to be.
#[derive(Debug, Default, PartialEq, Eq)]
#[must_use = "what was added must be released when the container does not come to be"]
pub struct Added(Vec<(VolumeId, Use)>);

/// An imported pool.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Active {
    request: Request,
    disk: Disk,
    partition: Bytes,
    quota: u64,
    /// Where we have it mounted ourselves.
    base: PathBuf,
    /// The halves of its disk, where it is a mirror.
    mirror: Option<mirror::Halves>,
    /// The pool was imported read-only, since its disk is.
    read_only: bool,
}

/// What a volume is brought up with.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Request {
    spec: VolumeSpec,
    fs_group: Option<u32>,
}

/// A running or finished activation.
#[derive(Debug, Clone)]
struct Run {
    request: Request,
    result: watch::Receiver<Option<Result<(), VolumeError>>>,
}

#[derive(Debug, Default)]
struct State {
    active: Option<Active>,
    /// What the spec of a block device has become since its note was left: see [`Volume::newest`].
    changed: Option<VolumeSpec>,
    uses: BTreeSet<Use>,
    run: Option<Run>,
    details: Option<status::Cached>,
    /// Its pool is suspended, and since when.
    suspended: Option<resume::Suspension>,
    /// What is known of its automatic snapshots.
    kept: schedule::Kept,
    /// Why the last container that asked for it did not get it. Stays while another try runs: that may take as long.
    refusal: Option<status::Refusal>,
    /// What came of the rollback that was asked for.
    rolled_back: Option<rollback::RolledBack>,
    /// It has datasets below its own.
    children: bool,
    /// Which of these containers don't have, and why.
    trouble: Option<String>,
}

#[derive(Debug)]
struct Volume {
    id: VolumeId,
    gate: tokio::sync::Mutex<()>,
    /// Held by the one stream that is being received.
    receiving: tokio::sync::Mutex<()>,
    /// Streams listen to it: what is sent cuts them off.
    transfers: watch::Sender<()>,
    state: Mutex<State>,
    progress: Progress,
    keyring: Keyring,
}

impl Volume {
    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing panics while it holds this lock; should it ever, the state is still whole: it is changed in one step.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes what the spec of a publication has become.
    fn remember(&self, spec: VolumeSpec) {
        if !spec.mode.is_filesystem() {
            self.state().changed = Some(spec);
        }
    }

    /// The newest that is known of the publication that a spec is of. The note of a block device can't be written while
    /// its pod lives, and is as old as that; the entry of a file system is always the node's latest word.
    fn newest(&self, spec: VolumeSpec) -> VolumeSpec {
        let changed = self.state().changed.clone();
        changed.filter(|changed| !spec.mode.is_filesystem() && changed.token == spec.token).unwrap_or(spec)
    }

    /// Notes why a container does not get it: the node is told.
    fn refuse(&self, spec: &VolumeSpec, error: &VolumeError) {
        self.state().refusal = Some(status::Refusal::new(spec, error));
    }
}

/// The volumes of this guest.
#[derive(Debug)]
pub struct Volumes<M> {
    machine: M,
    bases: PathBuf,
    table: Mutex<BTreeMap<VolumeId, Arc<Volume>>>,
    imports: restore::Imports,
    /// A volume may have a snapshot that is due.
    scheduled: tokio::sync::Notify,
}

impl<M: Machine> Volumes<M> {
    /// Volumes of a machine, with our own mounts of them below `bases`.
    pub fn new(machine: M, bases: impl Into<PathBuf>) -> Arc<Self> {
        Arc::new(Self {
            machine,
            bases: bases.into(),
            table: Mutex::default(),
            imports: Default::default(),
            scheduled: Default::default(),
        })
    }

    /// The machine.
    pub const fn machine(&self) -> &M {
        &self.machine
    }

    fn volumes(&self) -> Vec<Arc<Volume>> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }

    fn volume(&self, id: VolumeId) -> Arc<Volume> {
        let mut table = self.table.lock().unwrap_or_else(PoisonError::into_inner);
        let new = || Volume {
            id,
            gate: Default::default(),
            receiving: Default::default(),
            transfers: Default::default(),
            state: Mutex::default(),
            progress: Progress::default(),
            keyring: Keyring::default(),
        };
        Arc::clone(table.entry(id).or_insert_with(|| Arc::new(new())))
    }

    fn known(&self, id: VolumeId) -> Result<(Arc<Volume>, Active), VolumeError> {
        let volume = self.table.lock().unwrap_or_else(PoisonError::into_inner).get(&id).cloned();
        let volume = volume.ok_or(VolumeError::NotHere { id })?;
        let active = volume.state().active.clone().ok_or(VolumeError::NotHere { id })?;
        Ok((volume, active))
    }

    /// The volume that is mounted for a container there.
    pub fn at(&self, mount_point: &Path) -> Option<VolumeId> {
        let here = |volume: &Arc<Volume>| {
            let state = volume.state();
            // Paths of block devices are those of each container.
            let block = state.active.as_ref().is_some_and(Active::is_block);
            !block && state.uses.iter().any(|usage| usage.mount_point == mount_point)
        };
        self.volumes().iter().find(|volume| here(volume)).map(|volume| volume.id)
    }

    /// Makes the volumes of a container ready and mounts them. A volume that is mounted already counts once more.
    ///
    /// # Errors
    /// The first failure; what this call has mounted is released again.
    pub async fn prepare(
        self: &Arc<Self>,
        container: &str,
        wanted: &[Wanted],
        deadline: Instant,
    ) -> Result<Added, VolumeError> {
        let started = Instant::now();
        let mut added = Added::default();
        for wanted in wanted {
            check(wanted).inspect_err(|error| self.volume(wanted.spec.id).refuse(&wanted.spec, error))?;
        }
        for wanted in wanted {
            self.volume(wanted.spec.id).keyring.extend(deadline);
        }
        // All at once, so that one slow disk does not hold up the others.
        let runs: Vec<_> = wanted.iter().map(|wanted| self.run(&self.volume(wanted.spec.id), wanted)).collect();
        for (wanted, run) in wanted.iter().zip(runs) {
            let (volume, usage) = (self.volume(wanted.spec.id), Use::of(container, wanted));
            let had = volume.state().uses.contains(&usage);
            match self.prepare_one(container, wanted, run, started, deadline).await {
                Ok(usage) => {
                    volume.state().refusal = None;
                    added.0.extend(usage.map(|usage| (wanted.spec.id, usage)));
                }
                Err(error) => {
                    volume.refuse(&wanted.spec, &error);
                    // Its time may have been up when it was mounted, and what is below it was not.
                    if !had && volume.state().uses.contains(&usage) {
                        added.0.push((volume.id, usage));
                    }
                    self.undo(added).await;
                    return Err(error);
                }
            }
        }
        Ok(added)
    }

    async fn prepare_one(
        self: &Arc<Self>,
        container: &str,
        wanted: &Wanted,
        mut run: Run,
        started: Instant,
        deadline: Instant,
    ) -> Result<Option<Use>, VolumeError> {
        let volume = self.volume(wanted.spec.id);
        let overrun =
            || VolumeError::Overrun { id: volume.id, waited: started.elapsed(), progress: volume.progress.to_string() };
        let work = async {
            loop {
                self.ready(&volume, wanted, run).await?;
                let gate = volume.gate.lock().await;
                if let Some(result) = self.mount(&volume, container, wanted).await {
                    return result;
                }
                // Released again in between: once more.
                drop(gate);
                run = self.run(&volume, wanted);
            }
        };
        tokio::time::timeout_at(deadline, work).await.unwrap_or_else(|_| Err(overrun()))
    }

    /// Mounts for a container; the gate is held. `None` when the pool is no longer imported.
    async fn mount(
        &self,
        volume: &Volume,
        container: &str,
        wanted: &Wanted,
    ) -> Option<Result<Option<Use>, VolumeError>> {
        let usage = Use::of(container, wanted);
        if let Some(refused) = self.writable_for(volume, wanted).await {
            return Some(Err(refused));
        }
        if !wanted.spec.mode.is_filesystem() {
            let mut state = volume.state();
            state.active.as_ref()?;
            return Some(Ok(state.uses.insert(usage.clone()).then_some(usage)));
        }
        if let Some(other) = self.at(&wanted.mount_point).filter(|other| *other != volume.id) {
            let reason = format!("volume {other} is mounted at {} already", wanted.mount_point.display());
            return Some(Err(VolumeError::Invalid { id: volume.id, reason }));
        }
        let base = {
            let mut state = volume.state();
            let base = state.active.as_ref()?.base.clone();
            if !state.uses.insert(usage.clone()) {
                return Some(Ok(None));
            }
            base
        };
        let result = self.machine.mount_for_container(&base, &wanted.mount_point, wanted.flags).await;
        Some(match result {
            Ok(_) => {
                self.mount_children(volume, wanted).await;
                Ok(Some(usage))
            }
            Err(fault) => {
                volume.state().uses.remove(&usage);
                Err(VolumeError::failed(volume.id, "mounting it for the container", fault))
            }
        })
    }

    /// Waits until the volume's pool is up as wanted.
    async fn ready(self: &Arc<Self>, volume: &Arc<Volume>, wanted: &Wanted, mut run: Run) -> Result<(), VolumeError> {
        loop {
            let same = run.request == Request { spec: wanted.spec.clone(), fs_group: wanted.fs_group };
            let result = match run.result.wait_for(Option::is_some).await {
                Ok(result) => result.clone(),
                // Its task panicked or the runtime ends.
                Err(_) => None,
            };
            if same {
                let fault = || crate::machine::Fault::new("the work was cut off");
                return result.unwrap_or_else(|| Err(VolumeError::failed(volume.id, "bringing up its pool", fault())));
            }
            run = self.run(volume, wanted);
        }
    }

    /// The activation that runs now, or a new one.
    fn run(self: &Arc<Self>, volume: &Arc<Volume>, wanted: &Wanted) -> Run {
        let mut state = volume.state();
        if let Some(run) = state.run.as_ref().filter(|run| run.result.has_changed().is_ok()) {
            return run.clone();
        }
        let request = Request { spec: wanted.spec.clone(), fs_group: wanted.fs_group };
        let (done, result) = watch::channel(None);
        let run = Run { request: request.clone(), result };
        state.run = Some(run.clone());
        drop(state);
        volume.progress.start();
        let (volumes, volume, refused) = (Arc::clone(self), Arc::clone(volume), request.spec.clone());
        let place = wanted.place.clone();
        tokio::spawn(async move {
            let result = volumes.activate(&volume, request, place).await;
            match &result {
                Ok(()) => volume.state().refusal = None,
                Err(error) => {
                    tracing::error!("{error}");
                    // Whoever asked may have been sent away before the reason was known.
                    volume.refuse(&refused, error);
                }
            }
            volume.state().run = None;
            done.send_replace(Some(result));
            tokio::time::sleep(IDLE).await;
            volumes.release_if_idle(&volume).await;
        });
        run
    }

    async fn activate(&self, volume: &Volume, request: Request, place: Option<Place>) -> Result<(), VolumeError> {
        let _gate = volume.gate.lock().await;
        let request = Request { spec: volume.newest(request.spec), ..request };
        let previous = volume.state().active.clone();
        let arc = self.volumes().iter().filter_map(|v| v.state().active.as_ref()?.request.spec.arc_max).max();
        let base = self.bases.join(volume.id.to_string());
        let active = activate::Activation {
            machine: &self.machine,
            id: volume.id,
            volume,
            request: &request,
            progress: &volume.progress,
            arc_max: arc.max(request.spec.arc_max),
            imports: &self.imports,
            place: place.as_ref(),
            used: !volume.state().uses.is_empty(),
        };
        let known = previous.is_some();
        let active = match active.run(previous, base).await {
            Err(error) if !known && error.is_for_good() => {
                // The next try begins anew, and may find another disk: its pool must not be in the way.
                let _ = self.machine.export(&request.spec.pool).await;
                return Err(error);
            }
            result => result?,
        };
        {
            let mut state = volume.state();
            (state.active, state.kept) = (Some(active), schedule::Kept::default());
        }
        self.scheduled.notify_one();
        if !known {
            tracing::info!(volume = %volume.id, "pool up: {}", volume.progress.timings());
        }
        Ok(())
    }

    async fn release_if_idle(&self, volume: &Volume) {
        let _gate = volume.gate.lock().await;
        let idle = {
            let state = volume.state();
            state.uses.is_empty() && state.run.is_none()
        };
        if idle {
            self.close(volume).await;
        }
    }

    /// Takes back what a call has added.
    pub async fn undo(self: &Arc<Self>, added: Added) {
        let mut by_volume: BTreeMap<VolumeId, Vec<Use>> = BTreeMap::new();
        for (id, usage) in added.0 {
            by_volume.entry(id).or_default().push(usage);
        }
        self.release(by_volume).await;
    }

    /// Releases what a container uses: its mounts, and with the last user of a pool the pool. Bounded in time.
    pub async fn release_container(self: &Arc<Self>, container: &str) {
        self.release(self.uses(|usage| usage.container == container)).await;
    }

    /// Releases everything. Bounded in time.
    pub async fn release_all(self: &Arc<Self>) {
        self.release(self.uses(|_| true)).await;
    }

    fn uses(&self, filter: impl Fn(&Use) -> bool) -> BTreeMap<VolumeId, Vec<Use>> {
        let uses = self.volumes().into_iter().map(|volume| {
            let uses: Vec<_> = volume.state().uses.iter().filter(|usage| filter(usage)).cloned().collect();
            (volume.id, uses)
        });
        uses.filter(|(_, uses)| !uses.is_empty()).collect()
    }

    async fn release(self: &Arc<Self>, uses: BTreeMap<VolumeId, Vec<Use>>) {
        let mut tasks = JoinSet::new();
        for (id, uses) in uses {
            let (volumes, volume) = (Arc::clone(self), self.volume(id));
            tasks.spawn(async move { volumes.release_uses(&volume, &uses).await });
        }
        let all = async { while tasks.join_next().await.is_some() {} };
        if tokio::time::timeout(RELEASE, all).await.is_err() {
            tracing::error!(
                "releasing volumes takes longer than {} s; it goes on in the background",
                RELEASE.as_secs()
            );
            tasks.detach_all();
        }
    }

    /// Usage of a volume.
    ///
    /// # Errors
    /// When it is not here, or can't be asked.
    pub async fn usage(&self, id: VolumeId) -> Result<Usage, VolumeError> {
        let (_, active) = self.known(id)?;
        if active.is_block() {
            let dataset = self.machine.dataset(&active.request.spec.dataset()).await;
            let dataset = dataset.map_err(|fault| VolumeError::failed(id, "reading its usage", fault))?;
            return Ok(device::usage(&dataset.unwrap_or_default()));
        }
        self.machine.usage(&active.base).await.map_err(|fault| VolumeError::failed(id, "reading its usage", fault))
    }
}

fn check(wanted: &Wanted) -> Result<(), VolumeError> {
    use std::path::Component;
    let path = &wanted.mount_point;
    let mut parts = path.components();
    let sound = parts.next() == Some(Component::RootDir)
        && parts.clone().next().is_some()
        && parts.all(|part| matches!(part, Component::Normal(_)))
        && path.as_os_str().len() < 4096;
    if sound {
        return Ok(());
    }
    let reason = format!("{path:?} can't be a mount point: an absolute path without .. is needed");
    Err(VolumeError::Invalid { id: wanted.spec.id, reason })
}
