//! Going back to a snapshot in a volume's pool: asked for now, done by the volume's next guest.
//!
//! # Design
//! The guest that runs is asked whether it could be done, and the request is recorded with an id. The next publication notes the
//! id and tells its guest ([`super::spec`]); what is published already is told nothing, so that nobody goes back under the
//! hands of a container. The guest does it once, before a container has the volume, and its report of that is recorded. Until
//! then each publication tells its guest again, and a guest that finds it done says so. A request that no guest was told of
//! yet is replaced by a later one, and can be taken back.
//!
//! **What is lost is what was said yes to.** A request names the pod that had the volume when somebody looked, and is refused
//! where another one has it. It is good for [`GOOD_FOR`]: a pod that starts later than that does not go back. Neither does
//! one that kubectl-zpod makes to have the volume for a time.

use std::time::{SystemTime, UNIX_EPOCH};

use uuid::Uuid;
use zpod_admin::{RollbackQuery, RollbackRequested};
use zpod_storage::catalog::{CatalogError, PodRef, Publication, RollbackOutcome, RollbackRecord, Volume};
use zpod_volume::{Rollback, VolumeId, VolumeMode, note};

use super::publish::NodeVolumes;
use super::spec::volume_spec;
use super::{VolumeError, context::to_the_end};
use crate::guest::VolumeReport;

/// How long a request waits for a pod, in seconds. What has been written by then is more than somebody said yes to lose.
const GOOD_FOR: u64 = 24 * 3600;

pub(super) fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// What a report says of the rollback that its guest was told to do.
pub(super) fn outcome_of(given: Rollback, report: &VolumeReport) -> Option<(Rollback, RollbackOutcome)> {
    let told = report.rolled_back.as_ref().filter(|told| told.id == given.id)?;
    Some((given, RollbackOutcome { refused: told.refused.clone(), at: now() }))
}

/// What a new publication is to tell its guest of what is asked for: the id for it, and the record then, with an outcome where
/// it is too late.
pub(super) fn for_publication(
    record: Option<RollbackRecord>,
    pod: Option<&PodRef>,
    read_only: bool,
    now: u64,
) -> (Option<Uuid>, Option<RollbackRecord>) {
    let Some(pending) = record.as_ref().filter(|record| record.outcome.is_none()) else { return (None, record) };
    if now.saturating_sub(pending.requested) > GOOD_FOR {
        let more = match pending.given {
            true => "; a pod that has ended may have gone back already: look at the data",
            false => "",
        };
        let refused = Some(format!("asked for more than {} h ago; ask again{more}", GOOD_FOR / 3600));
        let outcome = Some(RollbackOutcome { refused, at: now });
        return (None, record.map(|record| RollbackRecord { outcome, ..record }));
    }
    // Whoever can't write can't go back, and whoever only holds the volume is not who was meant: that is for the next one.
    if read_only || pod.is_some_and(|pod| zpod_admin::is_helper(&pod.name)) {
        return (None, record);
    }
    (Some(pending.request.id), record.map(|record| RollbackRecord { given: true, ..record }))
}

/// Whether a record can have another request, or none. The publication is that of this boot: what was told before is over.
fn check_free(volume: &Volume, publication: Option<&Publication>) -> Result<(), VolumeError> {
    match volume.given_rollback().filter(|_| publication.is_some()) {
        None => Ok(()),
        Some(given) => {
            let pod = publication.and_then(|publication| publication.pod.as_ref());
            let holder = pod.map_or_else(|| "its pod".to_owned(), |pod| format!("pod {pod}"));
            Err(VolumeError::RollbackGiven { id: volume.id, snapshot: given.snapshot.clone(), holder })
        }
    }
}

impl NodeVolumes {
    /// Records that a volume's next guest is to go back to a snapshot, if the one that runs says that this can be done.
    ///
    /// # Errors
    /// When no guest is heard or the guest refuses, the volume ends with its pod, or one is on its way already.
    pub async fn request_rollback(&self, id: VolumeId, query: RollbackQuery) -> Result<RollbackRequested, VolumeError> {
        let node = self.clone();
        to_the_end(async move { node.request_rollback_now(id, query).await }).await
    }

    async fn request_rollback_now(&self, id: VolumeId, query: RollbackQuery) -> Result<RollbackRequested, VolumeError> {
        let _lock = self.context.lock(id).await;
        let volume = self.context.ready(id).await?;
        if volume.ephemeral {
            let reason = format!("volume {id} ends with its pod, and has no next start");
            return Err(VolumeError::invalid("volume_id", reason));
        }
        let publication = self.context.publication(&volume);
        check_free(&volume, publication)?;
        let pod = publication.and_then(|publication| publication.pod.as_ref()).map_or("", |pod| pod.uid.as_str());
        if query.pod.as_ref().is_some_and(|seen| seen != pod) {
            return Err(VolumeError::RollbackPodChanged { id });
        }
        let heard = self.context.published.heard(id);
        let heard = heard.ok_or_else(|| VolumeError::GuestSilent { id, node: self.context.node.clone() })?;
        let checked = heard.guest.check_rollback(id, &query.snapshot, query.destroy_newer).await;
        let (_, guid) = checked.map_err(|source| VolumeError::Guest { id, source })?;
        let (snapshot, destroy_newer) = (query.snapshot.to_string(), query.destroy_newer);
        let request = Rollback { id: query.id.unwrap_or_else(Uuid::new_v4), snapshot, guid, destroy_newer };
        let record = RollbackRecord { request: request.clone(), requested: now(), given: false, outcome: None };
        let volume = Volume { rollback: Some(record.clone()), ..volume };
        check_room(&volume)?;
        self.record_rollback(volume).await?;
        tracing::info!(volume = %id, "its next guest goes back to snapshot {}, as was asked for", request.snapshot);
        self.tell_rollback(id, &request, true);
        Ok(requested(&record))
    }

    /// Writes a record with another request, or none. The catalog may have written it and fail behind that: what counts is
    /// what is there.
    async fn record_rollback(&self, volume: Volume) -> Result<(), VolumeError> {
        let (id, wanted) = (volume.id, volume.rollback.clone());
        let volume = match self.context.catalog.update(volume).await {
            Ok(volume) => volume,
            Err(error) => self.written_all_the_same(id, wanted.as_ref(), error).await?,
        };
        self.context.published.refresh(&volume);
        Ok(())
    }

    async fn written_all_the_same(
        &self,
        id: VolumeId,
        wanted: Option<&RollbackRecord>,
        error: CatalogError,
    ) -> Result<Volume, VolumeError> {
        let of = |record: Option<&RollbackRecord>| record.map(|record| record.request.id);
        match self.context.catalog.get(id).await {
            Ok(Some(volume)) if of(volume.rollback.as_ref()) == of(wanted) => Ok(volume),
            Ok(_) | Err(_) => Err(error.into()),
        }
    }

    fn tell_rollback(&self, id: VolumeId, request: &Rollback, asked: bool) {
        if let Some((observed, _)) = self.context.published.observed(id) {
            self.observer.rollback_changed(&observed, request, asked);
        }
    }

    /// Takes back what was asked for, or one request alone, if no guest was told of it.
    ///
    /// # Errors
    /// When nothing is asked for, or a guest was told.
    pub async fn cancel_rollback(&self, id: VolumeId, one: Option<Uuid>) -> Result<RollbackRequested, VolumeError> {
        let node = self.clone();
        to_the_end(async move { node.cancel_rollback_now(id, one).await }).await
    }

    async fn cancel_rollback_now(&self, id: VolumeId, one: Option<Uuid>) -> Result<RollbackRequested, VolumeError> {
        let _lock = self.context.lock(id).await;
        let volume = self.context.ready(id).await?;
        let pending = volume.rollback.clone().filter(|record| record.outcome.is_none());
        let Some(pending) = pending.filter(|record| one.is_none_or(|one| record.request.id == one)) else {
            return Err(VolumeError::NoRollback { id });
        };
        check_free(&volume, self.context.publication(&volume))?;
        self.record_rollback(Volume { rollback: None, ..volume }).await?;
        let snapshot = &pending.request.snapshot;
        tracing::info!(volume = %id, "it does not go back to snapshot {snapshot}: that was taken back");
        self.tell_rollback(id, &pending.request, false);
        Ok(requested(&pending))
    }
}

fn requested(record: &RollbackRecord) -> RollbackRequested {
    RollbackRequested {
        id: record.request.id.to_string(),
        snapshot: record.request.snapshot.clone(),
        destroy_newer: record.request.destroy_newer,
        given: record.given,
    }
}

/// Whether the note on a block device has room for the request: it must not keep the next pod from its volume.
fn check_room(volume: &Volume) -> Result<(), VolumeError> {
    let Some(publication) = volume.publication.clone().filter(|_| volume.mode == VolumeMode::Block) else {
        return Ok(());
    };
    let publication = Publication { rollback: volume.pending_rollback().map(|rollback| rollback.id), ..publication };
    let note = note::encode(&volume_spec(volume, &publication, Uuid::nil()));
    note.map(drop).map_err(|error| {
        let reason = format!("volume {}: {error}; take snapshots with shorter names", volume.id);
        VolumeError::invalid("snapshot", reason)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;
    use zpod_volume::{Bytes, Create, TokenDigest, VolumeParameters};

    fn publication(rollback: Option<Uuid>) -> Publication {
        Publication {
            target_path: PathBuf::from("/t"),
            token_digest: TokenDigest::of(Uuid::from_u128(7)),
            read_only: false,
            fs_group: None,
            mount_flags: Vec::new(),
            rollback,
            pod: None,
            claim: None,
            boot_id: "b".into(),
        }
    }

    fn volume(outcome: Option<RollbackOutcome>) -> Volume {
        let request = Rollback { id: Uuid::from_u128(1), snapshot: "before".into(), guid: 0, destroy_newer: true };
        Volume {
            initialized: true,
            rollback: Some(RollbackRecord { request, requested: 1, given: false, outcome }),
            ..Volume::wanted("a", Bytes::gib(1), VolumeParameters::default(), "n1")
        }
    }

    #[test]
    fn only_the_guest_of_a_publication_that_notes_the_id_is_told_and_only_until_the_outcome_is_recorded() {
        let told = |volume: &Volume, rollback: Option<u128>| {
            let publication = publication(rollback.map(Uuid::from_u128));
            volume_spec(volume, &publication, Uuid::from_u128(7)).rollback
        };
        let pending = volume(None);
        // What was published before it was asked for, or was told of another one.
        assert_eq!((told(&pending, None), told(&pending, Some(2))), (None, None));
        assert_eq!(told(&pending, Some(1)).as_ref(), pending.pending_rollback());
        let done = volume(Some(RollbackOutcome { refused: None, at: 2 }));
        assert_eq!(told(&done, Some(1)), None);
        assert_eq!(volume_spec(&pending, &publication(None), Uuid::nil()).create, Create::Never);
    }

    #[test]
    fn a_request_that_a_guest_was_told_of_is_not_replaced_and_one_that_was_carried_out_is() {
        let given = |outcome, rollback: Option<u128>| Volume {
            publication: Some(publication(rollback.map(Uuid::from_u128))),
            ..volume(outcome)
        };
        let check = |volume: &Volume| check_free(volume, volume.publication.as_ref());
        assert!(check(&given(None, None)).is_ok() && check(&volume(None)).is_ok());
        let error = check(&given(None, Some(1))).unwrap_err().to_string();
        assert!(error.contains("snapshot before") && error.contains("its pod"), "{error}");
        assert!(check(&given(Some(RollbackOutcome { refused: None, at: 2 }), Some(1))).is_ok());
        assert!(check_free(&given(None, Some(1)), None).is_ok(), "of an earlier boot");
    }

    #[test]
    fn a_publication_gets_a_request_that_is_young_and_meant_for_it() {
        let record = || volume(None).rollback;
        let pod = |name: &str| PodRef { namespace: "a".into(), name: name.into(), uid: "u".into() };
        let id = Some(Uuid::from_u128(1));
        let (given, kept) = for_publication(record(), Some(&pod("db-0")), false, 1 + GOOD_FOR);
        assert!(given == id && kept.is_some_and(|kept| kept.given && kept.outcome.is_none()));
        let named_alike = pod("zpod-transfer-db-0");
        assert_eq!(for_publication(record(), Some(&named_alike), false, 0).0, id, "nor is a clock that was set back");
        // For the next one.
        for (pod, read_only) in [(pod("zpod-transfer-19ad2c3f1b0-4d2"), false), (pod("db-0"), true)] {
            assert_eq!(for_publication(record(), Some(&pod), read_only, 2), (None, record()));
        }
        for (earlier, more) in [(false, false), (true, true)] {
            let record = record().map(|record| RollbackRecord { given: earlier, ..record });
            let (given, kept) = for_publication(record, None, false, 2 + GOOD_FOR);
            let refused = kept.unwrap().outcome.unwrap().refused.unwrap();
            assert!(given.is_none() && refused.contains("more than 24 h ago"), "{refused}");
            assert_eq!(refused.contains("may have gone back already"), more, "{refused}");
        }
        let done = volume(Some(RollbackOutcome { refused: None, at: 2 })).rollback;
        assert_eq!(for_publication(done.clone(), None, false, 2 + GOOD_FOR), (None, done));
    }

    #[test]
    fn a_guest_speaks_for_the_request_that_it_was_told_of_and_no_other() {
        let given = volume(None).pending_rollback().cloned().unwrap();
        let report = |id: u128, refused: Option<&str>| VolumeReport {
            rolled_back: Some(crate::guest::RolledBack {
                id: Uuid::from_u128(id),
                refused: refused.map(str::to_owned),
            }),
            ..VolumeReport::online(volume(None).id)
        };
        assert!(outcome_of(given.clone(), &report(2, None)).is_none());
        let (_, outcome) = outcome_of(given.clone(), &report(1, Some("no"))).unwrap();
        let recorded = volume(None).with_outcome(Some(outcome));
        assert_eq!(recorded.rollback.unwrap().outcome.unwrap().refused.as_deref(), Some("no"));
        assert!(volume(None).with_outcome(None).pending_rollback().is_some());
    }

    #[test]
    fn a_request_that_the_note_of_a_block_device_has_no_room_for_is_refused() {
        let block = |name: &str| {
            let request = Rollback { id: Uuid::from_u128(1), snapshot: name.into(), guid: 0, destroy_newer: true };
            let rollback = Some(RollbackRecord { request, requested: 1, given: false, outcome: None });
            Volume { mode: VolumeMode::Block, publication: Some(publication(None)), rollback, ..volume(None) }
        };
        assert!(check_room(&block(&"a".repeat(255))).is_ok());
        let error = check_room(&block(&"a".repeat(1 << 20))).unwrap_err().to_string();
        assert!(error.contains("shorter names"), "{error}");
    }
}
