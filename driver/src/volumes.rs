//! What can be done with a volume, and the rules that keep its data. No gRPC here.
//!
//! # Design
//! [`Provisioner`] is the controller's side: it records volumes and has their devices made and destroyed.
//! [`NodeVolumes`] is the node's side: it publishes them to pods and listens to their guests. Each change of a volume
//! happens under that volume's lock, in a task of its own that runs to its end even when the caller has hung up, and
//! can be killed between any two steps and repeated.
//!
//! # Limitations
//! Both sides run in one process and share the lock; the catalog in Kubernetes, where they don't, comes later.

mod capacity_range;
mod context;
mod error;
mod expand;
mod lock;
mod mount_options;
mod observer;
mod pods;
mod provision;
mod publish;
mod published;
mod reports;
mod spec;
mod stats;

pub use capacity_range::{CapacityRange, DEFAULT_CAPACITY};
pub use context::Context;
pub use error::VolumeError;
pub use mount_options::MountOptions;
pub use observer::{CLAIM_NAME, CLAIM_NAMESPACE, Observed, Observer, PERSISTENT_VOLUME};
pub use pods::{AnyPod, PodCheck};
pub use provision::{CreateRequest, Provisioner, Room, TOPOLOGY_KEY};
pub use publish::{NodeVolumes, PublishRequest};
pub use stats::Stats;
