use std::collections::BTreeMap;
use std::time::Duration;

use zpod_proto::guest::{
    MarkRequest, MarkResponse, QuotaMode as WireMode, SetPropertiesRequest, SetPropertiesResponse, UnmarkRequest,
    UnmarkResponse,
};
use zpod_volume::{Bytes, Mark, QuotaMode, SnapshotSchedule, VolumeId};

use super::{GuestClient, GuestError};

/// A transaction group for each property.
const SET_DEADLINE: Duration = Duration::from_secs(30);

const NO_SCHEDULES: &str = "snapshotSchedule: this guest was started from an earlier image and takes no snapshots by \
                            itself; end the pod, and set it when the next one runs";

impl GuestClient {
    /// Marks this instant, and has everything written out. A mark that is there stays as it is.
    ///
    /// # Errors
    /// When the guest does not answer within this time, or refuses.
    pub async fn mark(&self, id: VolumeId, mark: &Mark, within: Duration) -> Result<(), GuestError> {
        let mut stub = self.stub::<MarkResponse>();
        let request = MarkRequest { volume_id: id.to_string(), mark: mark.to_string() };
        self.call("Mark", within, stub.mark(request)).await.map(drop)
    }

    /// Removes a mark. One that is not there is no error. Gives whether it was there, where the guest says so.
    ///
    /// # Errors
    /// When the guest does not answer within this time, or refuses.
    pub async fn unmark(&self, id: VolumeId, mark: &Mark, within: Duration) -> Result<Option<bool>, GuestError> {
        let mut stub = self.stub::<UnmarkResponse>();
        let request = UnmarkRequest { volume_id: id.to_string(), mark: mark.to_string() };
        self.call("Unmark", within, stub.unmark(request)).await.map(|answer| answer.removed)
    }

    /// Changes a running volume.
    ///
    /// # Errors
    /// When the guest does not answer in time, or refuses: then nothing is changed. When a guest from before there were
    /// schedules is to follow one, that is refused, and all else is set.
    pub async fn set_properties(&self, id: VolumeId, changes: Changes) -> Result<(), GuestError> {
        let scheduled = changes.schedule.is_some();
        let mut stub = self.stub::<SetPropertiesResponse>();
        let quota = changes.quota.map(|quota| match quota {
            QuotaMode::Refquota => WireMode::Refquota,
            QuotaMode::Quota => WireMode::Quota,
            QuotaMode::None => WireMode::None,
        });
        let request = SetPropertiesRequest {
            volume_id: id.to_string(),
            dataset_properties: changes.dataset.into_iter().collect(),
            pool_properties: changes.pool.into_iter().collect(),
            quota: quota.map(Into::into),
            reservation_bytes: Some(changes.reservation.0),
            snapshot_schedule: Some(changes.schedule.map_or_else(String::new, String::from)),
        };
        let answer = self.call("SetProperties", SET_DEADLINE, stub.set_properties(request)).await?;
        if scheduled && !answer.follows_schedule {
            return Err(GuestError::Refused {
                sandbox: self.sandbox.clone(),
                call: "SetProperties",
                message: NO_SCHEDULES.into(),
            });
        }
        Ok(())
    }
}

/// How a running volume is to be from now on.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Changes {
    /// Properties of the dataset.
    pub dataset: BTreeMap<String, String>,
    /// Properties of the pool.
    pub pool: BTreeMap<String, String>,
    /// What the capacity limits; not for block devices.
    pub quota: Option<QuotaMode>,
    /// Space that is kept for its own contents; zero for none.
    pub reservation: Bytes,
    /// The snapshots that the guest takes by itself.
    pub schedule: Option<SnapshotSchedule>,
}
