use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;
use zpod_storage::catalog::{CatalogError, Contents, GroupMember, Snapshot, SnapshotPhase as RecordPhase};
use zpod_volume::{Encryption, SnapshotId};

use super::{READY, mode_of, mode_status, origin_of, origin_status, successor};
use crate::Quantity;
use crate::catalog::{Head, Kept, Requests};
use crate::crd::{FINALIZER, GroupRef, SnapshotPhase, ZfsSnapshot, ZfsSnapshotSpec, ZfsSnapshotStatus};
use crate::remark::{Remark, set};

/// A label with the group's id, for people, and for controllers from before `spec.complete`. Nodes could write labels: nothing is
/// decided by it.
const GROUP_LABEL: &str = "zpod.storage/group";

impl Kept for ZfsSnapshot {
    type Record = Snapshot;
    type Phase = SnapshotPhase;
    const REQUESTS: Requests = Requests {
        get: "get ZfsSnapshot",
        list: "list ZfsSnapshots",
        create: "create ZfsSnapshot",
        change: "change ZfsSnapshot",
        status: "write the status of ZfsSnapshot",
        release: "let ZfsSnapshot go",
        delete: "delete ZfsSnapshot",
    };

    fn asking_for(snapshot: &Snapshot) -> Self {
        let spec = ZfsSnapshotSpec {
            snapshot_name: snapshot.name.clone(),
            volume: snapshot.volume.to_string(),
            node_name: snapshot.node.clone(),
            group: snapshot.group.as_ref().map(|group| GroupRef {
                id: group.id.to_string(),
                name: group.name.clone(),
                size: i64::try_from(group.size).unwrap_or(i64::MAX),
            }),
            copy: false,
            complete: false,
            allow_copy: snapshot.allow_copy,
            destroy: false,
            adopt: None,
        };
        let mut object = Self::new(&snapshot.id.to_string(), spec);
        object.metadata.finalizers = Some(vec![FINALIZER.to_owned()]);
        let label = |group: &GroupMember| (GROUP_LABEL.to_owned(), group.id.to_string());
        object.metadata.labels = snapshot.group.as_ref().map(|group| [label(group)].into());
        object
    }

    fn record(&self) -> Result<Snapshot, CatalogError> {
        let name = self.metadata.name.as_deref().unwrap_or_default();
        let unreadable =
            |reason: &str| CatalogError::Unreadable { what: format!("ZfsSnapshot {name}"), reason: reason.into() };
        let id: SnapshotId = name.parse().map_err(|_| unreadable("its name is not a snapshot's id"))?;
        let (spec, status) = (&self.spec, self.own_status());
        let group = spec.group.as_ref().map(|group| {
            let bad = || unreadable("its group is none");
            let size = usize::try_from(group.size).map_err(|_| bad())?;
            Ok(GroupMember { id: group.id.parse().map_err(|_| bad())?, name: group.name.clone(), size })
        });
        Ok(Snapshot {
            id,
            name: spec.snapshot_name.clone(),
            volume: spec.volume.parse().map_err(|_| unreadable("its volume is none"))?,
            node: spec.node_name.clone(),
            group: group.transpose()?,
            phase: match status.phase {
                None | Some(SnapshotPhase::Refused) => RecordPhase::Wanted,
                Some(SnapshotPhase::Marked) => RecordPhase::Marked,
                Some(SnapshotPhase::Copying) => RecordPhase::Copying,
                Some(SnapshotPhase::Ready) => RecordPhase::Ready,
                Some(SnapshotPhase::Deleting) => RecordPhase::Deleting,
            },
            allow_copy: spec.allow_copy,
            contents: contents_of(&status).map_err(unreadable)?,
            revision: u64::try_from(status.revision).map_err(|_| unreadable("status.revision is negative"))?,
        })
    }

    fn status_for(&self, snapshot: &Snapshot) -> ZfsSnapshotStatus {
        let found = self.own_status();
        let phase = match snapshot.phase {
            RecordPhase::Wanted => None,
            RecordPhase::Marked => Some(SnapshotPhase::Marked),
            RecordPhase::Copying => Some(SnapshotPhase::Copying),
            RecordPhase::Ready => Some(SnapshotPhase::Ready),
            RecordPhase::Deleting => Some(SnapshotPhase::Deleting),
        };
        let mut conditions = found.conditions;
        // What was said of an earlier attempt.
        conditions.retain(|condition| condition.type_ != READY);
        if phase == Some(SnapshotPhase::Ready) {
            let message = format!("the copy is on node {}", snapshot.node);
            let remark = Remark { kind: READY, holds: true, reason: "CopyMade", message };
            set(&mut conditions, &remark, self.metadata.generation);
        }
        let contents = snapshot.contents.as_ref();
        ZfsSnapshotStatus {
            ready_to_use: phase == Some(SnapshotPhase::Ready),
            phase,
            progress: found.progress.filter(|_| phase == Some(SnapshotPhase::Copying)),
            partition: contents.map(|contents| Quantity(contents.partition)),
            origin: contents.map(|contents| origin_status(&contents.origin)),
            encryption: contents
                .and_then(|contents| contents.encryption)
                .map(Encryption::as_str)
                .unwrap_or_default()
                .into(),
            mode: contents.and_then(|contents| mode_status(contents.mode)),
            revision: i64::try_from(snapshot.revision).unwrap_or(i64::MAX - 1) + 1,
            observed_generation: self.metadata.generation,
            creation_time: contents.and_then(|contents| time(contents.taken)),
            restore_size: contents.map(|contents| Quantity(contents.capacity)),
            conditions,
        }
    }

    /// Of an object that was deleted by hand and made anew, what the node had recorded before, until it takes that over.
    fn own_status(&self) -> ZfsSnapshotStatus {
        let status = self.status.clone().unwrap_or_default();
        match &self.spec.adopt {
            Some(before) if status.phase.is_none() => {
                ZfsSnapshotStatus { conditions: status.conditions, ..(**before).clone() }
            }
            _ => status,
        }
    }

    fn anew(&self) -> Result<Option<Self>, CatalogError> {
        let adopt = match self.own_status().phase {
            None => None,
            Some(SnapshotPhase::Ready) => {
                let status = self.status_for(&self.record()?);
                Some(Box::new(ZfsSnapshotStatus { observed_generation: None, conditions: Vec::new(), ..status }))
            }
            Some(_) => return Ok(None),
        };
        let spec = ZfsSnapshotSpec { adopt, ..self.spec.clone() };
        Ok(Some(Self { metadata: successor(&self.metadata), spec, status: None }))
    }

    fn is_unmade(&self) -> bool {
        matches!(self.own_status().phase, None | Some(SnapshotPhase::Refused))
    }

    fn is_made_anew(&self) -> bool {
        self.spec.adopt.is_some()
    }

    fn node(&self) -> &str {
        &self.spec.node_name
    }

    fn head(status: &mut ZfsSnapshotStatus) -> Head<'_, SnapshotPhase> {
        Head {
            phase: &mut status.phase,
            observed_generation: &mut status.observed_generation,
            conditions: &mut status.conditions,
        }
    }

    fn destroy(spec: &mut ZfsSnapshotSpec) -> &mut bool {
        &mut spec.destroy
    }

    fn taking_over(snapshot: Snapshot, _: &Snapshot) -> Snapshot {
        snapshot
    }
}

/// What is in the copy: all that is needed, or nothing yet.
fn contents_of(status: &ZfsSnapshotStatus) -> Result<Option<Contents>, &'static str> {
    let (Some(partition), Some(origin), Some(taken), Some(capacity)) =
        (status.partition, &status.origin, &status.creation_time, status.restore_size)
    else {
        return Ok(None);
    };
    let encryption = match status.encryption.as_str() {
        "" => None,
        word if word == Encryption::Aes256Gcm.as_str() => Some(Encryption::Aes256Gcm),
        _ => return Err("its encryption is not known"),
    };
    Ok(Some(Contents {
        taken: u64::try_from(taken.0.as_second()).map_err(|_| "its time is before 1970")?,
        capacity: capacity.0,
        partition: partition.0,
        origin: origin_of(origin).ok_or("its origin is none")?,
        encryption,
        mode: mode_of(status.mode),
    }))
}

fn time(seconds: u64) -> Option<Time> {
    Timestamp::from_second(i64::try_from(seconds).ok()?).ok().map(Time)
}

#[cfg(test)]
mod tests {
    use super::*;
    use zpod_volume::{Bytes, GroupId, Mark, Origin, VolumeId, VolumeMode};

    fn snapshot() -> Snapshot {
        let (id, volume) = (SnapshotId::from_name("snapshot-1"), VolumeId::from_name("pvc-1"));
        Snapshot {
            id,
            name: "snapshot-1".into(),
            volume,
            node: "node-a".into(),
            group: Some(GroupMember { id: GroupId::from_name("g"), name: "g".into(), size: 2 }),
            phase: RecordPhase::Copying,
            allow_copy: true,
            contents: Some(Contents {
                taken: 1_700_000_000,
                capacity: Bytes::gib(1),
                partition: Bytes::mib(1100),
                origin: Origin { volume, mark: Some(Mark::for_snapshot(id)), initialized: true, copy: None },
                encryption: Some(Encryption::Aes256Gcm),
                mode: VolumeMode::Block,
            }),
            revision: 3,
        }
    }

    fn stored(snapshot: &Snapshot) -> ZfsSnapshot {
        let mut object = ZfsSnapshot::asking_for(snapshot);
        object.status = Some(object.status_for(snapshot));
        serde_json::from_str(&serde_json::to_string(&object).unwrap()).unwrap()
    }

    #[test]
    fn a_snapshot_survives_the_way_there_and_back_and_counts_its_change() {
        let whole = snapshot();
        let bare = Snapshot { group: None, contents: None, allow_copy: false, ..snapshot() };
        for phase in [RecordPhase::Marked, RecordPhase::Copying, RecordPhase::Ready, RecordPhase::Deleting] {
            for snapshot in [&whole, &bare] {
                let snapshot = Snapshot { phase, ..snapshot.clone() };
                assert_eq!(stored(&snapshot).record().unwrap(), Snapshot { revision: 4, ..snapshot });
            }
        }
    }

    #[test]
    fn what_a_node_has_refused_or_not_spoken_of_is_only_wanted() {
        let mut object = ZfsSnapshot::asking_for(&snapshot());
        let read = object.record().unwrap();
        assert_eq!((read.phase, read.contents, read.revision), (RecordPhase::Wanted, None, 0));
        object.status = Some(ZfsSnapshotStatus { phase: Some(SnapshotPhase::Refused), ..Default::default() });
        assert_eq!(object.record().unwrap().phase, RecordPhase::Wanted);
    }

    #[test]
    fn the_members_of_a_group_have_its_id_in_a_label_that_kubernetes_allows() {
        let object = ZfsSnapshot::asking_for(&snapshot());
        let value = &object.metadata.labels.unwrap()[GROUP_LABEL];
        assert_eq!(value, &GroupId::from_name("g").to_string());
        assert!(value.len() <= 63);
    }

    #[test]
    fn a_copy_that_is_made_is_ready_and_has_no_progress_any_more() {
        let mut object = stored(&snapshot());
        object.status.as_mut().unwrap().progress = Some(40);
        assert_eq!(object.status_for(&snapshot()).progress, Some(40));
        let ready = object.status_for(&Snapshot { phase: RecordPhase::Ready, ..snapshot() });
        assert_eq!((ready.ready_to_use, ready.progress), (true, None));
        assert!(ready.conditions.iter().any(|condition| condition.type_ == READY && condition.status == "True"));
    }
}
