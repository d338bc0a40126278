//! Automatic snapshots of volumes, by the schedule that the node gives with the spec.
//!
//! # Design
//! The guest takes and removes them by itself, so it is the same whether its node is heard or not. A turn every
//! [`EVERY`], and one right after a volume has come up or was changed, looks at each volume that has a schedule: what is
//! due is taken ([`plan`]), then what is beyond the numbers is destroyed. A turn in which nothing can be due runs no tool.
//!
//! **Room.** Below a tenth of its room a volume takes no snapshot. The room is the volume's quota, its size where it is a
//! block device, what there is where it has neither. Where it is automatic snapshots that keep the room from the
//! application, the oldest go, one a turn, until there is a tenth again or only the newest of each kind are left. Nothing goes
//! where that helps nobody: the volume's own files may be what fills it, and snapshots may hold next to nothing. What is
//! kept for the volume (`refreservation`) stays kept: ZFS refuses a snapshot that would take it.
//!
//! Nothing is done to a pool that is suspended, to a volume that is read-only or receives a stream, nor while another call
//! works on the volume: the next turn comes soon. `zfs destroy` of one snapshot, without `-r`, `-R` or `-d`, never takes
//! what has a hold or a clone.

use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::Instant;
use zpod_volume::SnapshotSchedule;

use super::marks::is_mark;
use super::{Active, Volume, Volumes, device};
use crate::machine::{Fault, Health, Machine};

mod plan;

use plan::{Automatic, Period};

/// How often volumes are looked at, and how soon where the last turn has left something to do.
const EVERY: Duration = Duration::from_secs(10);
const SOON: Duration = Duration::from_secs(2);
/// How often the room of a block device is looked at, which takes a tool, and what failed is tried again.
const SELDOM: Duration = Duration::from_secs(60);
/// The part of a volume's room, one in so many, that is left to its application.
const SPARED: u64 = 10;
/// So many are removed in a turn, while the volume waits for its end.
const AT_ONCE: usize = 8;
/// The part of it, one in so many, for which snapshots are given up.
const WORTH: u64 = 100;

/// Why a volume that has a schedule takes no snapshots.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Paused {
    /// There is too little room beside them.
    NoRoom,
    /// ZFS fails to take them; why is in the guest's log.
    Failing,
}

/// What is known of a volume's automatic snapshots.
#[derive(Debug, Clone, Default)]
pub(super) struct Kept {
    pub(super) paused: Option<Paused>,
    /// All that was due by this schedule in these periods is taken, and nothing is beyond its numbers.
    settled: Option<(SnapshotSchedule, Vec<Period>)>,
    /// When the room of a block device was looked at, and when something failed.
    room: Option<Instant>,
    failed: Option<Instant>,
}

/// The room of a volume, in bytes.
#[derive(Debug, Clone, Copy)]
struct Room {
    total: u64,
    free: u64,
    /// What would be free if no snapshot held anything.
    at_most: u64,
}

impl Room {
    const fn is_low(&self) -> bool {
        self.free < self.total / SPARED
    }
}

/// What a turn has left to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Left {
    Nothing,
    Something,
}

impl<M: Machine> Volumes<M> {
    /// Takes and removes automatic snapshots, for ever.
    pub async fn keep_snapshots(self: Arc<Self>) {
        loop {
            let left = self.turn().await;
            let pause = if left == Left::Something { SOON } else { EVERY };
            let _ = tokio::time::timeout(pause, self.scheduled.notified()).await;
        }
    }

    async fn turn(self: &Arc<Self>) -> Left {
        let mut turns = JoinSet::new();
        for volume in self.volumes() {
            let volumes = Arc::clone(self);
            turns.spawn(async move { volumes.keep_schedule(&volume).await });
        }
        let mut all = Left::Nothing;
        while let Some(left) = turns.join_next().await {
            all = all.max(left.unwrap_or(Left::Something));
        }
        all
    }

    async fn keep_schedule(&self, volume: &Volume) -> Left {
        let schedule_of = |active: &Active| active.request.spec.snapshot_schedule.clone();
        let scheduled = volume.state().active.as_ref().and_then(schedule_of).is_some();
        if !scheduled {
            volume.state().kept = Kept::default();
            return Left::Nothing;
        }
        let (Ok(_gate), Ok(_receiving)) = (volume.gate.try_lock(), volume.receiving.try_lock()) else {
            return Left::Something;
        };
        // Only now it stays as it is.
        let Some(active) = volume.state().active.clone() else { return Left::Nothing };
        let Some(schedule) = schedule_of(&active) else { return Left::Nothing };
        if active.read_only || active.request.spec.read_only {
            return Left::Nothing;
        }
        let health = self.machine.health(&active.request.spec.pool).await;
        if !matches!(health, Ok(Some(Health::Online | Health::Degraded))) {
            return Left::Nothing;
        }
        match self.keep_as(volume, &active, &schedule).await {
            Ok(left) => left,
            Err(fault) => {
                let mut state = volume.state();
                if state.kept.paused != Some(Paused::Failing) {
                    tracing::error!(volume = %volume.id, "its automatic snapshots can't be taken, tried again each minute: {fault}");
                }
                (state.kept.paused, state.kept.failed) = (Some(Paused::Failing), Some(Instant::now()));
                Left::Nothing
            }
        }
    }

    /// One turn of a volume; its gate is held.
    async fn keep_as(&self, volume: &Volume, active: &Active, schedule: &SnapshotSchedule) -> Result<Left, Fault> {
        let mut kept = volume.state().kept.clone();
        if kept.failed.is_some_and(|at| at.elapsed() < SELDOM) {
            return Ok(Left::Nothing);
        }
        let now = self.machine.now();
        let periods: Vec<_> = schedule.iter().map(|(kind, _)| Period::of(kind, now)).collect();
        let settled = Some((schedule.clone(), periods));
        let open = kept.settled != settled;
        let known = active.is_block() && kept.room.is_some_and(|at| at.elapsed() < SELDOM);
        if known && !open && kept.paused.is_none() {
            return Ok(Left::Nothing);
        }
        let room = self.room(active).await?;
        let low = room.is_low();
        kept.room = Some(Instant::now());
        if low && kept.paused != Some(Paused::NoRoom) {
            tracing::warn!(volume = %volume.id, "less than a tenth of its room is free: no automatic snapshots are taken");
        }
        let mut left = Left::Nothing;
        if low {
            left = self.make_room(volume, active, room).await?;
            (kept.paused, kept.settled) = (Some(Paused::NoRoom), None);
        } else if open {
            (kept.paused, left) = self.take_due(volume, active, schedule, room).await?;
            kept.settled = settled.filter(|_| left == Left::Nothing && kept.paused.is_none());
        } else {
            kept.paused = None;
        }
        // Room that ZFS did not find is not there in a moment.
        kept.failed = (!low && kept.paused.is_some() && left == Left::Nothing).then(Instant::now);
        volume.state().kept = kept;
        Ok(left)
    }

    /// Takes what is due, and then removes what is beyond the numbers.
    async fn take_due(
        &self,
        volume: &Volume,
        active: &Active,
        schedule: &SnapshotSchedule,
        room: Room,
    ) -> Result<(Option<Paused>, Left), Fault> {
        let (spec, now) = (&active.request.spec, self.machine.now());
        let dataset = spec.dataset();
        if spec.reservation.is_some() && self.machine.snapshots(&dataset).await?.iter().any(|name| is_mark(name)) {
            // What is kept for the volume is lent to the mark, and is not to be taken by others.
            return Ok((None, Left::Something));
        }
        let due = plan::due(&self.automatic(active).await?, schedule, now);
        if active.is_block() && !due.is_empty() {
            self.machine.flush_volume(&dataset).await?;
        }
        for name in due.into_iter().map(|kind| plan::name(kind, now)) {
            match self.machine.snapshot(&dataset, &name).await {
                Ok(()) => tracing::info!(volume = %volume.id, "took {name}"),
                Err(fault) if fault.text.contains("out of space") => {
                    if volume.state().kept.paused.is_none() {
                        tracing::warn!(volume = %volume.id, "there is no room for its automatic snapshots: {fault}");
                    }
                    let room = Room { at_most: u64::MAX, ..room };
                    return Ok((Some(Paused::NoRoom), self.make_room(volume, active, room).await?));
                }
                Err(fault) => return Err(fault),
            }
        }
        let (mut left, surplus) = (Left::Nothing, plan::surplus(&self.automatic(active).await?, schedule));
        if surplus.len() > AT_ONCE {
            left = Left::Something;
        }
        for name in surplus.iter().take(AT_ONCE) {
            if !self.remove(volume, active, name).await? {
                left = Left::Something;
            }
        }
        volume.state().details = None;
        Ok((None, left))
    }

    /// Removes the oldest that can go, where that gives the application more than next to nothing. What it held is free some
    /// transaction groups later: the next turn sees.
    async fn make_room(&self, volume: &Volume, active: &Active, room: Room) -> Result<Left, Fault> {
        let found = self.automatic(active).await?;
        let names: Vec<_> = plan::dispensable(&found).collect();
        if names.is_empty() {
            return Ok(Left::Nothing);
        }
        if self.machine.freeing(&active.request.spec.pool).await? > 0 {
            // What the last one held is on its way.
            return Ok(Left::Something);
        }
        let held = self.machine.reclaimable(&active.request.spec.dataset(), &names).await?;
        if held.min(room.at_most.saturating_sub(room.free)) < room.total / WORTH {
            return Ok(Left::Nothing);
        }
        for name in names {
            if self.remove(volume, active, name).await? {
                return Ok(Left::Something);
            }
        }
        Ok(Left::Nothing)
    }

    /// Destroys one; false where somebody has come to use it.
    async fn remove(&self, volume: &Volume, active: &Active, name: &str) -> Result<bool, Fault> {
        match self.machine.destroy_snapshot(&active.request.spec.dataset(), name).await {
            Ok(()) => {
                tracing::info!(volume = %volume.id, "removed {name}");
                volume.state().details = None;
                Ok(true)
            }
            Err(fault) if fault.busy || fault.text.contains("dependent clones") => {
                tracing::warn!(volume = %volume.id, "{name} stays until the next turn: {fault}");
                Ok(false)
            }
            Err(fault) => Err(fault),
        }
    }

    async fn automatic(&self, active: &Active) -> Result<Vec<Automatic>, Fault> {
        let all = self.machine.send_points(&active.request.spec.dataset()).await?;
        Ok(all.iter().filter_map(|there| Automatic::named(&there.name, there.pinned)).collect())
    }

    async fn room(&self, active: &Active) -> Result<Room, Fault> {
        if active.is_block() {
            let now = self.machine.dataset(&active.request.spec.dataset()).await?.unwrap_or_default();
            let free = now.get("available").and_then(|bytes| bytes.parse().ok()).unwrap_or(0);
            return Ok(Room { total: device::usage(&now).total_bytes, free, at_most: u64::MAX });
        }
        let usage = self.machine.usage(&active.base).await?;
        let free = usage.available_bytes;
        // A tenant with the tools may have lifted it: that makes no room.
        let quota = active.quota.min(active.request.spec.capacity.0);
        Ok(match quota {
            0 => Room { total: usage.total_bytes, free, at_most: u64::MAX },
            quota => Room { total: quota, free, at_most: quota.saturating_sub(usage.used_bytes) },
        })
    }
}

#[cfg(test)]
mod tests;
