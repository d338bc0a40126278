//! The cluster that all trials share.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow};
use libtest_mimic::{Failed, Trial};
use tokio::runtime::{Builder, Runtime};
use zpod_e2e::cluster::Cluster;

/// Longer than any scenario may take.
const DEADLINE: Duration = Duration::from_secs(1200);
const NODE: &str = "node-a";

/// Starts the cluster when the first trial needs it. Ends it on drop.
#[derive(Clone, Default)]
pub(crate) struct Stage {
    // Or why there is none: the second trial must not wait for it again.
    scene: Arc<Mutex<Option<Result<Scene, String>>>>,
}

struct Scene {
    // Before the runtime: its parts end while it can still be used.
    cluster: Cluster,
    runtime: Runtime,
}

impl Stage {
    /// A scenario as a trial. When it fails, it shows the cluster's state.
    pub(crate) fn trial(
        &self,
        name: &str,
        scenario: impl AsyncFnOnce(&Cluster) -> Result<()> + Send + 'static,
    ) -> Trial {
        let stage = self.clone();
        Trial::test(name, move || {
            let mut scene = stage.scene.lock().unwrap_or_else(PoisonError::into_inner);
            let scene = scene.get_or_insert_with(|| Scene::start().map_err(|error| format!("{error:#}")));
            let Scene { cluster, runtime } = scene.as_ref().map_err(Failed::from)?;
            runtime.block_on(async {
                let result = tokio::time::timeout(DEADLINE, scenario(cluster)).await;
                let result = result.unwrap_or_else(|_| Err(anyhow!("not done after {DEADLINE:?}")));
                match result {
                    Ok(()) => Ok(()),
                    Err(error) => {
                        // All that a run says that is stopped before its end.
                        eprintln!("{error:#}");
                        let diagnosis = cluster.diagnosis().await;
                        let cleared = tokio::time::timeout(DEADLINE, cluster.clear()).await;
                        eprintln!("what it left is ended: {cleared:?}");
                        Err(Failed::from(format!("{error:#}\n{diagnosis}")))
                    }
                }
            })
        })
    }
}

impl Scene {
    fn start() -> Result<Self> {
        let runtime = Builder::new_current_thread().enable_all().build().context("make a runtime")?;
        let cluster = runtime.block_on(async {
            let cluster = Cluster::start().await?;
            cluster.add_node(NODE).await?;
            Ok::<_, anyhow::Error>(cluster)
        })?;
        Ok(Self { cluster, runtime })
    }
}
