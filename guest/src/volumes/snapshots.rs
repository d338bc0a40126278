//! The snapshots in a volume's pool: listed, taken and destroyed for those who ask by hand.

use zpod_volume::VolumeId;

use super::marks::is_mark;
use super::{Active, Volumes};
use crate::error::VolumeError;
use crate::machine::streams::SendPoint;
use crate::machine::{Fault, Machine};

/// Names that begin so are zpod's own.
const OURS: &str = "zpod-";
const LONGEST: usize = 128;
/// What ZFS itself takes (`ZFS_MAX_DATASET_NAME_LEN`).
const LONGEST_OF_ZFS: usize = 255;
const CHARACTERS: &str = "A-Z, a-z, 0-9, _, ., : and -";

/// Whether ZFS takes it for a snapshot. Spaces, which it takes too, are left out; so is what makes a list or a range of one.
fn is_sound(name: &str, longest: usize) -> bool {
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"_.:-".contains(&byte);
    (1..=longest).contains(&name.len()) && name.bytes().all(plain)
}

impl<M: Machine> Volumes<M> {
    /// The snapshots of a volume, oldest first, but for what the node marks an instant with.
    ///
    /// # Errors
    /// When it is not here, or can't be asked.
    pub async fn snapshots(&self, id: VolumeId) -> Result<Vec<SendPoint>, VolumeError> {
        let (_, active) = self.known(id)?;
        let listed = self.machine.send_points(&active.request.spec.dataset()).await;
        let mut snapshots = listed.map_err(|fault| VolumeError::failed(id, "listing its snapshots", fault))?;
        snapshots.retain(|snapshot| !is_mark(&snapshot.name));
        Ok(snapshots)
    }

    /// Takes a snapshot of a volume; it is on the disk when this returns.
    ///
    /// # Errors
    /// When the volume is not here or read-only, the name can't be one, there is one of that name, or ZFS refuses.
    pub async fn take_snapshot(&self, id: VolumeId, name: &str) -> Result<(), VolumeError> {
        if !is_sound(name, LONGEST) || name.starts_with(OURS) {
            let reason = format!(
                "snapshot {name:.64?} is not a name for one; allowed are 1 to {LONGEST} of {CHARACTERS}, and not {OURS} at the beginning"
            );
            return Err(VolumeError::Invalid { id, reason });
        }
        let (volume, _) = self.known(id)?;
        let _gate = volume.gate.lock().await;
        let (_, active) = self.known(id)?;
        active.must_be_writable(id)?;
        let failed = |fault| VolumeError::failed(id, "taking a snapshot", fault);
        if self.has_snapshot(&active, name).await.map_err(failed)? {
            let reason = format!("it has a snapshot {name} already: choose another name, or destroy that one first");
            return Err(VolumeError::Refused { id, reason });
        }
        if active.is_block() {
            // What containers have written lies in the kernel's cache first, as with any disk.
            self.machine.flush_volume(&active.request.spec.dataset()).await.map_err(failed)?;
        }
        // What is kept for the volume stays kept: ZFS refuses a snapshot that would take it.
        self.machine.snapshot(&active.request.spec.dataset(), name).await.map_err(|fault| {
            let room = fault.text.contains("out of space");
            let reason = format!("a snapshot would take the space that is kept for the volume (reservation): {fault}");
            if room { VolumeError::NoRoom { id, reason } } else { failed(fault) }
        })?;
        tracing::info!(volume = %id, "snapshot {name} is taken");
        Ok(())
    }

    /// Destroys a snapshot of a volume.
    ///
    /// # Errors
    /// When the volume is not here or read-only, the name can't be one or is the node's, it is not there, or something keeps it.
    pub async fn destroy_snapshot(&self, id: VolumeId, name: &str) -> Result<(), VolumeError> {
        if !is_sound(name, LONGEST_OF_ZFS) || is_mark(name) {
            let reason = format!(
                "snapshot {name:.64?} is not the name of one that can be destroyed by hand; allowed are {CHARACTERS}, and what \
                 DeleteSnapshot removes is not"
            );
            return Err(VolumeError::Invalid { id, reason });
        }
        let (volume, _) = self.known(id)?;
        let _gate = volume.gate.lock().await;
        let (_, active) = self.known(id)?;
        active.must_be_writable(id)?;
        let there = self.has_snapshot(&active, name).await;
        if !there.map_err(|fault| VolumeError::failed(id, "listing its snapshots", fault))? {
            let reason = format!("it has no snapshot {name}; `kubectl zpod snapshots` lists those that it has");
            return Err(VolumeError::Refused { id, reason });
        }
        self.machine.destroy_snapshot(&active.request.spec.dataset(), name).await.map_err(|fault| {
            let reason = format!(
                "snapshot {name} is not destroyed: {fault}; a clone or a hold in the pod keeps one, or a stream that is sent"
            );
            VolumeError::Refused { id, reason }
        })?;
        tracing::info!(volume = %id, "snapshot {name} is destroyed");
        Ok(())
    }

    async fn has_snapshot(&self, active: &Active, name: &str) -> Result<bool, Fault> {
        let there = self.machine.snapshots(&active.request.spec.dataset()).await?;
        Ok(there.iter().any(|snapshot| snapshot == name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_one_name_and_never_a_range_or_a_list() {
        for name in ["a", "2026-11-30T12:00:00Z", "before_upgrade.1", "zpod-auto-hourly-20261130T120000Z"] {
            assert!(is_sound(name, LONGEST), "{name}");
        }
        for name in ["", "a@b", "a%b", "a,b", "a b", "a/b", "a#b", "é", &"a".repeat(LONGEST + 1)] {
            assert!(!is_sound(name, LONGEST), "{name}");
        }
    }
}
