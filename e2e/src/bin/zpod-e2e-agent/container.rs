//! A container: its bundle, its cgroup, its processes.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail};
use nix::mount::{MsFlags, mount};
use zpod_proto::agent;

use crate::child::{ContainerSpec, ExecSpec};
use crate::mounts::detach;
use crate::process::Process;

/// kata-agent's `CONTAINER_BASE`.
pub(crate) const BASE: &str = "/run/kata-containers";
const CGROUPS: &str = "/sys/fs/cgroup";

#[derive(Debug)]
pub(crate) struct Container {
    bundle: PathBuf,
    cgroup: PathBuf,
    first: Arc<Process>,
    processes: HashMap<String, Arc<Process>>,
    pub(crate) mounts: Vec<String>,
}

impl Container {
    pub(crate) async fn create(id: &str, spec: agent::Spec, mounts: Vec<String>) -> Result<Self> {
        let bundle = Path::new(BASE).join(id);
        let cgroup = Path::new(CGROUPS).join(id);
        fs::create_dir_all(&cgroup).with_context(|| format!("create {}", cgroup.display()))?;
        let result = start(&bundle, &cgroup, spec).await;
        match result {
            Ok(first) => {
                let first = Arc::new(first);
                let processes = HashMap::from([(String::new(), Arc::clone(&first))]);
                Ok(Self { bundle, cgroup, first, processes, mounts })
            }
            Err(error) => {
                remove(&bundle, &cgroup).await?;
                Err(error)
            }
        }
    }

    pub(crate) async fn start(&self) -> Result<()> {
        self.first.start().await
    }

    pub(crate) async fn exec(&mut self, exec_id: &str, process: agent::Process) -> Result<()> {
        let spec = ExecSpec { cgroup: self.cgroup.clone(), pid: self.first.pid, program: process.into() };
        let process = Process::spawn("exec", &spec).await?;
        self.processes.insert(exec_id.to_owned(), Arc::new(process));
        Ok(())
    }

    /// kata-agent: an exec id that is empty, or the container's own, means its first process.
    pub(crate) fn process(&self, id: &str, exec_id: &str) -> Result<Arc<Process>> {
        let key = if exec_id == id { "" } else { exec_id };
        self.processes.get(key).cloned().ok_or_else(|| anyhow!("Invalid exec id"))
    }

    pub(crate) fn forget(&mut self, exec_id: &str) {
        self.processes.retain(|key, _| key.is_empty() || key != exec_id);
    }

    /// Every process of the container.
    pub(crate) fn kill_all(&self) -> Result<()> {
        fs::write(self.cgroup.join("cgroup.kill"), "1").context("kill the cgroup")
    }

    pub(crate) async fn destroy(&self) -> Result<()> {
        remove(&self.bundle, &self.cgroup).await
    }
}

async fn start(bundle: &Path, cgroup: &Path, spec: agent::Spec) -> Result<Process> {
    let root = spec.root.ok_or_else(|| anyhow!("the OCI spec has no root"))?;
    let rootfs = bundle.join("rootfs");
    if !rootfs.exists() {
        fs::create_dir_all(&rootfs)?;
        mount(Some(root.path.as_str()), &rootfs, Some("bind"), MsFlags::MS_BIND, None::<&str>)
            .with_context(|| format!("bind {}", root.path))?;
    }
    let devices = spec.linux.unwrap_or_default().devices.into_iter().map(Into::into).collect();
    let process = spec.process.ok_or_else(|| anyhow!("no process configurations!"))?;
    let spec = ContainerSpec {
        cgroup: cgroup.to_owned(),
        rootfs,
        read_only_root: root.readonly,
        mounts: spec.mounts.into_iter().map(Into::into).collect(),
        devices,
        program: process.into(),
    };
    Process::spawn("container", &spec).await
}

async fn remove(bundle: &Path, cgroup: &Path) -> Result<()> {
    let populated = || {
        let events = fs::read_to_string(cgroup.join("cgroup.events")).unwrap_or_default();
        events.lines().any(|line| line == "populated 1")
    };
    fs::write(cgroup.join("cgroup.kill"), "1").context("kill the cgroup")?;
    for _ in 0..500 {
        if !populated() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    if populated() {
        bail!("processes of {} don't die", bundle.display());
    }
    // Zombies keep the directory until they are reaped: no reason to fail.
    let _ = fs::remove_dir(cgroup);
    let rootfs = bundle.join("rootfs");
    if rootfs.exists() {
        detach(&rootfs).context("umount the rootfs")?;
    }
    if bundle.exists() {
        fs::remove_dir_all(bundle).context("remove the bundle")?;
    }
    Ok(())
}
