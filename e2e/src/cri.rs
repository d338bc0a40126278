//! A Kubernetes node for the tests: a real kubelet, and a CRI server in the place of containerd and Kata.
//!
//! # Design
//! * A node is a mount namespace ([`node`]): its kubelet directory and the like are bound over the standard paths, so
//!   that two nodes run on one machine. The network is that of the process that starts it.
//! * Pods without a runtime handler are processes in namespaces of their own ([`process`]), with the user, the
//!   capabilities, the mounts and their propagation as the CRI request says: what a chart's security context lacks,
//!   its program lacks.
//! * Pods with a Kata handler boot a guest ([`guest`]): the shim player does with their mounts what Kata's shim does.
//! * Images are directories ([`images`]).
//!
//! # Limitations
//! No cgroups, so no limits and hardly any statistics; no seccomp, AppArmor or user namespaces; no streaming `exec`,
//! `attach` or `port-forward` (`ExecSync` works, for probes and for [`client::Client`]). A guest has no network: its
//! pod's address is taken and answers nobody. Its containers share one busybox for their root, whatever their images
//! say, and get no files of kubelet's (tokens, `/etc/hosts`). Nothing survives a restart of the node.

pub mod client;
mod container;
mod filesystems;
mod guest;
mod images;
mod kubelet;
mod log;
mod machine;
mod network;
pub mod node;
mod pod;
pub mod process;
mod runtime;
mod service;
mod statistics;

pub use images::Image;
pub use network::Subnet;

/// The messages and services of CRI v1 that are used here.
#[allow(missing_docs, unreachable_pub, rust_2018_idioms, clippy::all)]
pub mod api {
    tonic::include_proto!("runtime.v1");
}
