use std::collections::BTreeMap;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition as KubeCondition, Time};
use k8s_openapi::jiff::Timestamp;
use zpod_storage::catalog::{
    CatalogError, ClaimRef as BoundClaim, Condition, Phase as RecordPhase, PodRef, Publication, RollbackOutcome,
    RollbackRecord, Source, Volume,
};
use zpod_volume::{ParameterError, Rollback, VolumeAttributes, VolumeId};

use super::{EXPANDED, HEALTHY, READY, mode_of, mode_status, origin_of, origin_status, successor};
use crate::Quantity;
use crate::catalog::{Head, Kept, Requests};
use crate::crd::{
    ClaimRef, FINALIZER, Phase, Pod, PublicationStatus, RollbackState, RollbackStatus, SourceRef, ZfsVolume,
    ZfsVolumeSpec, ZfsVolumeStatus,
};
use crate::remark::{Remark, set};

/// Labels of a record that name the PersistentVolumeClaim. The first three are external-provisioner's
/// (`--extra-create-metadata`), the last is ours.
const CLAIM_NAME: &str = "csi.storage.k8s.io/pvc/name";
const CLAIM_NAMESPACE: &str = "csi.storage.k8s.io/pvc/namespace";
const PERSISTENT_VOLUME: &str = "csi.storage.k8s.io/pv/name";
/// The claim's UID.
pub const CLAIM_UID: &str = "zpod.storage/pvc-uid";

/// What is asked for with a new record.
fn spec_of(volume: &Volume) -> ZfsVolumeSpec {
    ZfsVolumeSpec {
        volume_name: volume.name.clone(),
        node_name: volume.node.clone(),
        capacity: Quantity(volume.capacity),
        parameters: volume.parameters.clone(),
        claim: claim_of(&volume.labels),
        source: volume.source.map(source_ref),
        mode: mode_status(volume.mode),
        attributes: volume.attributes.iter().map(|(key, value)| (key.to_owned(), value.to_owned())).collect(),
        scrub_requested_at: None,
        ephemeral: volume.ephemeral,
        destroy: false,
        adopt: None,
    }
}

fn source_ref(source: Source) -> SourceRef {
    match source {
        Source::Snapshot(id) => SourceRef { snapshot: Some(id.to_string()), volume: None },
        Source::Volume(id) => SourceRef { snapshot: None, volume: Some(id.to_string()) },
    }
}

fn source_of(reference: &SourceRef) -> Option<Source> {
    match (&reference.snapshot, &reference.volume) {
        (Some(id), None) => id.parse().ok().map(Source::Snapshot),
        (None, Some(id)) => id.parse().ok().map(Source::Volume),
        _ => None,
    }
}

fn attributes_of(map: &BTreeMap<String, String>) -> Result<VolumeAttributes, ParameterError> {
    VolumeAttributes::parse(map.iter().map(|(key, value)| (key.as_str(), value.as_str())))
}

fn claim_of(labels: &BTreeMap<String, String>) -> Option<ClaimRef> {
    let label = |key: &str| labels.get(key).cloned().unwrap_or_default();
    let claim = ClaimRef {
        namespace: label(CLAIM_NAMESPACE),
        name: label(CLAIM_NAME),
        uid: label(CLAIM_UID),
        persistent_volume: label(PERSISTENT_VOLUME),
    };
    (!claim.name.is_empty()).then_some(claim)
}

fn labels_of(claim: Option<&ClaimRef>) -> BTreeMap<String, String> {
    let Some(claim) = claim else { return BTreeMap::new() };
    let pairs = [
        (CLAIM_NAME, &claim.name),
        (CLAIM_NAMESPACE, &claim.namespace),
        (CLAIM_UID, &claim.uid),
        (PERSISTENT_VOLUME, &claim.persistent_volume),
    ];
    pairs.into_iter().filter(|(_, value)| !value.is_empty()).map(|(key, value)| (key.into(), value.clone())).collect()
}

impl Kept for ZfsVolume {
    type Record = Volume;
    type Phase = Phase;
    const REQUESTS: Requests = Requests {
        get: "get ZfsVolume",
        list: "list ZfsVolumes",
        create: "create ZfsVolume",
        change: "change ZfsVolume",
        status: "write the status of ZfsVolume",
        release: "let ZfsVolume go",
        delete: "delete ZfsVolume",
    };

    fn asking_for(volume: &Volume) -> Self {
        let mut object = Self::new(&volume.id.to_string(), spec_of(volume));
        object.metadata.finalizers = Some(vec![FINALIZER.to_owned()]);
        object
    }

    fn record(&self) -> Result<Volume, CatalogError> {
        volume_of(self)
    }

    fn status_for(&self, volume: &Volume) -> ZfsVolumeStatus {
        node_status(self, volume)
    }

    fn own_status(&self) -> ZfsVolumeStatus {
        let mut status = recorded(self);
        status.pool = None;
        status.conditions = conditions_of_node(&status.conditions);
        status
    }

    fn anew(&self) -> Result<Option<Self>, CatalogError> {
        let adopt = match recorded(self).phase {
            // A copy that is begun is known by its origin, which only the status has.
            None if recorded(self).origin.is_some() => return Ok(None),
            None => None,
            Some(Phase::Ready) => {
                let status = node_status(self, &volume_of(self)?);
                Some(Box::new(ZfsVolumeStatus { observed_generation: None, conditions: Vec::new(), ..status }))
            }
            Some(Phase::Refused | Phase::Deleting) => return Ok(None),
        };
        let spec = ZfsVolumeSpec { adopt, ..self.spec.clone() };
        Ok(Some(Self { metadata: successor(&self.metadata), spec, status: None }))
    }

    fn is_unmade(&self) -> bool {
        matches!(recorded(self).phase, None | Some(Phase::Refused))
    }

    fn is_made_anew(&self) -> bool {
        self.spec.adopt.is_some()
    }

    fn node(&self) -> &str {
        &self.spec.node_name
    }

    fn head(status: &mut ZfsVolumeStatus) -> Head<'_, Phase> {
        Head {
            phase: &mut status.phase,
            observed_generation: &mut status.observed_generation,
            conditions: &mut status.conditions,
        }
    }

    fn destroy(spec: &mut ZfsVolumeSpec) -> &mut bool {
        &mut spec.destroy
    }

    /// What guests say has another owner (`Manager::State`), and the labels were asked for.
    fn taking_over(volume: Volume, found: &Volume) -> Volume {
        Volume { condition: found.condition.clone(), labels: found.labels.clone(), ..volume }
    }
}

/// What the node has recorded. Of an object that was deleted by hand and made anew, what it had recorded before, until it
/// takes that over.
fn recorded(object: &ZfsVolume) -> ZfsVolumeStatus {
    let status = object.status.clone().unwrap_or_default();
    match &object.spec.adopt {
        Some(before) if status.phase.is_none() => {
            ZfsVolumeStatus { pool: status.pool, conditions: status.conditions, ..(**before).clone() }
        }
        _ => status,
    }
}

fn volume_of(object: &ZfsVolume) -> Result<Volume, CatalogError> {
    let name = object.metadata.name.as_deref().unwrap_or_default();
    let unreadable =
        |reason: &str| CatalogError::Unreadable { what: format!("ZfsVolume {name}"), reason: reason.into() };
    let id: VolumeId = name.parse().map_err(|_| unreadable("its name is not a volume's id"))?;
    let (spec, status) = (&object.spec, recorded(object));
    let capacity = status.capacity.unwrap_or(spec.capacity).0;
    // What the node has taken over; before it has the device, what was asked for.
    let attributes = if status.phase.is_some() { &status.attributes } else { &spec.attributes };
    let attributes = attributes_of(attributes).map_err(|error| unreadable(&error.to_string()))?;
    let source = spec.source.as_ref().map(|source| source_of(source).ok_or_else(|| unreadable("its source is none")));
    let origin = status.origin.as_ref().map(|origin| origin_of(origin).ok_or_else(|| unreadable("its origin is none")));
    let healthy = status.conditions.iter().find(|condition| condition.type_ == HEALTHY);
    Ok(Volume {
        id,
        name: spec.volume_name.clone(),
        capacity,
        initial_capacity: status.initial_capacity.map_or(capacity, |initial| initial.0),
        parameters: spec.parameters.clone(),
        node: spec.node_name.clone(),
        phase: match status.phase {
            None | Some(Phase::Refused) => RecordPhase::Creating,
            Some(Phase::Ready) => RecordPhase::Ready,
            Some(Phase::Deleting) => RecordPhase::Deleting,
        },
        initialized: status.initialized,
        written: status.written,
        table_capacity: status.table_capacity.unwrap_or_default().0,
        publication: status.publication.as_ref().map(publication_of).transpose().map_err(unreadable)?,
        condition: healthy
            .map(|condition| Condition { abnormal: condition.status == "False", message: condition.message.clone() }),
        labels: labels_of(spec.claim.as_ref()),
        attributes,
        mode: mode_of(spec.mode),
        source: source.transpose()?,
        origin: origin.transpose()?,
        ephemeral: spec.ephemeral,
        behind: status.behind,
        disk_limit: status.disk_limit.map(|limit| limit.0),
        rollback: status.rollback.as_ref().map(rollback_of),
        revision: u64::try_from(status.revision).map_err(|_| unreadable("status.revision is negative"))?,
    })
}

fn publication_of(status: &PublicationStatus) -> Result<Publication, &'static str> {
    let plain = status.token.map(|token| token.to_string());
    let token = status.token_digest.clone().or(plain).and_then(|text| text.parse().ok());
    let token_digest = token.ok_or("status.publication has no sound tokenDigest")?;
    Ok(Publication {
        target_path: status.target_path.clone(),
        token_digest,
        read_only: status.read_only,
        fs_group: status.fs_group,
        mount_flags: status.mount_flags.clone(),
        rollback: status.rollback,
        pod: status.pod.clone().map(|pod| PodRef { namespace: pod.namespace, name: pod.name, uid: pod.uid }),
        claim: status.claim.clone().map(|claim| BoundClaim {
            namespace: claim.namespace,
            name: claim.name,
            uid: claim.uid,
        }),
        boot_id: status.boot_id.clone(),
    })
}

fn publication_status(publication: &Publication) -> PublicationStatus {
    PublicationStatus {
        target_path: publication.target_path.clone(),
        token_digest: Some(publication.token_digest.to_string()),
        token: None,
        read_only: publication.read_only,
        fs_group: publication.fs_group,
        mount_flags: publication.mount_flags.clone(),
        rollback: publication.rollback,
        pod: publication.pod.clone().map(|pod| Pod { namespace: pod.namespace, name: pod.name, uid: pod.uid }),
        claim: publication.claim.clone().map(|claim| ClaimRef {
            namespace: claim.namespace,
            name: claim.name,
            uid: claim.uid,
            persistent_volume: String::new(),
        }),
        boot_id: publication.boot_id.clone(),
    }
}

fn seconds(time: &Time) -> u64 {
    u64::try_from(time.0.as_second()).unwrap_or(0)
}

fn time(seconds: u64) -> Time {
    let stamp = i64::try_from(seconds).ok().and_then(|seconds| Timestamp::from_second(seconds).ok());
    Time(stamp.unwrap_or(Timestamp::UNIX_EPOCH))
}

fn rollback_of(status: &RollbackStatus) -> RollbackRecord {
    let request = Rollback {
        id: status.id,
        snapshot: status.snapshot.clone(),
        guid: status.guid.parse().unwrap_or_default(),
        destroy_newer: status.destroy_newer,
    };
    let at = status.end_time.as_ref().map_or(0, seconds);
    let outcome = match status.state {
        RollbackState::Pending => None,
        RollbackState::RolledBack => Some(RollbackOutcome { refused: None, at }),
        RollbackState::Refused => Some(RollbackOutcome { refused: Some(status.message.clone()), at }),
    };
    RollbackRecord { request, requested: seconds(&status.requested_at), given: status.given, outcome }
}

fn rollback_status(rollback: &RollbackRecord) -> RollbackStatus {
    let (request, outcome) = (&rollback.request, rollback.outcome.as_ref());
    let refused = outcome.and_then(|outcome| outcome.refused.clone());
    RollbackStatus {
        id: request.id,
        snapshot: request.snapshot.clone(),
        guid: if request.guid == 0 { String::new() } else { request.guid.to_string() },
        destroy_newer: request.destroy_newer,
        requested_at: time(rollback.requested),
        given: rollback.given,
        state: match (outcome, &refused) {
            (None, _) => RollbackState::Pending,
            (Some(_), None) => RollbackState::RolledBack,
            (Some(_), Some(_)) => RollbackState::Refused,
        },
        end_time: outcome.map(|outcome| time(outcome.at)),
        message: refused.unwrap_or_default(),
    }
}

/// The node's part of the status for a record that is to replace the one in `object`.
fn node_status(object: &ZfsVolume, volume: &Volume) -> ZfsVolumeStatus {
    let generation = object.metadata.generation;
    let mut conditions = conditions_of_node(object.status.as_ref().map_or(&[], |status| &status.conditions));
    let phase = match volume.phase {
        RecordPhase::Creating => None,
        RecordPhase::Ready => Some(Phase::Ready),
        RecordPhase::Deleting => Some(Phase::Deleting),
    };
    if phase == Some(Phase::Ready) {
        let message = format!("the device is on node {}", volume.node);
        set(&mut conditions, &Remark { kind: READY, holds: true, reason: "DeviceMade", message }, generation);
        if volume.capacity >= object.spec.capacity.0 && conditions.iter().any(|condition| condition.type_ == EXPANDED) {
            let message = format!("there is room for {}", volume.capacity);
            set(&mut conditions, &Remark { kind: EXPANDED, holds: true, reason: "RoomPromised", message }, generation);
        }
    }
    ZfsVolumeStatus {
        phase,
        capacity: Some(Quantity(volume.capacity)),
        initial_capacity: Some(Quantity(volume.initial_capacity)),
        table_capacity: Some(Quantity(volume.table_capacity)),
        initialized: volume.initialized,
        written: volume.written,
        publication: volume.publication.as_ref().map(publication_status),
        origin: volume.origin.as_ref().map(origin_status),
        behind: volume.behind,
        disk_limit: volume.disk_limit.map(Quantity),
        rollback: volume.rollback.as_ref().map(rollback_status),
        attributes: volume.attributes.iter().map(|(key, value)| (key.to_owned(), value.to_owned())).collect(),
        observed_generation: generation,
        revision: i64::try_from(volume.revision).unwrap_or(i64::MAX - 1) + 1,
        pool: None,
        conditions,
    }
}

/// The conditions that the node itself owns.
fn conditions_of_node(conditions: &[KubeCondition]) -> Vec<KubeCondition> {
    conditions.iter().filter(|condition| condition.type_ != HEALTHY).cloned().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;
    use uuid::Uuid;
    use zpod_volume::{Bytes, Half, Mark, Origin, TokenDigest, VolumeMode, VolumeParameters};

    fn volume() -> Volume {
        Volume {
            id: VolumeId::from_name("pvc-1"),
            name: "pvc-1".into(),
            capacity: Bytes::gib(2),
            initial_capacity: Bytes::gib(1),
            parameters: VolumeParameters::parse([("compression", "zstd"), ("headroom", "4x")]).unwrap(),
            node: "node-a".into(),
            phase: RecordPhase::Ready,
            initialized: true,
            written: true,
            table_capacity: Bytes::gib(1),
            publication: Some(Publication {
                target_path: PathBuf::from("/var/lib/kubelet/pods/u/volumes/kubernetes.io~csi/pvc-1/mount"),
                token_digest: TokenDigest::of(Uuid::from_u128(7)),
                read_only: true,
                fs_group: Some(1000),
                mount_flags: vec!["noexec".into()],
                rollback: Some(Uuid::from_u128(3)),
                pod: Some(PodRef { namespace: "ns".into(), name: "db-0".into(), uid: "u".into() }),
                claim: Some(BoundClaim { namespace: "ns".into(), name: "data-db-0".into(), uid: "c".into() }),
                boot_id: "boot".into(),
            }),
            condition: None,
            labels: labels_of(Some(&ClaimRef {
                namespace: "ns".into(),
                name: "data-db-0".into(),
                uid: "c".into(),
                persistent_volume: "pvc-1".into(),
            })),
            attributes: VolumeAttributes::parse([("atime", "on")]).unwrap(),
            mode: VolumeMode::Block,
            source: Some(Source::Volume(VolumeId::from_name("pvc-0"))),
            origin: Some(Origin {
                volume: VolumeId::from_name("pvc-0"),
                mark: Some(Mark::for_clone(VolumeId::from_name("pvc-1"))),
                initialized: true,
                copy: Some(uuid::Uuid::from_u128(9)),
            }),
            ephemeral: false,
            behind: Some(Half::Second),
            disk_limit: Some(Bytes::gib(16)),
            rollback: Some(RollbackRecord {
                request: Rollback {
                    id: Uuid::from_u128(3),
                    snapshot: "before".into(),
                    guid: u64::MAX,
                    destroy_newer: true,
                },
                requested: 1_764_000_000,
                given: true,
                outcome: None,
            }),
            revision: 4,
        }
    }

    fn object(volume: &Volume) -> ZfsVolume {
        let mut object = ZfsVolume::new(&volume.id.to_string(), spec_of(volume));
        object.status = Some(node_status(&object, volume));
        object
    }

    #[test]
    fn a_record_survives_the_way_there_and_back_and_counts_its_change() {
        let volume = volume();
        let text = serde_json::to_string(&object(&volume)).unwrap();
        let read: ZfsVolume = serde_json::from_str(&text).unwrap();
        assert_eq!(volume_of(&read).unwrap(), Volume { revision: 5, ..volume.clone() });
        // So does what came of a rollback.
        for refused in [None, Some("it has no snapshot before".to_owned())] {
            let told = volume.clone().with_outcome(Some(RollbackOutcome { refused, at: 1_764_000_060 }));
            assert_eq!(volume_of(&object(&told)).unwrap().rollback, told.rollback);
        }
    }

    #[test]
    fn an_object_of_an_earlier_version_has_the_token_itself_and_is_written_with_its_digest() {
        let mut earlier = object(&volume());
        let publication = earlier.status.as_mut().unwrap().publication.as_mut().unwrap();
        (publication.token_digest, publication.token) = (None, Some(Uuid::from_u128(7)));
        let read = volume_of(&earlier).unwrap();
        let digest = read.publication.as_ref().unwrap().token_digest;
        assert!(digest.is_of(Uuid::from_u128(7)) && digest.was_plain());
        let written = serde_json::to_string(&object(&read)).unwrap();
        assert!(!written.contains(&Uuid::from_u128(7).to_string()), "{written}");
        assert!(!volume_of(&object(&read)).unwrap().publication.unwrap().token_digest.was_plain());
    }

    #[test]
    fn an_object_made_anew_has_the_same_record_until_and_after_its_node_takes_it_over() {
        let volume = volume();
        let before = object(&volume);
        let known = volume_of(&before).unwrap();
        let mut anew = before.anew().unwrap().unwrap();
        assert!(anew.status.is_none() && anew.is_to_be_adopted());
        let read = volume_of(&anew).unwrap();
        assert_eq!(Volume { revision: known.revision, ..read.clone() }, known);
        // Whatever the node says first brings all of it along.
        let mut status = anew.own_status();
        assert_eq!(status.phase, Some(Phase::Ready));
        let remark = Remark { kind: READY, holds: true, reason: "Adopted", message: "here".into() };
        set(&mut status.conditions, &remark, Some(1));
        anew.status = Some(status);
        assert!(!anew.is_to_be_adopted());
        assert_eq!(volume_of(&anew).unwrap(), read);
        // From then on the status counts, and what it was made with does not.
        anew.status = Some(node_status(&anew, &Volume { publication: None, ..read }));
        assert!(volume_of(&anew).unwrap().publication.is_none());
        // Deleted by hand once more, it is the later record that is adopted.
        assert!(volume_of(&anew.anew().unwrap().unwrap()).unwrap().publication.is_none());
    }

    #[test]
    fn what_was_never_begun_is_asked_for_again_and_what_is_no_more_is_not() {
        let mut object = object(&Volume { origin: None, ..volume() });
        let origin = origin_status(&volume().origin.unwrap());
        for (phase, origin, made) in [
            (None, None, true),
            (None, Some(origin), false),
            (Some(Phase::Refused), None, false),
            (Some(Phase::Deleting), None, false),
        ] {
            let status = object.status.as_mut().unwrap();
            (status.phase, status.origin) = (phase, origin);
            let anew = object.anew().unwrap();
            assert_eq!(anew.is_some(), made, "{phase:?}");
            assert!(anew.is_none_or(|anew| anew.spec.adopt.is_none() && anew.spec.volume_name == "pvc-1"));
        }
    }

    #[test]
    fn what_a_node_has_not_spoken_of_yet_is_being_created_with_the_size_that_was_asked_for() {
        let mut object = object(&volume());
        object.status = None;
        let read = volume_of(&object).unwrap();
        assert_eq!((read.phase, read.capacity, read.revision), (RecordPhase::Creating, Bytes::gib(2), 0));
        assert!(!read.initialized && read.publication.is_none());
    }
}
