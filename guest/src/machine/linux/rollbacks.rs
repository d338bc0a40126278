//! Going back, as the ZFS tools do it.

use async_trait::async_trait;

use super::LinuxMachine;
use crate::machine::Fault;
use crate::machine::rollbacks::{Later, Rollbacks};

#[async_trait]
impl Rollbacks for LinuxMachine {
    async fn rollback(&self, dataset: &str, name: &str, later: Later) -> Result<(), Fault> {
        self.tools.rollback(dataset, name, later).await
    }

    async fn bookmarks_after(&self, dataset: &str, name: &str) -> Result<Vec<String>, Fault> {
        self.tools.bookmarks_after(dataset, name).await
    }

    async fn written_since(&self, dataset: &str, name: &str) -> Result<u64, Fault> {
        self.tools.written_since(dataset, name).await
    }
}
