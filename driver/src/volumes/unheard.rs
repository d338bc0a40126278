use std::time::Duration;

use futures_util::StreamExt as _;
use tokio::time::MissedTickBehavior;

use super::NodeVolumes;

/// How often the volumes are looked at of which no guest tells.
const EVERY: Duration = Duration::from_secs(30);
/// How long a volume may be published before that means anything: a guest tells of it when its container is created.
const PATIENCE: Duration = Duration::from_secs(60);
/// Pods that are asked for at once.
const AT_ONCE: usize = 4;

/// What is said of a volume whose container runs without it.
pub(super) const UNHEARD: &str = "a container that mounts it runs, and no guest has reported on it: the pod's runtime has not \
                                  plugged its disk in, and the container has a read-only directory without its data. With \
                                  Kata's Go runtime that is disable_block_device_use = true: set it to false in the drop-in of \
                                  the pod's runtime handler, as charts/zpod/files/kata-deploy-values.yaml does, and delete the \
                                  pod. If the container does have the volume, its guest can't be heard: see kubectl zpod doctor";

impl NodeVolumes {
    /// Finds volumes that a runtime has left out without an error, for ever.
    ///
    /// # Design
    /// zpod-guest tells of a volume from the moment a container asks for it, and fails the container where it can't give
    /// it. So a container that runs and mounts a volume of which no guest tells has something else there. That it runs is
    /// asked of the API server, and only for volumes of which nobody has told since they were published: a guest that has had
    /// one tells of it no more when its container has ended, which the API server hears of later. It holds until a guest tells or the publication
    /// ends: a container that has ended since, for want of its data perhaps, was without it all the same.
    pub async fn keep_finding_unheard(self) {
        let mut tick = tokio::time::interval(EVERY);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tick.tick().await;
            self.find_unheard(PATIENCE).await;
        }
    }

    /// One look at those that have been published for so long.
    pub async fn find_unheard(&self, patience: Duration) {
        let silent = self.context.published.silent(patience);
        futures_util::stream::iter(silent)
            .for_each_concurrent(AT_ONCE, |(volume, token)| async move {
                let Some(pod) = volume.pod.as_ref() else { return };
                match self.pods.runs_with(&volume, pod).await {
                    Ok(true) => {
                        let tell = || self.observer.unheard(&volume, UNHEARD);
                        if self.context.published.set_unheard(volume.id, token, tell) {
                            tracing::warn!(volume = %volume.id, pod = %pod, "{UNHEARD}");
                        }
                    }
                    Ok(false) => {}
                    // It is asked again at the next turn.
                    Err(error) => tracing::debug!(volume = %volume.id, "{error}"),
                }
            })
            .await;
    }
}
