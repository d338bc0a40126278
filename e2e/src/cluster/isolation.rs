//! Namespaces of the cluster's own, so that its addresses, ports and mounts meet nobody else's.

use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, bail};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

use crate::inputs;

/// The first address of the services' range: what pods know the API server by.
pub const SERVICE_ADDRESS: &str = "10.96.0.1";
/// The bridge's own address, which the machine has on the pods' network.
pub const BRIDGE_ADDRESS: &str = "10.88.0.1";
/// Where no machine is: only that there is a default route, from which Kubernetes' parts learn their address.
const NOWHERE: &str = "10.88.255.254";

/// Moves this process, and what it will start, into a network and a mount namespace of its own, with the pods' bridge
/// `cni0`. First thing in `main`: a namespace is a thread's, and threads started earlier would stay behind.
///
/// # Errors
/// When there are threads already, without root's rights, or without `ip`.
pub fn isolate() -> Result<()> {
    let threads = std::fs::read_dir("/proc/self/task").context("count the threads")?.count();
    if threads != 1 {
        bail!("isolate() comes first in main: there are {threads} threads already");
    }
    unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWNET).context("make namespaces (run this as root)")?;
    let none = None::<&str>;
    mount(none, Path::new("/"), none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).context("make mounts private")?;
    let ip = inputs::program("ip", "install it with `deploy/setup.sh kubernetes`")?;
    let service = format!("{SERVICE_ADDRESS}/32");
    let bridge = format!("{BRIDGE_ADDRESS}/16");
    let commands: [&[&str]; 6] = [
        &["link", "set", "lo", "up"],
        &["address", "add", &service, "dev", "lo"],
        &["link", "add", "cni0", "type", "bridge"],
        &["address", "add", &bridge, "dev", "cni0"],
        &["link", "set", "cni0", "up"],
        &["route", "add", "default", "via", NOWHERE],
    ];
    for arguments in commands {
        let output = Command::new(&ip).args(arguments).output().context("run ip")?;
        if !output.status.success() {
            bail!("ip {}: {}", arguments.join(" "), String::from_utf8_lossy(&output.stderr).trim());
        }
    }
    Ok(())
}
