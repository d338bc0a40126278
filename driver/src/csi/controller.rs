use std::collections::HashMap;
use std::sync::Arc;

use tonic::{Request, Response, Status, async_trait};
use zpod_proto::csi::controller_server::Controller;
use zpod_proto::csi::controller_service_capability::rpc::Type as Rpc;
use zpod_proto::csi::controller_service_capability::{Rpc as RpcCapability, Type as CapabilityType};
use zpod_proto::csi::list_volumes_response::{Entry, VolumeStatus};
use zpod_proto::csi::validate_volume_capabilities_response::Confirmed;
use zpod_proto::csi::volume_content_source::{SnapshotSource, Type as SourceType, VolumeSource};
use zpod_proto::csi::{self, ControllerServiceCapability, VolumeCondition, VolumeContentSource};
use zpod_storage::catalog::{Condition, Source, Volume};
use zpod_volume::{DiskLayout, VolumeId, VolumeParameters};

use super::request::{self, int, topology};
use super::{answer, capability, snapshot};
use crate::volumes::{CreateRequest, Provision, Room, Snapshots, VolumeError, check_vdevs};

/// The most entries a page of ListVolumes has: about 200 KiB, far below gRPC's limit of 4 MiB.
pub(super) const MAX_PAGE: usize = 1000;

const CAPABILITIES: [Rpc; 12] = [
    Rpc::CreateDeleteVolume,
    Rpc::ListVolumes,
    Rpc::GetCapacity,
    Rpc::CreateDeleteSnapshot,
    Rpc::ListSnapshots,
    Rpc::CloneVolume,
    Rpc::ExpandVolume,
    Rpc::GetVolume,
    Rpc::VolumeCondition,
    Rpc::SingleNodeMultiWriter,
    Rpc::ModifyVolume,
    Rpc::GetSnapshot,
];

/// Makes, deletes, grows, changes and lists volumes and snapshots.
#[derive(Debug)]
pub struct ControllerService {
    provisioner: Arc<dyn Provision>,
    snapshots: Arc<dyn Snapshots>,
}

impl ControllerService {
    /// The service of this process.
    pub fn new(provisioner: Arc<dyn Provision>, snapshots: Arc<dyn Snapshots>) -> Self {
        Self { provisioner, snapshots }
    }

    /// An id. One that is not in our form is of no volume of ours.
    fn volume_id(&self, id: &str) -> Result<VolumeId, VolumeError> {
        request::required("volume_id", id)?;
        id.parse().map_err(|_| self.provisioner.not_found(id))
    }

    async fn create(&self, request: csi::CreateVolumeRequest) -> Result<csi::CreateVolumeResponse, VolumeError> {
        request::name(&request.name)?;
        let mode = capability::parse_all(&request.volume_capabilities)?;
        let range = request::range(request.capacity_range.as_ref())?;
        let parameters = parameters(&request.parameters)?;
        let not_found = |id: &str| self.provisioner.not_found(id);
        let wanted = CreateRequest {
            range,
            parameters,
            nodes: request::nodes(request.accessibility_requirements.as_ref()),
            labels: request::labels(&request.parameters),
            attributes: request::attributes(&request.mutable_parameters)?,
            mode,
            source: request::source(request.volume_content_source.as_ref(), not_found)?,
            name: request.name,
            inline: None,
        };
        check_vdevs(&wanted)?;
        let volume = self.provisioner.create(wanted).await?;
        Ok(csi::CreateVolumeResponse { volume: Some(describe(&volume)) })
    }

    async fn delete(&self, id: &str) -> Result<csi::DeleteVolumeResponse, VolumeError> {
        request::required("volume_id", id)?;
        // CSI 1.12, DeleteVolume: what does not exist is deleted, and an id that is none of ours does not exist.
        if let Ok(id) = id.parse() {
            self.provisioner.delete(id).await?;
        }
        Ok(csi::DeleteVolumeResponse {})
    }

    async fn validate(
        &self,
        request: csi::ValidateVolumeCapabilitiesRequest,
    ) -> Result<csi::ValidateVolumeCapabilitiesResponse, VolumeError> {
        let id = self.volume_id(&request.volume_id);
        if request.volume_capabilities.is_empty() {
            return Err(VolumeError::invalid("volume_capabilities", "is missing"));
        }
        let volume = self.provisioner.get(id?).await?;
        let fits = capability::parse_all(&request.volume_capabilities).and_then(|mode| {
            if mode != volume.mode {
                let reason = "ask for another volumeMode than the volume was made for";
                return Err(VolumeError::invalid("volume_capabilities", reason));
            }
            request::attributes(&request.mutable_parameters)?;
            let differs = !request.parameters.is_empty() && parameters(&request.parameters)? != volume.parameters;
            let reason = "differ from those the volume was made with";
            if differs { Err(VolumeError::invalid("parameters", reason)) } else { Ok(()) }
        });
        Ok(match fits {
            Ok(()) => csi::ValidateVolumeCapabilitiesResponse {
                confirmed: Some(Confirmed {
                    volume_context: request.volume_context,
                    volume_capabilities: request.volume_capabilities,
                    parameters: request.parameters,
                    mutable_parameters: request.mutable_parameters,
                }),
                message: String::new(),
            },
            Err(error) => csi::ValidateVolumeCapabilitiesResponse { confirmed: None, message: error.to_string() },
        })
    }

    async fn list(&self, request: csi::ListVolumesRequest) -> Result<csi::ListVolumesResponse, VolumeError> {
        let limit = request::limit(request.max_entries, MAX_PAGE)?;
        let from = Some(request.starting_token).filter(|token| !token.is_empty());
        let page = self.provisioner.list(from, limit).await?;
        let entries = page.volumes.iter().map(|volume| Entry {
            volume: Some(describe(volume)),
            status: Some(VolumeStatus { published_node_ids: vec![], volume_condition: Some(condition(volume)) }),
        });
        Ok(csi::ListVolumesResponse { entries: entries.collect(), next_token: page.next.unwrap_or_default() })
    }

    async fn capacity(&self, request: csi::GetCapacityRequest) -> Result<csi::GetCapacityResponse, VolumeError> {
        let vdevs = parameters(&request.parameters)?.vdevs;
        let topology = request.accessible_topology.as_ref();
        let node = topology.and_then(request::node_of);
        let elsewhere = node.is_none() && topology.is_some_and(|topology| !topology.segments.is_empty());
        // CSI 1.12: what can be had for volumes of these capabilities; of those that can't be had at all, none.
        let possible = request.volume_capabilities.iter().all(|wanted| {
            capability::parse(Some(wanted)).is_ok_and(|access| vdevs.is_single() || access.mode.is_filesystem())
        });
        let room = match possible && !elsewhere {
            true => self.provisioner.room(node.as_deref(), vdevs).await?,
            false => Room::default(),
        };
        Ok(csi::GetCapacityResponse {
            available_capacity: int(room.available.0),
            maximum_volume_size: Some(int(room.largest.0)),
            minimum_volume_size: Some(int(DiskLayout::MIN_CAPACITY.0)),
        })
    }

    async fn expand(
        &self,
        request: csi::ControllerExpandVolumeRequest,
    ) -> Result<csi::ControllerExpandVolumeResponse, VolumeError> {
        let id = self.volume_id(&request.volume_id)?;
        if request.capacity_range.is_none() {
            return Err(VolumeError::invalid("capacity_range", "is missing"));
        }
        let range = request::range(request.capacity_range.as_ref())?;
        if request.volume_capability.is_some() {
            capability::parse(request.volume_capability.as_ref())?;
        }
        let volume = self.provisioner.expand(id, range).await?;
        Ok(csi::ControllerExpandVolumeResponse {
            capacity_bytes: int(volume.capacity.0),
            node_expansion_required: true,
        })
    }

    async fn modify(
        &self,
        request: csi::ControllerModifyVolumeRequest,
    ) -> Result<csi::ControllerModifyVolumeResponse, VolumeError> {
        let id = self.volume_id(&request.volume_id)?;
        self.provisioner.modify(id, request::attributes(&request.mutable_parameters)?).await?;
        Ok(csi::ControllerModifyVolumeResponse {})
    }

    async fn get(&self, id: &str) -> Result<csi::ControllerGetVolumeResponse, VolumeError> {
        let volume = self.provisioner.get(self.volume_id(id)?).await?;
        Ok(csi::ControllerGetVolumeResponse {
            volume: Some(describe(&volume)),
            status: Some(csi::controller_get_volume_response::VolumeStatus {
                published_node_ids: vec![],
                volume_condition: Some(condition(&volume)),
            }),
        })
    }
}

fn parameters(given: &HashMap<String, String>) -> Result<VolumeParameters, VolumeError> {
    Ok(VolumeParameters::parse(given.iter().map(|(key, value)| (key.as_str(), value.as_str())))?)
}

fn describe(volume: &Volume) -> csi::Volume {
    csi::Volume {
        capacity_bytes: int(volume.capacity.0),
        volume_id: volume.id.to_string(),
        volume_context: HashMap::new(),
        content_source: volume.source.map(content_source),
        accessible_topology: vec![topology(&volume.node)],
    }
}

/// CSI 1.12, Volume: a volume that was made from something says so.
fn content_source(source: Source) -> VolumeContentSource {
    let source = match source {
        Source::Snapshot(id) => SourceType::Snapshot(SnapshotSource { snapshot_id: id.to_string() }),
        Source::Volume(id) => SourceType::Volume(VolumeSource { volume_id: id.to_string() }),
    };
    VolumeContentSource { r#type: Some(source) }
}

fn condition(volume: &Volume) -> VolumeCondition {
    match &volume.condition {
        Some(Condition { abnormal, message }) => VolumeCondition { abnormal: *abnormal, message: message.clone() },
        None => VolumeCondition { abnormal: false, message: "no guest has reported on this volume yet".into() },
    }
}

#[async_trait]
impl Controller for ControllerService {
    async fn create_volume(
        &self,
        request: Request<csi::CreateVolumeRequest>,
    ) -> Result<Response<csi::CreateVolumeResponse>, Status> {
        let request = request.into_inner();
        answer("CreateVolume", &request.name.clone(), self.create(request)).await
    }

    async fn delete_volume(
        &self,
        request: Request<csi::DeleteVolumeRequest>,
    ) -> Result<Response<csi::DeleteVolumeResponse>, Status> {
        let id = request.into_inner().volume_id;
        answer("DeleteVolume", &id, self.delete(&id)).await
    }

    async fn validate_volume_capabilities(
        &self,
        request: Request<csi::ValidateVolumeCapabilitiesRequest>,
    ) -> Result<Response<csi::ValidateVolumeCapabilitiesResponse>, Status> {
        let request = request.into_inner();
        answer("ValidateVolumeCapabilities", &request.volume_id.clone(), self.validate(request)).await
    }

    async fn list_volumes(
        &self,
        request: Request<csi::ListVolumesRequest>,
    ) -> Result<Response<csi::ListVolumesResponse>, Status> {
        answer("ListVolumes", "", self.list(request.into_inner())).await
    }

    async fn get_capacity(
        &self,
        request: Request<csi::GetCapacityRequest>,
    ) -> Result<Response<csi::GetCapacityResponse>, Status> {
        answer("GetCapacity", "", self.capacity(request.into_inner())).await
    }

    async fn controller_get_capabilities(
        &self,
        _: Request<csi::ControllerGetCapabilitiesRequest>,
    ) -> Result<Response<csi::ControllerGetCapabilitiesResponse>, Status> {
        let capability = |rpc: Rpc| ControllerServiceCapability {
            r#type: Some(CapabilityType::Rpc(RpcCapability { r#type: rpc.into() })),
        };
        let capabilities = CAPABILITIES.into_iter().map(capability).collect();
        Ok(Response::new(csi::ControllerGetCapabilitiesResponse { capabilities }))
    }

    async fn controller_expand_volume(
        &self,
        request: Request<csi::ControllerExpandVolumeRequest>,
    ) -> Result<Response<csi::ControllerExpandVolumeResponse>, Status> {
        let request = request.into_inner();
        answer("ControllerExpandVolume", &request.volume_id.clone(), self.expand(request)).await
    }

    async fn controller_get_volume(
        &self,
        request: Request<csi::ControllerGetVolumeRequest>,
    ) -> Result<Response<csi::ControllerGetVolumeResponse>, Status> {
        let id = request.into_inner().volume_id;
        answer("ControllerGetVolume", &id, self.get(&id)).await
    }

    async fn controller_publish_volume(
        &self,
        _: Request<csi::ControllerPublishVolumeRequest>,
    ) -> Result<Response<csi::ControllerPublishVolumeResponse>, Status> {
        Err(unimplemented("ControllerPublishVolume", "nothing is attached to a node"))
    }

    async fn controller_unpublish_volume(
        &self,
        _: Request<csi::ControllerUnpublishVolumeRequest>,
    ) -> Result<Response<csi::ControllerUnpublishVolumeResponse>, Status> {
        Err(unimplemented("ControllerUnpublishVolume", "nothing is attached to a node"))
    }

    async fn create_snapshot(
        &self,
        request: Request<csi::CreateSnapshotRequest>,
    ) -> Result<Response<csi::CreateSnapshotResponse>, Status> {
        let (request, not_found) = (request.into_inner(), |id: &str| self.provisioner.not_found(id));
        let name = request.name.clone();
        answer("CreateSnapshot", &name, snapshot::create(self.snapshots.as_ref(), not_found, request)).await
    }

    async fn delete_snapshot(
        &self,
        request: Request<csi::DeleteSnapshotRequest>,
    ) -> Result<Response<csi::DeleteSnapshotResponse>, Status> {
        let id = request.into_inner().snapshot_id;
        answer("DeleteSnapshot", &id, snapshot::delete(self.snapshots.as_ref(), &id)).await
    }

    async fn list_snapshots(
        &self,
        request: Request<csi::ListSnapshotsRequest>,
    ) -> Result<Response<csi::ListSnapshotsResponse>, Status> {
        answer("ListSnapshots", "", snapshot::list(self.snapshots.as_ref(), request.into_inner())).await
    }

    async fn get_snapshot(
        &self,
        request: Request<csi::GetSnapshotRequest>,
    ) -> Result<Response<csi::GetSnapshotResponse>, Status> {
        let id = request.into_inner().snapshot_id;
        answer("GetSnapshot", &id, snapshot::get(self.snapshots.as_ref(), &id)).await
    }

    async fn controller_modify_volume(
        &self,
        request: Request<csi::ControllerModifyVolumeRequest>,
    ) -> Result<Response<csi::ControllerModifyVolumeResponse>, Status> {
        let request = request.into_inner();
        answer("ControllerModifyVolume", &request.volume_id.clone(), self.modify(request)).await
    }
}

fn unimplemented(call: &str, why: &str) -> Status {
    Status::unimplemented(format!("{call}: {why}"))
}
