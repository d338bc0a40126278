//! One more program in a running container.

use std::fs::File;
use std::io::Write as _;
use std::process::{Command as StdCommand, Stdio};

use anyhow::{Context as _, Result, bail};
use nix::sched::{CloneFlags, setns};
use nix::sys::prctl;
use nix::sys::signal::Signal;
use nix::unistd::dup2_stdin;
use serde::{Deserialize, Serialize};
use tokio::io::AsyncWriteExt as _;
use tokio::process::Command;

use super::program::Program;
use super::{exit_code, identity, instructions};
use crate::shim::Output;

pub(super) const ROLE: &str = "exec";
pub(super) const CHILD_ROLE: &str = "exec-child";

#[derive(Debug, Serialize, Deserialize)]
struct Instructions {
    /// The container's first process.
    container: u32,
    program: Program,
}

/// Runs it to its end. Dropping the future kills it.
pub(super) async fn exec(container: u32, program: Program) -> Result<Output> {
    let mut child = Command::new("/proc/self/exe")
        .arg(ROLE)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .context("start a process")?;
    let Some(mut stdin) = child.stdin.take() else { bail!("the process has no input") };
    let instructions = serde_json::to_string(&Instructions { container, program })?;
    stdin.write_all(format!("{instructions}\n").as_bytes()).await?;
    drop(stdin);
    let output = child.wait_with_output().await.context("wait for the process")?;
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    Ok(Output { code: exit_code(output.status), stdout: text(output.stdout), stderr: text(output.stderr) })
}

/// Joins what children are born into.
pub(super) fn run() -> Result<()> {
    prctl::set_pdeathsig(Signal::SIGKILL)?;
    let instructions: Instructions = instructions()?;
    for kind in ["net", "uts", "ipc", "pid"] {
        join(instructions.container, kind)?;
    }
    let mut child =
        StdCommand::new("/proc/self/exe").arg(CHILD_ROLE).stdin(Stdio::piped()).spawn().context("start a child")?;
    if let Some(mut stdin) = child.stdin.take() {
        writeln!(stdin, "{}", serde_json::to_string(&instructions)?)?;
    }
    std::process::exit(exit_code(child.wait()?))
}

/// Joins the mount namespace and becomes the program.
pub(super) fn run_child() -> Result<()> {
    let instructions: Instructions = instructions()?;
    dup2_stdin(File::open("/dev/null").context("open /dev/null")?)?;
    join(instructions.container, "mnt")?;
    let error = identity::become_program(&instructions.program);
    eprintln!("{error:#}");
    std::process::exit(126)
}

fn join(process: u32, kind: &str) -> Result<()> {
    let path = format!("/proc/{process}/ns/{kind}");
    let namespace = File::open(&path).with_context(|| format!("open {path}"))?;
    setns(namespace, CloneFlags::empty()).with_context(|| format!("join {path}"))
}
