//! Going back to a snapshot in a volume's pool: asked for now, done by the volume's next guest.
//!
//! # Design
//! The guest that runs is asked whether it could be done, and the request is recorded with an id. The next publication notes the
//! id and tells its guest ([`super::spec`]); what is published already is told nothing, so that nobody goes back under the
//! hands of a container. The guest does it once, before a container has the volume, and its report of that is recorded. Until
//! then each publication tells its guest again, and a guest that finds it done says so. A request that no guest was told of
//! yet is replaced by a later one, and can be taken back.

use std::time::{SystemTime, UNIX_EPOCH};

use uuid::Uuid;
use zpod_admin::{RollbackQuery, RollbackRequested};
use zpod_storage::catalog::{RollbackOutcome, RollbackRecord, Volume};
use zpod_volume::{Rollback, VolumeId, VolumeMode, note};

use super::publish::NodeVolumes;
use super::spec::volume_spec;
use super::{VolumeError, context::to_the_end};
use crate::guest::VolumeReport;

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// What a report says of the rollback that its guest was told to do.
pub(super) fn outcome_of(given: Rollback, report: &VolumeReport) -> Option<(Rollback, RollbackOutcome)> {
    let told = report.rolled_back.as_ref().filter(|told| told.id == given.id)?;
    Some((given, RollbackOutcome { refused: told.refused.clone(), at: now() }))
}

/// Whether a record can have another request, or none.
fn check_free(volume: &Volume) -> Result<(), VolumeError> {
    match volume.given_rollback() {
        None => Ok(()),
        Some(given) => {
            let pod = volume.publication.as_ref().and_then(|publication| publication.pod.as_ref());
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
        check_free(&volume)?;
        let heard = self.context.published.heard(id);
        let heard = heard.ok_or_else(|| VolumeError::GuestSilent { id, node: self.context.node.clone() })?;
        let checked = heard.guest.check_rollback(id, &query.snapshot, query.destroy_newer).await;
        checked.map_err(|source| VolumeError::Guest { id, source })?;
        let (snapshot, destroy_newer) = (query.snapshot.to_string(), query.destroy_newer);
        let request = Rollback { id: Uuid::new_v4(), snapshot, destroy_newer };
        let record = RollbackRecord { request: request.clone(), requested: now(), outcome: None };
        let volume = Volume { rollback: Some(record), ..volume };
        check_room(&volume)?;
        let volume = self.context.catalog.update(volume).await?;
        self.context.published.refresh(&volume);
        tracing::info!(volume = %id, "its next guest goes back to snapshot {}, as was asked for", request.snapshot);
        Ok(requested(&request))
    }

    /// Takes back what was asked for, if no guest was told of it.
    ///
    /// # Errors
    /// When nothing is asked for, or a guest was told.
    pub async fn cancel_rollback(&self, id: VolumeId) -> Result<RollbackRequested, VolumeError> {
        let _lock = self.context.lock(id).await;
        let volume = self.context.ready(id).await?;
        check_free(&volume)?;
        let Some(pending) = volume.pending_rollback().cloned() else {
            return Err(VolumeError::NoRollback { id });
        };
        let volume = self.context.catalog.update(Volume { rollback: None, ..volume }).await?;
        self.context.published.refresh(&volume);
        tracing::info!(volume = %id, "it does not go back to snapshot {}, as was asked for", pending.snapshot);
        Ok(requested(&pending))
    }
}

fn requested(request: &Rollback) -> RollbackRequested {
    RollbackRequested {
        id: request.id.to_string(),
        snapshot: request.snapshot.clone(),
        destroy_newer: request.destroy_newer,
    }
}

/// Whether the note on a block device has room for the request: it must not keep the next pod from its volume.
fn check_room(volume: &Volume) -> Result<(), VolumeError> {
    let Some(publication) = volume.publication.clone().filter(|_| volume.mode == VolumeMode::Block) else {
        return Ok(());
    };
    let publication = zpod_storage::catalog::Publication {
        rollback: volume.pending_rollback().map(|rollback| rollback.id),
        ..publication
    };
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
    use zpod_storage::catalog::Publication;
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
        let request = Rollback { id: Uuid::from_u128(1), snapshot: "before".into(), destroy_newer: true };
        Volume {
            initialized: true,
            rollback: Some(RollbackRecord { request, requested: 1, outcome }),
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
        assert!(check_free(&given(None, None)).is_ok() && check_free(&volume(None)).is_ok());
        let error = check_free(&given(None, Some(1))).unwrap_err().to_string();
        assert!(error.contains("snapshot before") && error.contains("its pod"), "{error}");
        assert!(check_free(&given(Some(RollbackOutcome { refused: None, at: 2 }), Some(1))).is_ok());
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
            let request = Rollback { id: Uuid::from_u128(1), snapshot: name.into(), destroy_newer: true };
            let rollback = Some(RollbackRecord { request, requested: 1, outcome: None });
            Volume { mode: VolumeMode::Block, publication: Some(publication(None)), rollback, ..volume(None) }
        };
        assert!(check_room(&block(&"a".repeat(255))).is_ok());
        let error = check_room(&block(&"a".repeat(1 << 20))).unwrap_err().to_string();
        assert!(error.contains("shorter names"), "{error}");
    }
}
