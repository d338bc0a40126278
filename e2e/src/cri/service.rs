//! CRI's runtime service: parse, call, map.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Result;
use tokio::time::timeout;
use tonic::{Request, Response, Status};

use super::api::runtime_service_server::RuntimeService;
use super::runtime::Runtime;
use super::{api, statistics};

/// The service on a node's pods.
#[derive(Debug, Clone)]
pub(super) struct Service {
    runtime: Arc<Runtime>,
}

impl Service {
    pub(super) fn new(runtime: Arc<Runtime>) -> Self {
        Self { runtime }
    }
}

type Answer<T> = Result<Response<T>, Status>;

fn answer<T>(message: T) -> Answer<T> {
    Ok(Response::new(message))
}

fn not_found(what: &str, id: &str) -> Status {
    Status::not_found(format!("no {what} {id}"))
}

/// Runs to its end even where kubelet gives up: half a pod would be nobody's.
async fn whole<T: Send + 'static>(work: impl Future<Output = Result<T>> + Send + 'static) -> Result<T, Status> {
    let result = tokio::spawn(work).await.map_err(|error| Status::internal(error.to_string()))?;
    result.map_err(|error| Status::unknown(format!("{error:#}")))
}

#[tonic::async_trait]
impl RuntimeService for Service {
    async fn version(&self, _: Request<api::VersionRequest>) -> Answer<api::VersionResponse> {
        answer(api::VersionResponse {
            version: "0.1.0".into(),
            runtime_name: "zpod-e2e".into(),
            runtime_version: env!("CARGO_PKG_VERSION").into(),
            runtime_api_version: "v1".into(),
        })
    }

    async fn status(&self, _: Request<api::StatusRequest>) -> Answer<api::StatusResponse> {
        let conditions = ["RuntimeReady", "NetworkReady"].map(|kind| api::RuntimeCondition {
            r#type: kind.into(),
            status: true,
            ..Default::default()
        });
        let handlers =
            std::iter::once("").chain(self.runtime.guest_handlers().iter().map(|handler| handler.name.as_str()));
        answer(api::StatusResponse {
            status: Some(api::RuntimeStatus { conditions: conditions.into() }),
            runtime_handlers: handlers.map(|name| api::RuntimeHandler { name: name.into() }).collect(),
        })
    }

    async fn runtime_config(&self, _: Request<api::RuntimeConfigRequest>) -> Answer<api::RuntimeConfigResponse> {
        let driver = api::CgroupDriver::Cgroupfs.into();
        answer(api::RuntimeConfigResponse { linux: Some(api::LinuxRuntimeConfiguration { cgroup_driver: driver }) })
    }

    async fn update_runtime_config(
        &self,
        _: Request<api::UpdateRuntimeConfigRequest>,
    ) -> Answer<api::UpdateRuntimeConfigResponse> {
        // The node's pod CIDR; the addresses are given on the command line.
        answer(api::UpdateRuntimeConfigResponse {})
    }

    async fn run_pod_sandbox(&self, request: Request<api::RunPodSandboxRequest>) -> Answer<api::RunPodSandboxResponse> {
        let (request, runtime) = (request.into_inner(), Arc::clone(&self.runtime));
        let config = request.config.ok_or_else(|| Status::invalid_argument("no pod config"))?;
        let run = async move { runtime.run_pod(config, request.runtime_handler).await };
        answer(api::RunPodSandboxResponse { pod_sandbox_id: whole(run).await? })
    }

    async fn stop_pod_sandbox(
        &self,
        request: Request<api::StopPodSandboxRequest>,
    ) -> Answer<api::StopPodSandboxResponse> {
        let (id, runtime) = (request.into_inner().pod_sandbox_id, Arc::clone(&self.runtime));
        whole(async move { runtime.stop_pod(&id).await }).await?;
        answer(api::StopPodSandboxResponse {})
    }

    async fn remove_pod_sandbox(
        &self,
        request: Request<api::RemovePodSandboxRequest>,
    ) -> Answer<api::RemovePodSandboxResponse> {
        let (id, runtime) = (request.into_inner().pod_sandbox_id, Arc::clone(&self.runtime));
        whole(async move { runtime.remove_pod(&id).await }).await?;
        answer(api::RemovePodSandboxResponse {})
    }

    async fn pod_sandbox_status(
        &self,
        request: Request<api::PodSandboxStatusRequest>,
    ) -> Answer<api::PodSandboxStatusResponse> {
        let id = request.into_inner().pod_sandbox_id;
        let pod = self.runtime.pod(&id).ok_or_else(|| not_found("pod", &id))?;
        answer(api::PodSandboxStatusResponse { status: Some(pod.status()) })
    }

    async fn list_pod_sandbox(
        &self,
        request: Request<api::ListPodSandboxRequest>,
    ) -> Answer<api::ListPodSandboxResponse> {
        let filter = request.into_inner().filter.unwrap_or_default();
        let pods = self.runtime.pods();
        let items = pods.iter().filter(|pod| pod.matches(&filter)).map(|pod| pod.item()).collect();
        answer(api::ListPodSandboxResponse { items })
    }

    async fn create_container(
        &self,
        request: Request<api::CreateContainerRequest>,
    ) -> Answer<api::CreateContainerResponse> {
        let (request, runtime) = (request.into_inner(), Arc::clone(&self.runtime));
        let create = async move { runtime.create_container(request).await };
        answer(api::CreateContainerResponse { container_id: whole(create).await? })
    }

    async fn start_container(
        &self,
        request: Request<api::StartContainerRequest>,
    ) -> Answer<api::StartContainerResponse> {
        let (id, runtime) = (request.into_inner().container_id, Arc::clone(&self.runtime));
        whole(async move { runtime.start_container(&id).await }).await?;
        answer(api::StartContainerResponse {})
    }

    async fn stop_container(&self, request: Request<api::StopContainerRequest>) -> Answer<api::StopContainerResponse> {
        let (request, runtime) = (request.into_inner(), Arc::clone(&self.runtime));
        whole(async move { runtime.stop_container(&request.container_id, request.timeout).await }).await?;
        answer(api::StopContainerResponse {})
    }

    async fn remove_container(
        &self,
        request: Request<api::RemoveContainerRequest>,
    ) -> Answer<api::RemoveContainerResponse> {
        let (id, runtime) = (request.into_inner().container_id, Arc::clone(&self.runtime));
        whole(async move { runtime.remove_container(&id).await }).await?;
        answer(api::RemoveContainerResponse {})
    }

    async fn list_containers(
        &self,
        request: Request<api::ListContainersRequest>,
    ) -> Answer<api::ListContainersResponse> {
        let filter = request.into_inner().filter.unwrap_or_default();
        let all = self.runtime.containers();
        let containers = all.iter().filter(|container| container.matches(&filter));
        answer(api::ListContainersResponse { containers: containers.map(|container| container.item()).collect() })
    }

    async fn container_status(
        &self,
        request: Request<api::ContainerStatusRequest>,
    ) -> Answer<api::ContainerStatusResponse> {
        let id = request.into_inner().container_id;
        let container = self.runtime.container(&id).ok_or_else(|| not_found("container", &id))?;
        answer(api::ContainerStatusResponse { status: Some(container.status()) })
    }

    async fn update_container_resources(
        &self,
        _: Request<api::UpdateContainerResourcesRequest>,
    ) -> Answer<api::UpdateContainerResourcesResponse> {
        answer(api::UpdateContainerResourcesResponse {})
    }

    async fn exec_sync(&self, request: Request<api::ExecSyncRequest>) -> Answer<api::ExecSyncResponse> {
        let api::ExecSyncRequest { container_id, cmd, timeout: seconds } = request.into_inner();
        let deadline = Duration::from_secs(match u64::try_from(seconds) {
            Ok(0) | Err(_) => u64::from(u32::MAX),
            Ok(seconds) => seconds,
        });
        let exec = self.runtime.exec(&container_id, cmd);
        // kubelet tells a probe's timeout by this code.
        let late = |_| Status::deadline_exceeded(format!("the command takes longer than {deadline:?}"));
        let output = timeout(deadline, exec).await.map_err(late)?;
        let output = output.map_err(|error| Status::unknown(format!("{error:#}")))?;
        answer(api::ExecSyncResponse {
            stdout: output.stdout.into_bytes(),
            stderr: output.stderr.into_bytes(),
            exit_code: output.code,
        })
    }

    async fn container_stats(
        &self,
        request: Request<api::ContainerStatsRequest>,
    ) -> Answer<api::ContainerStatsResponse> {
        let id = request.into_inner().container_id;
        let container = self.runtime.container(&id).ok_or_else(|| not_found("container", &id))?;
        answer(api::ContainerStatsResponse { stats: Some(statistics::of(&container)) })
    }

    async fn list_container_stats(
        &self,
        request: Request<api::ListContainerStatsRequest>,
    ) -> Answer<api::ListContainerStatsResponse> {
        let asked = request.into_inner().filter.unwrap_or_default();
        let api::ContainerStatsFilter { id, pod_sandbox_id, label_selector } = asked;
        let filter = api::ContainerFilter { id, pod_sandbox_id, label_selector, state: None };
        let all = self.runtime.containers();
        let running = all.iter().filter(|container| container.runs() && container.matches(&filter));
        answer(api::ListContainerStatsResponse { stats: running.map(|container| statistics::of(container)).collect() })
    }
}
