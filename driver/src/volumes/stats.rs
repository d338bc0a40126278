use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use zpod_storage::catalog::Condition;
use zpod_volume::{Bytes, TokenDigest, VolumeId};

use super::block::is_meant;
use super::observer::Observed;
use super::publish::NodeVolumes;
use super::published::Silence;
use super::unheard::UNHEARD;
use super::{Context, VolumeError};
use crate::guest::{Health, VolumeReport};

/// What a volume uses, and how it is. Numbers fit an `i64`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stats {
    /// Total, used and available bytes, as df(1) shows them.
    pub bytes: [u64; 3],
    /// Total, used and available inodes, where a guest has told.
    pub inodes: Option<[u64; 3]>,
    /// How it is.
    pub condition: Condition,
}

/// What is said of a volume that nobody has reported on.
pub(super) const SILENT: &str = "no guest has reported on this volume since it was published";

/// A guest may be silent for so long before that is a matter for somebody: pods end.
const TOO_LONG: Duration = Duration::from_secs(60);

impl NodeVolumes {
    /// Usage and condition of a published volume: fresh from its guest, or what the guest said last.
    ///
    /// # Errors
    /// When the volume does not exist or is not published at that path.
    pub async fn stats(&self, id: VolumeId, path: &Path) -> Result<Stats, VolumeError> {
        let context: &Context = &self.context;
        // What is published here is known here: kubelet asks each minute for each volume, on each of many nodes, and the
        // catalog may be one API server for all of them.
        let (volume, token) = match context.published.observed(id) {
            Some(known) => known,
            None => {
                let volume = context.find(id).await?;
                match context.publication(&volume) {
                    Some(publication) => (Arc::new(Observed::new(&volume, publication)), publication.token_digest),
                    None => return Err(self.not_published(id, path)),
                }
            }
        };
        if !is_meant(&volume.target, path, context.published.is_block(id)) {
            return Err(self.not_published(id, path));
        }
        let mut stats = self.said_or_known(&volume, token).await;
        // Not the guest's word but the host's own measurement.
        let mirrored = context.published.is_mirrored(id);
        let excess = context.with_devices(mirrored, move |backing| backing.excess(id)).await?;
        if excess.0 > 0 {
            let also = format!("{}; {}", past_the_partition(excess), stats.condition.message);
            stats.condition = Condition { abnormal: true, message: also };
        }
        Ok(stats)
    }

    fn not_published(&self, id: VolumeId, path: &Path) -> VolumeError {
        VolumeError::NotPublished { id, path: path.to_owned(), node: self.context.node.clone() }
    }

    /// What the guest says now, said last, or what is known without it.
    async fn said_or_known(&self, volume: &Observed, token: TokenDigest) -> Stats {
        let (context, id) = (&self.context, volume.id);
        let Some(heard) = context.published.heard(id) else {
            if let Some(silence) = context.published.silence(id) {
                return Stats::before(&silence);
            }
            let capacity = volume.capacity;
            let allocated = context.with_backing(move |backing| backing.allocated(id)).await.unwrap_or(Bytes(0));
            let used = allocated.min(capacity).0;
            let unheard = context.published.is_unheard(id);
            let message = if unheard { UNHEARD } else { SILENT };
            let condition = Condition { abnormal: unheard, message: message.into() };
            return Stats { bytes: [capacity.0, used, capacity.0 - used], inodes: None, condition };
        };
        match heard.guest.status().await {
            Ok(report) => {
                let report = report.volume(id, token).unwrap_or(&heard.report);
                Stats::new(&VolumeReport { trouble: self.key_trouble(report), ..report.clone() })
            }
            Err(error) => {
                let mut stats = Stats::new(&heard.report);
                stats.condition.message =
                    format!("{}; what follows was known before: {}", error, stats.condition.message);
                stats
            }
        }
    }
}

fn past_the_partition(excess: Bytes) -> String {
    format!(
        "the guest has written {excess} past its partition, into room that other volumes were promised: end the pod, \
         and use an XFS backing directory mounted with prjquota, or headroom 1x, to stop this"
    )
}

impl Stats {
    /// What was known before a guest fell silent.
    fn before(silence: &Silence) -> Self {
        let mut stats = Self::new(&silence.report);
        let silent = silence.since.elapsed();
        stats.condition.abnormal |= silent >= TOO_LONG;
        stats.condition.message = format!(
            "the guest that has the volume can't be heard for {} s: it has ended, it hangs, or its virtual machine was \
             stopped, as QEMU does when the node's file system is full; what follows was known before: {}",
            silent.as_secs(),
            stats.condition.message
        );
        stats
    }

    fn new(report: &VolumeReport) -> Self {
        let of = |usage: crate::guest::Usage| [usage.total, usage.used, usage.available];
        let inodes = (report.inodes.total > 0 && !report.block).then(|| of(report.inodes));
        Self { bytes: of(report.bytes), inodes, condition: condition_of(report) }
    }
}

/// The condition that a report amounts to.
pub(crate) fn condition_of(report: &VolumeReport) -> Condition {
    let said = |otherwise: &str| {
        if report.message.is_empty() { otherwise.to_owned() } else { report.message.clone() }
    };
    let (abnormal, message) = match report.health {
        // No cause for alarm while it is being brought.
        _ if report.awaits_key => (false, said("the guest waits for the volume's key")),
        Health::Online if report.data_errors > 0 => {
            (true, said(&format!("{} files or objects of the pool are damaged", report.data_errors)))
        }
        Health::Online | Health::Unknown if report.refusal.is_some() => (true, said("a container was refused it")),
        Health::Online => match (&report.unmounted, report.paused) {
            (Some(unmounted), _) => (true, unmounted.clone()),
            (None, Some(paused)) => (true, format!("no automatic snapshots are taken: {}", paused.cause())),
            (None, None) => (false, said("the pool is healthy")),
        },
        Health::Unknown => (false, said("the guest does not know the pool's health yet")),
        Health::Degraded => (true, said("the pool is degraded")),
        Health::Faulted => (true, said("the pool is faulted")),
        Health::Suspended => (true, said("the pool is suspended: its device does not answer")),
        Health::Unavailable => (true, said("the pool is not available")),
    };
    match &report.trouble {
        Some(trouble) => Condition { abnormal: true, message: format!("{trouble}; {message}") },
        None => Condition { abnormal, message },
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    #[test]
    fn a_guest_that_is_silent_for_long_is_abnormal_and_one_that_was_damaged_stays_so() {
        let report = VolumeReport::online(VolumeId::from_name("a"));
        let before = |seconds, report: &VolumeReport| {
            let since = Instant::now().checked_sub(Duration::from_secs(seconds)).unwrap();
            Stats::before(&Silence { since, report: report.clone() }).condition
        };
        assert!(!before(3, &report).abnormal);
        let long = before(61, &report);
        assert!(long.abnormal && long.message.contains("can't be heard for 61 s"), "{long:?}");
        assert!(before(3, &VolumeReport { data_errors: 1, ..report }).abnormal);
    }
}
