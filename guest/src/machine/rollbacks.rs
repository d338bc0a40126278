//! Going back to a snapshot.

use async_trait::async_trait;

use super::Fault;

/// What becomes of snapshots and bookmarks that were taken later.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Later {
    /// They are in the way: ZFS refuses.
    Kept,
    /// They are destroyed. Those that have a hold or a clone are in the way.
    Destroyed,
    /// They are destroyed, held or not, and what was cloned from them.
    DestroyedWithClones,
}

/// The part of the machine that goes back.
#[async_trait]
pub trait Rollbacks {
    /// Makes a dataset what it was at a snapshot.
    async fn rollback(&self, dataset: &str, name: &str, later: Later) -> Result<(), Fault>;

    /// Bookmarks of a dataset that are later than a snapshot: what stands behind the #.
    async fn bookmarks_after(&self, dataset: &str, name: &str) -> Result<Vec<String>, Fault>;

    /// Bytes that were written since a snapshot.
    async fn written_since(&self, dataset: &str, name: &str) -> Result<u64, Fault>;
}
