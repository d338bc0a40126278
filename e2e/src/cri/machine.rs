//! What runs a pod's containers: processes of this machine, or a guest.

use std::path::PathBuf;

use anyhow::Result;
use async_trait::async_trait;
use nix::sys::signal::Signal;
use tokio::sync::oneshot;

use super::api;
use super::images::Image;
use super::process::program::Program;
use crate::shim::Output;

/// A container to be.
#[derive(Debug, Clone)]
pub(super) struct Order {
    pub(super) id: String,
    pub(super) image: Image,
    pub(super) program: Program,
    pub(super) log: PathBuf,
    pub(super) config: api::ContainerConfig,
}

/// One pod's place to run.
#[async_trait]
pub(super) trait Machine: std::fmt::Debug + Send + Sync {
    /// Whether it is still there: when it isn't, kubelet makes the pod anew.
    fn runs(&self) -> bool;

    /// Gets ready to start a container.
    async fn create(&self, order: Order) -> Result<()>;

    /// Starts it; the receiver gets its exit code, once everything it printed is in its log.
    async fn start(&self, id: &str) -> Result<oneshot::Receiver<i32>>;

    /// Sends a signal to a container that was started.
    async fn signal(&self, id: &str, signal: Signal) -> Result<()>;

    /// Runs a command in a container to its end. Dropping the future ends the command.
    async fn exec(&self, id: &str, command: Vec<String>) -> Result<Output>;

    /// Forgets a container that doesn't run.
    async fn remove(&self, id: &str) -> Result<()>;

    /// Ends whatever is left.
    async fn stop(&self);

    /// The process to ask about a container's processor time and memory, where there is one.
    fn process(&self, id: &str) -> Option<u32>;
}
