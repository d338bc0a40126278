//! What can be told about the volumes here.
//!
//! # Design
//! Health and usage cost two system calls and are read each time. Error counters, compression and allocation need the
//! ZFS tools; they are read again when the health changes or [`DETAIL_AGE`] has passed.

use std::collections::BTreeSet;
use std::time::Duration;

use tokio::time::Instant;
use uuid::Uuid;
use zpod_volume::{Bytes, Half, PoolName, VolumeId, VolumeSpec};

use super::rollback::RolledBack;
use super::schedule::Paused;
use super::{Active, Volume, Volumes, device};
use crate::error::VolumeError;
use crate::machine::{Health, Machine, PoolReport, Usage};

/// How old details may be in a stream of states.
pub const DETAIL_AGE: Duration = Duration::from_secs(30);

/// Longest refusal that is told.
const REFUSAL_TEXT: usize = 1024;

/// A volume as it is now.
#[derive(Debug, Clone, PartialEq)]
pub struct Snapshot {
    /// The volume.
    pub id: VolumeId,
    /// Proof that it was given to this guest.
    pub token: Uuid,
    /// Its pool.
    pub pool: PoolName,
    /// Health of the pool; `None` when it is not imported any more.
    pub health: Option<Health>,
    /// What df(1) says.
    pub usage: Usage,
    /// Its partition.
    pub partition: Bytes,
    /// Its disk.
    pub disk: Bytes,
    /// Its quota, 0 for none.
    pub quota: u64,
    /// Containers that use it.
    pub containers: BTreeSet<String>,
    /// It waits for its key.
    pub awaits_key: bool,
    /// Its contents are encrypted.
    pub encrypted: bool,
    /// It is a block device.
    pub block: bool,
    /// The half of its disk that lacks some of what the other one has.
    pub behind: Option<Half>,
    /// What takes the ZFS tools to find out.
    pub details: Details,
    /// It has a schedule of snapshots, and takes none.
    pub paused: Option<Paused>,
    /// What came of the rollback that was asked for.
    pub rolled_back: Option<RolledBack>,
    /// Why the last container that asked for it did not get it.
    pub refusal: Option<String>,
    /// What containers don't have of it.
    pub trouble: Option<String>,
}

/// A volume that a container asked for and did not get.
#[derive(Debug, Clone)]
pub(super) struct Refusal {
    token: Uuid,
    pool: PoolName,
    encrypted: bool,
    block: bool,
    message: String,
}

impl Refusal {
    pub(super) fn new(spec: &VolumeSpec, error: &VolumeError) -> Self {
        Self::about(spec, error.to_string().chars().take(REFUSAL_TEXT).collect())
    }

    fn about(spec: &VolumeSpec, message: String) -> Self {
        let (encrypted, block) = (spec.encryption.is_some(), !spec.mode.is_filesystem());
        Self { token: spec.token, pool: spec.pool.clone(), encrypted, block, message }
    }

    fn snapshot(self, id: VolumeId) -> Snapshot {
        Snapshot {
            id,
            token: self.token,
            pool: self.pool,
            health: None,
            usage: Usage::default(),
            partition: Bytes(0),
            disk: Bytes(0),
            quota: 0,
            containers: BTreeSet::new(),
            awaits_key: false,
            encrypted: self.encrypted,
            block: self.block,
            behind: None,
            details: Details { compress_ratio: 1.0, ..Details::default() },
            paused: None,
            rolled_back: None,
            refusal: Some(self.message),
            trouble: None,
        }
    }
}

/// What takes the ZFS tools to find out.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Details {
    /// Errors, and what ZFS says about them.
    pub report: PoolReport,
    /// Logical size over stored size.
    pub compress_ratio: f64,
    /// Space that ZFS snapshots alone hold, in bytes.
    pub snapshot_bytes: u64,
    /// Space that its own contents hold, in bytes.
    pub dataset_bytes: u64,
    /// Space that datasets below it hold, in bytes.
    pub children_bytes: u64,
    /// Usage of a block device; of a file system it is asked for each time.
    pub device: Usage,
}

/// Details, and when and in which health they were read.
#[derive(Debug, Clone)]
pub(super) struct Cached {
    at: Instant,
    health: Option<Health>,
    details: Details,
}

impl<M: Machine> Volumes<M> {
    /// Every volume whose pool was brought up here, with details no older than `age`, and those that were refused.
    pub async fn status(&self, age: Duration) -> Vec<Snapshot> {
        let mut all = Vec::new();
        for volume in self.volumes() {
            let (active, refusal, wanted) = {
                let state = volume.state();
                (state.active.clone(), state.refusal.clone(), state.run.as_ref().map(|run| run.request.spec.clone()))
            };
            // Who asked for it, and waits.
            let waits = wanted.filter(|spec| volume.keyring.awaited() == Some(spec.token));
            match (active, refusal) {
                (_, refusal) if waits.is_some() => {
                    let waits = waits.as_ref().map(|spec| Refusal::about(spec, String::new()).snapshot(volume.id));
                    let refusal = refusal.map(|refusal| refusal.message);
                    all.extend(waits.map(|snapshot| Snapshot { awaits_key: true, refusal, ..snapshot }));
                }
                (Some(active), refusal) => {
                    let snapshot = self.snapshot(&volume, &active, age).await;
                    all.push(Snapshot { refusal: refusal.map(|refusal| refusal.message), ..snapshot });
                }
                (None, Some(refusal)) => all.push(refusal.snapshot(volume.id)),
                (None, None) => {}
            }
        }
        all
    }

    async fn snapshot(&self, volume: &Volume, active: &Active, age: Duration) -> Snapshot {
        let spec = &active.request.spec;
        let health = self.machine.health(&spec.pool).await.unwrap_or(None);
        // A suspended pool may not answer.
        let answers = health.is_some_and(|health| health < Health::Suspended);
        let usage = match answers && !active.is_block() {
            true => self.machine.usage(&active.base).await.unwrap_or_default(),
            false => Usage::default(),
        };
        let cached = volume.state().details.clone();
        let details = match cached {
            Some(cached) if cached.at.elapsed() < age && cached.health == health => cached.details,
            _ => {
                let details = self.details(active).await;
                volume.state().details = Some(Cached { at: Instant::now(), health, details: details.clone() });
                details
            }
        };
        let usage = if active.is_block() { details.device } else { usage };
        let behind = active.mirror.as_ref().and_then(|halves| halves.behind);
        // ZFS itself calls a pool ONLINE whose half it has given up.
        let health = health.map(|health| if behind.is_some() { health.max(Health::Degraded) } else { health });
        let (containers, paused, rolled_back, trouble) = {
            let state = volume.state();
            let containers = state.uses.iter().map(|usage| usage.container.clone()).collect();
            (containers, state.kept.paused, state.rolled_back.clone(), state.trouble.clone())
        };
        Snapshot {
            id: volume.id,
            token: spec.token,
            pool: spec.pool.clone(),
            health,
            usage,
            partition: active.partition,
            disk: active.disk.size,
            quota: active.quota,
            awaits_key: false,
            encrypted: spec.encryption.is_some(),
            block: !spec.mode.is_filesystem(),
            behind,
            containers,
            details,
            paused,
            rolled_back,
            refusal: None,
            trouble,
        }
    }

    async fn details(&self, active: &Active) -> Details {
        let spec = &active.request.spec;
        let report = self.machine.report(&spec.pool).await.unwrap_or_else(|fault| PoolReport {
            message: format!("the pool does not answer: {fault}"),
            ..PoolReport::default()
        });
        let dataset = self.machine.dataset(&spec.dataset()).await.ok().flatten().unwrap_or_default();
        let ratio = dataset.get("compressratio").and_then(|ratio| ratio.trim_end_matches('x').parse().ok());
        let bytes = |key: &str| dataset.get(key).and_then(|bytes| bytes.parse().ok()).unwrap_or(0);
        let device = if active.is_block() { device::usage(&dataset) } else { Usage::default() };
        Details {
            report,
            compress_ratio: ratio.unwrap_or(1.0),
            snapshot_bytes: bytes("usedbysnapshots"),
            dataset_bytes: bytes("usedbydataset"),
            children_bytes: bytes("usedbychildren"),
            device,
        }
    }
}

impl Snapshot {
    /// What is wrong, for a person; `None` when all is well.
    pub fn problem(&self) -> Option<String> {
        let report = &self.details.report;
        let state = match self.health {
            None if self.awaits_key => {
                return Some("it waits for its key, which its node has not provided yet".to_owned());
            }
            None if self.refusal.is_some() => return self.refusal.clone(),
            None => format!("pool {} is not imported any more", self.pool),
            Some(Health::Online) if report.data_errors > 0 => {
                format!("pool {} has {} permanent errors in its data", self.pool, report.data_errors)
            }
            Some(Health::Online) if report.read_errors + report.write_errors + report.checksum_errors > 0 => format!(
                "pool {} is online, with {} read, {} write and {} checksum errors",
                self.pool, report.read_errors, report.write_errors, report.checksum_errors
            ),
            Some(Health::Online) => return self.refusal.clone().or_else(|| self.trouble.clone()),
            Some(health) => format!("pool {} is {health}", self.pool),
        };
        let state = match (self.behind, report.resilvering()) {
            (None, _) => state,
            (Some(half), true) => format!("{state}, the {half} of its mirror is being given what it lacks"),
            (Some(half), false) => format!("{state}, the {half} of its mirror lacks some of what the other one has"),
        };
        Some(if report.message.is_empty() { state } else { format!("{state}: {}", report.message) })
    }
}
