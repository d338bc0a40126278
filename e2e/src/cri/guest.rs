//! A pod in a guest: what containerd and Kata's shim do with CRI's requests.

use std::collections::HashMap;
use std::fs;
use std::os::unix::fs::FileTypeExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context as _, Result};
use async_trait::async_trait;
use nix::sys::signal::Signal;
use tokio::sync::{Mutex as AsyncMutex, oneshot};
use zpod_proto::agent;

use super::api;
use super::log::LogStream;
use super::machine::{Machine, Order};
use super::process::program::Program;
use crate::agent::{AgentClient, AgentError};
use crate::direct_volume;
use crate::qemu::{Boot, Guest};
use crate::shim::{Container, Device, Handler, Mount, Output, Running, Sandbox};

const DIRECT_VOLUMES: &str = "/run/kata-containers/shared/direct-volumes";

/// A pod whose containers run in a guest.
#[derive(Debug)]
pub(super) struct GuestPod {
    /// `None` once it was stopped.
    sandbox: Arc<AsyncMutex<Option<Sandbox>>>,
    agent: AgentClient,
    process: u32,
    containers: Mutex<HashMap<String, (Program, PathBuf)>>,
}

impl GuestPod {
    /// Boots it.
    pub(super) async fn start(id: &str, hostname: &str, handler: &Handler) -> Result<Self> {
        let (runtime, plugs_disks) = (handler.runtime, handler.plugs_disks(Path::new("/"))?);
        // As short as the sandbox's directory: its sockets must be where zpod-node sees them.
        let dir = runtime.run_dir().join(id);
        fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
        let guest = Guest::boot_in(Boot::FromTemplate, &dir).await?;
        let process = guest.process();
        let (run_dir, volumes) = (runtime.run_dir(), PathBuf::from(DIRECT_VOLUMES));
        let mut sandbox = Sandbox::start_in(run_dir, volumes, id.to_owned(), hostname, runtime, guest).await?;
        if !plugs_disks {
            sandbox.disable_disks();
        }
        eprintln!("pod {id}: its guest booted in {:?}", sandbox.boot_time);
        let agent = sandbox.agent().clone();
        let sandbox = Arc::new(AsyncMutex::new(Some(sandbox)));
        Ok(Self { sandbox, agent, process, containers: Mutex::default() })
    }

    fn program(&self, id: &str) -> Result<(Program, PathBuf)> {
        let containers = self.containers.lock().unwrap_or_else(PoisonError::into_inner);
        containers.get(id).cloned().with_context(|| format!("no container {id}"))
    }
}

#[async_trait]
impl Machine for GuestPod {
    fn runs(&self) -> bool {
        // A zombie has no root any more.
        Path::new(&format!("/proc/{}/root/.", self.process)).exists()
    }

    async fn create(&self, order: Order) -> Result<()> {
        let Mounts { volumes, memory, left_out } = sort(&order.config.mounts, Path::new(DIRECT_VOLUMES));
        if !left_out.is_empty() {
            eprintln!("container {}: not in the guest: {}", order.id, left_out.join(", "));
        }
        let security = order.config.linux.unwrap_or_default().security_context.unwrap_or_default();
        let (devices, others) = disks(&order.config.devices);
        if !others.is_empty() {
            eprintln!("container {}: no block devices of this node: {}", order.id, others.join(", "));
        }
        let container = Container {
            devices,
            tmpfs: memory,
            process: Some(process(&order.program)),
            read_only_root: security.readonly_rootfs,
            ..Container::new(&order.id, volumes)
        };
        let mut sandbox = self.sandbox.lock().await;
        let sandbox = sandbox.as_mut().context("the pod was stopped")?;
        if let Err(error) = sandbox.create(&container).await {
            if !error.is::<AgentError>() {
                // The whole story is for the node's log: an event has room for the cause only.
                eprintln!("container {}: {}", order.id, sandbox.guest().console_tail(30));
            }
            return Err(error);
        }
        let mut containers = self.containers.lock().unwrap_or_else(PoisonError::into_inner);
        containers.insert(order.id, (order.program, order.log));
        Ok(())
    }

    async fn start(&self, id: &str) -> Result<oneshot::Receiver<i32>> {
        let (_, log) = self.program(id)?;
        let logs = LogStream::both(&log).with_context(|| format!("open the log {}", log.display()))?;
        let first = {
            let mut sandbox = self.sandbox.lock().await;
            sandbox.as_mut().context("the pod was stopped")?.begin(id).await?
        };
        let (ended, end) = oneshot::channel();
        let (sandbox, id) = (Arc::clone(&self.sandbox), id.to_owned());
        tokio::spawn(async move {
            let code = follow(first, logs).await;
            // containerd deletes a task as soon as it has ended; that is when the shim unplugs its disks.
            if let Some(sandbox) = sandbox.lock().await.as_mut()
                && let Err(error) = sandbox.delete(&id).await
            {
                eprintln!("container {id}: {error:#}");
            }
            ended.send(code)
        });
        Ok(end)
    }

    async fn signal(&self, id: &str, signal: Signal) -> Result<()> {
        let signal = u32::try_from(signal as i32)?;
        let request = agent::SignalProcessRequest { container_id: id.into(), exec_id: String::new(), signal };
        Ok(self.agent.run("SignalProcess", &request).await?)
    }

    async fn exec(&self, id: &str, command: Vec<String>) -> Result<Output> {
        let (program, _) = self.program(id)?;
        let running = {
            let mut sandbox = self.sandbox.lock().await;
            let sandbox = sandbox.as_mut().context("the pod was stopped")?;
            sandbox.spawn_process(id, process(&program.with_args(command))).await?
        };
        let mut kill = Kill(Some(running.clone()));
        let output = running.finish().await;
        kill.0 = None;
        output
    }

    async fn remove(&self, id: &str) -> Result<()> {
        let known = self.containers.lock().unwrap_or_else(PoisonError::into_inner).remove(id);
        // One that has ended is gone from the guest already.
        if known.is_some()
            && let Some(sandbox) = self.sandbox.lock().await.as_mut()
            && sandbox.has(id)
        {
            sandbox.delete(id).await?;
        }
        Ok(())
    }

    async fn stop(&self) {
        if let Some(sandbox) = self.sandbox.lock().await.take() {
            sandbox.kill();
        }
    }

    fn process(&self, _: &str) -> Option<u32> {
        Some(self.process)
    }
}

/// Ends a command that nobody waits for any more.
struct Kill(Option<Running>);

impl Drop for Kill {
    fn drop(&mut self) {
        if let Some(running) = self.0.take() {
            // It may have ended just now.
            tokio::spawn(async move { running.signal(Signal::SIGKILL as u32).await });
        }
    }
}

/// Copies a container's output to its log until its end; gives its exit code.
async fn follow(first: Running, [mut out, mut err]: [LogStream; 2]) -> i32 {
    let stdout = async {
        while let Some(data) = first.read().await {
            let _ = out.add(&data);
        }
        out.finish()
    };
    let stderr = async {
        while let Some(data) = first.read_error().await {
            let _ = err.add(&data);
        }
        err.finish()
    };
    // A log that can't be written is no reason to lose the exit code.
    let _ = tokio::join!(stdout, stderr);
    first.wait().await.unwrap_or(255)
}

fn process(program: &Program) -> agent::Process {
    let names = program.capability_names();
    agent::Process {
        user: Some(agent::User { uid: program.uid, gid: program.gid, additional_gids: program.groups.clone() }),
        args: program.args.clone(),
        env: program.env.clone(),
        cwd: program.cwd.clone(),
        capabilities: Some(agent::LinuxCapabilities {
            bounding: names.clone(),
            effective: names.clone(),
            permitted: names,
            ..Default::default()
        }),
        no_new_privileges: program.no_new_privileges,
        ..Default::default()
    }
}

/// A container's mounts, by what becomes of them in a guest.
#[derive(Debug, Default)]
struct Mounts {
    volumes: Vec<Mount>,
    memory: Vec<String>,
    left_out: Vec<String>,
}

/// Volumes with a direct-volume entry are hot-plugged. Kata shares everything else by virtio-fs, which the guests of
/// the tests don't have: an emptyDir becomes memory, files of kubelet's are left out; but a CSI volume or a subPath of
/// one goes to the shim player, who says that Kata would share the host's directory.
fn sort(mounts: &[api::Mount], direct_volumes: &Path) -> Mounts {
    let mut sorted = Mounts::default();
    for mount in mounts {
        let has = |part: &str| mount.host_path.contains(part);
        let target = Path::new(&mount.host_path);
        let csi = has("/volumes/kubernetes.io~csi/") || has("/volume-subpaths/");
        if csi || direct_volume::entry(direct_volumes, target).exists() {
            let read_only = mount.readonly;
            sorted.volumes.push(Mount { read_only, ..Mount::new(target, &mount.container_path) });
        } else if has("/volumes/kubernetes.io~empty-dir/") {
            sorted.memory.push(mount.container_path.clone());
        } else {
            sorted.left_out.push(mount.container_path.clone());
        }
    }
    sorted
}

/// A container's devices: those that are block devices of the node, which Kata plugs in, and the others.
fn disks(devices: &[api::Device]) -> (Vec<Device>, Vec<String>) {
    let (mut disks, mut others) = (Vec::new(), Vec::new());
    for device in devices {
        // Kubelet hands out a link below the pod's directory.
        let disk = fs::canonicalize(&device.host_path)
            .ok()
            .filter(|path| fs::metadata(path).is_ok_and(|metadata| metadata.file_type().is_block_device()));
        if let Some(path) = disk {
            let read_only = !device.permissions.contains('w');
            disks.push(Device { read_only, ..Device::new(path, &device.container_path) });
        } else {
            others.push(device.host_path.clone());
        }
    }
    (disks, others)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn volumes_are_plugged_in_and_only_what_is_not_csi_may_be_left_out() {
        let dir = tempfile::tempdir().unwrap();
        let static_target = "/srv/volume/mount";
        fs::create_dir(direct_volume::entry(dir.path(), Path::new(static_target))).unwrap();
        let pod = "/var/lib/kubelet/pods/uid";
        let mount = |host_path: String, container_path: &str| api::Mount {
            host_path,
            container_path: container_path.into(),
            readonly: true,
            ..Default::default()
        };
        let sorted = sort(
            &[
                mount(format!("{pod}/volumes/kubernetes.io~csi/pvc-1/mount"), "/data"),
                mount(format!("{pod}/volume-subpaths/pvc-1/app/0"), "/sub"),
                mount(static_target.into(), "/static"),
                mount(format!("{pod}/volumes/kubernetes.io~empty-dir/tmp"), "/tmp"),
                mount(format!("{pod}/volumes/kubernetes.io~projected/token"), "/var/run/secrets"),
                mount(format!("{pod}/etc-hosts"), "/etc/hosts"),
            ],
            dir.path(),
        );
        let volumes: Vec<_> = sorted.volumes.iter().map(|mount| mount.destination.as_str()).collect();
        assert_eq!(volumes, ["/data", "/sub", "/static"]);
        assert!(sorted.volumes.iter().all(|mount| mount.read_only));
        assert_eq!(sorted.memory, ["/tmp"]);
        assert_eq!(sorted.left_out, ["/var/run/secrets", "/etc/hosts"]);
    }
}
