//! The driver in a cluster: the same work on volumes, asked for and reported through custom resources.
//!
//! # Design
//! The controller writes what is wanted into a `ZfsVolume` and waits until the node that is to have it says that it is
//! so ([`ClusterProvisioner`]). It keeps nothing itself: any number may run, and killing one loses nothing. A node
//! watches its own objects only and carries out what they ask for ([`reconcile`]), under the same lock as the work that
//! kubelet asks for.

mod node_status;
mod nodes;
mod provisioner;
mod reconcile;

pub use node_status::{NodeReporter, report_node};
pub use nodes::Nodes;
pub use provisioner::ClusterProvisioner;
pub use reconcile::reconcile;
