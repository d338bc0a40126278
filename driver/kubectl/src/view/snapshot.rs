use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use serde::Serialize;
use zpod_kubernetes::crd::{SnapshotPhase, ZfsSnapshot};

/// A snapshot.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct SnapshotView {
    /// The snapshot handle: the name of its ZfsSnapshot.
    pub(crate) snapshot: String,
    /// What CSI calls it: `snapshot-` and the UID of its VolumeSnapshot.
    pub(crate) name: String,
    /// The ZfsVolume it is of. It may be gone.
    pub(crate) volume: String,
    pub(crate) node: String,
    pub(crate) ready: bool,
    /// `Pending`, `Marked`, `Copying`, `Ready`, `Refused` or `Deleting`.
    pub(crate) phase: String,
    /// Of a full copy, in percent.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) progress: Option<i64>,
    /// The least that a volume restored from it has.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) restore_size_bytes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) creation_time: Option<Time>,
    /// The name of the group it was taken with; empty where it was taken alone.
    pub(crate) group: String,
    /// Why it can't be had; empty when all is well.
    pub(crate) message: String,
}

impl SnapshotView {
    pub(crate) fn new(object: &ZfsSnapshot) -> Self {
        let (spec, status) = (&object.spec, object.status.clone().unwrap_or_default());
        let wrong = status.conditions.iter().find(|condition| condition.status == "False");
        Self {
            snapshot: object.metadata.name.clone().unwrap_or_default(),
            name: spec.snapshot_name.clone(),
            volume: spec.volume.clone(),
            node: spec.node_name.clone(),
            ready: status.ready_to_use,
            phase: match status.phase {
                None => "Pending",
                Some(SnapshotPhase::Marked) => "Marked",
                Some(SnapshotPhase::Copying) => "Copying",
                Some(SnapshotPhase::Ready) => "Ready",
                Some(SnapshotPhase::Refused) => "Refused",
                Some(SnapshotPhase::Deleting) => "Deleting",
            }
            .into(),
            progress: status.progress,
            restore_size_bytes: status.restore_size.map(|size| size.0.0),
            creation_time: status.creation_time.clone(),
            group: spec.group.as_ref().map(|group| group.name.clone()).unwrap_or_default(),
            message: wrong.map(|condition| condition.message.clone()).unwrap_or_default(),
        }
    }

    /// One word for how far it is, with the progress of a copy.
    pub(crate) fn state(&self) -> String {
        match self.progress {
            Some(percent) if self.phase == "Copying" => format!("Copying {percent}%"),
            _ => self.phase.clone(),
        }
    }
}
