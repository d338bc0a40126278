//! What can be done with a volume, and the rules that keep its data. No gRPC here.
//!
//! # Design
//! [`Provisioner`] is the controller's side: it records volumes and has their devices made and destroyed.
//! [`NodeVolumes`] is the node's side: it publishes them to pods and listens to their guests. Each change of a volume
//! happens under that volume's lock, in a task of its own that runs to its end even when the caller has hung up, and
//! can be killed between any two steps and repeated.
//!
//! In a cluster the controller asks for volumes through their objects, and the node that is to have them does the same
//! work as here: see [`crate::cluster`].

mod abandoned;
mod access;
mod block;
mod capacity_range;
mod clone;
mod context;
mod copies;
mod ephemeral;
mod error;
mod expand;
mod inline;
mod keys;
mod lock;
mod mirror;
mod modify;
mod mount_options;
mod observer;
mod pods;
mod presence;
mod provision;
mod publish;
mod published;
mod reports;
mod rollback;
mod scrubs;
mod snapshots;
mod spec;
mod stats;
mod unheard;
mod withdraw;

#[allow(unused_imports, reason = "for the cluster's provisioner")]
pub(crate) use access::check_access;
pub use capacity_range::{CapacityRange, DEFAULT_CAPACITY};
#[allow(unused_imports, reason = "for the cluster's provisioner")]
pub(crate) use clone::Bounds;
pub use context::{Context, Probe};
pub use copies::Progress;
pub use ephemeral::EphemeralVolume;
pub use error::VolumeError;
pub use inline::{InlineLimits, Share};
pub use keys::{KeyPair, Secret};
pub(crate) use mirror::check_vdevs;
pub use mirror::{Mirrors, NO_MIRRORS};
#[allow(unused_imports, reason = "for the cluster's provisioner")]
pub(crate) use modify::check as check_attributes;
pub use mount_options::MountOptions;
pub use observer::{CLAIM_NAME, CLAIM_NAMESPACE, Observed, Observer, PERSISTENT_VOLUME, SnapshotChange};
pub use pods::{AnyPod, PodCheck};
pub use presence::{Look, Presence};
pub(crate) use provision::same;
pub use provision::{CreateRequest, Provision, Provisioner, Room, TOPOLOGY_KEY, VolumePage};
pub use publish::{NodeVolumes, PublishRequest};
pub use scrubs::ScrubStart;
pub use snapshots::{GroupRequest, MarkBounds, SnapshotPage, SnapshotRequest, Snapshots, Snapshotter};
#[allow(unused_imports, reason = "for the cluster's snapshots")]
pub(crate) use snapshots::{member_name, wanted_member};
pub use stats::Stats;
pub(crate) use stats::condition_of;
