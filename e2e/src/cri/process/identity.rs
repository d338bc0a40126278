//! Becoming a container's program.

use std::collections::BTreeMap;
use std::os::unix::process::CommandExt as _;
use std::process::Command;

use anyhow::{Context as _, Error, Result, anyhow};
use nix::sys::prctl;
use nix::sys::signal::Signal;
use nix::unistd::{Gid, Uid, chdir, setgroups, setresgid, setresuid};
use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, capability_is_in_bounding_set, remove_capability_from_bounding_set,
    set_capabilities,
};

use super::program::{Program, every_capability};

/// Gives up what the program may not have and executes it; returns only when that fails.
pub(super) fn become_program(program: &Program) -> Error {
    let Err(error) = take_identity(program) else {
        let Some((name, args)) = program.args.split_first() else { return anyhow!("no program") };
        let env: BTreeMap<_, _> = program.env.iter().filter_map(|pair| pair.split_once('=')).collect();
        let error = Command::new(name).args(args).env_clear().envs(env).exec();
        return Error::new(error).context(format!("execute {name:?}"));
    };
    error
}

fn take_identity(program: &Program) -> Result<()> {
    // A machine may itself lack some of "all": runc leaves those out too.
    let own = capabilities(None).context("read the own capabilities")?.permitted;
    let allowed = program.capabilities() & own;
    for (name, capability) in every_capability().difference(allowed).iter_names() {
        // An older kernel doesn't know all of them.
        if capability_is_in_bounding_set(capability).unwrap_or(false) {
            remove_capability_from_bounding_set(capability).with_context(|| format!("drop CAP_{name}"))?;
        }
    }
    let groups: Vec<_> = program.groups.iter().copied().map(Gid::from_raw).collect();
    let (uid, gid) = (Uid::from_raw(program.uid), Gid::from_raw(program.gid));
    setgroups(&groups).context("set groups")?;
    setresgid(gid, gid, gid).context("set group")?;
    // The directory before the user: it may be closed to him, as for containerd.
    chdir(program.cwd.as_str()).with_context(|| format!("working directory {}", program.cwd))?;
    setresuid(uid, uid, uid).context("set user")?;
    if program.uid == 0 {
        let sets = CapabilitySets { effective: allowed, permitted: allowed, inheritable: CapabilitySet::empty() };
        set_capabilities(None, sets).context("set capabilities")?;
    }
    if program.no_new_privileges {
        prctl::set_no_new_privs().context("set no_new_privs")?;
    }
    // Last: a change of identity clears it.
    prctl::set_pdeathsig(Signal::SIGKILL).context("set the parent-death signal")
}
