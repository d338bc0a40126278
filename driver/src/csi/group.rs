use std::collections::BTreeSet;
use std::sync::Arc;

use tonic::{Request, Response, Status, async_trait};
use zpod_proto::csi;
use zpod_proto::csi::group_controller_server::GroupController;
use zpod_proto::csi::group_controller_service_capability::rpc::Type as Rpc;
use zpod_proto::csi::group_controller_service_capability::{Rpc as RpcCapability, Type as CapabilityType};
use zpod_storage::catalog::{Snapshot, SnapshotPhase};
use zpod_volume::{GroupId, VolumeId};

use super::{answer, request, snapshot};
use crate::guest::clean;
use crate::volumes::{GroupRequest, Snapshots, VolumeError};

/// As many as a pod has volumes, and more: each has a guest that marks while the others wait.
const MAX_MEMBERS: usize = 256;

/// Takes and removes snapshots of several volumes together.
#[derive(Debug)]
pub struct GroupControllerService {
    snapshots: Arc<dyn Snapshots>,
}

impl GroupControllerService {
    /// The service of this process.
    pub fn new(snapshots: Arc<dyn Snapshots>) -> Self {
        Self { snapshots }
    }

    async fn create(
        &self,
        request: csi::CreateVolumeGroupSnapshotRequest,
    ) -> Result<csi::CreateVolumeGroupSnapshotResponse, VolumeError> {
        request::name(&request.name)?;
        let allow_copy = snapshot::allow_copy(&request.parameters)?;
        let given = request.source_volume_ids.len();
        if !(1..=MAX_MEMBERS).contains(&given) {
            let reason = format!("has {given} ids, 1 to {MAX_MEMBERS} are allowed");
            return Err(VolumeError::invalid("source_volume_ids", reason));
        }
        let missing =
            |id: &str| VolumeError::NotFound { id: clean(id, 128), node: "any (that is no id of ours)".into() };
        let ids = request.source_volume_ids.iter().map(|id| id.parse().map_err(|_| missing(id)));
        let volumes = ids.collect::<Result<BTreeSet<VolumeId>, _>>()?;
        if volumes.len() != given {
            return Err(VolumeError::invalid("source_volume_ids", "has an id more than once"));
        }
        let volumes = volumes.into_iter().collect();
        let members =
            self.snapshots.create_group(GroupRequest { name: request.name.clone(), volumes, allow_copy }).await?;
        let group = describe(GroupId::from_name(&request.name), &members);
        Ok(csi::CreateVolumeGroupSnapshotResponse { group_snapshot: Some(group) })
    }

    async fn delete(
        &self,
        request: csi::DeleteVolumeGroupSnapshotRequest,
    ) -> Result<csi::DeleteVolumeGroupSnapshotResponse, VolumeError> {
        request::required("group_snapshot_id", &request.group_snapshot_id)?;
        // CSI 1.12, DeleteVolumeGroupSnapshot: what does not exist is deleted.
        let Ok(id) = request.group_snapshot_id.parse() else { return Ok(Default::default()) };
        match self.snapshots.group(id).await {
            // Some of those named may be gone, of an attempt before.
            Ok(members) => check(&members, &request.snapshot_ids, |members, named| members.is_subset(named))?,
            Err(VolumeError::GroupNotFound { .. }) => {}
            Err(error) => return Err(error),
        }
        self.snapshots.delete_group(id).await?;
        Ok(csi::DeleteVolumeGroupSnapshotResponse {})
    }

    async fn get(
        &self,
        request: csi::GetVolumeGroupSnapshotRequest,
    ) -> Result<csi::GetVolumeGroupSnapshotResponse, VolumeError> {
        request::required("group_snapshot_id", &request.group_snapshot_id)?;
        let missing = |_| VolumeError::GroupNotFound { id: clean(&request.group_snapshot_id, 128) };
        let id = request.group_snapshot_id.parse().map_err(missing)?;
        let members = self.snapshots.group(id).await?;
        check(&members, &request.snapshot_ids, BTreeSet::eq)?;
        Ok(csi::GetVolumeGroupSnapshotResponse { group_snapshot: Some(describe(id, &members)) })
    }
}

/// That the snapshots named are those of the group.
fn check(
    members: &[Snapshot],
    named: &[String],
    fits: impl Fn(&BTreeSet<String>, &BTreeSet<String>) -> bool,
) -> Result<(), VolumeError> {
    let members: BTreeSet<_> = members.iter().map(|member| member.id.to_string()).collect();
    if named.is_empty() || fits(&members, &named.iter().cloned().collect()) {
        return Ok(());
    }
    let members: Vec<_> = members.into_iter().collect();
    Err(VolumeError::invalid("snapshot_ids", format!("are not those of the group: {}", members.join(", "))))
}

fn describe(id: GroupId, members: &[Snapshot]) -> csi::VolumeGroupSnapshot {
    csi::VolumeGroupSnapshot {
        group_snapshot_id: id.to_string(),
        snapshots: members.iter().map(snapshot::describe).collect(),
        creation_time: members.iter().map(snapshot::taken).max_by_key(|time| time.seconds),
        ready_to_use: members.iter().all(|member| member.phase == SnapshotPhase::Ready),
    }
}

#[async_trait]
impl GroupController for GroupControllerService {
    async fn group_controller_get_capabilities(
        &self,
        _: Request<csi::GroupControllerGetCapabilitiesRequest>,
    ) -> Result<Response<csi::GroupControllerGetCapabilitiesResponse>, Status> {
        let rpc = RpcCapability { r#type: Rpc::CreateDeleteGetVolumeGroupSnapshot.into() };
        let capability = csi::GroupControllerServiceCapability { r#type: Some(CapabilityType::Rpc(rpc)) };
        Ok(Response::new(csi::GroupControllerGetCapabilitiesResponse { capabilities: vec![capability] }))
    }

    async fn create_volume_group_snapshot(
        &self,
        request: Request<csi::CreateVolumeGroupSnapshotRequest>,
    ) -> Result<Response<csi::CreateVolumeGroupSnapshotResponse>, Status> {
        let request = request.into_inner();
        answer("CreateVolumeGroupSnapshot", &request.name.clone(), self.create(request)).await
    }

    async fn delete_volume_group_snapshot(
        &self,
        request: Request<csi::DeleteVolumeGroupSnapshotRequest>,
    ) -> Result<Response<csi::DeleteVolumeGroupSnapshotResponse>, Status> {
        let request = request.into_inner();
        answer("DeleteVolumeGroupSnapshot", &request.group_snapshot_id.clone(), self.delete(request)).await
    }

    async fn get_volume_group_snapshot(
        &self,
        request: Request<csi::GetVolumeGroupSnapshotRequest>,
    ) -> Result<Response<csi::GetVolumeGroupSnapshotResponse>, Status> {
        let request = request.into_inner();
        answer("GetVolumeGroupSnapshot", &request.group_snapshot_id.clone(), self.get(request)).await
    }
}
