//! Snapshots, alone and in groups.

use std::collections::BTreeSet;

use tonic::Code;
use zpod_proto::csi;
use zpod_volume::{GroupId, SnapshotId};

use super::{Judged, Model, Snapshot, Volume, done, is_id};
use crate::call::{Answer, Reply};

const GIB: i64 = 1 << 30;
/// What a snapshot may be promised is what its volume has: no more than that, in these tests.
const MOST: i64 = 16 * GIB;

fn allow_copy(parameters: &std::collections::HashMap<String, String>) -> bool {
    parameters.get("allowCopy").is_some_and(|value| value == "true")
}

fn shows(volume: &Volume, id: &str, name: &str, group: Option<&str>, allow_copy: bool) -> Snapshot {
    Snapshot {
        name: name.to_owned(),
        volume: id.to_owned(),
        group: group.map(str::to_owned),
        size: volume.capacity,
        allow_copy: allow_copy || volume.parameters.allow_copy,
        block: volume.block,
        encrypted: volume.parameters.encryption.is_some(),
        content: volume.content,
        initialized: volume.is_initialized(),
    }
}

fn same_as(found: &csi::Snapshot, id: &str, snapshot: &Snapshot) -> Judged {
    let group = snapshot.group.as_deref().unwrap_or_default();
    let as_known = (&*found.snapshot_id, &*found.source_volume_id, found.size_bytes, &*found.group_snapshot_id)
        == (id, &*snapshot.volume, snapshot.size, group);
    if !as_known || !found.ready_to_use {
        return Err(format!("{found:?}, where {id} is {snapshot:?}"));
    }
    Ok(())
}

impl Model {
    pub(super) fn create_snapshot(&mut self, request: &csi::CreateSnapshotRequest, answer: &Answer) -> Judged {
        if let Some((id, found)) = self.snapshots.iter().find(|(_, snapshot)| snapshot.name == request.name) {
            if found.volume != request.source_volume_id || found.group.is_some() {
                let odd = !is_id(&request.source_volume_id);
                return self.refused(answer, if odd { &[Code::NotFound] } else { &[Code::AlreadyExists] });
            }
            let Some(Reply::CreateSnapshot(reply)) = done(answer, &[])? else { return Ok(()) };
            return same_as(reply.snapshot.as_ref().ok_or("no snapshot in the answer")?, id, found);
        }
        let Some(volume) = self.volumes.get(&request.source_volume_id) else {
            return self.refused(answer, &[Code::NotFound]);
        };
        let allow_copy = allow_copy(&request.parameters);
        let (mut reasons, perhaps) = self.copying(volume, allow_copy);
        if !reasons.is_empty() && (!perhaps || answer.is_err()) {
            reasons.push(Code::ResourceExhausted);
            return self.refused(answer, &reasons);
        }
        let snapshot = shows(volume, &request.source_volume_id, &request.name, None, allow_copy);
        let Some(Reply::CreateSnapshot(reply)) = self.made(answer, &[Code::ResourceExhausted])? else {
            self.no_room(MOST);
            return Ok(());
        };
        let found = reply.snapshot.as_ref().ok_or("no snapshot in the answer")?;
        same_as(found, &found.snapshot_id, &snapshot)?;
        match self.snapshots.insert(found.snapshot_id.clone(), snapshot) {
            None => Ok(()),
            Some(other) => Err(format!("the id is that of snapshot {:?}", other.name)),
        }
    }

    pub(super) fn delete_snapshot(&mut self, id: &str, answer: &Answer) -> Judged {
        if self.snapshots.get(id).is_some_and(|snapshot| snapshot.group.is_some()) {
            return self.refused(answer, &[Code::InvalidArgument]);
        }
        if self.removed(answer)? {
            self.snapshots.remove(id);
        }
        Ok(())
    }

    pub(super) fn get_snapshot(&self, id: &str, answer: &Answer) -> Judged {
        let Some(snapshot) = self.snapshots.get(id) else { return self.refused(answer, &[Code::NotFound]) };
        let Some(Reply::GetSnapshot(reply)) = done(answer, &[])? else { return Ok(()) };
        same_as(reply.snapshot.as_ref().ok_or("no snapshot in the answer")?, id, snapshot)
    }

    /// The snapshots of a group.
    pub(crate) fn members(&self, group: &str) -> impl Iterator<Item = (&String, &Snapshot)> {
        self.snapshots.iter().filter(move |(_, snapshot)| snapshot.group.as_deref() == Some(group))
    }

    fn same_group(&self, found: Option<&csi::VolumeGroupSnapshot>, id: &str) -> Judged {
        let found = found.ok_or("no group in the answer")?;
        let known = self.members(id).map(|(id, _)| id.as_str()).collect::<BTreeSet<_>>();
        let listed = found.snapshots.iter().map(|snapshot| snapshot.snapshot_id.as_str()).collect::<BTreeSet<_>>();
        if found.group_snapshot_id != id || listed != known || !found.ready_to_use {
            return Err(format!("{found:?}, where group {id} has {known:?}"));
        }
        found.snapshots.iter().try_for_each(|one| same_as(one, &one.snapshot_id, &self.snapshots[&one.snapshot_id]))
    }

    pub(super) fn create_group(&mut self, request: &csi::CreateVolumeGroupSnapshotRequest, answer: &Answer) -> Judged {
        let wanted = request.source_volume_ids.iter().collect::<BTreeSet<_>>();
        if let Some((id, _)) = self.groups.iter().find(|(_, name)| **name == request.name) {
            let known = self.members(id).map(|(_, snapshot)| &snapshot.volume).collect::<BTreeSet<_>>();
            if known != wanted {
                // One that has no form of an id is found out first.
                return self.refused(answer, &[Code::AlreadyExists, Code::NotFound]);
            }
            let Some(Reply::CreateGroup(reply)) = done(answer, &[])? else { return Ok(()) };
            return self.same_group(reply.group_snapshot.as_ref(), id);
        }
        let allow_copy = allow_copy(&request.parameters);
        let (mut reasons, mut perhaps) = (Vec::new(), true);
        for id in &wanted {
            match self.volumes.get(*id).map(|volume| self.copying(volume, allow_copy)) {
                None => (reasons, perhaps) = ([reasons, vec![Code::NotFound]].concat(), false),
                Some((why, can)) => {
                    (reasons, perhaps) = ([reasons, why.clone()].concat(), perhaps && (can || why.is_empty()))
                }
            }
        }
        if !reasons.is_empty() && (!perhaps || answer.is_err()) {
            reasons.push(Code::ResourceExhausted);
            return self.refused(answer, &reasons);
        }
        let Some(Reply::CreateGroup(reply)) = self.made(answer, &[Code::ResourceExhausted])? else {
            self.no_room(MOST);
            return Ok(());
        };
        let found = reply.group_snapshot.as_ref().ok_or("no group in the answer")?;
        let id = found.group_snapshot_id.clone();
        for one in &found.snapshots {
            let volume = self.volumes.get(&one.source_volume_id).ok_or("a snapshot of no volume")?;
            let shown = shows(volume, &one.source_volume_id, &one.snapshot_id, Some(&id), allow_copy);
            if self.snapshots.insert(one.snapshot_id.clone(), shown).is_some() {
                return Err(format!("snapshot {} was there before", one.snapshot_id));
            }
        }
        self.groups.insert(id.clone(), request.name.clone());
        let known = self.members(&id).map(|(_, snapshot)| &snapshot.volume).collect::<BTreeSet<_>>();
        if known != wanted {
            return Err(format!("it has snapshots of {known:?}"));
        }
        self.same_group(Some(found), &id)
    }

    pub(super) fn delete_group(&mut self, id: &str, answer: &Answer) -> Judged {
        if self.removed(answer)? {
            self.groups.remove(id);
            self.snapshots.retain(|_, snapshot| snapshot.group.as_deref() != Some(id));
        }
        Ok(())
    }

    pub(super) fn get_group(&self, id: &str, answer: &Answer) -> Judged {
        if !self.groups.contains_key(id) {
            return self.refused(answer, &[Code::NotFound]);
        }
        let Some(Reply::GetGroup(reply)) = done(answer, &[])? else { return Ok(()) };
        self.same_group(reply.group_snapshot.as_ref(), id)
    }

    /// The id that a name has, or would have.
    pub(crate) fn snapshot_id_of(&self, name: &str) -> String {
        let found = self.snapshots.iter().find(|(_, snapshot)| snapshot.name == name);
        found.map_or_else(|| SnapshotId::from_name(name).to_string(), |(id, _)| id.clone())
    }

    /// The id that a name has, or would have.
    pub(crate) fn group_id_of(name: &str) -> String {
        GroupId::from_name(name).to_string()
    }
}
