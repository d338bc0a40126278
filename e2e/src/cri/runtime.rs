//! Pods and containers: what CRI's calls do to them.

use std::collections::BTreeMap;
use std::fs;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use nix::sys::signal::Signal;
use tokio::sync::watch;
use tokio::time::timeout;

use super::container::{Container, State};
use super::guest::GuestPod;
use super::images::Images;
use super::machine::{Machine, Order};
use super::network::Network;
use super::pod::{Pod, namespaces};
use super::process::program::Program;
use super::process::{Namespaces, Processes};
use super::{api, filesystems};
use crate::shim::{Handler, Output};

/// After SIGKILL only the kernel keeps a process.
const KILLED: Duration = Duration::from_secs(30);

/// The node's pods.
#[derive(Debug)]
pub(super) struct Runtime {
    pub(super) images: Images,
    network: Network,
    guest_handlers: Vec<Handler>,
    dir: PathBuf,
    pods: Mutex<BTreeMap<String, Arc<Pod>>>,
    containers: Mutex<BTreeMap<String, Arc<Container>>>,
}

fn new_id() -> String {
    uuid::Uuid::new_v4().simple().to_string()
}

impl Runtime {
    pub(super) fn new(images: Images, network: Network, guest_handlers: Vec<Handler>, dir: PathBuf) -> Self {
        Self { images, network, guest_handlers, dir, pods: Mutex::default(), containers: Mutex::default() }
    }

    pub(super) fn guest_handlers(&self) -> &[Handler] {
        &self.guest_handlers
    }

    pub(super) fn pods(&self) -> Vec<Arc<Pod>> {
        self.pods.lock().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }

    pub(super) fn pod(&self, id: &str) -> Option<Arc<Pod>> {
        self.pods.lock().unwrap_or_else(PoisonError::into_inner).get(id).cloned()
    }

    pub(super) fn containers(&self) -> Vec<Arc<Container>> {
        self.containers.lock().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }

    pub(super) fn container(&self, id: &str) -> Option<Arc<Container>> {
        self.containers.lock().unwrap_or_else(PoisonError::into_inner).get(id).cloned()
    }

    pub(super) async fn run_pod(&self, config: api::PodSandboxConfig, handler: String) -> Result<String> {
        let id = new_id();
        let on_node = namespaces(&config).network() == api::NamespaceMode::Node;
        let address = if on_node { None } else { Some(self.network.take()?) };
        let machine = match self.machine(&id, &config, &handler, address).await {
            Ok(machine) => machine,
            Err(error) => {
                address.into_iter().for_each(|address| self.network.give_back(address));
                return Err(error);
            }
        };
        if !config.log_directory.is_empty() {
            fs::create_dir_all(&config.log_directory).context("create the pod's log directory")?;
        }
        let created_at = filesystems::now();
        let stopped = AtomicBool::new(false);
        let pod = Pod { id: id.clone(), config, handler, created_at, address, machine, stopped };
        eprintln!("pod {}: {id} runs, address {address:?}", pod.name());
        self.pods.lock().unwrap_or_else(PoisonError::into_inner).insert(id.clone(), Arc::new(pod));
        Ok(id)
    }

    async fn machine(
        &self,
        id: &str,
        config: &api::PodSandboxConfig,
        handler: &str,
        address: Option<Ipv4Addr>,
    ) -> Result<Arc<dyn Machine>> {
        if let Some(known) = self.guest_handlers.iter().find(|known| known.name == handler) {
            return Ok(Arc::new(GuestPod::start(id, &config.hostname, known).await?));
        }
        if !handler.is_empty() {
            bail!("unknown runtime handler {handler:?}: this node has {:?}", self.guest_handlers);
        }
        let options = namespaces(config);
        if options.userns_options.as_ref().is_some_and(|users| users.mode() == api::NamespaceMode::Pod) {
            bail!("user namespaces are not supported");
        }
        let own = Namespaces {
            hostname: address.map(|_| config.hostname.clone()),
            ipc: options.ipc() != api::NamespaceMode::Node,
            pids: options.pid() == api::NamespaceMode::Pod,
        };
        let attach = address.map(|address| (address, &self.network));
        Ok(Arc::new(Processes::start(own, attach, self.dir.join(id), files(config)).await?))
    }

    pub(super) async fn stop_pod(&self, id: &str) -> Result<()> {
        let Some(pod) = self.pod(id) else { return Ok(()) };
        for container in self.containers().into_iter().filter(|container| container.pod.id == id) {
            self.stop_container(&container.id, 0).await?;
        }
        pod.machine.stop().await;
        if !pod.stopped.swap(true, Ordering::Relaxed) {
            eprintln!("pod {}: {id} is stopped", pod.name());
            pod.address.into_iter().for_each(|address| self.network.give_back(address));
        }
        Ok(())
    }

    pub(super) async fn remove_pod(&self, id: &str) -> Result<()> {
        self.stop_pod(id).await?;
        for container in self.containers().into_iter().filter(|container| container.pod.id == id) {
            self.remove_container(&container.id).await?;
        }
        self.pods.lock().unwrap_or_else(PoisonError::into_inner).remove(id);
        match fs::remove_dir(self.dir.join(id)) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(error).context("remove the pod's directory")
            }
            _ => Ok(()),
        }
    }

    pub(super) async fn create_container(&self, request: api::CreateContainerRequest) -> Result<String> {
        let pod = self.pod(&request.pod_sandbox_id).with_context(|| format!("no pod {}", request.pod_sandbox_id))?;
        let config = request.config.context("no container config")?;
        let image = self.images.get(&config.image.clone().unwrap_or_default().image)?;
        let program = Program::new(&config, &image)?;
        let log = match (pod.config.log_directory.as_str(), config.log_path.as_str()) {
            ("", _) | (_, "") => PathBuf::from("/dev/null"),
            (dir, name) => Path::new(dir).join(name),
        };
        let (id, image_id) = (new_id(), image.id.clone());
        let order = Order { id: id.clone(), image, program, log: log.clone(), config: config.clone() };
        pod.machine.create(order).await?;
        let (state, created_at) = (watch::Sender::new(State::Created), filesystems::now());
        let container = Container { id: id.clone(), pod, config, image_id, log, created_at, state };
        self.containers.lock().unwrap_or_else(PoisonError::into_inner).insert(id.clone(), Arc::new(container));
        Ok(id)
    }

    pub(super) async fn start_container(&self, id: &str) -> Result<()> {
        let container = self.container(id).with_context(|| format!("no container {id}"))?;
        if *container.state.borrow() != State::Created {
            bail!("container {id} was started already");
        }
        let end = match container.pod.machine.start(id).await {
            Ok(end) => end,
            Err(error) => {
                container.state.send_replace(State::not_started(format!("{error:#}")));
                return Err(error);
            }
        };
        let since = filesystems::now();
        container.state.send_replace(State::Running { since });
        tokio::spawn(async move {
            let code = end.await.unwrap_or(255);
            eprintln!("container {}: ended with {code}", container.name());
            container.state.send_replace(State::ended(since, code));
        });
        Ok(())
    }

    /// SIGTERM, and SIGKILL after so many seconds.
    pub(super) async fn stop_container(&self, id: &str, patience: i64) -> Result<()> {
        let Some(container) = self.container(id) else { return Ok(()) };
        if *container.state.borrow() == State::Created {
            return Ok(());
        }
        let mut state = container.state.subscribe();
        let patience = Duration::from_secs(u64::try_from(patience).unwrap_or_default());
        for (signal, patience) in [(Signal::SIGTERM, patience), (Signal::SIGKILL, KILLED)] {
            if container.state.borrow().has_ended() {
                return Ok(());
            }
            if patience.is_zero() {
                continue;
            }
            // It may have ended meanwhile: a guest removes it at once, and reports the end when its disks are unplugged.
            let _ = container.pod.machine.signal(id, signal).await;
            if timeout(patience, state.wait_for(State::has_ended)).await.is_ok() {
                return Ok(());
            }
        }
        if !container.pod.machine.runs() {
            return Ok(());
        }
        bail!("container {} doesn't end: SIGKILL was {KILLED:?} ago", container.name())
    }

    pub(super) async fn remove_container(&self, id: &str) -> Result<()> {
        let Some(container) = self.container(id) else { return Ok(()) };
        self.stop_container(id, 0).await?;
        container.pod.machine.remove(id).await?;
        self.containers.lock().unwrap_or_else(PoisonError::into_inner).remove(id);
        Ok(())
    }

    pub(super) async fn exec(&self, id: &str, command: Vec<String>) -> Result<Output> {
        let container = self.container(id).with_context(|| format!("no container {id}"))?;
        if !container.runs() {
            bail!("container {} doesn't run", container.name());
        }
        container.pod.machine.exec(id, command).await
    }
}

/// What the runtime itself puts into a container: kubelet's part is `/etc/hosts`.
fn files(config: &api::PodSandboxConfig) -> Vec<(String, String)> {
    let dns = config.dns_config.clone().unwrap_or_default();
    let mut resolver: String = dns.servers.iter().map(|server| format!("nameserver {server}\n")).collect();
    for (word, values) in [("search", dns.searches), ("options", dns.options)] {
        if !values.is_empty() {
            resolver += &format!("{word} {}\n", values.join(" "));
        }
    }
    vec![("/etc/resolv.conf".to_owned(), resolver), ("/etc/hostname".to_owned(), format!("{}\n", config.hostname))]
}
