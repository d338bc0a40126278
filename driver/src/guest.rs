//! The control channel to zpod-guest: gRPC over vsock, host to guest only.
//!
//! # Design
//! A guest belongs to a tenant who may own its kernel. So only those are listened to that have a volume, and those that a
//! publication may wait for, a bounded number of them at a time ([`Wanted`]). Each call has a deadline, each message a
//! size, each list a length, each text is cleaned ([`VolumeReport`]); a flood is slowed to the pace at which it is read.
//! What a guest says of a volume counts only if it comes with the token of the volume's publication: see `volumes`.

mod client;
mod connect;
mod monitor;
mod pace;
mod report;
mod turns;

pub use client::{Changes, GuestClient, GuestError, MAX_CHUNK, Sending};
pub use monitor::{Listener, Monitor};
pub use report::{Errors, Health, Paused, Report, RolledBack, Scrub, ScrubState, Usage, VolumeReport, clean};
pub use turns::Wanted;
