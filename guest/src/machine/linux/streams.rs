//! Streams of the machine as it is: the ZFS tools make them.

use async_trait::async_trait;

use super::LinuxMachine;
use crate::machine::Fault;
use crate::machine::streams::{Inward, Outward, SendPoint, Streams, What};

#[async_trait]
impl Streams for LinuxMachine {
    async fn send_points(&self, dataset: &str) -> Result<Vec<SendPoint>, Fault> {
        self.tools.send_points(dataset).await
    }

    async fn resume_token(&self, dataset: &str) -> Result<Option<String>, Fault> {
        self.tools.resume_token(dataset).await
    }

    async fn forget_receive(&self, dataset: &str) -> Result<(), Fault> {
        self.tools.forget_receive(dataset).await
    }

    async fn estimate(&self, dataset: &str, what: &What) -> Result<u64, Fault> {
        self.tools.estimate(dataset, what).await
    }

    async fn send(&self, dataset: &str, what: &What) -> Result<Outward, Fault> {
        self.tools.send(dataset, what)
    }

    async fn receive(&self, dataset: &str, new: bool) -> Result<Inward, Fault> {
        self.tools.receive(dataset, new)
    }

    async fn rename(&self, dataset: &str, to: &str) -> Result<(), Fault> {
        self.tools.rename(dataset, to).await
    }

    async fn destroy(&self, dataset: &str) -> Result<(), Fault> {
        self.tools.destroy(dataset).await
    }
}
