//! A pod of processes.

use std::collections::HashMap;
use std::fs;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::{Mutex, PoisonError};

use anyhow::{Context as _, Result, bail};
use async_trait::async_trait;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader, Lines};
use tokio::process::{Child, ChildStdout, Command};
use tokio::sync::{Mutex as AsyncMutex, oneshot};

use super::child::Instructions as ChildInstructions;
use super::exec::exec;
use super::mounts::plan;
use super::pause::{Namespaces, Pause};
use super::program::Program;
use super::rootfs::Root;
use super::supervisor::{Instructions, Pids, ROLE, Report};
use crate::cri::api;
use crate::cri::machine::{Machine, Order};
use crate::cri::network::Network;
use crate::shim::Output;

/// A pod whose containers are processes of this machine.
#[derive(Debug)]
pub(in crate::cri) struct Processes {
    pause: AsyncMutex<Pause>,
    id: u32,
    join: Vec<PathBuf>,
    dir: PathBuf,
    files: Vec<(String, String)>,
    containers: Mutex<HashMap<String, Held>>,
}

#[derive(Debug)]
struct Held {
    instructions: Instructions,
    process: Option<u32>,
}

impl Processes {
    /// A pod with its namespaces, and with an interface where it has an address. `files` are written into each
    /// container; its containers' roots are made below `dir`.
    pub(in crate::cri) async fn start(
        namespaces: Namespaces,
        address: Option<(Ipv4Addr, &Network)>,
        dir: PathBuf,
        files: Vec<(String, String)>,
    ) -> Result<Self> {
        fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
        let pause = Pause::start(namespaces).await?;
        if let Some((address, network)) = address {
            network.attach(pause.id, address).await.with_context(|| format!("give the pod {address}"))?;
        }
        let (id, join) = (pause.id, pause.join());
        Ok(Self { pause: AsyncMutex::new(pause), id, join, dir, files, containers: Mutex::default() })
    }

    fn with<T>(&self, id: &str, what: impl FnOnce(&mut Held) -> T) -> Result<T> {
        let mut containers = self.containers.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(what(containers.get_mut(id).with_context(|| format!("no container {id}"))?))
    }

    fn running(&self, id: &str) -> Result<(u32, Program)> {
        let found = self.with(id, |held| (held.process, held.instructions.child.program.clone()))?;
        Ok((found.0.with_context(|| format!("container {id} doesn't run"))?, found.1))
    }
}

#[async_trait]
impl Machine for Processes {
    fn runs(&self) -> bool {
        // A zombie has no root any more.
        Path::new(&format!("/proc/{}/root/.", self.id)).exists()
    }

    async fn create(&self, order: Order) -> Result<()> {
        let name = order.image.references.join(", ");
        let image = order.image.rootfs.with_context(|| format!("image {name} has no files: it is for guests only"))?;
        let security = order.config.linux.unwrap_or_default().security_context.unwrap_or_default();
        let pids = match security.namespace_options.unwrap_or_default().pid() {
            api::NamespaceMode::Container => Pids::Own,
            api::NamespaceMode::Pod => Pids::Pod,
            api::NamespaceMode::Node => Pids::Node,
            api::NamespaceMode::Target => bail!("containers that join another's processes are not supported"),
        };
        let mountinfo = fs::read_to_string("/proc/self/mountinfo").context("read this node's mounts")?;
        let dir = self.dir.join(&order.id);
        fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
        let paths = |paths: Vec<String>| paths.into_iter().map(PathBuf::from).collect();
        let root = Root {
            dir,
            image,
            libraries: order.image.libraries,
            read_only: security.readonly_rootfs,
            privileged: security.privileged,
            own_processes: pids != Pids::Node,
            files: self.files.clone(),
            mounts: plan(&order.config.mounts, &mountinfo)?,
            masked: paths(security.masked_paths),
            unwritable: paths(security.readonly_paths),
        };
        let child = ChildInstructions { root, program: order.program };
        let instructions = Instructions { join: self.join.clone(), pids, log: order.log, child };
        let mut containers = self.containers.lock().unwrap_or_else(PoisonError::into_inner);
        containers.insert(order.id, Held { instructions, process: None });
        Ok(())
    }

    async fn start(&self, id: &str) -> Result<oneshot::Receiver<i32>> {
        let instructions = self.with(id, |held| serde_json::to_string(&held.instructions))??;
        let mut child = Command::new("/proc/self/exe")
            .arg(ROLE)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("start the container's supervisor")?;
        let (Some(mut stdin), Some(stdout)) = (child.stdin.take(), child.stdout.take()) else {
            bail!("the supervisor has no streams");
        };
        stdin.write_all(format!("{instructions}\n").as_bytes()).await?;
        let mut reports = BufReader::new(stdout).lines();
        match next(&mut reports).await? {
            Some(Report::Started(process)) => self.with(id, |held| held.process = Some(process))?,
            Some(Report::Failed(why)) => bail!("{why}"),
            other => bail!("the supervisor says {other:?}"),
        }
        let (ended, end) = oneshot::channel();
        tokio::spawn(async move { ended.send(wait(child, reports).await) });
        Ok(end)
    }

    async fn signal(&self, id: &str, signal: Signal) -> Result<()> {
        let (process, _) = self.running(id)?;
        match kill(Pid::from_raw(i32::try_from(process)?), signal) {
            Ok(()) | Err(nix::Error::ESRCH) => Ok(()),
            Err(error) => Err(error).with_context(|| format!("send {signal} to {process}")),
        }
    }

    async fn exec(&self, id: &str, command: Vec<String>) -> Result<Output> {
        let (process, program) = self.running(id)?;
        exec(process, program.with_args(command)).await
    }

    async fn remove(&self, id: &str) -> Result<()> {
        let held = self.containers.lock().unwrap_or_else(PoisonError::into_inner).remove(id);
        if let Some(held) = held {
            let dir = held.instructions.child.root.dir;
            fs::remove_dir(&dir).with_context(|| format!("remove {}", dir.display()))?;
        }
        Ok(())
    }

    async fn stop(&self) {
        self.pause.lock().await.stop().await;
    }

    fn process(&self, id: &str) -> Option<u32> {
        self.running(id).ok().map(|(process, _)| process)
    }
}

async fn next(reports: &mut Lines<BufReader<ChildStdout>>) -> Result<Option<Report>> {
    let line = reports.next_line().await.context("hear from the supervisor")?;
    line.map(|line| serde_json::from_str(&line).context("understand the supervisor")).transpose()
}

async fn wait(mut supervisor: Child, mut reports: Lines<BufReader<ChildStdout>>) -> i32 {
    let code = match next(&mut reports).await {
        Ok(Some(Report::Ended(code))) => code,
        _ => 255,
    };
    // It ends right after its report.
    let _ = supervisor.wait().await;
    code
}
