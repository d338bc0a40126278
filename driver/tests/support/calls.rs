//! CSI calls as Kubernetes' components make them.

use std::path::Path;

use tonic::Status;
use tonic::transport::Channel;
use zpod_proto::csi::controller_client::ControllerClient;
use zpod_proto::csi::node_client::NodeClient;
use zpod_proto::csi::volume_capability::access_mode::Mode;
use zpod_proto::csi::volume_capability::{AccessMode, AccessType, MountVolume};
use zpod_proto::csi::{self, CapacityRange, VolumeCapability};

/// Controller and node of one process.
#[derive(Clone)]
pub(crate) struct Calls {
    controller: ControllerClient<Channel>,
    node: NodeClient<Channel>,
}

pub(crate) fn capability() -> VolumeCapability {
    VolumeCapability {
        access_type: Some(AccessType::Mount(MountVolume::default())),
        access_mode: Some(AccessMode { mode: Mode::SingleNodeWriter.into() }),
    }
}

fn range(bytes: i64) -> Option<CapacityRange> {
    Some(CapacityRange { required_bytes: bytes, limit_bytes: 0 })
}

fn text(path: &Path) -> String {
    path.to_str().unwrap().to_owned()
}

impl Calls {
    pub(crate) fn new(channel: Channel) -> Self {
        Self { controller: ControllerClient::new(channel.clone()), node: NodeClient::new(channel) }
    }

    pub(crate) async fn create(&mut self, name: &str, bytes: i64) -> Result<csi::Volume, Status> {
        let request = csi::CreateVolumeRequest {
            name: name.into(),
            capacity_range: range(bytes),
            volume_capabilities: vec![capability()],
            ..Default::default()
        };
        Ok(self.controller.create_volume(request).await?.into_inner().volume.unwrap())
    }

    pub(crate) async fn delete(&mut self, id: &str) -> Result<(), Status> {
        let request = csi::DeleteVolumeRequest { volume_id: id.into(), ..Default::default() };
        self.controller.delete_volume(request).await.map(drop)
    }

    pub(crate) async fn get(&mut self, id: &str) -> Result<csi::ControllerGetVolumeResponse, Status> {
        let request = csi::ControllerGetVolumeRequest { volume_id: id.into() };
        Ok(self.controller.controller_get_volume(request).await?.into_inner())
    }

    pub(crate) async fn expand(&mut self, id: &str, bytes: i64) -> Result<i64, Status> {
        let request = csi::ControllerExpandVolumeRequest {
            volume_id: id.into(),
            capacity_range: range(bytes),
            ..Default::default()
        };
        Ok(self.controller.controller_expand_volume(request).await?.into_inner().capacity_bytes)
    }

    pub(crate) async fn modify(&mut self, id: &str, parameters: &[(&str, &str)]) -> Result<(), Status> {
        let mutable_parameters = parameters.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned()));
        let request = csi::ControllerModifyVolumeRequest {
            volume_id: id.into(),
            mutable_parameters: mutable_parameters.collect(),
            ..Default::default()
        };
        self.controller.controller_modify_volume(request).await.map(drop)
    }

    pub(crate) async fn stage(&mut self, id: &str, staging: &Path) -> Result<(), Status> {
        let request = csi::NodeStageVolumeRequest {
            volume_id: id.into(),
            staging_target_path: text(staging),
            volume_capability: Some(capability()),
            ..Default::default()
        };
        self.node.node_stage_volume(request).await.map(drop)
    }

    pub(crate) async fn unstage(&mut self, id: &str, staging: &Path) -> Result<(), Status> {
        let request = csi::NodeUnstageVolumeRequest { volume_id: id.into(), staging_target_path: text(staging) };
        self.node.node_unstage_volume(request).await.map(drop)
    }

    pub(crate) async fn publish(&mut self, id: &str, target: &Path) -> Result<(), Status> {
        self.publish_as(Self::publication(id, target)).await
    }

    /// A writable publication without a pod.
    pub(crate) fn publication(id: &str, target: &Path) -> csi::NodePublishVolumeRequest {
        csi::NodePublishVolumeRequest {
            volume_id: id.into(),
            target_path: text(target),
            staging_target_path: "/staging".into(),
            volume_capability: Some(capability()),
            ..Default::default()
        }
    }

    pub(crate) async fn publish_as(&mut self, request: csi::NodePublishVolumeRequest) -> Result<(), Status> {
        self.node.node_publish_volume(request).await.map(drop)
    }

    pub(crate) async fn unpublish(&mut self, id: &str, target: &Path) -> Result<(), Status> {
        let request = csi::NodeUnpublishVolumeRequest { volume_id: id.into(), target_path: text(target) };
        self.node.node_unpublish_volume(request).await.map(drop)
    }

    pub(crate) async fn stats(&mut self, id: &str, path: &Path) -> Result<csi::NodeGetVolumeStatsResponse, Status> {
        let request =
            csi::NodeGetVolumeStatsRequest { volume_id: id.into(), volume_path: text(path), ..Default::default() };
        Ok(self.node.node_get_volume_stats(request).await?.into_inner())
    }

    pub(crate) async fn node_expand(&mut self, id: &str, path: &Path) -> Result<i64, Status> {
        let request =
            csi::NodeExpandVolumeRequest { volume_id: id.into(), volume_path: text(path), ..Default::default() };
        Ok(self.node.node_expand_volume(request).await?.into_inner().capacity_bytes)
    }

    pub(crate) async fn capacity(&mut self) -> Result<csi::GetCapacityResponse, Status> {
        Ok(self.controller.get_capacity(csi::GetCapacityRequest::default()).await?.into_inner())
    }

    pub(crate) async fn list(&mut self, max_entries: i32, token: &str) -> Result<csi::ListVolumesResponse, Status> {
        let request = csi::ListVolumesRequest { max_entries, starting_token: token.into() };
        Ok(self.controller.list_volumes(request).await?.into_inner())
    }

    pub(crate) async fn create_as(&mut self, request: csi::CreateVolumeRequest) -> Result<csi::Volume, Status> {
        Ok(self.controller.create_volume(request).await?.into_inner().volume.unwrap())
    }
}
