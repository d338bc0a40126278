//! A pod on a node of its own, by CRI calls.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use serde_json::json;
use tokio::time::{Instant, sleep};
use zpod_e2e::cri::api::{self, LinuxContainerSecurityContext, NamespaceMode};
use zpod_e2e::cri::client::Client;
use zpod_e2e::cri::node;
use zpod_e2e::inputs;
use zpod_e2e::process::Process;
use zpod_e2e::workdir::Workdir;

const READY: Duration = Duration::from_secs(120);

/// One pod, on the machine's network, and the node it runs on.
pub(crate) struct Pod {
    cri: Client,
    id: String,
    logs: PathBuf,
    // Ends before its directory is removed.
    node: Process,
    _dir: Workdir,
}

/// A busybox container that does nothing.
pub(crate) fn sleeper(
    name: &str,
    mounts: impl IntoIterator<Item = api::Mount>,
    security: LinuxContainerSecurityContext,
) -> api::ContainerConfig {
    api::ContainerConfig {
        metadata: Some(api::ContainerMetadata { name: name.to_owned(), attempt: 0 }),
        image: Some(api::ImageSpec { image: "busybox".to_owned(), ..Default::default() }),
        command: ["/bin/sleep", "100000"].map(str::to_owned).to_vec(),
        mounts: mounts.into_iter().collect(),
        log_path: format!("{name}.log"),
        linux: Some(api::LinuxContainerConfig { security_context: Some(with_own_processes(security)) }),
        ..Default::default()
    }
}

/// As kubelet asks for it unless the pod says otherwise.
fn with_own_processes(security: LinuxContainerSecurityContext) -> LinuxContainerSecurityContext {
    LinuxContainerSecurityContext { namespace_options: Some(namespaces()), ..security }
}

fn namespaces() -> api::NamespaceOption {
    api::NamespaceOption {
        network: NamespaceMode::Node.into(),
        pid: NamespaceMode::Container.into(),
        ipc: NamespaceMode::Pod.into(),
        ..Default::default()
    }
}

impl Pod {
    pub(crate) async fn start() -> Result<Self> {
        let dir = Workdir::new()?;
        let (root, images, logs) = (dir.subdirectory("n")?, dir.subdirectory("images")?, dir.subdirectory("logs")?);
        let rootfs = dir.subdirectory("busybox")?;
        for name in ["bin", "mnt"] {
            fs::create_dir(rootfs.join(name))?;
        }
        let busybox = inputs::busybox()?;
        fs::copy(&busybox, rootfs.join("bin/busybox"))?;
        let list = Command::new(&busybox).arg("--list").output()?.stdout;
        for applet in String::from_utf8(list)?.lines().filter(|applet| *applet != "busybox") {
            symlink("busybox", rootfs.join("bin").join(applet))?;
        }
        let image = json!({"references": ["busybox"], "rootfs": rootfs});
        fs::write(images.join("busybox.json"), image.to_string())?;

        let show = |path: &PathBuf| path.display().to_string();
        let arguments = ["--name", "node", "--root", &show(&root), "--images", &show(&images)];
        let mut node = Process::start(&inputs::node_program()?, arguments, &[], &dir.path().join("node.log"))?;
        let mut cri = Client::new(&node::socket(&root));
        let security = api::LinuxSandboxSecurityContext { namespace_options: Some(namespaces()) };
        let config = api::PodSandboxConfig {
            metadata: Some(api::PodSandboxMetadata { name: "pod".to_owned(), ..Default::default() }),
            log_directory: show(&logs),
            linux: Some(api::LinuxPodSandboxConfig { security_context: Some(security) }),
            ..Default::default()
        };
        let end = Instant::now() + READY;
        while let Err(error) = cri.runtime().version(api::VersionRequest::default()).await {
            node.must_run()?;
            if Instant::now() >= end {
                bail!("the node doesn't answer: {error}");
            }
            sleep(Duration::from_millis(20)).await;
        }
        let request = api::RunPodSandboxRequest { config: Some(config), runtime_handler: String::new() };
        let answer = cri.runtime().run_pod_sandbox(request).await.with_context(|| node.tail())?;
        Ok(Self { cri, id: answer.into_inner().pod_sandbox_id, logs, node, _dir: dir })
    }

    /// Creates and starts a container; gives its id.
    pub(crate) async fn run(&mut self, config: api::ContainerConfig) -> Result<String> {
        self.node.must_run()?;
        let pod_sandbox_id = self.id.clone();
        let request = api::CreateContainerRequest { pod_sandbox_id, config: Some(config), sandbox_config: None };
        let container_id = self.cri.runtime().create_container(request).await?.into_inner().container_id;
        let request = api::StartContainerRequest { container_id: container_id.clone() };
        self.cri.runtime().start_container(request).await?;
        Ok(container_id)
    }

    /// Runs a shell command in a container and gives what it prints.
    pub(crate) async fn sh(&mut self, container: &str, script: &str) -> Result<String> {
        let cmd = ["/bin/sh", "-c", script].map(str::to_owned).to_vec();
        let request = api::ExecSyncRequest { container_id: container.to_owned(), cmd, timeout: 20 };
        let answer = self.cri.runtime().exec_sync(request).await?.into_inner();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim_end().to_owned();
        if answer.exit_code != 0 {
            bail!("{script}: exit code {}: {}", answer.exit_code, text(&answer.stderr));
        }
        Ok(text(&answer.stdout))
    }

    /// Stops a container; gives its exit code.
    pub(crate) async fn stop(&mut self, container: &str, timeout: i64) -> Result<i32> {
        let container_id = container.to_owned();
        let request = api::StopContainerRequest { container_id: container_id.clone(), timeout };
        self.cri.runtime().stop_container(request).await?;
        let request = api::ContainerStatusRequest { container_id, verbose: false };
        let status = self.cri.runtime().container_status(request).await?.into_inner().status.context("no status")?;
        if status.state() != api::ContainerState::ContainerExited {
            bail!("it was stopped, and is {:?}", status.state());
        }
        Ok(status.exit_code)
    }

    pub(crate) async fn remove(&mut self, container: &str) -> Result<()> {
        let request = api::RemoveContainerRequest { container_id: container.to_owned() };
        self.cri.runtime().remove_container(request).await?;
        Ok(())
    }

    /// What a container of this name printed.
    pub(crate) fn log(&self, container: &str) -> Result<String> {
        let path = self.logs.join(format!("{container}.log"));
        fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))
    }
}
