//! The host side of zpod.
//!
//! Layers, each of which knows only those above it in this list:
//!
//! * `zpod_volume`, `zpod_storage`: ids, sizes, parameters; where volumes are kept and recorded.
//! * [`kata`]: the direct-volume contract, target paths, discovery of sandboxes.
//! * [`guest`]: the control channel to zpod-guest. Everything from there is hostile.
//! * [`volumes`]: what can be done with a volume, and the rules that keep its data. No gRPC.
//! * [`metrics`]: what Prometheus is told.
//! * [`admin`]: what `kubectl zpod` asks of a node and of running guests.
//! * [`csi`]: the CSI services: parse, call, map.
//! * [`serve`], [`privileges`], [`system_calls`], [`memory`], [`command`]: the socket, what is given up at the start, how keys
//!   in memory stay there, and the command line.

pub mod admin;
mod bucket;
pub mod cluster;
pub mod command;
mod crowd;
pub mod csi;
pub mod guest;
pub mod kata;
pub mod memory;
pub mod metrics;
pub mod privileges;
pub mod serve;
pub mod system_calls;
pub mod volumes;
