//! The floor: a CSI driver that does nothing, behind the same csi-provisioner and the same kubelet. What a claim or a
//! pod takes with it is Kubernetes' own time.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use anyhow::{Context as _, Result};
use tokio::net::UnixListener;
use tokio::task::JoinHandle;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::Server;
use tonic::{Request, Response, Status};
use zpod_e2e::authority::Lenient;
use zpod_e2e::cluster::Cluster;
use zpod_e2e::inputs;
use zpod_e2e::process::Process;
use zpod_proto::csi;
use zpod_proto::csi::controller_server::{Controller, ControllerServer};
use zpod_proto::csi::identity_server::{Identity, IdentityServer};
use zpod_proto::csi::node_server::{Node, NodeServer};

use crate::NODE;
use crate::driver::Limits;

const NAME: &str = "floor.zpod.example";
/// As the chart's CSIDriver and classes, for this driver.
const OBJECTS: &str = include_str!("floor.yaml");

/// The driver, its csi-provisioner and its registration with the node's kubelet.
pub(crate) struct Floor {
    provisioner: Option<Process>,
    _registrar: Process,
    service: JoinHandle<()>,
    socket: PathBuf,
    kubeconfig: PathBuf,
    logs: PathBuf,
    published: Published,
}

/// When each target path was published.
type Published = Arc<Mutex<HashMap<String, Instant>>>;

impl Floor {
    pub(crate) async fn start(cluster: &Cluster) -> Result<Self> {
        cluster.apply(OBJECTS).await?;
        let kubelet = cluster.node_dir(NODE).join("var/lib/kubelet");
        let dir = kubelet.join("plugins").join(NAME);
        fs::create_dir_all(&dir).context("make the floor's directory")?;
        let socket = dir.join("csi.sock");
        let published = Published::default();
        let service = serve(&socket, published.clone())?;
        let logs = cluster.dir().join("logs");
        let arguments = [
            format!("--csi-address={}", socket.display()),
            format!("--kubelet-registration-path=/var/lib/kubelet/plugins/{NAME}/csi.sock"),
            format!("--plugin-registration-path={}", kubelet.join("plugins_registry").display()),
        ];
        let arguments = std::iter::once("node-driver-registrar".to_owned()).chain(arguments);
        let registrar = Process::start(&inputs::sidecar()?, arguments, &[], &logs.join("floor-registrar.log"))?;
        cluster
            .wait("the floor is registered", async || {
                let node = cluster.kubectl(&["get", "csinode", NODE, "-o", "jsonpath={.spec.drivers[*].name}"]).await?;
                anyhow::ensure!(node.contains(NAME), "drivers: {node}");
                Ok(())
            })
            .await?;
        let kubeconfig = cluster.kubeconfig().to_owned();
        Ok(Self { provisioner: None, _registrar: registrar, service, socket, kubeconfig, logs, published })
    }

    /// Starts csi-provisioner anew, with the arguments that the chart gives it where they matter here.
    pub(crate) fn limit(&mut self, limits: Limits) -> Result<()> {
        self.provisioner = None;
        let arguments = [
            format!("--csi-address={}", self.socket.display()),
            format!("--kubeconfig={}", self.kubeconfig.display()),
            "--extra-create-metadata".to_owned(),
            "--timeout=60s".to_owned(),
            format!("--worker-threads={}", limits.workers),
            format!("--kube-api-qps={}", limits.qps),
            format!("--kube-api-burst={}", limits.burst),
            "--v=2".to_owned(),
        ];
        let log = self.logs.join("floor-provisioner.log");
        self.provisioner = Some(Process::start(&inputs::kubernetes("csi-provisioner")?, arguments, &[], &log)?);
        Ok(())
    }

    /// When a pod's volume was published.
    pub(crate) fn published(&self) -> HashMap<String, Instant> {
        self.published.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Drop for Floor {
    fn drop(&mut self) {
        self.service.abort();
    }
}

fn serve(socket: &Path, published: Published) -> Result<JoinHandle<()>> {
    let listener = UnixListener::bind(socket).with_context(|| format!("listen on {}", socket.display()))?;
    let driver = Driver { published };
    let server = Server::builder()
        .add_service(IdentityServer::new(driver.clone()))
        .add_service(ControllerServer::new(driver.clone()))
        .add_service(NodeServer::new(driver));
    Ok(tokio::spawn(async move {
        let incoming = UnixListenerStream::new(listener);
        let incoming = tokio_stream::StreamExt::map(incoming, |stream| stream.map(Lenient::new));
        if let Err(error) = server.serve_with_incoming(incoming).await {
            eprintln!("the floor's driver: {error}");
        }
    }))
}

#[derive(Clone)]
struct Driver {
    published: Published,
}

macro_rules! service {
    ($service:path { $($done:tt)* } refuses { $($name:ident($request:ident) -> $response:ident;)* }) => {
        #[tonic::async_trait]
        impl $service for Driver {
            $($done)*
            $(async fn $name(&self, _: Request<csi::$request>) -> Result<Response<csi::$response>, Status> {
                Err(Status::unimplemented(stringify!($name)))
            })*
        }
    };
}

service! { Identity {
    async fn get_plugin_info(
        &self,
        _: Request<csi::GetPluginInfoRequest>,
    ) -> Result<Response<csi::GetPluginInfoResponse>, Status> {
        Ok(Response::new(csi::GetPluginInfoResponse {
            name: NAME.to_owned(),
            vendor_version: "0".to_owned(),
            ..Default::default()
        }))
    }

    async fn get_plugin_capabilities(
        &self,
        _: Request<csi::GetPluginCapabilitiesRequest>,
    ) -> Result<Response<csi::GetPluginCapabilitiesResponse>, Status> {
        use csi::plugin_capability::{Service, Type, service};
        let service = Service { r#type: service::Type::ControllerService.into() };
        let capability = csi::PluginCapability { r#type: Some(Type::Service(service)) };
        Ok(Response::new(csi::GetPluginCapabilitiesResponse { capabilities: vec![capability] }))
    }

    async fn probe(&self, _: Request<csi::ProbeRequest>) -> Result<Response<csi::ProbeResponse>, Status> {
        Ok(Response::new(csi::ProbeResponse { ready: Some(true) }))
    }
} refuses {} }

service! { Controller {
    async fn create_volume(
        &self,
        request: Request<csi::CreateVolumeRequest>,
    ) -> Result<Response<csi::CreateVolumeResponse>, Status> {
        let request = request.into_inner();
        let volume = csi::Volume {
            volume_id: request.name,
            capacity_bytes: request.capacity_range.map_or(0, |range| range.required_bytes),
            ..Default::default()
        };
        Ok(Response::new(csi::CreateVolumeResponse { volume: Some(volume) }))
    }

    async fn delete_volume(
        &self,
        _: Request<csi::DeleteVolumeRequest>,
    ) -> Result<Response<csi::DeleteVolumeResponse>, Status> {
        Ok(Response::new(csi::DeleteVolumeResponse {}))
    }

    async fn controller_get_capabilities(
        &self,
        _: Request<csi::ControllerGetCapabilitiesRequest>,
    ) -> Result<Response<csi::ControllerGetCapabilitiesResponse>, Status> {
        use csi::controller_service_capability::{Rpc, Type, rpc};
        let capability = |kind: rpc::Type| csi::ControllerServiceCapability {
            r#type: Some(Type::Rpc(Rpc { r#type: kind.into() })),
        };
        let capabilities = vec![
            capability(rpc::Type::CreateDeleteVolume),
            // Without it csi-provisioner refuses ReadWriteOncePod.
            capability(rpc::Type::SingleNodeMultiWriter),
        ];
        Ok(Response::new(csi::ControllerGetCapabilitiesResponse { capabilities }))
    }
} refuses {
    controller_publish_volume(ControllerPublishVolumeRequest) -> ControllerPublishVolumeResponse;
    controller_unpublish_volume(ControllerUnpublishVolumeRequest) -> ControllerUnpublishVolumeResponse;
    validate_volume_capabilities(ValidateVolumeCapabilitiesRequest) -> ValidateVolumeCapabilitiesResponse;
    list_volumes(ListVolumesRequest) -> ListVolumesResponse;
    get_capacity(GetCapacityRequest) -> GetCapacityResponse;
    create_snapshot(CreateSnapshotRequest) -> CreateSnapshotResponse;
    delete_snapshot(DeleteSnapshotRequest) -> DeleteSnapshotResponse;
    list_snapshots(ListSnapshotsRequest) -> ListSnapshotsResponse;
    get_snapshot(GetSnapshotRequest) -> GetSnapshotResponse;
    controller_expand_volume(ControllerExpandVolumeRequest) -> ControllerExpandVolumeResponse;
    controller_get_volume(ControllerGetVolumeRequest) -> ControllerGetVolumeResponse;
    controller_modify_volume(ControllerModifyVolumeRequest) -> ControllerModifyVolumeResponse;
} }

service! { Node {
    async fn node_publish_volume(
        &self,
        request: Request<csi::NodePublishVolumeRequest>,
    ) -> Result<Response<csi::NodePublishVolumeResponse>, Status> {
        let target = request.into_inner().target_path;
        self.published.lock().unwrap_or_else(PoisonError::into_inner).entry(target).or_insert_with(Instant::now);
        Ok(Response::new(csi::NodePublishVolumeResponse {}))
    }

    async fn node_unpublish_volume(
        &self,
        _: Request<csi::NodeUnpublishVolumeRequest>,
    ) -> Result<Response<csi::NodeUnpublishVolumeResponse>, Status> {
        Ok(Response::new(csi::NodeUnpublishVolumeResponse {}))
    }

    async fn node_get_capabilities(
        &self,
        _: Request<csi::NodeGetCapabilitiesRequest>,
    ) -> Result<Response<csi::NodeGetCapabilitiesResponse>, Status> {
        use csi::node_service_capability::{Rpc, Type, rpc};
        let kind = rpc::Type::SingleNodeMultiWriter.into();
        let capability = csi::NodeServiceCapability { r#type: Some(Type::Rpc(Rpc { r#type: kind })) };
        Ok(Response::new(csi::NodeGetCapabilitiesResponse { capabilities: vec![capability] }))
    }

    async fn node_get_info(
        &self,
        _: Request<csi::NodeGetInfoRequest>,
    ) -> Result<Response<csi::NodeGetInfoResponse>, Status> {
        Ok(Response::new(csi::NodeGetInfoResponse { node_id: NODE.to_owned(), ..Default::default() }))
    }
} refuses {
    node_stage_volume(NodeStageVolumeRequest) -> NodeStageVolumeResponse;
    node_unstage_volume(NodeUnstageVolumeRequest) -> NodeUnstageVolumeResponse;
    node_get_volume_stats(NodeGetVolumeStatsRequest) -> NodeGetVolumeStatsResponse;
    node_expand_volume(NodeExpandVolumeRequest) -> NodeExpandVolumeResponse;
} }
