//! The process that becomes a container's program.

use std::fs::{self, File};
use std::io::Write as _;
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixStream;

use anyhow::{Context as _, Error, Result};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::dup2_stdin;
use serde::{Deserialize, Serialize};

use super::program::Program;
use super::rootfs::Root;
use super::{identity, instructions, rootfs};

pub(super) const ROLE: &str = "container-child";

/// What to become.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Instructions {
    pub(super) root: Root,
    pub(super) program: Program,
}

/// Standard input is a socket: the instructions come in, what went wrong goes out. It closes when the program runs.
pub(super) fn run() -> Result<()> {
    let socket = std::io::stdin().as_fd().try_clone_to_owned().context("keep the socket")?;
    let error = match instructions().and_then(|instructions: Instructions| {
        prepare(&instructions)?;
        Ok(instructions.program)
    }) {
        Ok(program) => identity::become_program(&program),
        Err(error) => error,
    };
    say(socket.into(), &error)?;
    std::process::exit(127)
}

fn say(mut socket: UnixStream, error: &Error) -> Result<()> {
    Ok(socket.write_all(format!("{error:#}").as_bytes())?)
}

fn prepare(instructions: &Instructions) -> Result<()> {
    dup2_stdin(File::open("/dev/null").context("open /dev/null")?).context("close the input")?;
    unshare(CloneFlags::CLONE_NEWNS).context("unshare the mount namespace")?;
    rootfs::enter(&instructions.root)?;
    let cwd = &instructions.program.cwd;
    // A read-only root either has it or not.
    let _ = fs::create_dir_all(cwd);
    Ok(())
}
