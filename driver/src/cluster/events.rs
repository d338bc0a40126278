//! What guests say of their pools, as events on the PersistentVolumeClaim and the pod.
//!
//! # Design
//! An event tells of a change: what is wrong, and what to do about it. A guest's words are in it, cleaned and short. A
//! hostile guest can change its mind all the time: of each reason a volume gets six events an hour at most, a node's
//! events come one in half a second at most, and those that wait are bounded. What is dropped is in the status all the
//! same ([`super::PoolStates`]), which always has the latest.

mod change;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use k8s_openapi::api::core::v1::ObjectReference;
use k8s_openapi::api::events::v1::Event;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta};
use k8s_openapi::jiff::Timestamp;
use kube::api::PostParams;
use kube::{Api, Client};
use tokio::sync::mpsc;
use tokio::time::Instant;
use zpod_kubernetes::{CLAIM_UID, is_refusal};
use zpod_storage::catalog::RollbackOutcome;
use zpod_volume::{Rollback, VolumeId};

use crate::bucket::Bucket;
use crate::guest::VolumeReport;
use crate::volumes::{CLAIM_NAME, CLAIM_NAMESPACE, Observed, Observer, SnapshotChange};
use change::{Change, Seen};

/// Of one volume and reason: 3 at once, then one each 20 minutes. That is 6 in an hour at most.
const REASON_BURST: u32 = 3;
const REASON_EVERY: Duration = Duration::from_secs(20 * 60);
/// Of a node: 20 at once, then two a second.
const NODE_BURST: u32 = 20;
const NODE_EVERY: Duration = Duration::from_millis(500);
/// Events that wait for the API server.
const WAITING: usize = 256;
/// How long a volume's bounds are kept when no pod uses it any more.
const KEPT: Duration = Duration::from_secs(3600);
/// How long one request may take, and how often it is tried.
const PATIENCE: Duration = Duration::from_secs(10);
const TRIES: u32 = 6;
/// events.k8s.io/v1: a note is below 1 KiB.
const MAX_NOTE: usize = 1000;
/// Names of objects have 253 characters at most, and the name of an event ends in a number of 17.
const MAX_NAME: usize = 235;

/// An event that is to be written.
#[derive(Debug, Clone, PartialEq)]
struct Note {
    regarding: ObjectReference,
    change: Change,
    related: ObjectReference,
}

/// Takes note of what is worth an event.
pub struct PoolEvents {
    node: String,
    volumes: Mutex<BTreeMap<VolumeId, Known>>,
    waiting: mpsc::Sender<Note>,
}

#[derive(Debug, Default)]
struct Known {
    seen: Seen,
    said: BTreeMap<&'static str, Bucket>,
    withdrawn: Option<Instant>,
}

impl Known {
    /// Whether one more event of this reason is within the bounds.
    fn may_say(&mut self, reason: &'static str, now: Instant) -> bool {
        self.said.entry(reason).or_insert_with(|| Bucket::new(REASON_BURST, REASON_EVERY)).try_take(now)
    }
}

impl fmt::Debug for PoolEvents {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PoolEvents").field("node", &self.node).finish_non_exhaustive()
    }
}

/// The events that wait to be written: see [`write_events`].
#[derive(Debug)]
pub struct WaitingEvents {
    node: String,
    notes: mpsc::Receiver<Note>,
}

impl PoolEvents {
    /// Of a node; with the events that [`write_events`] is to write.
    pub fn new(node: &str) -> (Arc<Self>, WaitingEvents) {
        let (waiting, notes) = mpsc::channel(WAITING);
        let node = node.to_owned();
        (Arc::new(Self { node: node.clone(), volumes: Mutex::default(), waiting }), WaitingEvents { node, notes })
    }

    fn volumes(&self) -> MutexGuard<'_, BTreeMap<VolumeId, Known>> {
        self.volumes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tell(&self, volume: &Observed, change: &Change) {
        for regarding in regarding(volume) {
            let note = Note { regarding, change: change.clone(), related: object(volume.id) };
            if self.waiting.try_send(note).is_err() {
                tracing::warn!(volume = %volume.id, reason = change.reason, "event dropped, too many wait");
            }
        }
    }

    /// What is worth an event now, and may be one.
    fn changes(&self, volume: &Observed, report: &VolumeReport, now: Instant) -> Vec<Change> {
        let mut volumes = self.volumes();
        let known = volumes.entry(volume.id).or_default();
        known.withdrawn = None;
        let mut changes = known.seen.changes(&self.node, volume, report);
        changes.retain(|change| known.may_say(change.reason, now));
        changes
    }
}

impl Observer for PoolEvents {
    fn reported(&self, volume: &Observed, report: &VolumeReport) {
        for change in self.changes(volume, report, Instant::now()) {
            self.tell(volume, &change);
        }
    }

    fn unheard(&self, volume: &Observed, reason: &str) {
        let change = Change::unheard(volume, reason);
        if self.volumes().entry(volume.id).or_default().may_say(change.reason, Instant::now()) {
            self.tell(volume, &change);
        }
    }

    fn claimed_again(&self, volume: &Observed, sandbox: &str) {
        let change = change::claimed_again(&self.node, volume, sandbox);
        if self.volumes().entry(volume.id).or_default().may_say(change.reason, Instant::now()) {
            self.tell(volume, &change);
        }
    }

    fn snapshot_changed(&self, volume: &Observed, change: &SnapshotChange) {
        let change = change::snapshot(volume, change);
        if self.volumes().entry(volume.id).or_default().may_say(change.reason, Instant::now()) {
            self.tell(volume, &change);
        }
    }

    fn rollback_changed(&self, volume: &Observed, rollback: &Rollback, asked: bool) {
        let change = change::rollback(volume, rollback, asked);
        if self.volumes().entry(volume.id).or_default().may_say(change.reason, Instant::now()) {
            self.tell(volume, &change);
        }
    }

    fn rolled_back(&self, volume: &Observed, rollback: &Rollback, outcome: &RollbackOutcome) {
        let change = change::rolled_back(volume, rollback, outcome);
        if self.volumes().entry(volume.id).or_default().may_say(change.reason, Instant::now()) {
            self.tell(volume, &change);
        }
    }

    fn withdrawn(&self, id: VolumeId) {
        let now = Instant::now();
        let mut volumes = self.volumes();
        if let Some(known) = volumes.get_mut(&id) {
            // The next pod is told again; how often is still bounded by what was told the one before.
            (known.seen, known.withdrawn) = (Seen::default(), Some(now));
        }
        volumes.retain(|_, known| known.withdrawn.is_none_or(|at| now.duration_since(at) < KEPT));
    }
}

/// Claim and pod, where they are known.
fn regarding(volume: &Observed) -> impl Iterator<Item = ObjectReference> {
    let reference = |kind: &str, namespace: &str, name: &str, uid: &str| {
        let some = |text: &str| Some(text.to_owned()).filter(|text| !text.is_empty());
        Some(ObjectReference {
            api_version: Some("v1".into()),
            kind: Some(kind.into()),
            namespace: Some(some(namespace)?),
            name: Some(some(name)?),
            uid: some(uid),
            ..ObjectReference::default()
        })
    };
    let label = |key: &str| volume.label(key);
    let claim = reference("PersistentVolumeClaim", label(CLAIM_NAMESPACE), label(CLAIM_NAME), label(CLAIM_UID));
    let pod = volume.pod.as_ref().and_then(|pod| reference("Pod", &pod.namespace, &pod.name, &pod.uid));
    claim.into_iter().chain(pod)
}

fn object(id: VolumeId) -> ObjectReference {
    ObjectReference {
        api_version: Some("zpod.storage/v1alpha1".into()),
        kind: Some("ZfsVolume".into()),
        name: Some(id.to_string()),
        ..ObjectReference::default()
    }
}

/// Writes the events, until it is dropped.
pub async fn write_events(client: Client, mut waiting: WaitingEvents) {
    let mut pace = Bucket::new(NODE_BURST, NODE_EVERY);
    while let Some(note) = waiting.notes.recv().await {
        let now = Instant::now();
        if let Some(ready) = pace.ready(now) {
            tokio::time::sleep_until(ready).await;
        }
        pace.take(Instant::now());
        let namespace = note.regarding.namespace.clone().unwrap_or_default();
        let (events, event) = (Api::namespaced(client.clone(), &namespace), event(&waiting.node, note));
        if let Err(reason) = write(&events, &event).await {
            tracing::warn!(reason = event.reason, "event not written: {reason}");
        }
    }
}

/// Tries for a while. An object that is gone, or a namespace on its way out, is not tried again.
async fn write(events: &Api<Event>, event: &Event) -> Result<(), String> {
    let mut wait = Duration::from_secs(1);
    for tries in 1.. {
        let failed = match tokio::time::timeout(PATIENCE, events.create(&PostParams::default(), event)).await {
            Ok(Ok(_)) => return Ok(()),
            Ok(Err(kube::Error::Api(status))) if is_refusal(status.code) => {
                return Err(format!("{} ({})", status.message, status.code));
            }
            Ok(Err(error)) => error.to_string(),
            Err(_) => format!("no answer in {PATIENCE:?}"),
        };
        if tries == TRIES {
            return Err(failed);
        }
        tokio::time::sleep(wait).await;
        wait *= 2;
    }
    Ok(())
}

fn event(node: &str, note: Note) -> Event {
    let now = Timestamp::now();
    let Note { regarding, change, related } = note;
    // Names are made of ASCII; what is not is not cut in two.
    let name: String = regarding.name.iter().flat_map(|name| name.chars()).take(MAX_NAME).collect();
    Event {
        metadata: ObjectMeta {
            name: Some(format!("{}.{:x}", name.trim_end_matches(['.', '-']), now.as_nanosecond())),
            namespace: regarding.namespace.clone(),
            ..ObjectMeta::default()
        },
        event_time: Some(MicroTime(now)),
        type_: Some(if change.warning { "Warning" } else { "Normal" }.into()),
        reason: Some(change.reason.into()),
        action: Some("Watch".into()),
        note: Some(cut(change.note)),
        regarding: Some(regarding),
        related: Some(related),
        reporting_controller: Some("zpod-node".into()),
        // At most 128 characters.
        reporting_instance: Some(node.chars().take(128).collect()),
        ..Event::default()
    }
}

fn cut(mut note: String) -> String {
    if note.len() > MAX_NOTE {
        let end = (0..=MAX_NOTE).rev().find(|at| note.is_char_boundary(*at)).unwrap_or(0);
        note.truncate(end);
        note.push_str(" ...");
    }
    note
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::fake::Answers;
    use crate::guest::Health;
    use zpod_storage::catalog::PodRef;
    use zpod_volume::Bytes;

    fn observed() -> Observed {
        let labels = [(CLAIM_NAMESPACE, "prod"), (CLAIM_NAME, "data"), (CLAIM_UID, "c-1")];
        Observed {
            id: VolumeId::from_name("data"),
            target: "/t".into(),
            pod: Some(PodRef { namespace: "prod".into(), name: "db-0".into(), uid: "u-1".into() }),
            labels: labels.map(|(key, value)| (key.to_owned(), value.to_owned())).into(),
            capacity: Bytes::gib(1),
        }
    }

    fn report(health: Health) -> VolumeReport {
        VolumeReport { health, ..VolumeReport::online(VolumeId::from_name("data")) }
    }

    #[tokio::test(start_paused = true)]
    async fn claim_and_pod_are_told_of_a_pool_that_degrades_and_of_one_that_is_well_again() {
        let api = Answers::default();
        let (events, waiting) = PoolEvents::new("n1");
        let writer = tokio::spawn(write_events(api.client(), waiting));
        events.reported(&observed(), &report(Health::Online));
        events.reported(&observed(), &report(Health::Degraded));
        events.reported(&observed(), &report(Health::Degraded));
        events.reported(&observed(), &report(Health::Online));
        tokio::time::sleep(Duration::from_secs(5)).await;
        let writes = api.writes();
        let told: Vec<_> = writes
            .iter()
            .map(|write| {
                let part = |key: &str| write.body[key].as_str().unwrap().to_owned();
                let regarding = &write.body["regarding"];
                (part("reason"), part("type"), format!("{}/{}", regarding["kind"], regarding["uid"]))
            })
            .collect();
        let want = |reason: &str, kind: &str, object: &str| (reason.to_owned(), kind.to_owned(), object.to_owned());
        assert_eq!(
            told,
            [
                want("PoolDegraded", "Warning", r#""PersistentVolumeClaim"/"c-1""#),
                want("PoolDegraded", "Warning", r#""Pod"/"u-1""#),
                want("PoolRecovered", "Normal", r#""PersistentVolumeClaim"/"c-1""#),
                want("PoolRecovered", "Normal", r#""Pod"/"u-1""#),
            ]
        );
        assert_eq!(writes[0].path, "/apis/events.k8s.io/v1/namespaces/prod/events");
        assert_eq!(writes[0].body["related"]["kind"], "ZfsVolume");
        writer.abort();
    }

    #[tokio::test(start_paused = true)]
    async fn a_guest_that_flaps_gets_six_events_an_hour_of_each_reason_and_takes_no_memory() {
        let (events, mut waiting) = PoolEvents::new("n1");
        let begun = Instant::now();
        let mut told: BTreeMap<&str, u32> = BTreeMap::new();
        while begun.elapsed() < Duration::from_secs(3600) {
            for health in [Health::Suspended, Health::Online] {
                events.reported(&observed(), &report(health));
            }
            // Not even a pod that comes and goes makes it more.
            events.withdrawn(observed().id);
            tokio::time::advance(Duration::from_secs(1)).await;
            while let Ok(note) = waiting.notes.try_recv() {
                *told.entry(note.change.reason).or_default() += 1;
            }
        }
        // Two objects each.
        assert_eq!(told, [("PoolRecovered", 10), ("PoolSuspended", 10)].into());
        tokio::time::advance(KEPT).await;
        events.withdrawn(VolumeId::from_name("other"));
        assert!(events.volumes().is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn a_second_claim_is_told_to_claim_and_pod_a_few_times() {
        let (events, mut waiting) = PoolEvents::new("n1");
        for _ in 0..100 {
            events.claimed_again(&observed(), "sandbox-2");
        }
        let mut told = Vec::new();
        while let Ok(note) = waiting.notes.try_recv() {
            told.push(note);
        }
        assert_eq!(told.len(), 2 * REASON_BURST as usize);
        let change = &told[0].change;
        assert!(change.warning && change.reason == "VolumeClaimedAgain", "{change:?}");
        assert!(change.note.contains("sandbox-2") && change.note.contains("delete the pod"), "{change:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_snapshot_that_somebody_had_taken_or_destroyed_is_told_to_claim_and_pod() {
        let (events, mut waiting) = PoolEvents::new("n1");
        let name = || "before.1".parse().unwrap();
        for (change, reason) in
            [(SnapshotChange::Taken(name()), "SnapshotTaken"), (SnapshotChange::Destroyed(name()), "SnapshotDestroyed")]
        {
            events.snapshot_changed(&observed(), &change);
            for kind in ["PersistentVolumeClaim", "Pod"] {
                let note = waiting.notes.try_recv().unwrap();
                assert_eq!(note.regarding.kind.as_deref(), Some(kind));
                assert_eq!((note.change.reason, note.change.warning), (reason, false));
                assert!(note.change.note.contains("before.1") && note.change.note.contains("claim data"), "{note:?}");
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn claim_and_pod_are_told_what_came_of_a_rollback() {
        let (events, mut waiting) = PoolEvents::new("n1");
        let rollback =
            Rollback { id: uuid::Uuid::from_u128(1), snapshot: "before".into(), guid: 0, destroy_newer: false };
        let outcome = |refused: Option<&str>| RollbackOutcome { refused: refused.map(str::to_owned), at: 1 };
        for (asked, reason) in [(true, "RollbackRequested"), (false, "RollbackCanceled")] {
            events.rollback_changed(&observed(), &rollback, asked);
            for kind in ["PersistentVolumeClaim", "Pod"] {
                let note = waiting.notes.try_recv().unwrap();
                assert_eq!(note.regarding.kind.as_deref(), Some(kind));
                assert_eq!((note.change.reason, note.change.warning), (reason, false));
                assert!(note.change.note.contains("snapshot before"), "{note:?}");
            }
        }
        events.rolled_back(&observed(), &rollback, &outcome(None));
        events.rolled_back(&observed(), &rollback, &outcome(Some("it has no snapshot before")));
        let mut told = Vec::new();
        while let Ok(note) = waiting.notes.try_recv() {
            let kind = note.regarding.kind.clone().unwrap();
            told.push((kind, note.change.reason, note.change.warning, note.change.note));
        }
        let seen: Vec<_> = told.iter().map(|(kind, reason, warning, _)| (kind.as_str(), *reason, *warning)).collect();
        let (claim, pod) = ("PersistentVolumeClaim", "Pod");
        let want = [(claim, "RolledBack", false), (pod, "RolledBack", false)];
        let refused = [(claim, "RollbackRefused", true), (pod, "RollbackRefused", true)];
        assert_eq!(seen, [want, refused].concat());
        assert!(told[0].3.contains("claim data") && told[0].3.contains("snapshot before"), "{told:?}");
        assert!(told[2].3.contains("it has no snapshot before") && told[2].3.contains("as it was"), "{told:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn nobody_to_write_them_costs_a_bounded_number_of_waiting_events() {
        let (events, waiting) = PoolEvents::new("n1");
        for number in 0..1000 {
            let volume = Observed { id: VolumeId::from_name(&number.to_string()), ..observed() };
            events.reported(&volume, &VolumeReport { id: volume.id, ..report(Health::Faulted) });
        }
        assert_eq!(waiting.notes.len(), WAITING);
    }

    #[test]
    fn a_note_of_a_guest_that_talks_much_is_cut_between_characters() {
        let cut = cut("ä".repeat(600) + "x");
        assert!(cut.len() < 1024 && cut.ends_with("ä ..."), "{}", cut.len());
        let long = ObjectReference { name: Some("a".repeat(253)), ..object(VolumeId::from_name("a")) };
        let change = Change { reason: "R", warning: true, note: String::new() };
        let note = Note { regarding: long.clone(), change, related: long };
        assert!(event("n1", note).metadata.name.unwrap().len() <= 253);
    }
}
