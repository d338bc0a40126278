//! What the admin endpoint of zpod-node and kubectl-zpod say to each other: paths, headers and bodies. HTTP/1.1, JSON,
//! and raw ZFS streams for what is sent and received.
//!
//! # Design
//! In a cluster the endpoint is reached through the API server's proxy to pods, which takes the caller's `Authorization`
//! for itself; who asks is said by [`TOKEN_HEADER`]. On one machine it is a unix socket, and its mode says who may.

mod answer;
mod name;
mod route;

pub use answer::{
    Check, Failed, Level, PoolSnapshots, Properties, Received, Removed, RollbackPlan, RollbackRequested, SendPoint,
    SendPoints, Taken,
};
pub use name::{NewSnapshotName, ParseTokenError, ResumeToken, SendName, SnapshotName};
pub use route::{RollbackQuery, Route, SendQuery, canceled, new_snapshot_name, snapshot, snapshot_name};

/// What the names of the pods begin with that kubectl-zpod makes to have a volume for a time.
pub const HELPER_PREFIX: &str = "zpod-transfer-";

/// Whether a pod is one of those: the prefix, the time in milliseconds and a process, both in hexadecimal digits. No volume goes
/// back with the start of one.
pub fn is_helper(pod: &str) -> bool {
    let hex = |text: &str, least: usize| text.len() >= least && text.bytes().all(|c| c.is_ascii_hexdigit());
    let rest = pod.strip_prefix(HELPER_PREFIX).and_then(|rest| rest.split_once('-'));
    rest.is_some_and(|(time, process)| hex(time, 11) && hex(process, 1))
}

/// The port of zpod-node.
pub const PORT: u16 = 9812;
/// The header with a ServiceAccount token for what is asked for ([`Route::audience`]).
pub const TOKEN_HEADER: &str = "x-zpod-token";
/// What the audiences of those tokens begin with. None opens anything else, the API server least.
const AUDIENCE: &str = "zpod.storage";
/// The ServiceAccount, in zpod's namespace, whose tokens are taken.
pub const SERVICE_ACCOUNT: &str = "zpod-admin";
/// The header with ZFS's estimate of what is about to be sent, in bytes.
pub const ESTIMATE_HEADER: &str = "x-zpod-estimated-bytes";
/// The media type of a ZFS stream.
pub const STREAM_TYPE: &str = "application/octet-stream";
