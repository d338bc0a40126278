//! Plays Kata's shim for one pod.

mod container;
mod control;
mod exec;
mod handler;
mod monitor;
mod runtime;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, Result, bail};
use tokio::time::{Instant, sleep, timeout};
use zpod_proto::agent;

use crate::PATIENCE;
use crate::agent::{AgentClient, AgentError, SetGuestDateTimeRequest};
use crate::direct_volume::DirectVolume;
use crate::node::Node;
use crate::qemu::{Boot, Guest, Plug};

pub use container::{Container, Device, Mount, User};
pub use exec::{Output, Running};
pub use handler::Handler;
pub use monitor::Monitor;
pub use runtime::{Runtime, Vmm};

/// A container and the disks that it uses.
#[derive(Debug, Default)]
struct Held {
    /// PCI paths.
    disks: Vec<String>,
    capabilities: agent::LinuxCapabilities,
}

/// A disk that was plugged in.
#[derive(Debug)]
struct Disk {
    device: PathBuf,
    source: String,
    users: usize,
    /// The shim finds it again by its path.
    known: bool,
    /// It is a block device of a container.
    block: bool,
}

/// A pod: a guest, the agent in it, its containers.
#[derive(Debug)]
pub struct Sandbox {
    runtime: Runtime,
    agent: AgentClient,
    guest: Guest,
    _monitor: Monitor,
    direct_volumes: PathBuf,
    hostname: String,
    vmm: Vmm,
    plugs_disks: bool,
    disks: Vec<Disk>,
    containers: HashMap<String, Held>,
    substitutes: HashMap<PathBuf, PathBuf>,
    execs: u64,
    /// From power-on to the agent's first answer.
    pub boot_time: Duration,
    /// What the last CreateContainer took, from the request to its answer.
    pub create_time: Duration,
}

impl Sandbox {
    /// Boots a guest and creates the sandbox in it.
    ///
    /// # Errors
    /// When the agent doesn't answer in time.
    pub async fn start(node: &Node, runtime: Runtime) -> Result<Self> {
        Self::start_with(node, runtime, Boot::FromTemplate).await
    }

    /// The same, with a choice of what the guest starts.
    ///
    /// # Errors
    /// When the agent doesn't answer in time.
    pub async fn start_with(node: &Node, runtime: Runtime, boot: Boot) -> Result<Self> {
        let id = uuid::Uuid::new_v4().simple().to_string();
        let guest = Guest::boot(boot).await?;
        Self::start_in(&node.kata_run_dir(), node.direct_volume_dir(), id, "e2e", runtime, guest).await
    }

    /// The same in a guest that boots already, with the directories and the names of the caller's choice.
    ///
    /// # Errors
    /// When the agent doesn't answer in time.
    pub async fn start_in(
        run_dir: &Path,
        direct_volumes: PathBuf,
        id: String,
        hostname: &str,
        runtime: Runtime,
        mut guest: Guest,
    ) -> Result<Self> {
        let agent = match connect(&mut guest).await {
            Ok(agent) => agent,
            Err(error) => return Err(guest.explain(error)),
        };
        let boot_time = guest.power_on.elapsed();
        if guest.is_restored() {
            set_clock(&agent).await?;
        }
        let monitor = Monitor::serve(run_dir, &id, &guest.vsock())?;
        let request = agent::CreateSandboxRequest { hostname: hostname.into(), sandbox_id: id, ..Default::default() };
        if let Err(error) = agent.run("CreateSandbox", &request).await {
            return Err(guest.explain(error.into()));
        }
        Ok(Self {
            runtime,
            agent,
            guest,
            _monitor: monitor,
            direct_volumes,
            hostname: hostname.to_owned(),
            vmm: Vmm::Qemu,
            plugs_disks: true,
            disks: Vec::new(),
            containers: HashMap::new(),
            substitutes: HashMap::new(),
            execs: 0,
            boot_time,
            create_time: Duration::ZERO,
        })
    }

    /// From now on disks are taken as by this VMM.
    pub fn play(&mut self, vmm: Vmm) {
        self.vmm = vmm;
    }

    /// From now on no disk is plugged in: Kata's configuration has `disable_block_device_use = true`.
    pub fn disable_disks(&mut self) {
        self.plugs_disks = false;
    }

    /// From now on another device is plugged in where this one should be: an attacker's or an operator's mistake.
    pub fn substitute(&mut self, device: &Path, other: &Path) {
        self.substitutes.insert(device.to_owned(), other.to_owned());
    }

    /// Creates and starts a container. Its disks are plugged in first; where it fails they are unplugged again.
    ///
    /// # Errors
    /// When the agent refuses; the text is what kubelet would show.
    pub async fn run(&mut self, container: Container) -> Result<()> {
        if let Err(error) = self.create(&container).await {
            return Err(if error.is::<AgentError>() { error } else { self.guest.explain(error) });
        }
        self.begin(&container.id).await.map(|_| ())
    }

    /// Creates a container and no more. Its disks are plugged in first; where it fails they are unplugged again.
    ///
    /// # Errors
    /// When the agent refuses; the text is what kubelet would show.
    pub async fn create(&mut self, container: &Container) -> Result<()> {
        let result = self.prepare(container).await;
        if result.is_err() {
            self.release(&container.id).await?;
        }
        result
    }

    /// Starts a container that was created; gives its first process.
    ///
    /// # Errors
    /// When the agent refuses.
    pub async fn begin(&mut self, id: &str) -> Result<Running> {
        self.agent.run("StartContainer", &agent::StartContainerRequest { container_id: id.into() }).await?;
        Ok(Running { agent: self.agent.patient(), container: id.into(), exec_id: String::new() })
    }

    async fn prepare(&mut self, container: &Container) -> Result<()> {
        let (mut storages, mut mounts) = (Vec::new(), Vec::new());
        let held = Held { disks: Vec::new(), capabilities: container.capabilities() };
        self.containers.insert(container.id.clone(), held);
        for mount in &container.mounts {
            if !self.plugs_disks {
                // The entry is not even looked for.
                mounts.push(self.runtime.without_disk(mount)?);
                continue;
            }
            let volume = DirectVolume::read(&self.direct_volumes, &mount.target)?;
            let how = Plug {
                read_only: self.runtime.plugs_read_only(mount, &volume),
                discards: self.runtime.passes_discards(&volume),
            };
            let source = self.plug(&container.id, &volume.device, how, false).await?;
            let (storage, bind) = self.runtime.requests(mount, &volume, &source);
            storages.extend(storage);
            mounts.push(bind);
        }
        let mut devices = Vec::new();
        for device in &container.devices {
            // manager_inner.rs: id is the PCI path.
            let how = Plug { read_only: device.read_only, discards: false };
            let id = self.plug(&container.id, &device.path, how, true).await?;
            let container_path = device.destination.clone();
            devices.push(agent::Device { id, r#type: "blk".into(), container_path, ..Default::default() });
        }
        let request = agent::CreateContainerRequest {
            container_id: container.id.clone(),
            exec_id: container.id.clone(),
            devices,
            storages,
            oci: Some(container.spec(&self.hostname, mounts)),
            ..Default::default()
        };
        let sent = Instant::now();
        let result = self.agent.run("CreateContainer", &request).await;
        self.create_time = sent.elapsed();
        Ok(result?)
    }

    async fn plug(&mut self, container: &str, device: &Path, how: Plug, block: bool) -> Result<String> {
        let device = self.substitutes.get(device).map_or(device, PathBuf::as_path).to_owned();
        let looks = self.runtime == Runtime::Go || !block;
        let known = self.disks.iter().position(|disk| looks && disk.known && disk.device == device);
        let index = match known {
            Some(index) => index,
            None => {
                let there = self.disks.iter().any(|disk| disk.device == device);
                if there && self.vmm == (Vmm::CloudHypervisor { locks: true }) {
                    // `AddDisk` of cloud-hypervisor 51.1 ends so.
                    bail!("the VMM can't add a disk: the image {} is locked", device.display());
                }
                let source = self.guest.plug(&device, how).await?;
                self.disks.push(Disk { device, source, users: 0, known: true, block });
                self.disks.len() - 1
            }
        };
        let Some(disk) = self.disks.get_mut(index) else { bail!("a disk got lost") };
        disk.users += 1;
        self.containers.entry(container.to_owned()).or_default().disks.push(disk.source.clone());
        Ok(disk.source.clone())
    }

    /// Unplugs what nobody uses any more, right after the agent's answer, as the shims do.
    async fn release(&mut self, container: &str) -> Result<()> {
        for source in self.containers.remove(container).unwrap_or_default().disks {
            let Some(index) = self.disks.iter().position(|disk| disk.source == source) else { continue };
            let Some(disk) = self.disks.get_mut(index) else { continue };
            // runtime-rs does not find it any more, or never looks for it.
            if self.runtime == Runtime::Rs && (disk.block || !disk.known) {
                continue;
            }
            disk.users -= 1;
            if disk.users > 0 {
                disk.known = self.runtime == Runtime::Go;
                continue;
            }
            self.disks.remove(index);
            let unplugged = match self.vmm {
                Vmm::Qemu => self.guest.unplug(&source).await,
                Vmm::CloudHypervisor { .. } => self.guest.begin_unplug(&source).await,
            };
            if let Err(error) = unplugged {
                return Err(self.guest.explain(error));
            }
        }
        Ok(())
    }

    /// Kills a container and removes it; its disks are unplugged when it was their last user.
    ///
    /// # Errors
    /// When the agent refuses, or a disk can't be unplugged.
    pub async fn remove(&mut self, id: &str) -> Result<()> {
        let kill = agent::SignalProcessRequest { container_id: id.into(), exec_id: String::new(), signal: 9 };
        self.agent.run("SignalProcess", &kill).await?;
        let wait = agent::WaitProcessRequest { container_id: id.into(), exec_id: String::new() };
        self.agent.call::<agent::WaitProcessResponse>("WaitProcess", &wait).await?;
        self.delete(id).await
    }

    /// Removes a container that has ended, as containerd does at once; its disks are unplugged when it was their last
    /// user.
    ///
    /// # Errors
    /// When the agent refuses, or a disk can't be unplugged.
    pub async fn delete(&mut self, id: &str) -> Result<()> {
        let request = agent::RemoveContainerRequest { container_id: id.into(), timeout: 0 };
        if let Err(error) = self.agent.run("RemoveContainer", &request).await {
            return Err(self.guest.explain(error.into()));
        }
        self.release(id).await
    }

    /// Starts a program in a container.
    ///
    /// # Errors
    /// When the agent refuses.
    pub async fn spawn(&mut self, container: &str, user: User, args: &[&str]) -> Result<Running> {
        let capabilities = self.containers.get(container).map(|held| held.capabilities.clone()).unwrap_or_default();
        self.spawn_process(container, container::process(args, user, capabilities)).await
    }

    /// The same, with all that a process may have.
    ///
    /// # Errors
    /// When the agent refuses.
    pub async fn spawn_process(&mut self, container: &str, process: agent::Process) -> Result<Running> {
        self.execs += 1;
        let exec_id = format!("exec{}", self.execs);
        let request = agent::ExecProcessRequest {
            container_id: container.into(),
            exec_id: exec_id.clone(),
            process: Some(process),
            ..Default::default()
        };
        self.agent.run("ExecProcess", &request).await?;
        // kata-agent starts an exec at once; the shims send nothing more.
        Ok(Running { agent: self.agent.patient(), container: container.into(), exec_id })
    }

    /// Runs a shell command in a container and gives what it prints.
    ///
    /// # Errors
    /// When it fails.
    pub async fn sh(&mut self, container: &str, script: &str) -> Result<String> {
        self.sh_as(container, User::ROOT, script).await
    }

    /// The same, as somebody else.
    ///
    /// # Errors
    /// When it fails.
    pub async fn sh_as(&mut self, container: &str, user: User, script: &str) -> Result<String> {
        let running = self.spawn(container, user, &["/bin/sh", "-c", script]).await?;
        let output = timeout(2 * PATIENCE, running.finish()).await.with_context(|| format!("no end of {script}"));
        let output = output.flatten().map_err(|error| self.guest.explain(error))?;
        output.ok().with_context(|| format!("in the container: {script}"))
    }

    /// zpool or zfs in the guest, from a container made by [`Container::debug`].
    ///
    /// # Errors
    /// When it fails.
    pub async fn zfs_tool(&mut self, container: &str, command: &str) -> Result<String> {
        let tool = "/zpod/lib/ld-linux-x86-64.so.2 --library-path /zpod/lib /zpod/bin/";
        self.sh(container, &format!("{tool}{command}")).await
    }

    /// Ends the pod in good order: containers first, then the sandbox as this runtime does, then SIGKILL.
    ///
    /// # Errors
    /// When the agent refuses.
    pub async fn stop(mut self) -> Result<()> {
        let ids: Vec<_> = self.containers.keys().cloned().collect();
        for id in ids {
            self.remove(&id).await?;
        }
        if self.runtime == Runtime::Go {
            match self.agent.run("DestroySandbox", &agent::DestroySandboxRequest {}).await {
                // The agent ends with it, and the machine with the agent: its answer may not get out any more.
                Ok(()) | Err(AgentError::Broken { .. }) => {}
                Err(error) => return Err(error.into()),
            }
        }
        self.kill();
        Ok(())
    }

    /// Whether a container was created and not removed yet.
    pub fn has(&self, container: &str) -> bool {
        self.containers.contains_key(container)
    }

    /// Kills the virtual machine without a word.
    pub fn kill(self) {
        self.guest.kill();
    }

    /// The agent, for what the shim doesn't do.
    pub fn agent(&self) -> &AgentClient {
        &self.agent
    }

    /// The virtual machine.
    pub fn guest(&self) -> &Guest {
        &self.guest
    }

    /// The virtual machine, to be tampered with.
    pub fn guest_mut(&mut self) -> &mut Guest {
        &mut self.guest
    }
}

/// As Kata's shim does for a guest that comes of a template: its clock stood still.
async fn set_clock(agent: &AgentClient) -> Result<()> {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?;
    let (sec, usec) = (i64::try_from(now.as_secs())?, i64::from(now.subsec_micros()));
    agent.run("SetGuestDateTime", &SetGuestDateTimeRequest { sec, usec }).await.context("set the guest's clock")
}

async fn connect(guest: &mut Guest) -> Result<AgentClient> {
    let end = Instant::now() + PATIENCE;
    loop {
        let stream = guest.connect(agent::PORT, end.saturating_duration_since(Instant::now())).await?;
        let client = AgentClient::new(stream);
        match client.check(Duration::from_secs(5)).await {
            Ok(()) => return Ok(client),
            Err(error) if Instant::now() >= end => return Err(error).context("the agent doesn't answer"),
            Err(_) => sleep(Duration::from_millis(100)).await,
        }
    }
}
