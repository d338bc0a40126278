use async_trait::async_trait;
use zpod_storage::catalog::{Condition, RollbackOutcome, Volume};
use zpod_storage::crash;
use zpod_volume::{Rollback, VolumeAttributes, VolumeId};

use super::VolumeError;
use super::context::to_the_end;
use super::modify::modify;
use super::publish::NodeVolumes;
use super::published::{Note, halves_of};
use super::rollback::outcome_of;
use super::stats::condition_of;
use crate::guest::{GuestClient, Listener, Report, VolumeReport, Wanted};

#[async_trait]
impl Listener for NodeVolumes {
    async fn reported(&self, guest: &GuestClient, report: Report) {
        let mut believed = Vec::with_capacity(report.volumes.len());
        for volume in report.volumes {
            let volume = &VolumeReport { trouble: self.key_trouble(&volume), ..volume };
            match self.context.published.note(guest, volume) {
                Note::Disbelieved => {
                    // Its own volume of a moment ago, or a lie. Either way nothing follows from it.
                    tracing::debug!(sandbox = guest.sandbox(), volume = %volume.id, "report without the right token ignored");
                }
                Note::SecondClaim { volume: observed, owner, complain } => {
                    self.observer.claimed_again(&observed, guest.sandbox());
                    if complain {
                        let (claims, id) = (guest.sandbox(), volume.id);
                        tracing::warn!(volume = %id, owner, claims, "a second sandbox shows the volume's token: refused");
                    }
                }
                Note::Believed { volume: observed, first, changed, grow, tell } => {
                    believed.push(volume.id);
                    self.observer.reported(&observed, volume);
                    self.provide_key_if_wanted(guest, volume);
                    let record = first || changed && !self.observer.keeps_condition();
                    if record && let Err(error) = self.record(volume).await {
                        tracing::warn!(volume = %volume.id, "report not recorded: {error}");
                    }
                    if grow {
                        self.grow_later(volume.id);
                    }
                    if tell {
                        self.tell_later(volume.id);
                    }
                }
            }
        }
        if report.dropped > 0 {
            tracing::debug!(sandbox = guest.sandbox(), dropped = report.dropped, "entries of a report made no sense");
        }
        self.context.published.keep_only(guest.sandbox(), &believed);
    }

    fn lost(&self, sandbox: &str) {
        self.context.published.lost(sandbox);
    }

    fn gone(&self, sandbox: &str) {
        self.context.published.gone(sandbox);
    }

    fn scanned(&self) -> u64 {
        self.context.published.scanned()
    }

    fn wanted(&self) -> Wanted {
        self.context.published.wanted()
    }
}

impl NodeVolumes {
    async fn record(&self, report: &VolumeReport) -> Result<(), VolumeError> {
        let (node, report) = (self.clone(), report.clone());
        // To its end, also when the sandbox is no more by then: what forbids its pod's next guest to make the pool comes last.
        to_the_end(async move { node.record_report(&report, condition_of(&report)).await }).await
    }

    /// Records what a believed guest said: that the pool is there, and how it is.
    async fn record_report(&self, report: &VolumeReport, condition: Condition) -> Result<(), VolumeError> {
        let (id, token, imported) = (report.id, report.token, report.health.is_imported());
        let _lock = self.context.lock(id).await;
        let volume = self.context.ready(id).await?;
        // The publication may have ended while the lock was waited for.
        if self.context.publication(&volume).is_none_or(|publication| !publication.token_digest.is_of(token)) {
            return Ok(());
        }
        let first = imported && !volume.initialized;
        let behind = if volume.is_mirrored() { halves_of(report, volume.behind) } else { None };
        let moved = behind != volume.behind;
        let stale = self.context.published.is_stale(id);
        let given = volume.given_rollback().cloned();
        let rolled_back = given.and_then(|given| outcome_of(given, report));
        if !first && !moved && !stale && rolled_back.is_none() && volume.condition.as_ref() == Some(&condition) {
            self.context.published.refresh(&volume);
            return Ok(());
        }
        if condition.abnormal {
            tracing::warn!(volume = %id, "{}", condition.message);
        }
        crash::point("report: begin");
        let record =
            Volume { initialized: volume.initialized || imported, condition: Some(condition), behind, ..volume };
        let record = record.with_outcome(rolled_back.as_ref().map(|(_, outcome)| outcome.clone()));
        let volume = self.context.catalog.update(record).await?;
        self.context.published.refresh(&volume);
        crash::point("report: recorded");
        if first {
            tracing::info!(volume = %id, "pool is there: it will never be made again");
        }
        if moved {
            match behind {
                Some(half) => tracing::error!(volume = %id, "the {half} of its mirror lacks some of what was written"),
                None => tracing::info!(volume = %id, "both halves of its mirror have everything"),
            }
        }
        if let Some((rollback, outcome)) = &rolled_back {
            self.tell_rolled_back(id, rollback, outcome);
        }
        if first || moved || stale || rolled_back.is_some() {
            // The next container or virtual machine of this pod must not be allowed to make it either, nor to use that
            // half alone, nor has it to go back once more.
            self.refresh_entry(&volume).await?;
        }
        Ok(())
    }

    pub(super) fn tell_rolled_back(&self, id: VolumeId, rollback: &Rollback, outcome: &RollbackOutcome) {
        match &outcome.refused {
            None => tracing::info!(volume = %id, "its guest went back to snapshot {}", rollback.snapshot),
            Some(reason) => {
                tracing::warn!(volume = %id, "its guest did not go back to snapshot {}: {reason}", rollback.snapshot);
            }
        }
        if let Some((observed, _)) = self.context.published.observed(id) {
            self.observer.rolled_back(&observed, rollback, outcome);
        }
    }

    /// Tells a guest of attributes that its note may be without: it runs on a virtual machine that was started after they
    /// were changed, in a pod that was there before.
    fn tell_later(&self, id: VolumeId) {
        let node = self.clone();
        tokio::spawn(async move {
            if let Err(error) = modify(&node.context, Some(&node), id, VolumeAttributes::default()).await {
                tracing::warn!(volume = %id, "its guest was not told of its attributes: {error}");
            }
        });
    }

    /// Carries out an expansion that its guest has not heard of: it was silent, or its disk too small.
    fn grow_later(&self, id: VolumeId) {
        let node = self.clone();
        tokio::spawn(async move {
            if let Err(error) = node.expand(id, super::CapacityRange::default()).await {
                tracing::warn!(volume = %id, "not grown: {error}");
            }
        });
    }
}
