mod group;

use std::fmt;
use std::time::Duration;

use async_trait::async_trait;
use kube::Client;
use zpod_kubernetes::crd::{SnapshotPhase, ZfsSnapshot, ZfsVolume};
use zpod_kubernetes::{DESTROYED, Kept, KubeCatalog, READY};
use zpod_storage::backing::Outcome;
use zpod_storage::catalog::{Catalog as _, CatalogError, Phase, Snapshot, SnapshotPhase as RecordPhase, Volume};
use zpod_storage::crash;
use zpod_volume::{GroupId, SnapshotId, VolumeId};

use super::answers::{ANY_NODE, Wanted, refusal, said_now, wait};
use crate::volumes::{GroupRequest, SnapshotPage, SnapshotRequest, Snapshots, VolumeError};

/// Takes, removes and lists snapshots by their objects, which the nodes carry out.
#[derive(Clone)]
pub struct ClusterSnapshotter {
    volumes: KubeCatalog<ZfsVolume>,
    snapshots: KubeCatalog<ZfsSnapshot>,
    /// How long a node is waited for. Less than the sidecars' deadline, so that they hear why.
    patience: Duration,
}

impl fmt::Debug for ClusterSnapshotter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClusterSnapshotter").finish_non_exhaustive()
    }
}

impl ClusterSnapshotter {
    /// A snapshotter of this cluster.
    pub fn new(client: Client, patience: Duration) -> Self {
        Self { volumes: KubeCatalog::of_cluster(client.clone()), snapshots: KubeCatalog::of_cluster(client), patience }
    }

    /// A volume that there can be snapshots of.
    async fn source(&self, id: VolumeId) -> Result<Volume, VolumeError> {
        let not_found = || VolumeError::NotFound { id: id.to_string(), node: ANY_NODE.into() };
        let object = self.volumes.object(id).await?.ok_or_else(not_found)?;
        let volume = object.record()?;
        let state = match volume.phase {
            Phase::Ready if object.metadata.deletion_timestamp.is_none() || !object.spec.destroy => return Ok(volume),
            Phase::Creating => "not finished yet",
            _ => "being deleted",
        };
        Err(VolumeError::NotReady { id, state, remedy: "a snapshot is of what is there: try again when it is" })
    }

    /// Asks for a snapshot; what is asked for already is the answer too.
    async fn ask(&self, wanted: Snapshot) -> Result<Snapshot, VolumeError> {
        crash::point("cluster snapshot: begin");
        let asked = self.snapshots.create(wanted).await?.into_record();
        crash::point("cluster snapshot: recorded");
        Ok(asked)
    }

    /// Waits until the node has answered; gives the object if it is still there.
    async fn answer(
        &self,
        snapshot: &Snapshot,
        what: &'static str,
        answered: fn(&ZfsSnapshot) -> bool,
    ) -> Result<ZfsSnapshot, VolumeError> {
        let done =
            move |object: Option<&ZfsSnapshot>| object.is_none_or(|object| is_leaving(object) || answered(object));
        let wanted = Wanted { node: &snapshot.node, what, within: self.patience };
        wait(&self.snapshots, snapshot.id, wanted, done)
            .await?
            .ok_or_else(|| CatalogError::not_found::<Snapshot>(snapshot.id).into())
    }

    /// Has a snapshot destroyed and waits until it is gone.
    async fn end(&self, object: &ZfsSnapshot) -> Result<(), VolumeError> {
        let id = object.record()?.id;
        crash::point("cluster snapshot: end");
        self.snapshots.destroy(object).await?;
        let node = object.spec.node_name.as_str();
        let wanted = Wanted { node, what: "destroyed", within: self.patience };
        let gone = |object: Option<&ZfsSnapshot>| object.is_none_or(|object| said_now(object, DESTROYED));
        match wait(&self.snapshots, id, wanted, gone).await? {
            None => Ok(()),
            Some(object) => Err(refusal(&object, DESTROYED, node)),
        }
    }
}

#[async_trait]
impl Snapshots for ClusterSnapshotter {
    async fn create(&self, request: SnapshotRequest) -> Result<Snapshot, VolumeError> {
        let id = SnapshotId::from_name(&request.name);
        let snapshot = match self.snapshots.object(id).await? {
            Some(object) => usable(&object)?,
            None => {
                let volume = self.source(request.volume).await?;
                let wanted = Snapshot {
                    id,
                    name: request.name.clone(),
                    volume: volume.id,
                    node: volume.node,
                    group: None,
                    phase: RecordPhase::Wanted,
                    allow_copy: request.allow_copy || volume.parameters.allow_copy,
                    contents: None,
                    revision: 0,
                };
                self.ask(wanted).await?
            }
        };
        same(&snapshot, &request)?;
        let object = self.answer(&snapshot, "taken", is_taken).await?;
        match phase(&object) {
            Some(SnapshotPhase::Ready) => {}
            Some(SnapshotPhase::Copying) if !said_now(&object, READY) => {}
            // Its contents are fixed: the node goes on with the copy.
            Some(SnapshotPhase::Copying) => return Err(refusal(&object, READY, &snapshot.node)),
            _ => {
                let snapshot = usable(&object)?;
                // Nothing is left of it: the next try is of another instant.
                match phase(&object) {
                    // A copy that is there all the same is none of this attempt's.
                    None | Some(SnapshotPhase::Refused) => drop(self.snapshots.discard(&object).await?),
                    _ => self.snapshots.destroy(&object).await?,
                }
                return Err(refusal(&object, READY, &snapshot.node));
            }
        }
        usable(&object)
    }

    async fn delete(&self, id: SnapshotId) -> Result<Outcome, VolumeError> {
        let Some(object) = self.snapshots.object(id).await? else { return Ok(Outcome::Unchanged) };
        if let Some(group) = object.record()?.group {
            return Err(VolumeError::InGroup { id, group: group.id });
        }
        self.end(&object).await?;
        Ok(Outcome::Changed)
    }

    async fn get(&self, id: SnapshotId) -> Result<Snapshot, VolumeError> {
        let object = self.snapshots.object(id).await?;
        let snapshot = object.as_ref().map(Kept::record).transpose()?.filter(|snapshot| snapshot.contents.is_some());
        snapshot.ok_or_else(|| VolumeError::SnapshotNotFound { id: id.to_string(), node: ANY_NODE.into() })
    }

    async fn list(
        &self,
        of: Option<VolumeId>,
        from: Option<String>,
        limit: usize,
    ) -> Result<SnapshotPage, VolumeError> {
        let (from, limit) = (from.as_deref(), u32::try_from(limit).unwrap_or(u32::MAX));
        let (objects, next) = match of {
            Some(volume) => self.snapshots.page_of_volume(volume, from, limit).await?,
            None => self.snapshots.page(from, limit).await?,
        };
        let mut snapshots = Vec::with_capacity(objects.len());
        for object in &objects {
            match object.record() {
                Ok(snapshot) if snapshot.contents.is_some() => snapshots.push(snapshot),
                Ok(_) => {}
                Err(error) => tracing::warn!("left out of a list: {error}"),
            }
        }
        Ok(SnapshotPage { snapshots, next })
    }

    async fn create_group(&self, request: GroupRequest) -> Result<Vec<Snapshot>, VolumeError> {
        self.take_group(&request).await
    }

    async fn group(&self, id: GroupId) -> Result<Vec<Snapshot>, VolumeError> {
        let members = self.snapshots.in_group(Some(id)).await?;
        let members = members.iter().map(Kept::record).collect::<Result<Vec<_>, _>>()?;
        if members.is_empty() || members.iter().any(|member| member.contents.is_none()) {
            return Err(VolumeError::GroupNotFound { id: id.to_string() });
        }
        Ok(members)
    }

    async fn delete_group(&self, id: GroupId) -> Result<Outcome, VolumeError> {
        let members = self.snapshots.in_group(Some(id)).await?;
        self.end_all(&members).await?;
        Ok(if members.is_empty() { Outcome::Unchanged } else { Outcome::Changed })
    }
}

fn phase(object: &ZfsSnapshot) -> Option<SnapshotPhase> {
    object.status.as_ref()?.phase
}

fn is_leaving(object: &ZfsSnapshot) -> bool {
    object.metadata.deletion_timestamp.is_some()
}

/// Whether there is an answer for CreateSnapshot. A copy that shares blocks is made before anybody could ask again; one
/// that takes its time says how far it is.
fn is_taken(object: &ZfsSnapshot) -> bool {
    let progress = object.status.as_ref().is_some_and(|status| status.progress.is_some());
    match phase(object) {
        Some(SnapshotPhase::Ready | SnapshotPhase::Refused) => true,
        Some(SnapshotPhase::Copying) => progress || said_now(object, READY),
        _ => said_now(object, READY),
    }
}

/// The record of a snapshot that is there or is being taken.
fn usable(object: &ZfsSnapshot) -> Result<Snapshot, VolumeError> {
    let snapshot = object.record()?;
    if !is_leaving(object) {
        return Ok(snapshot);
    }
    let remedy = if object.spec.destroy {
        "let DeleteSnapshot be repeated until it succeeds, or this call if nothing asked for that"
    } else if object.is_unmade() {
        "it was never taken, and its record is on its way out: repeat the call"
    } else {
        "somebody deleted its ZfsSnapshot by hand: `kubectl zpod adopt` undoes that"
    };
    Err(VolumeError::SnapshotNotReady { id: snapshot.id, state: "being deleted", remedy })
}

/// Whether what exists under a name is what is asked for.
fn same(snapshot: &Snapshot, request: &SnapshotRequest) -> Result<(), VolumeError> {
    let difference = if snapshot.name != request.name {
        format!("its name is {:?}", snapshot.name)
    } else if snapshot.volume != request.volume {
        format!("it is of volume {}", snapshot.volume)
    } else if snapshot.group.is_some() {
        "it was taken with a group".to_owned()
    } else {
        return Ok(());
    };
    Err(VolumeError::SnapshotExists { name: request.name.clone(), id: snapshot.id, difference })
}
