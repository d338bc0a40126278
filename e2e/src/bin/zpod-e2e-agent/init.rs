//! PID 1: the mounts kata-agent makes when it is init (`general_mount`, `init_agent_as_init`), then the server.

use std::collections::HashMap;
use std::fs;
use std::sync::Arc;

use anyhow::{Context as _, Result};
use nix::mount::MsFlags;
use nix::sys::reboot::{RebootMode, reboot};

use crate::mounts::mount_new;
use crate::rpc::{self, Agent};

/// In kata-agent's order (`INIT_ROOTFS_MOUNTS`): /run comes last and hides what was there.
const MOUNTS: [(&str, &str, MsFlags); 7] = [
    ("proc", "/proc", MsFlags::MS_NOSUID),
    ("sysfs", "/sys", MsFlags::MS_NOSUID),
    ("devtmpfs", "/dev", MsFlags::MS_NOSUID),
    ("tmpfs", "/dev/shm", MsFlags::MS_NOSUID),
    ("devpts", "/dev/pts", MsFlags::MS_NOSUID),
    ("tmpfs", "/run", MsFlags::MS_NOSUID),
    ("cgroup2", "/sys/fs/cgroup", MsFlags::MS_NOSUID),
];

pub(crate) fn run() -> Result<()> {
    let result = serve();
    if let Err(error) = &result {
        eprintln!("agent stand-in: {error:#}");
    }
    // As kata-agent does at the end of its main, when it is init.
    nix::unistd::sync();
    reboot(RebootMode::RB_POWER_OFF).context("power off")?;
    result
}

fn serve() -> Result<()> {
    for (fstype, target, flags) in MOUNTS {
        mount_new(fstype, target, flags)?;
    }
    let address = server_address(&fs::read_to_string("/proc/cmdline").context("read /proc/cmdline")?);
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(async {
        let (agent, stopped) = Agent::new();
        let mut server = ttrpc::asynchronous::Server::new()
            .bind(&address)
            .with_context(|| format!("listen on {address}"))?
            .register_service(HashMap::from(rpc::services(&Arc::new(agent))));
        server.start().await.context("start the server")?;
        println!("agent stand-in: listening on {address}");
        // The sender lives in the agent: an error means the same as a value.
        let _ = stopped.await;
        server.shutdown().await.context("stop the server")
    })
}

/// kata-agent's parameter, and its default.
fn server_address(cmdline: &str) -> String {
    let given = cmdline.split_whitespace().find_map(|word| word.strip_prefix("agent.server_addr="));
    given.unwrap_or("vsock://-1:1024").to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_address_comes_from_the_kernel_command_line() {
        let line = "console=ttyS0 agent.server_addr=unix:///run/kata-agent.sock panic=-1\n";
        assert_eq!(server_address(line), "unix:///run/kata-agent.sock");
        assert_eq!(server_address("quiet"), "vsock://-1:1024");
    }
}
