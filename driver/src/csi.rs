//! The CSI services, version 1.12. They parse, call and map; what they call is in [`crate::volumes`].

mod capability;
mod controller;
mod ephemeral;
mod group;
mod identity;
mod node;
mod request;
mod snapshot;
mod status;

pub use controller::ControllerService;
pub use group::GroupControllerService;
pub use identity::IdentityService;
pub use node::NodeService;
pub use status::to_status;

use std::future::Future;

use tonic::{Code, Response, Status};

use crate::volumes::VolumeError;

/// The driver's name.
pub const DRIVER: &str = "csi.zpod.storage";

/// Runs one call, logs how it ended, and maps its error.
async fn answer<T>(
    call: &'static str,
    volume: &str,
    work: impl Future<Output = Result<T, VolumeError>>,
) -> Result<Response<T>, Status> {
    let begun = std::time::Instant::now();
    let result = work.await.map_err(|error| to_status(&error));
    let took = begun.elapsed();
    crate::metrics::observe(call, result.as_ref().map_or_else(|status| status.code(), |_| Code::Ok), took);
    let millis = took.as_millis() as u64;
    // The id is as the caller gave it: cleaned before it reaches the log.
    let volume = crate::guest::clean(volume, 128);
    match result {
        Ok(value) => {
            tracing::debug!(call, volume, millis, "done");
            Ok(Response::new(value))
        }
        Err(status) => {
            tracing::warn!(call, volume, millis, code = ?status.code(), "{}", status.message());
            Err(status)
        }
    }
}
