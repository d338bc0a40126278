//! Builds what boots in a pod's guest: Debian's kernel with OpenZFS, and the
//! initramfs overlay that is appended to the Kata initrd already on a node.
//!
//! # Design
//! The kernel unpacks concatenated archives in order, so an *overlay* appended
//! to Kata's own initrd adds to it and changes nothing in it: agent and shim
//! keep matching, and no Kata code is shipped. Everything of ours lies under
//! `/zpod`, with its own dynamic loader and libraries, because the initrd
//! below may be musl or another glibc.
//!
//! Kernel, modules and tools come from Debian's packages, installed in a build
//! chroot in the cache ([`chroot`]); nothing on the host but the cache changes.
//! Steps are keyed by their inputs and renamed into place ([`cache`]), so a
//! build killed anywhere is simply built again.
//!
//! The same inputs give the same bytes: entries are sorted, times and owners
//! fixed, compression single-threaded ([`archive`]).
//!
//! # Limitations
//! x86-64 and Debian 12 only; building the chroot needs root.

pub mod archive;
pub mod atomic;
pub mod cache;
pub mod chroot;
pub mod command;
pub mod debian;
pub mod error;
pub mod guest_binary;
pub mod image;
pub mod initrd;
pub mod libraries;
pub mod manifest;
pub mod modules;
pub mod overlay;

pub use archive::Archive;
pub use error::{Error, Result};
