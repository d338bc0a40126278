use tonic::{Request, Response, Status, async_trait};
use zpod_proto::csi::node_server::Node;
use zpod_proto::csi::node_service_capability::rpc::Type as Rpc;
use zpod_proto::csi::node_service_capability::{Rpc as RpcCapability, Type as CapabilityType};
use zpod_proto::csi::volume_usage::Unit;
use zpod_proto::csi::{self, NodeServiceCapability, VolumeCondition, VolumeUsage};

use super::request::{self, int, topology, volume_id};
use super::{answer, capability, ephemeral};
use crate::volumes::{KeyPair, NodeVolumes, PublishRequest, Stats, VolumeError};

const CAPABILITIES: [Rpc; 6] = [
    Rpc::StageUnstageVolume,
    Rpc::GetVolumeStats,
    Rpc::ExpandVolume,
    Rpc::VolumeCondition,
    Rpc::SingleNodeMultiWriter,
    Rpc::VolumeMountGroup,
];

/// Publishes volumes to the pods of this node.
#[derive(Debug)]
pub struct NodeService {
    volumes: NodeVolumes,
}

impl NodeService {
    /// The service of this process.
    pub fn new(volumes: NodeVolumes) -> Self {
        Self { volumes }
    }

    async fn stage(&self, request: csi::NodeStageVolumeRequest) -> Result<csi::NodeStageVolumeResponse, VolumeError> {
        let id = volume_id(self.volumes.context(), &request.volume_id);
        request::path("staging_target_path", &request.staging_target_path)?;
        capability::parse(request.volume_capability.as_ref())?;
        self.volumes.stage(id?).await?;
        Ok(csi::NodeStageVolumeResponse {})
    }

    async fn unstage(
        &self,
        request: csi::NodeUnstageVolumeRequest,
    ) -> Result<csi::NodeUnstageVolumeResponse, VolumeError> {
        request::required("volume_id", &request.volume_id)?;
        request::path("staging_target_path", &request.staging_target_path)?;
        // Staging makes nothing, so there is nothing to remove; least of all the volume.
        Ok(csi::NodeUnstageVolumeResponse {})
    }

    async fn publish(
        &self,
        mut request: csi::NodePublishVolumeRequest,
    ) -> Result<csi::NodePublishVolumeResponse, VolumeError> {
        request::required("volume_id", &request.volume_id)?;
        let target = request::path("target_path", &request.target_path)?;
        let parsed = capability::parse(request.volume_capability.as_ref())
            .and_then(|access| Ok((access, ephemeral::wanted(&request.volume_id, &request.volume_context)?)));
        let (parsed, id) = match (parsed, ephemeral::volume_id(&self.volumes, &request.volume_id)) {
            (parsed, Ok(id)) => (parsed, id),
            (Err(error), Err(_)) | (Ok(_), Err(error)) => return Err(error),
        };
        let parsed = parsed.and_then(|parsed| Ok((parsed, KeyPair::take(id, std::mem::take(&mut request.secrets))?)));
        let ((access, ephemeral), keys) = match parsed {
            Ok(parsed) => parsed,
            // What it was published with before may have been changed since, to what is none.
            Err(error) => return Err(self.volumes.failed_to_publish(id, &target, error).await),
        };
        let request = PublishRequest {
            id,
            target,
            mode: access.mode,
            read_only: request.readonly || access.options.read_only,
            fs_group: access.options.fs_group,
            flags: access.options.flags,
            pod: request::pod(&request.volume_context),
            keys,
        };
        match ephemeral {
            Some(wanted) => self.volumes.publish_ephemeral(wanted, request).await?,
            None => self.volumes.publish(request).await?,
        };
        Ok(csi::NodePublishVolumeResponse {})
    }

    async fn unpublish(
        &self,
        request: csi::NodeUnpublishVolumeRequest,
    ) -> Result<csi::NodeUnpublishVolumeResponse, VolumeError> {
        request::required("volume_id", &request.volume_id)?;
        let target = request::path("target_path", &request.target_path)?;
        // An id that is none of ours was never published.
        if let Ok(id) = ephemeral::volume_id(&self.volumes, &request.volume_id) {
            self.volumes.unpublish(id, target).await?;
        }
        Ok(csi::NodeUnpublishVolumeResponse {})
    }

    async fn stats(
        &self,
        request: csi::NodeGetVolumeStatsRequest,
    ) -> Result<csi::NodeGetVolumeStatsResponse, VolumeError> {
        request::required("volume_id", &request.volume_id)?;
        let path = request::path("volume_path", &request.volume_path)?;
        let id = ephemeral::volume_id(&self.volumes, &request.volume_id)?;
        Ok(describe(self.volumes.stats(id, &path).await?))
    }

    async fn expand(
        &self,
        request: csi::NodeExpandVolumeRequest,
    ) -> Result<csi::NodeExpandVolumeResponse, VolumeError> {
        request::required("volume_id", &request.volume_id)?;
        request::path("volume_path", &request.volume_path)?;
        let id = volume_id(self.volumes.context(), &request.volume_id)?;
        let range = request::range(request.capacity_range.as_ref())?;
        if request.volume_capability.is_some() {
            capability::parse(request.volume_capability.as_ref())?;
        }
        let capacity = self.volumes.expand(id, range).await?;
        Ok(csi::NodeExpandVolumeResponse { capacity_bytes: int(capacity.0) })
    }
}

fn describe(stats: Stats) -> csi::NodeGetVolumeStatsResponse {
    let usage = |[total, used, available]: [u64; 3], unit: Unit| VolumeUsage {
        total: int(total),
        used: int(used),
        available: int(available),
        unit: unit.into(),
    };
    let mut all = vec![usage(stats.bytes, Unit::Bytes)];
    all.extend(stats.inodes.map(|inodes| usage(inodes, Unit::Inodes)));
    let condition = VolumeCondition { abnormal: stats.condition.abnormal, message: stats.condition.message };
    csi::NodeGetVolumeStatsResponse { usage: all, volume_condition: Some(condition) }
}

#[async_trait]
impl Node for NodeService {
    async fn node_stage_volume(
        &self,
        request: Request<csi::NodeStageVolumeRequest>,
    ) -> Result<Response<csi::NodeStageVolumeResponse>, Status> {
        let request = request.into_inner();
        answer("NodeStageVolume", &request.volume_id.clone(), self.stage(request)).await
    }

    async fn node_unstage_volume(
        &self,
        request: Request<csi::NodeUnstageVolumeRequest>,
    ) -> Result<Response<csi::NodeUnstageVolumeResponse>, Status> {
        let request = request.into_inner();
        answer("NodeUnstageVolume", &request.volume_id.clone(), self.unstage(request)).await
    }

    async fn node_publish_volume(
        &self,
        request: Request<csi::NodePublishVolumeRequest>,
    ) -> Result<Response<csi::NodePublishVolumeResponse>, Status> {
        let request = request.into_inner();
        answer("NodePublishVolume", &request.volume_id.clone(), self.publish(request)).await
    }

    async fn node_unpublish_volume(
        &self,
        request: Request<csi::NodeUnpublishVolumeRequest>,
    ) -> Result<Response<csi::NodeUnpublishVolumeResponse>, Status> {
        let request = request.into_inner();
        answer("NodeUnpublishVolume", &request.volume_id.clone(), self.unpublish(request)).await
    }

    async fn node_get_volume_stats(
        &self,
        request: Request<csi::NodeGetVolumeStatsRequest>,
    ) -> Result<Response<csi::NodeGetVolumeStatsResponse>, Status> {
        let request = request.into_inner();
        answer("NodeGetVolumeStats", &request.volume_id.clone(), self.stats(request)).await
    }

    async fn node_expand_volume(
        &self,
        request: Request<csi::NodeExpandVolumeRequest>,
    ) -> Result<Response<csi::NodeExpandVolumeResponse>, Status> {
        let request = request.into_inner();
        answer("NodeExpandVolume", &request.volume_id.clone(), self.expand(request)).await
    }

    async fn node_get_capabilities(
        &self,
        _: Request<csi::NodeGetCapabilitiesRequest>,
    ) -> Result<Response<csi::NodeGetCapabilitiesResponse>, Status> {
        let capability = |rpc: Rpc| NodeServiceCapability {
            r#type: Some(CapabilityType::Rpc(RpcCapability { r#type: rpc.into() })),
        };
        let capabilities = CAPABILITIES.into_iter().map(capability).collect();
        Ok(Response::new(csi::NodeGetCapabilitiesResponse { capabilities }))
    }

    async fn node_get_info(
        &self,
        _: Request<csi::NodeGetInfoRequest>,
    ) -> Result<Response<csi::NodeGetInfoResponse>, Status> {
        let node = self.volumes.node();
        Ok(Response::new(csi::NodeGetInfoResponse {
            node_id: node.to_owned(),
            // No limit of the node's: a VMM has one for the disks of its pod, which the scheduler can't count.
            max_volumes_per_node: 0,
            accessible_topology: Some(topology(node)),
        }))
    }
}
