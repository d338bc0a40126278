//! A client of a node's CRI server, for what tests do inside pods: `kubectl exec` needs a streaming server.

use std::collections::HashMap;
use std::path::Path;

use anyhow::{Context as _, Result};
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint, Uri};
use tower::service_fn;

use super::api;
use super::api::runtime_service_client::RuntimeServiceClient;
use crate::shim::Output;

/// It connects at the first call, and again after a restart of the node.
#[derive(Debug, Clone)]
pub struct Client {
    runtime: RuntimeServiceClient<Channel>,
}

impl Client {
    /// A client of the socket: see [`super::node::socket`].
    pub fn new(socket: &Path) -> Self {
        let socket = socket.to_owned();
        let connect = service_fn(move |_: Uri| {
            let socket = socket.clone();
            async move { Ok::<_, std::io::Error>(TokioIo::new(UnixStream::connect(socket).await?)) }
        });
        // The address is not used: the connector knows the socket.
        let channel = Endpoint::from_static("http://cri").connect_with_connector_lazy(connect);
        Self { runtime: RuntimeServiceClient::new(channel) }
    }

    /// The runtime service itself.
    pub fn runtime(&mut self) -> &mut RuntimeServiceClient<Channel> {
        &mut self.runtime
    }

    /// Runs a command in a running container to its end.
    ///
    /// # Errors
    /// When there is no such container, or the command can't be run. That it fails is no error: see [`Output::ok`].
    pub async fn exec(&mut self, namespace: &str, pod: &str, container: &str, command: &[&str]) -> Result<Output> {
        let labels = [
            ("io.kubernetes.pod.namespace", namespace),
            ("io.kubernetes.pod.name", pod),
            ("io.kubernetes.container.name", container),
        ];
        let label_selector: HashMap<_, _> = labels.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
        let state = Some(api::ContainerStateValue { state: api::ContainerState::ContainerRunning.into() });
        let filter = Some(api::ContainerFilter { state, label_selector, ..Default::default() });
        let list = self.runtime.list_containers(api::ListContainersRequest { filter }).await?.into_inner();
        let found = list.containers.into_iter().max_by_key(|container| container.created_at);
        let found = found.with_context(|| format!("no container {container} of {namespace}/{pod} runs here"))?;
        let cmd = command.iter().map(|&word| word.to_owned()).collect();
        let request = api::ExecSyncRequest { container_id: found.id, cmd, timeout: 120 };
        let answer = self.runtime.exec_sync(request).await.with_context(|| format!("{command:?} in {pod}"))?;
        let answer = answer.into_inner();
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        Ok(Output { code: answer.exit_code, stdout: text(answer.stdout), stderr: text(answer.stderr) })
    }

    /// Runs a shell command in a running container and gives what it prints.
    ///
    /// # Errors
    /// When it fails.
    pub async fn sh(&mut self, namespace: &str, pod: &str, container: &str, script: &str) -> Result<String> {
        let output = self.exec(namespace, pod, container, &["/bin/sh", "-c", script]).await?;
        output.ok().with_context(|| format!("in {namespace}/{pod}, container {container}: {script}"))
    }
}
