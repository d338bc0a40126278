//! zpod's state in Kubernetes: the custom resources, and the catalog that keeps volumes in them.

mod catalog;
mod client;
pub mod crd;
mod quantity;
mod record;

pub use catalog::{KubeCatalog, Remark, is_refusal};
pub use client::connect;
pub use quantity::Quantity;
pub use record::{CLAIM_UID, DESTROYED, EXPANDED, HEALTHY, READY, volume_of};
