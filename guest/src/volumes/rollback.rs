//! Going back to a snapshot in the volume's pool, where the node asks for it with the spec.
//!
//! # Design
//! It is done where a volume is brought up, before it is mounted, and once: the id of the request is noted in the pool, in a
//! property of the pool's own dataset, with what came of it ([`ROLLED_BACK`]). A start that finds the id noted does nothing.
//! Killed between the two, the next start goes back once more, which changes nothing: no container ran in between. Where the
//! note can't be read or written the volume is not brought up, since a later start would go back over what containers have
//! written.
//!
//! What can't be done is noted as refused, with its reason, and not tried again: the volume starts as it is. All that is in
//! the way is looked for before. `zfs rollback -r` still can fail half way, since it destroys later snapshots one by one before
//! it goes back: so what there is then is looked at. Where some are gone, or the tool was given up and the kernel may go on,
//! nothing is noted and this start fails; the next one goes on.
//!
//! **Whose word.** The node's, for what to go back to and whether newer snapshots may go. A tenant with CAP_SYS_ADMIN can
//! forge the note: what it gains is that its own volume goes back once more, or not at all.

use uuid::Uuid;
use zpod_volume::{Rollback, VolumeId};

use super::Volumes;
use super::activate::Activation;
use super::bounds::Bounds;
use super::marks::is_mark;
use super::stream::{RECEIVING, is_point};
use crate::error::VolumeError;
use crate::machine::rollbacks::Later;
use crate::machine::{Fault, Machine, Properties, ROLLED_BACK};

/// Of the note.
const VERSION: &str = "1";
/// Bytes of a reason that are noted and told.
const REASON: usize = 256;
/// Snapshots that a reason names.
const NAMED: usize = 5;

/// What came of a rollback.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RolledBack {
    /// Of the request.
    pub id: Uuid,
    /// Why it was refused, where it was.
    pub refused: Option<String>,
}

impl RolledBack {
    fn refused(id: Uuid, reason: &str) -> Self {
        let reason = if reason.trim().is_empty() { "no reason was given" } else { reason };
        let plain: String = reason.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
        let end = (0..=REASON.min(plain.len())).rev().find(|end| plain.is_char_boundary(*end)).unwrap_or_default();
        Self { id, refused: Some(plain[..end].trim().to_owned()) }
    }

    /// Reads the note. One of another version, or that is none, is of no request.
    fn noted(note: &str) -> Option<Self> {
        let (version, rest) = note.split_once(' ')?;
        let (id, state) = rest.split_once(' ')?;
        let id = id.parse().ok().filter(|_| version == VERSION)?;
        match state.split_once(' ').unwrap_or((state, "")) {
            ("done", "") => Some(Self { id, refused: None }),
            ("refused", reason) => Some(Self::refused(id, reason)),
            _ => None,
        }
    }

    fn note(&self) -> String {
        match &self.refused {
            None => format!("{VERSION} {} done", self.id),
            Some(reason) => format!("{VERSION} {} refused {reason}", self.id),
        }
    }
}

/// What going back would take.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Losses {
    /// Snapshots and bookmarks that are later, oldest first. Bookmarks have their # in front.
    pub newer: Vec<String>,
    /// Bytes that were written since.
    pub written: u64,
    /// Of the snapshot.
    pub guid: u64,
}

/// A snapshot that can be gone back to.
struct Found {
    guid: u64,
    /// Bytes it refers to.
    referenced: u64,
    /// What is later.
    newer: Vec<String>,
}

/// What is later than a snapshot, or why it can't be gone back to. What the node marks an instant with goes by itself. `guid`
/// is 0 where any of the name will do.
async fn find<M: Machine>(
    machine: &M,
    dataset: &str,
    snapshot: &str,
    guid: u64,
    destroy_newer: bool,
) -> Result<Result<Found, String>, Fault> {
    let all = machine.send_points(dataset).await?;
    let Some(place) = all.iter().position(|there| there.name == snapshot) else {
        return Ok(Err(format!("it has no snapshot {snapshot}; `kubectl zpod snapshots` lists those that it has")));
    };
    if guid != 0 && all[place].guid != guid {
        return Ok(Err(format!(
            "snapshot {snapshot} is not the one that was asked for, which was destroyed; this one was taken under its name \
             since: ask once more if it is meant"
        )));
    }
    if machine.resume_token(dataset).await?.is_some() {
        return Ok(Err("a stream that was received into it broke off and can be gone on with, which would not be \
                       possible any more: receive it to its end first"
            .to_owned()));
    }
    let later: Vec<_> = all[place + 1..].iter().filter(|there| !is_mark(&there.name)).collect();
    if let Some(kept) = later.iter().find(|there| there.pinned) {
        return Ok(Err(format!(
            "snapshot {} is newer, and has a hold or a clone in the pod: release or destroy that first",
            kept.name
        )));
    }
    if let Some(point) = later.iter().find(|there| is_point(&there.name)) {
        return Ok(Err(format!(
            "send point {} is newer, and streams go on from it: `kubectl zpod send --remove` destroys it first",
            point.name
        )));
    }
    let mut newer: Vec<_> = later.iter().map(|there| there.name.clone()).collect();
    newer.extend(machine.bookmarks_after(dataset, snapshot).await?.iter().map(|name| format!("#{name}")));
    if newer.is_empty() || destroy_newer {
        return Ok(Ok(Found { guid: all[place].guid, referenced: all[place].referenced, newer }));
    }
    let mut named = newer.iter().take(NAMED).cloned().collect::<Vec<_>>().join(", ");
    if newer.len() > NAMED {
        named = format!("{named} and {} more", newer.len() - NAMED);
    }
    Ok(Err(format!("these are newer and would be destroyed: {named}; --destroy-newer allows it")))
}

impl<M: Machine> Volumes<M> {
    /// What going back to a snapshot would take. Nothing is changed: the next start goes back.
    ///
    /// # Errors
    /// When it could not be done now, the volume is not here or read-only, or the name is none.
    pub async fn check_rollback(
        &self,
        id: VolumeId,
        snapshot: &str,
        destroy_newer: bool,
    ) -> Result<Losses, VolumeError> {
        if !Rollback::allows(snapshot) {
            let reason = format!(
                "snapshot is not the name of one that can be gone back to; allowed are {}, and what DeleteSnapshot \
                 removes is not",
                Rollback::CHARACTERS
            );
            return Err(VolumeError::Invalid { id, reason });
        }
        let refused = |reason: String| VolumeError::Refused { id, reason };
        let failed = |fault| VolumeError::failed(id, "looking at its snapshots", fault);
        let (volume, _) = self.known(id)?;
        // A turn of its schedule has it for a moment.
        let one = tokio::time::timeout(RECEIVING, volume.receiving.lock()).await;
        let _one = one.map_err(|_| refused("a stream is being received into it: wait for its end".into()))?;
        let (_, active) = self.known(id)?;
        active.must_be_writable(id)?;
        let dataset = active.request.spec.dataset();
        let found = find(&self.machine, &dataset, snapshot, 0, destroy_newer).await.map_err(failed)?;
        let Found { guid, newer, .. } = found.map_err(refused)?;
        // What lies in memory is lost too.
        if active.is_block() {
            self.machine.flush_volume(&dataset).await.map_err(failed)?;
        }
        self.machine.sync(&active.request.spec.pool).await.map_err(failed)?;
        let written = self.machine.written_since(&dataset, snapshot).await.map_err(failed)?;
        Ok(Losses { newer, written, guid })
    }
}

impl<M: Machine> Activation<'_, M> {
    /// Goes back to a snapshot, if that is asked for and was not dealt with before. Gives the properties as they are then.
    pub(super) async fn roll_back(&self, now: Properties) -> Result<Properties, VolumeError> {
        let spec = &self.request.spec;
        let Some(rollback) = &spec.rollback else { return Ok(now) };
        let noted = self.machine.noted(&spec.pool, ROLLED_BACK).await;
        let noted = RolledBack::noted(&noted.map_err(self.failed("reading which rollback was the last"))?);
        if let Some(before) = noted.filter(|before| before.id == rollback.id) {
            self.volume.state().rolled_back = Some(before);
            return Ok(now);
        }
        if self.used {
            tracing::warn!(volume = %self.id, "containers use it: the next start goes back to {}", rollback.snapshot);
            return Ok(now);
        }
        self.progress.stage("going back to a snapshot, as was asked for");
        self.remove_leftover_marks(&now).await;
        let outcome = self.go_back(rollback, &now).await.map_err(self.failed("going back to a snapshot"))?;
        let noted = self.machine.note(&spec.pool, ROLLED_BACK, &outcome.note()).await;
        noted.map_err(self.failed("noting that it went back to a snapshot"))?;
        match &outcome.refused {
            None => tracing::info!(volume = %self.id, "went back to snapshot {}", rollback.snapshot),
            Some(reason) => {
                tracing::error!(volume = %self.id, "did not go back to snapshot {}: {reason}", rollback.snapshot);
            }
        }
        self.volume.state().rolled_back = Some(outcome);
        // What the contents measure is another thing now.
        self.dataset().await
    }

    async fn go_back(&self, rollback: &Rollback, now: &Properties) -> Result<RolledBack, Fault> {
        let (id, snapshot, guid) = (rollback.id, rollback.snapshot.as_str(), rollback.guid);
        let dataset = self.request.spec.dataset();
        let found = match find(self.machine, &dataset, snapshot, guid, rollback.destroy_newer).await? {
            Ok(found) => found,
            Err(reason) => return Ok(RolledBack::refused(id, &reason)),
        };
        // It is settled again by what follows, and where this start fails by the next one.
        let set_aside = Bounds::out_of_the_way(now, found.referenced);
        if !set_aside.is_empty() {
            self.machine.set_dataset(&dataset, &set_aside).await?;
        }
        let later = if rollback.destroy_newer { Later::Destroyed } else { Later::Kept };
        match self.machine.rollback(&dataset, snapshot, later).await {
            Ok(()) => Ok(RolledBack { id, refused: None }),
            Err(fault) => self.after(rollback, &found.newer, fault).await,
        }
    }

    /// What came of a rollback that failed, as far as anybody knows.
    async fn after(&self, rollback: &Rollback, before: &[String], fault: Fault) -> Result<RolledBack, Fault> {
        let (spec, id, snapshot) = (&self.request.spec, rollback.id, rollback.snapshot.as_str());
        let dataset = spec.dataset();
        // What the kernel has begun is done then.
        if self.machine.sync(&spec.pool).await.is_err() {
            return Err(fault);
        }
        let Ok(Ok(Found { newer: left, .. })) = find(self.machine, &dataset, snapshot, rollback.guid, true).await
        else {
            return Err(fault);
        };
        if left.is_empty() && self.machine.written_since(&dataset, snapshot).await == Ok(0) {
            return Ok(RolledBack { id, refused: None });
        }
        let gone = before.iter().filter(|name| !left.contains(name)).count();
        if gone > 0 {
            let text = format!(
                "it went only part of the way to snapshot {snapshot}: of {} that are newer {gone} are destroyed, as \
                 --destroy-newer allows, and then: {fault}; the next start goes on",
                before.len()
            );
            return Err(Fault { text, ..fault });
        }
        if fault.given_up {
            return Err(fault);
        }
        let text = match rollback.destroy_newer && before.is_empty() {
            true => format!("newer ones that an earlier start may have destroyed for it are gone; {fault}"),
            false => fault.text,
        };
        Ok(RolledBack::refused(id, &text))
    }
}

#[cfg(test)]
mod tests;
