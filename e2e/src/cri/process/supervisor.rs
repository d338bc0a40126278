//! A container's parent: namespaces, log, exit code.

use std::fs::File;
use std::io::{PipeReader, Read as _, Write as _, pipe};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::Command;
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::prctl;
use nix::sys::signal::Signal;
use serde::{Deserialize, Serialize};

use super::child::{self, Instructions as ChildInstructions};
use super::{exit_code, instructions};
use crate::cri::log::LogStream;

pub(super) const ROLE: &str = "container";
/// How long output is waited for that somebody who outlived the container still holds open.
const AFTER_EXIT: Duration = Duration::from_millis(500);

/// Whose processes a container sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Pids {
    Own,
    Pod,
    Node,
}

/// Which namespaces, which log, and what the child is to become.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Instructions {
    /// The namespaces of the pod: files of a process that holds them.
    pub(super) join: Vec<PathBuf>,
    pub(super) pids: Pids,
    pub(super) log: PathBuf,
    pub(super) child: ChildInstructions,
}

/// A line on standard output.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Report {
    /// It runs, with this process id.
    Started(u32),
    /// It doesn't, and why.
    Failed(String),
    /// It ended with this exit code.
    Ended(i32),
}

pub(super) fn run() -> Result<()> {
    prctl::set_pdeathsig(Signal::SIGKILL).context("set the parent-death signal")?;
    if let Err(error) = supervise() {
        report(&Report::Failed(format!("{error:#}")))?;
    }
    Ok(())
}

fn report(report: &Report) -> Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{}", serde_json::to_string(report)?)?;
    Ok(out.flush()?)
}

fn supervise() -> Result<()> {
    let Instructions { join, pids, log, child } = instructions()?;
    let log = LogStream::both(&log).with_context(|| format!("open the log {}", log.display()))?;
    let ((out, child_out), (err, child_err)) = (pipe()?, pipe()?);
    // Threads can't be made any more once children go to another PID namespace.
    let copied = copy([out, err], log);
    for path in join {
        let namespace = File::open(&path).with_context(|| format!("open {}", path.display()))?;
        setns(namespace, CloneFlags::empty()).with_context(|| format!("join {}", path.display()))?;
    }
    if pids == Pids::Own {
        unshare(CloneFlags::CLONE_NEWPID).context("unshare the PID namespace")?;
    }
    let (mut socket, child_socket) = UnixStream::pair()?;
    let mut command = Command::new("/proc/self/exe");
    command.arg(child::ROLE).stdin(OwnedFd::from(child_socket)).stdout(child_out).stderr(child_err);
    let mut process = command.spawn().context("start the child")?;
    // It holds the other ends of the pipes.
    drop(command);
    writeln!(socket, "{}", serde_json::to_string(&child)?)?;
    let mut error = String::new();
    socket.read_to_string(&mut error).context("hear from the child")?;
    if !error.is_empty() {
        process.wait()?;
        return report(&Report::Failed(error));
    }
    report(&Report::Started(process.id()))?;
    let code = exit_code(process.wait().context("wait for the child")?);
    for _ in 0..2 {
        let _ = copied.recv_timeout(AFTER_EXIT);
    }
    report(&Report::Ended(code))
}

/// Copies both streams; the receiver hears when each is at its end.
fn copy(pipes: [PipeReader; 2], logs: [LogStream; 2]) -> Receiver<()> {
    let (done, copied) = mpsc::channel();
    for (mut pipe, mut log) in pipes.into_iter().zip(logs) {
        let done = done.clone();
        thread::spawn(move || {
            let mut buffer = vec![0; 16 << 10];
            while let Ok(size) = pipe.read(&mut buffer) {
                // A full disk must not stop the container: kubelet's logs have the same manners.
                if size == 0 || log.add(&buffer[..size]).is_err() {
                    break;
                }
            }
            let _ = log.finish();
            let _ = done.send(());
        });
    }
    copied
}
