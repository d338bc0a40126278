//! The end of an episode: all of it can be taken back, and nothing is left. Nothing is stuck.

use std::time::{Duration, Instant};

use zpod_proto::csi::*;

use crate::call::{Call, Reply};
use crate::disk::State;
use crate::model::Judged;
use crate::world::World;

/// File systems take their time to give room back.
const ROOM: Duration = Duration::from_secs(90);
/// What a file system keeps for itself varies with what it once had.
const MARGIN: i64 = 256 << 20;

impl World {
    /// Ends everything that there is, as its owners would.
    pub(crate) async fn end(&mut self) -> Judged {
        self.note("the end");
        self.stop_all();
        // Room is made by removing: also where there is none.
        if self.model.disk == State::ReadOnly || self.random.bool() {
            self.befall(State::Free);
        }
        let mut calls = Vec::new();
        for (id, volume) in &self.model.volumes {
            let name = if volume.ephemeral { &volume.name } else { id };
            let target = volume.published.as_ref().map_or("/nowhere", |published| published.target.to_str().unwrap());
            calls.push(Call::Unpublish(NodeUnpublishVolumeRequest {
                volume_id: name.clone(),
                target_path: target.to_owned(),
            }));
        }
        self.all(&mut calls).await?;
        for group_snapshot_id in self.model.groups.keys().cloned() {
            calls.push(Call::DeleteGroup(DeleteVolumeGroupSnapshotRequest { group_snapshot_id, ..Default::default() }));
        }
        for (id, snapshot) in &self.model.snapshots {
            if snapshot.group.is_none() {
                let request = DeleteSnapshotRequest { snapshot_id: id.clone(), ..Default::default() };
                calls.push(Call::DeleteSnapshot(request));
            }
        }
        for volume_id in self.model.volumes.keys().cloned() {
            calls.push(Call::DeleteVolume(DeleteVolumeRequest { volume_id, ..Default::default() }));
        }
        self.all(&mut calls).await?;
        if !self.model.volumes.is_empty() || !self.model.snapshots.is_empty() {
            return Err(format!("there are still {:?} and {:?}", self.model.volumes, self.model.snapshots));
        }
        self.befall(State::Free);
        self.check().await?;
        self.room_is_back().await?;
        self.terminate();
        self.nobody_has_the_disk()
    }

    async fn all(&mut self, calls: &mut Vec<Call>) -> Judged {
        self.random.shuffle(calls);
        for call in calls.drain(..) {
            self.call(call).await?;
        }
        Ok(())
    }

    async fn room_is_back(&mut self) -> Judged {
        let begun = Instant::now();
        loop {
            let Reply::Capacity(capacity) = self.ask(Call::Capacity(GetCapacityRequest::default())).await? else {
                unreachable!()
            };
            if capacity.available_capacity + MARGIN >= self.room_at_first {
                return Ok(());
            }
            if begun.elapsed() > ROOM {
                return Err(format!("{} are offered, and {} were", capacity.available_capacity, self.room_at_first));
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
}
