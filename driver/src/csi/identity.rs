use std::sync::Arc;

use tonic::{Request, Response, Status, async_trait};
use zpod_proto::csi::identity_server::Identity;
use zpod_proto::csi::plugin_capability::service::Type as ServiceType;
use zpod_proto::csi::plugin_capability::volume_expansion::Type as ExpansionType;
use zpod_proto::csi::plugin_capability::{Service, Type, VolumeExpansion};
use zpod_proto::csi::{
    GetPluginCapabilitiesRequest, GetPluginCapabilitiesResponse, GetPluginInfoRequest, GetPluginInfoResponse,
    PluginCapability, ProbeRequest, ProbeResponse,
};

use super::DRIVER;
use crate::volumes::Probe;

/// Who the driver is, and whether it can work.
#[derive(Debug)]
pub struct IdentityService {
    probe: Arc<dyn Probe>,
}

impl IdentityService {
    /// The service of this process.
    pub fn new(probe: Arc<dyn Probe>) -> Self {
        Self { probe }
    }
}

#[async_trait]
impl Identity for IdentityService {
    async fn get_plugin_info(
        &self,
        _: Request<GetPluginInfoRequest>,
    ) -> Result<Response<GetPluginInfoResponse>, Status> {
        Ok(Response::new(GetPluginInfoResponse {
            name: DRIVER.into(),
            vendor_version: env!("CARGO_PKG_VERSION").into(),
            manifest: Default::default(),
        }))
    }

    async fn get_plugin_capabilities(
        &self,
        _: Request<GetPluginCapabilitiesRequest>,
    ) -> Result<Response<GetPluginCapabilitiesResponse>, Status> {
        let service = |kind: ServiceType| Type::Service(Service { r#type: kind.into() });
        let kinds = [
            service(ServiceType::ControllerService),
            service(ServiceType::VolumeAccessibilityConstraints),
            service(ServiceType::GroupControllerService),
            Type::VolumeExpansion(VolumeExpansion { r#type: ExpansionType::Online.into() }),
        ];
        let capabilities = kinds.into_iter().map(|kind| PluginCapability { r#type: Some(kind) }).collect();
        Ok(Response::new(GetPluginCapabilitiesResponse { capabilities }))
    }

    async fn probe(&self, _: Request<ProbeRequest>) -> Result<Response<ProbeResponse>, Status> {
        match self.probe.probe().await {
            Ok(()) => Ok(Response::new(ProbeResponse { ready: Some(true) })),
            // CSI 1.12, Probe: "the plugin is not in a healthy/ready state" is FAILED_PRECONDITION.
            Err(reason) => Err(Status::failed_precondition(reason)),
        }
    }
}
