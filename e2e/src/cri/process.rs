//! Pods that are processes of this machine.
//!
//! # Design
//! The node's program in four more roles, since entering and making namespaces needs a process with one thread, and the
//! first process of a PID namespace is a child of the one that asked for it:
//! * [`pause`] holds a pod's network, UTS, IPC and, where containers share it, PID namespace;
//! * [`supervisor`] is a container's parent: it copies its output to the log and reports its end;
//! * [`child`] becomes the container's program: mounts ([`rootfs`]), then identity ([`identity`]), then `exec`;
//! * [`exec`] runs one more program in a container.
//!
//! Each dies with its parent, by `PR_SET_PDEATHSIG`.

mod child;
mod exec;
mod identity;
mod machine;
mod mounts;
mod pause;
pub(super) mod program;
mod rootfs;
mod supervisor;

use std::io::BufRead as _;

use anyhow::{Context as _, Result};
use serde::Deserialize;

pub(super) use machine::Processes;
pub(super) use pause::Namespaces;

/// Plays a role if the first argument names one.
pub fn play(role: Option<&str>) -> Option<Result<()>> {
    match role? {
        pause::ROLE => Some(pause::run()),
        pause::INIT_ROLE => Some(pause::reap()),
        supervisor::ROLE => Some(supervisor::run()),
        child::ROLE => Some(child::run()),
        exec::ROLE => Some(exec::run()),
        exec::CHILD_ROLE => Some(exec::run_child()),
        _ => None,
    }
}

/// A role's instructions: one line of JSON on standard input.
fn instructions<T: for<'a> Deserialize<'a>>() -> Result<T> {
    let mut line = String::new();
    std::io::stdin().lock().read_line(&mut line).context("read the instructions")?;
    serde_json::from_str(&line).context("understand the instructions")
}

/// As shells and container runtimes count.
fn exit_code(status: std::process::ExitStatus) -> i32 {
    use std::os::unix::process::ExitStatusExt as _;
    status.code().or(status.signal().map(|signal| 128 + signal)).unwrap_or(255)
}
