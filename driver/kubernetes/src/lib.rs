//! zpod's state in Kubernetes: the custom resources, and the catalog that keeps volumes and snapshots in them.

mod catalog;
mod client;
pub mod crd;
mod quantity;
mod record;
mod remark;
mod request;

pub use catalog::{Head, Kept, KubeCatalog, Requests};
pub use client::connect;
pub use quantity::Quantity;
pub use record::{CLAIM_UID, DESTROYED, EXPANDED, HEALTHY, MODIFIED, READY};
pub use remark::Remark;
pub use request::is_refusal;
