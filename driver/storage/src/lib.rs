//! Where volumes are kept ([`backing`]) and recorded ([`catalog`]) on the host side. Knows nothing of gRPC, Kubernetes
//! or Kata.

pub mod backing;
pub mod catalog;
pub mod crash;
mod directory;
