//! Suspended pools, tried again until their disks work.
//!
//! # Design
//! A pool whose disk fails its writes is suspended, and ZFS leaves it so until somebody says `zpool clear`. In a guest
//! nobody sits who would, and a disk that failed because the node's file system was full works again once there is room.
//! So each suspended pool is cleared every [`EVERY`]: what could not be written is written then, and containers that wait
//! for it go on. A disk that is still broken suspends the pool again, at the cost of a few failed writes.
//!
//! Mirrors are looked at with each turn too ([`super::mirror`]).
//!
//! The volume's gate is not waited for: whoever holds it may be waiting for this very pool. Clearing a pool twice, or one
//! that is being exported, does no harm; and a disk that is not the pool's is not taken, whatever its name (ZFS compares
//! the label's GUID).

use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior};

use super::{Volume, Volumes};
use crate::machine::{Health, Machine};

/// How often a suspended pool is tried again.
const EVERY: Duration = Duration::from_secs(10);
/// Of the tries that fail the first is logged, then one of so many: one in ten minutes.
const LOG_EACH: u32 = 60;

/// How long a pool is suspended, and how often that was tried to be changed.
#[derive(Debug, Clone, Copy)]
pub(super) struct Suspension {
    since: Instant,
    tries: u32,
}

impl<M: Machine> Volumes<M> {
    /// Tries suspended pools again, for ever.
    pub async fn keep_resuming(self: Arc<Self>) {
        let mut tick = tokio::time::interval(EVERY);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tick.tick().await;
            // All at once, and each bounded by the tools' own deadline: one that hangs holds up the others' next turn only.
            let mut tries = JoinSet::new();
            for volume in self.volumes() {
                let volumes = Arc::clone(&self);
                tries.spawn(async move { volumes.try_again(&volume).await });
            }
            while tries.join_next().await.is_some() {}
        }
    }

    async fn try_again(&self, volume: &Volume) {
        let Some(active) = volume.state().active.clone() else { return };
        let pool = &active.request.spec.pool;
        let suspended = |health: Option<Health>| health == Some(Health::Suspended);
        // A health that can't be read now is read at the next turn.
        let Ok(health) = self.machine.health(pool).await else { return };
        if !suspended(health) {
            if let Some(suspension) = volume.state().suspended.take() {
                tracing::warn!(volume = %volume.id, "pool {pool} is no longer suspended, after {}", suspension.lasted());
            }
            if active.mirror.is_some() {
                self.watch_halves(volume).await;
            }
            return;
        }
        let now = Suspension { since: Instant::now(), tries: 0 };
        let before = *volume.state().suspended.get_or_insert(now);
        let resumed = self.machine.resume(pool, true).await;
        let still = self.machine.health(pool).await.is_ok_and(suspended);
        let mut state = volume.state();
        // What was read while it was suspended says so, and its counters are zero again.
        state.details = None;
        if !still && resumed.is_ok() {
            state.suspended = None;
            tracing::warn!(volume = %volume.id, "pool {pool} was suspended for {} and is resumed", before.lasted());
            return;
        }
        state.suspended = Some(Suspension { tries: before.tries + 1, ..before });
        if before.tries.is_multiple_of(LOG_EACH) {
            let cause = resumed.err().map_or_else(|| "its disk fails still".to_owned(), |fault| fault.text);
            tracing::error!(
                volume = %volume.id,
                "pool {pool} is suspended and can't be resumed, which is tried again every {} s: {cause}",
                EVERY.as_secs()
            );
        }
    }
}

impl Suspension {
    fn lasted(self) -> String {
        format!("{} s", self.since.elapsed().as_secs())
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{count, disks, guest, prepare, wanted};
    use super::*;
    use zpod_volume::Create;

    #[tokio::test(start_paused = true)]
    async fn a_suspended_pool_is_tried_again_until_its_disk_works_and_then_all_is_well() {
        let volumes = guest(&disks(&["a", "b"]));
        let _ = prepare(&volumes, "c1", wanted("a", Create::Fresh, "/m1")).await.unwrap();
        let _ = prepare(&volumes, "c1", wanted("b", Create::Fresh, "/m2")).await.unwrap();
        let task = tokio::spawn(Arc::clone(&volumes).keep_resuming());
        tokio::time::sleep(3 * EVERY).await;
        assert_eq!(count(&volumes, "resume"), 0, "nothing is done to pools that are well");

        volumes.machine().break_disk(0, true);
        let problem = || async { volumes.status(Duration::ZERO).await.iter().find_map(|volume| volume.problem()) };
        assert!(problem().await.unwrap().contains("SUSPENDED"));
        tokio::time::sleep(5 * EVERY).await;
        let tries = count(&volumes, "resume");
        assert!((4..=6).contains(&tries), "{tries} tries in five turns");
        assert!(problem().await.is_some());

        volumes.machine().break_disk(0, false);
        tokio::time::sleep(2 * EVERY).await;
        assert_eq!(problem().await, None);
        let tries = count(&volumes, "resume");
        tokio::time::sleep(5 * EVERY).await;
        assert_eq!(count(&volumes, "resume"), tries);
        // The container has it still, and gives it back as ever.
        volumes.release_container("c1").await;
        assert_eq!(volumes.machine().imported().len(), 0);
        task.abort();
    }

    #[tokio::test(start_paused = true)]
    async fn a_pool_is_resumed_while_somebody_waits_for_it() {
        let volumes = guest(&disks(&["a"]));
        let _ = prepare(&volumes, "c1", wanted("a", Create::Fresh, "/m1")).await.unwrap();
        let task = tokio::spawn(Arc::clone(&volumes).keep_resuming());
        let volume = volumes.volume(wanted("a", Create::Fresh, "/m1").spec.id);
        let _gate = volume.gate.lock().await;
        volumes.machine().break_disk(0, true);
        tokio::time::sleep(2 * EVERY).await;
        volumes.machine().break_disk(0, false);
        tokio::time::sleep(2 * EVERY).await;
        assert_eq!(volumes.status(Duration::ZERO).await[0].health, Some(Health::Online));
        task.abort();
    }
}
