//! The process that holds a pod's namespaces.

use std::io::{Read as _, Write as _};
use std::path::PathBuf;
use std::process::{Command as StdCommand, Stdio};

use anyhow::{Context as _, Result, bail};
use nix::sched::{CloneFlags, unshare};
use nix::sys::prctl;
use nix::sys::signal::Signal;
use nix::sys::wait::wait;
use nix::unistd::sethostname;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::process::{Child, Command};

use super::instructions;

pub(super) const ROLE: &str = "pause";
pub(super) const INIT_ROLE: &str = "pause-init";

/// Which namespaces a pod has of its own.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(in crate::cri) struct Namespaces {
    /// The name within the pod's own UTS and network namespaces; `None` on the node's network.
    pub(in crate::cri) hostname: Option<String>,
    pub(in crate::cri) ipc: bool,
    /// Whether containers share one PID namespace.
    pub(in crate::cri) pids: bool,
}

/// A running one. It is killed when this is dropped.
#[derive(Debug)]
pub(super) struct Pause {
    child: Child,
    pub(super) id: u32,
    namespaces: Namespaces,
}

impl Pause {
    pub(super) async fn start(namespaces: Namespaces) -> Result<Self> {
        let mut child = Command::new("/proc/self/exe")
            .arg(ROLE)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .context("start the pod's first process")?;
        let (Some(id), Some(mut stdin), Some(stdout)) = (child.id(), child.stdin.take(), child.stdout.take()) else {
            bail!("the pod's first process has no id or no streams");
        };
        stdin.write_all(format!("{}\n", serde_json::to_string(&namespaces)?).as_bytes()).await?;
        // Its end is the sign to end.
        child.stdin = Some(stdin);
        let mut line = String::new();
        BufReader::new(stdout).read_line(&mut line).await?;
        if line != "ready\n" {
            bail!("the pod's namespaces: {}", line.trim());
        }
        Ok(Self { child, id, namespaces })
    }

    /// What a container of the pod joins.
    pub(super) fn join(&self) -> Vec<PathBuf> {
        let own = self.namespaces.hostname.is_some();
        let kinds =
            [("net", own), ("uts", own), ("ipc", self.namespaces.ipc), ("pid_for_children", self.namespaces.pids)];
        let held = kinds.iter().filter(|(_, held)| *held);
        held.map(|(kind, _)| format!("/proc/{}/ns/{kind}", self.id).into()).collect()
    }

    pub(super) async fn stop(&mut self) {
        // Fails only when it is gone already.
        let _ = self.child.kill().await;
    }
}

pub(super) fn run() -> Result<()> {
    prctl::set_pdeathsig(Signal::SIGKILL)?;
    // Kept until the namespaces go: it is the first process of one of them.
    let _init = match make() {
        Ok(init) => init,
        Err(error) => {
            println!("{}", format!("{error:#}").replace('\n', " "));
            return Err(error);
        }
    };
    println!("ready");
    std::io::stdout().flush()?;
    std::io::stdin().read_to_end(&mut Vec::new())?;
    Ok(())
}

fn make() -> Result<Option<std::process::Child>> {
    let namespaces: Namespaces = instructions()?;
    let mut flags = CloneFlags::empty();
    flags.set(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWUTS, namespaces.hostname.is_some());
    flags.set(CloneFlags::CLONE_NEWIPC, namespaces.ipc);
    flags.set(CloneFlags::CLONE_NEWPID, namespaces.pids);
    unshare(flags).context("unshare the pod's namespaces")?;
    if let Some(name) = &namespaces.hostname {
        sethostname(name).context("set the hostname")?;
    }
    if !namespaces.pids {
        return Ok(None);
    }
    let init = StdCommand::new("/proc/self/exe").arg(INIT_ROLE).stdin(Stdio::null()).spawn();
    Ok(Some(init.context("start the first process of the pod's PID namespace")?))
}

/// The first process of a PID namespace: it waits for those that nobody else waits for.
pub(super) fn reap() -> Result<()> {
    prctl::set_pdeathsig(Signal::SIGKILL)?;
    loop {
        if wait().is_err() {
            std::thread::sleep(std::time::Duration::from_millis(100));
        }
    }
}
