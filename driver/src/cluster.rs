//! The driver in a cluster: the same work on volumes, asked for and reported through custom resources.
//!
//! # Design
//! The controller writes what is wanted into a `ZfsVolume` and waits until the node that is to have it says that it is
//! so ([`ClusterProvisioner`]), and for snapshots a `ZfsSnapshot` ([`ClusterSnapshotter`]). It keeps nothing itself: any number may run, and killing one loses nothing. A node
//! watches its own objects only and carries out what they ask for ([`reconcile_volumes`], [`reconcile_snapshots`]), under the same lock as the work that
//! kubelet asks for. What guests say goes into the status of the volumes ([`PoolStates`]) and, where it is news for a
//! person, into events ([`PoolEvents`]); which pods can have a volume at all, the node asks the API server
//! ([`ClusterPods`]).

mod answers;
mod election;
mod events;
#[cfg(test)]
mod fake;
mod groups;
mod node_status;
mod nodes;
mod orphans;
mod pods;
mod provisioner;
mod reasons;
mod reconcile;
mod snapshotter;
mod state;
mod unmade;

pub use election::Election;
pub use events::{PoolEvents, WaitingEvents, write_events};
pub use groups::Groups;
pub use node_status::{NodeReporter, report_node};
pub use nodes::Nodes;
pub use orphans::Orphans;
pub use pods::ClusterPods;
pub use provisioner::ClusterProvisioner;
pub use reconcile::{reconcile_snapshots, reconcile_volumes};
pub use snapshotter::ClusterSnapshotter;
pub use state::{PoolStates, write_states};
