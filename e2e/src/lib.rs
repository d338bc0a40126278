//! The end-to-end harness: real guests in QEMU, the real zpod, and in between a player of the Kata shim.
//!
//! # Design
//! * [`Node`]: directories of a node, a running `zpod --standalone` in them, a CSI client.
//! * [`Guest`]: one virtual machine, its disks hot-plugged by QMP, its vsock a unix socket on the host.
//! * [`Sandbox`]: does what Kata's shim does between a pod's mounts and the agent in its guest, in the manner of either
//!   runtime ([`Runtime`]): it reads `mountInfo.json`, hot-plugs, and sends the agent's requests.
//! * [`cri`]: a Kubernetes node, with a real kubelet (`zpod-e2e-node`).
//! * `zpod-e2e-agent` (a binary of this crate) takes kata-agent's place in the guest, unless `ZPOD_E2E_KATA_AGENT`
//!   names a real one.
//!
//! Whatever is started dies with the process that started it, and is cleaned up on `Drop`. Everything has a deadline;
//! a failure shows the end of the guest's console.

use std::time::Duration;

pub mod accel;
pub mod agent;
pub mod authority;
pub mod base_initrd;
pub mod cluster;
pub mod console;
pub mod cri;
pub mod csi;
pub mod direct_volume;
pub mod disk;
pub mod inputs;
pub mod node;
pub mod postgresql;
pub mod process;
pub mod qemu;
pub mod qmp;
pub mod report;
pub mod screen;
pub mod secrets;
pub mod shim;
pub mod slot;
pub mod vsock;
pub mod workdir;
pub mod zpod;

/// How long anything is waited for that is to become so. Nothing is measured by it: guests in emulation boot and work at
/// the same time on a machine that may be slow, and sidecars and kubelet try again after some time.
pub const PATIENCE: Duration = Duration::from_secs(300);

pub use node::Node;
pub use qemu::{Boot, Guest};
pub use shim::{Container, Mount, Runtime, Sandbox, Vmm};
