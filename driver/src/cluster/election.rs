use std::error::Error;

use kube::Client;
use kube_lease_manager::LeaseManagerBuilder;
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// The Lease, in the namespace of the controller.
const LEASE: &str = "zpod-controller";
/// Whoever holds it and says nothing for this long leads no more, in seconds.
const DURATION: u64 = 30;
/// The leader says so this long before, in seconds.
const GRACE: u64 = 10;

/// A part in the choice of a leader among the controllers. Serving CSI needs none: the sidecars choose among themselves,
/// and what is asked for twice is made once. The leader does what one alone should do: see [`super::Orphans`].
#[derive(Debug)]
pub struct Election {
    /// Whether this process leads.
    pub leads: watch::Receiver<bool>,
    task: JoinHandle<()>,
}

impl Election {
    /// Takes part under this name.
    ///
    /// # Errors
    /// When the Lease can't be used.
    pub async fn join(client: Client, namespace: &str, identity: &str) -> Result<Self, Box<dyn Error + Send + Sync>> {
        let manager = LeaseManagerBuilder::new(client, LEASE)
            .with_namespace(namespace)
            .with_identity(identity)
            .with_duration(DURATION)
            .with_grace(GRACE)
            .build()
            .await?;
        let (leads, task) = manager.watch().await;
        let task = tokio::spawn(async move {
            if let Ok(Err(error)) = task.await {
                tracing::warn!("election: {error}");
            }
        });
        Ok(Self { leads, task })
    }
}

impl Drop for Election {
    fn drop(&mut self) {
        self.task.abort();
    }
}
