//! What zpod runs inside the guest: `/zpod/init`.
//!
//! # Design
//! Three roles in one static binary, and a fourth in containers ([`launcher`]). [`init`] starts the machine, [`proxy`] stands in front of the unmodified kata-agent
//! and mounts volumes before the agent hears of a container, [`control`] answers the node. Both work on [`volumes`], which
//! knows nothing of either, and which reaches disks, ZFS and mounts through the trait [`machine::Machine`], so that its
//! logic is tested against a simulated machine that can be killed between any two steps.
//!
//! Bytes from the host pass through [`ttrpc`] (frames), [`wire`] (protobuf fields) and [`request`] (what is ours in
//! them). None of these panics on any input; sizes are bounded.
//!
//! # Limitations
//! One architecture's image runs glibc tools with their own loader; the kernel must show `diskseq` (5.15 or later).

pub mod automount;
pub mod block;
pub mod children;
pub mod control;
pub mod daemon;
pub mod disk;
pub mod error;
pub mod export;
pub mod init;
pub mod journal;
pub mod key;
pub mod kmsg;
pub mod launcher;
pub mod lost;
pub mod machine;
pub mod modules;
pub mod mounts;
pub mod ownership;
pub mod place;
pub mod proxy;
pub mod request;
pub mod sys;
pub mod ttrpc;
pub mod volumes;
pub mod wire;
pub mod zfs;
