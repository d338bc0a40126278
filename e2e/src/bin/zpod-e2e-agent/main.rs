//! A stand-in for kata-agent, for tests only: it does with the shim's requests what kata-agent 4.1.0 does, as far as
//! volumes are concerned, so that guests can be booted without a Kata release at hand.
//!
//! # Design
//! One binary in four roles: PID 1 of the guest ([`init`], [`rpc`]); a container's first process before it becomes the
//! container's program, and the same for `exec` ([`child`]); and an init for guests without zpod-guest ([`bare`]).
//! The roles re-execute the binary, since joining or making a mount namespace needs a process with one thread.
//!
//! # Limitations
//! No network, no devices, no seccomp, no capabilities, no PID namespace: containers are killed through their cgroup.

mod bare;
mod block;
mod child;
mod container;
mod device;
mod init;
mod mounts;
mod process;
mod rpc;
mod sandbox;
mod storage;

use std::path::Path;

fn main() -> anyhow::Result<()> {
    let mut args = std::env::args();
    let name = args.next().unwrap_or_default();
    if Path::new(&name).file_name().is_some_and(|name| name == "bare-init") {
        return bare::run();
    }
    match (args.next().as_deref(), args.next()) {
        (Some("container"), Some(spec)) => child::container(&spec),
        (Some("exec"), Some(spec)) => child::exec(&spec),
        _ => init::run(),
    }
}
