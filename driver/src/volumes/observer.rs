use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use zpod_admin::SnapshotName;
use zpod_kubernetes::CLAIM_UID;
use zpod_storage::catalog::{PodRef, Publication, RollbackOutcome, Volume};
use zpod_volume::{Bytes, Rollback, VolumeId};

use crate::guest::VolumeReport;

/// A published volume, as its record had it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Observed {
    /// The volume.
    pub id: VolumeId,
    /// The CSI target path.
    pub target: PathBuf,
    /// The pod it is published to, where the orchestrator told.
    pub pod: Option<PodRef>,
    /// What the orchestrator calls the volume: [`CLAIM_NAME`] and the like. Of its claims, only the one that it is bound to.
    pub labels: BTreeMap<String, String>,
    /// What the volume holds.
    pub capacity: Bytes,
}

/// Label with the name of the PersistentVolumeClaim.
pub const CLAIM_NAME: &str = "csi.storage.k8s.io/pvc/name";
/// Label with its namespace.
pub const CLAIM_NAMESPACE: &str = "csi.storage.k8s.io/pvc/namespace";
/// Label with the name of the PersistentVolume.
pub const PERSISTENT_VOLUME: &str = "csi.storage.k8s.io/pv/name";

impl Observed {
    pub(super) fn new(volume: &Volume, publication: &Publication) -> Self {
        Self {
            id: volume.id,
            target: publication.target_path.clone(),
            pod: publication.pod.clone(),
            labels: labels(volume, publication),
            capacity: volume.capacity,
        }
    }

    /// A label, empty where there is none.
    pub fn label(&self, key: &str) -> &str {
        self.labels.get(key).map_or("", String::as_str)
    }
}

/// The names of the claim that the volume is bound to, as was found when it was published. That for which it was made may
/// be gone, and the volume somebody else's: it counts only where nobody could be asked, and never for a pod of another
/// namespace.
fn labels(volume: &Volume, publication: &Publication) -> BTreeMap<String, String> {
    if let Some(claim) = &publication.claim {
        let named = [(CLAIM_NAMESPACE, &claim.namespace), (CLAIM_NAME, &claim.name), (CLAIM_UID, &claim.uid)];
        return named.map(|(key, value)| (key.to_owned(), value.clone())).into();
    }
    let pod = publication.pod.as_ref().map_or("", |pod| pod.namespace.as_str());
    let elsewhere = |namespace: &String| !pod.is_empty() && namespace != pod;
    if volume.labels.get(CLAIM_NAMESPACE).is_some_and(elsewhere) { BTreeMap::new() } else { volume.labels.clone() }
}

/// What was done with the snapshots in a volume's pool because somebody asked for it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SnapshotChange {
    /// The snapshot of this name was taken.
    Taken(SnapshotName),
    /// The one of this name was destroyed.
    Destroyed(SnapshotName),
}

/// Who is told what guests say of the volumes that are published on this node. Told a few times a second for each
/// guest at most, from the task that listens to it: takes note and returns, and never blocks or asks back.
pub trait Observer: Send + Sync + fmt::Debug {
    /// A guest said something of a volume, and is believed: the report came with the token of its publication. It may
    /// be a lie all the same.
    fn reported(&self, volume: &Observed, report: &VolumeReport);

    /// A sandbox showed a volume's token, which another one has. It is not believed, and told nothing.
    fn claimed_again(&self, _volume: &Observed, _sandbox: &str) {}

    /// A volume is not published here any more.
    fn withdrawn(&self, id: VolumeId);

    /// A container runs that mounts a volume of which no guest tells. The node's own word, told once. It holds until
    /// [`Observer::reported`] or [`Observer::withdrawn`].
    fn unheard(&self, volume: &Observed, reason: &str) {
        let _ = (volume, reason);
    }

    /// A snapshot in a volume's pool was taken or destroyed, as somebody asked for who may.
    fn snapshot_changed(&self, volume: &Observed, change: &SnapshotChange) {
        let _ = (volume, change);
    }

    /// A rollback was asked for, or that was taken back.
    fn rollback_changed(&self, volume: &Observed, rollback: &Rollback, asked: bool) {
        let _ = (volume, rollback, asked);
    }

    /// What came of a rollback that was asked for is recorded. Told once.
    fn rolled_back(&self, volume: &Observed, rollback: &Rollback, outcome: &RollbackOutcome) {
        let _ = (volume, rollback, outcome);
    }

    /// Whether it keeps a volume's condition where the catalog finds it. Then the node does not record it as well.
    fn keeps_condition(&self) -> bool {
        false
    }
}

/// All of them are told, in their order. An empty list is nobody.
impl Observer for Vec<Arc<dyn Observer>> {
    fn reported(&self, volume: &Observed, report: &VolumeReport) {
        self.iter().for_each(|observer| observer.reported(volume, report));
    }

    fn claimed_again(&self, volume: &Observed, sandbox: &str) {
        self.iter().for_each(|observer| observer.claimed_again(volume, sandbox));
    }

    fn withdrawn(&self, id: VolumeId) {
        self.iter().for_each(|observer| observer.withdrawn(id));
    }

    fn unheard(&self, volume: &Observed, reason: &str) {
        self.iter().for_each(|observer| observer.unheard(volume, reason));
    }

    fn snapshot_changed(&self, volume: &Observed, change: &SnapshotChange) {
        self.iter().for_each(|observer| observer.snapshot_changed(volume, change));
    }

    fn rollback_changed(&self, volume: &Observed, rollback: &Rollback, asked: bool) {
        self.iter().for_each(|observer| observer.rollback_changed(volume, rollback, asked));
    }

    fn rolled_back(&self, volume: &Observed, rollback: &Rollback, outcome: &RollbackOutcome) {
        self.iter().for_each(|observer| observer.rolled_back(volume, rollback, outcome));
    }

    fn keeps_condition(&self) -> bool {
        self.iter().any(|observer| observer.keeps_condition())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use uuid::Uuid;
    use zpod_storage::catalog::ClaimRef;
    use zpod_volume::{TokenDigest, VolumeParameters};

    #[test]
    fn a_volume_has_the_name_of_the_claim_it_is_bound_to_and_not_of_that_it_was_made_for() {
        let made_for = [(CLAIM_NAMESPACE, "prod"), (CLAIM_NAME, "data"), (CLAIM_UID, "c-1")];
        let volume = Volume {
            labels: made_for.map(|(key, value)| (key.to_owned(), value.to_owned())).into(),
            ..Volume::wanted("pvc-1", Bytes::gib(1), VolumeParameters::default(), "n1")
        };
        let observed = |namespace: &str, claim: Option<ClaimRef>| {
            let pod = PodRef { namespace: namespace.into(), name: "db-0".into(), uid: "u".into() };
            let publication = Publication {
                target_path: "/t".into(),
                token_digest: TokenDigest::of(Uuid::nil()),
                read_only: false,
                fs_group: None,
                mount_flags: vec![],
                rollback: None,
                pod: Some(pod),
                claim,
                boot_id: String::new(),
            };
            let observed = Observed::new(&volume, &publication);
            [CLAIM_NAMESPACE, CLAIM_NAME, CLAIM_UID].map(|key| observed.label(key).to_owned())
        };
        let bound = ClaimRef { namespace: "other".into(), name: "kept".into(), uid: "c-2".into() };
        assert_eq!(observed("other", Some(bound)), ["other", "kept", "c-2"]);
        // Recorded before this was asked.
        assert_eq!(observed("prod", None), ["prod", "data", "c-1"]);
        assert_eq!(observed("other", None), ["", "", ""], "the claim of another tenant");
    }
}
