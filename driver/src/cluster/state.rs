//! What guests say of their pools, and that none says anything of a volume that it should have, in the status of the
//! ZfsVolumes.
//!
//! # Design
//! Of each published volume only the latest report is kept, so that an API server that is away costs no memory. What is
//! news (health, errors, the condition) is written at once, a bound keeps a guest that changes its mind all the time from
//! writing all the time; usage is written when it has moved, and nothing when nothing has changed. Before the first
//! write of a volume its object is read once: what stands there already, from an earlier process, is not written again.
//!
//! The fields are owned by a field manager of their own ([`Manager::State`]): these writes can't touch the record that
//! data depends on, nor come into conflict with its.

mod said;
mod track;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use k8s_openapi::jiff::Timestamp;
use kube::api::{Api, ListParams, Patch, PatchParams};
use kube::{Client, Resource as _};
use serde_json::json;
use tokio::sync::Notify;
use tokio::time::Instant;
use zpod_kubernetes::crd::{LastSnapshot, Manager, ZfsVolume};
use zpod_kubernetes::{HEALTHY, is_refusal};
use zpod_volume::VolumeId;

use crate::bucket::Bucket;
use crate::guest::VolumeReport;
use crate::volumes::{Observed, Observer, SnapshotChange};
use said::Said;
use track::{Base, Next, Track, Written};

/// How long one request may take.
const PATIENCE: Duration = Duration::from_secs(10);
/// Writes of one node: this many at once, then one each tenth of a second.
const NODE_BURST: u32 = 20;
const NODE_EVERY: Duration = Duration::from_millis(100);
/// How long nothing is tried after a failure: from the first, doubled with each, to the longest.
const RETRY: Duration = Duration::from_millis(500);
const RETRY_LATEST: Duration = Duration::from_secs(30);
/// Objects the API server is asked for at once.
const PAGE: u32 = 500;

/// The latest of each volume that is published here, or was and has not been said to be no more.
#[derive(Debug)]
pub struct PoolStates {
    node: String,
    boot_id: String,
    tracks: Mutex<BTreeMap<VolumeId, Track>>,
    wake: Notify,
}

impl PoolStates {
    /// Of a node in this boot of the host. Nothing is written until [`write_states`] runs.
    pub fn new(node: &str, boot_id: &str) -> Arc<Self> {
        let (node, boot_id) = (node.to_owned(), boot_id.to_owned());
        Arc::new(Self { node, boot_id, tracks: Mutex::default(), wake: Notify::new() })
    }

    fn tracks(&self) -> MutexGuard<'_, BTreeMap<VolumeId, Track>> {
        self.tracks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is to be done first, and when.
    fn next(&self, now: Instant) -> Option<(Instant, VolumeId, Next)> {
        let mut tracks = self.tracks();
        tracks.retain(|_, track| !track.is_over());
        let all = tracks.iter().filter_map(|(id, track)| track.next(now).map(|(at, next)| (at, *id, next)));
        all.min_by_key(|(at, ..)| *at)
    }

    /// Notes that the object of a volume was made anew: what the one before said is not in it.
    pub(super) fn made_anew(&self, id: VolumeId) {
        if let Some(track) = self.tracks().get_mut(&id) {
            track.made_anew();
        }
        self.wake.notify_one();
    }

    /// An object as it was found at start: one that still speaks of a pool in use, though its volume isn't any more.
    fn found(&self, object: &ZfsVolume) {
        let Some((id, status)) =
            object.metadata.name.as_ref().and_then(|name| name.parse().ok()).zip(object.status.as_ref())
        else {
            return;
        };
        let published = status.publication.as_ref().is_some_and(|publication| publication.boot_id == self.boot_id);
        let Some((said, since)) = Said::found(status).filter(|(said, _)| !published && !said.is_over()) else {
            return;
        };
        self.tracks().entry(id).or_insert_with(|| Track::left_over(Written { said, since, at: None }));
    }
}

impl Observer for PoolStates {
    fn reported(&self, volume: &Observed, report: &VolumeReport) {
        let changed = self.tracks().entry(volume.id).or_default().report(Said::of(report), volume.capacity);
        if changed {
            self.wake.notify_one();
        }
    }

    fn unheard(&self, volume: &Observed, reason: &str) {
        self.tracks().entry(volume.id).or_default().unheard(Said::unheard(volume.id, reason));
        self.wake.notify_one();
    }

    fn snapshot_changed(&self, volume: &Observed, change: &SnapshotChange) {
        let (name, state) = match change {
            SnapshotChange::Taken(name) => (name, "Taken"),
            SnapshotChange::Destroyed(name) => (name, "Destroyed"),
        };
        let last = LastSnapshot { name: name.to_string(), state: state.to_owned(), time: Time(Timestamp::now()) };
        self.tracks().entry(volume.id).or_default().snapshot(last);
        self.wake.notify_one();
    }

    fn withdrawn(&self, id: VolumeId) {
        self.tracks().entry(id).or_default().withdraw();
        self.wake.notify_one();
    }

    fn keeps_condition(&self) -> bool {
        true
    }
}

/// Why a request failed.
#[derive(Debug)]
enum Failure {
    /// There is no such object.
    Gone,
    /// This one object can't be written.
    Refused(String),
    /// None can be.
    Away(String),
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Gone => f.write_str("there is no such object"),
            Self::Refused(reason) | Self::Away(reason) => f.write_str(reason),
        }
    }
}

async fn ask<T>(answer: impl Future<Output = kube::Result<T>>) -> Result<T, Failure> {
    match tokio::time::timeout(PATIENCE, answer).await {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(kube::Error::Api(status))) if status.code == 404 => Err(Failure::Gone),
        Ok(Err(kube::Error::Api(status))) if is_refusal(status.code) => {
            Err(Failure::Refused(format!("{} ({})", status.message, status.code)))
        }
        Ok(Err(error)) => Err(Failure::Away(error.to_string())),
        Err(_) => Err(Failure::Away(format!("no answer in {PATIENCE:?}"))),
    }
}

/// Writes what there is to be written, until it is dropped.
pub async fn write_states(client: Client, states: Arc<PoolStates>) {
    let volumes: Api<ZfsVolume> = Api::all(client);
    let mut pace = Bucket::new(NODE_BURST, NODE_EVERY);
    let (mut failures, mut settled, mut token) = (0_u32, false, None);
    loop {
        let now = Instant::now();
        let done = if !settled {
            // One page at a time: what is heard meanwhile comes first.
            settle(&volumes, &states, token.clone()).await.map(|next| {
                settled = next.is_none();
                token = next;
            })
        } else {
            Ok(())
        };
        let done = match done {
            Ok(()) => match states.next(now) {
                None if settled => {
                    states.wake.notified().await;
                    continue;
                }
                None => continue,
                Some((at, ..)) if at > now => {
                    let _ = tokio::time::timeout_at(at, states.wake.notified()).await;
                    continue;
                }
                Some((_, id, next)) => {
                    if let Some(ready) = pace.ready(now) {
                        tokio::time::sleep_until(ready).await;
                    }
                    pace.take(Instant::now());
                    carry_out(&volumes, &states, id, next).await
                }
            },
            failed => failed,
        };
        match done {
            Ok(()) if failures > 0 => {
                tracing::info!("states of pools are written again");
                failures = 0;
            }
            Ok(()) => {}
            Err(failure) => {
                if failures == 0 {
                    tracing::warn!("states of pools can't be written now, the latest are kept: {failure}");
                }
                let wait = RETRY.saturating_mul(1 << failures.min(10)).min(RETRY_LATEST);
                failures += 1;
                tokio::time::sleep(wait).await;
            }
        }
    }
}

/// Reads a page of this node's objects; gives where the next one begins.
async fn settle(
    volumes: &Api<ZfsVolume>,
    states: &PoolStates,
    token: Option<String>,
) -> Result<Option<String>, Failure> {
    let params = ListParams::default().limit(PAGE).fields(&format!("spec.nodeName={}", states.node));
    let params = token.iter().fold(params, |params, token| params.continue_token(token));
    match ask(volumes.list(&params)).await {
        Ok(list) => {
            list.items.iter().for_each(|object| states.found(object));
            Ok(list.metadata.continue_.filter(|token| !token.is_empty()))
        }
        // The list has got too old: what was not seen is said when its volume is used next.
        Err(Failure::Refused(_)) if token.is_some() => Ok(None),
        Err(failure) => Err(failure),
    }
}

/// Carries out one step. An error means that nothing can be done now, for no volume.
async fn carry_out(volumes: &Api<ZfsVolume>, states: &PoolStates, id: VolumeId, next: Next) -> Result<(), Failure> {
    let name = id.to_string();
    let (done, write) = match next {
        Next::Look => {
            let found = |object: ZfsVolume| {
                let (said, since) = Said::found(object.status.as_ref()?)?;
                Some(Box::new(Written { said, since, at: None }))
            };
            (ask(volumes.get(&name)).await.map(|object| Base::Known(found(object))), false)
        }
        Next::Write(said, since) => {
            let since = since.unwrap_or_else(|| Time(Timestamp::now()));
            let answer = ask(write(volumes, &name, &said, &since)).await;
            let written = || Box::new(Written { said: *said, since, at: Some(Instant::now()) });
            (answer.map(|()| Base::Known(Some(written()))), true)
        }
    };
    let now = Instant::now();
    let mut tracks = states.tracks();
    let Some(track) = tracks.get_mut(&id) else { return Ok(()) };
    match done {
        Ok(base) => track.based(base, write, now),
        Err(Failure::Gone) => track.gone(now),
        Err(Failure::Refused(reason)) => {
            tracing::warn!(volume = %id, "the state of its pool can't be written: {reason}");
            track.rest(now);
        }
        Err(failure) => return Err(failure),
    }
    Ok(())
}

async fn write(volumes: &Api<ZfsVolume>, name: &str, said: &Said, since: &Time) -> kube::Result<()> {
    let condition = Condition {
        type_: HEALTHY.to_owned(),
        status: said.healthy.status.clone(),
        reason: said.healthy.reason.clone(),
        message: said.healthy.message.clone(),
        last_transition_time: since.clone(),
        observed_generation: None,
    };
    let mut status = json!({"conditions": [condition]});
    if let Some(pool) = &said.pool {
        status["pool"] = json!(pool);
    }
    let body = json!({
        "apiVersion": ZfsVolume::api_version(&()), "kind": ZfsVolume::kind(&()), "metadata": {"name": name},
        "status": status,
    });
    let params = PatchParams::apply(Manager::State.name()).force();
    volumes.patch_status(name, &params, &Patch::Apply(body)).await.map(drop)
}

#[cfg(test)]
mod tests;
