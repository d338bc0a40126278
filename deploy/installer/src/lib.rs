//! Puts the guest on a node: our kernel, and the node's own Kata initrd with our overlay appended to it.
//!
//! # Design
//! The agent in a guest has to match the shim on the node, so no Kata code is shipped: the initrd is made on each node
//! from the one that came with its Kata ([`kata`] finds it), and again whenever that changes ([`watch`]). Paths of the
//! node are followed inside its root only ([`root`]); versions are made aside and switched to in one step, so that
//! kernel and initrd always match ([`install_dir`]).
//!
//! # Limitations
//! x86-64 only, as the guest is. Needs Linux 5.6 on the node (openat2). Between an upgrade of Kata and the next look,
//! new pods start with the agent of before.

pub mod check;
pub mod digest;
pub mod error;
pub mod guest;
pub mod inspect;
pub mod install;
pub mod install_dir;
pub mod kata;
pub mod report;
pub mod root;
pub mod stamp;
pub mod uninstall;
pub mod version;
pub mod watch;

pub use error::{Error, Result};
