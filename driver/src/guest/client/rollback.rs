use std::time::Duration;

use zpod_admin::{RollbackPlan, SnapshotName};
use zpod_proto::bounded::SNAPSHOTS;
use zpod_proto::guest::{CheckRollbackRequest, CheckRollbackResponse};
use zpod_volume::VolumeId;

use super::{GuestClient, GuestError, clean};

/// A few tools, and a turn of its schedule that is waited for.
const CHECK_DEADLINE: Duration = Duration::from_secs(60);

pub(super) const CHECK: &str = "CheckRollback";
/// What a guest of before says to it, in words.
pub(super) const NO_ROLLBACKS: &str = "this guest was started from an earlier image and knows nothing of rollbacks; end the pod, and ask \
                            when the next one runs";
/// ZFS's own bound for a name.
const MAX_NAME: usize = 256;

impl GuestClient {
    /// What going back to a snapshot would take, and the snapshot's GUID. Nothing is changed.
    ///
    /// # Errors
    /// When the guest does not answer in time, is of an earlier version, or says that it could not be done.
    pub async fn check_rollback(
        &self,
        id: VolumeId,
        snapshot: &SnapshotName,
        destroy_newer: bool,
    ) -> Result<(RollbackPlan, u64), GuestError> {
        let mut stub = self.stub::<CheckRollbackResponse>();
        let request = CheckRollbackRequest { volume_id: id.to_string(), snapshot: snapshot.to_string(), destroy_newer };
        let answer = self.call(CHECK, CHECK_DEADLINE, stub.check_rollback(request)).await?;
        let newer = answer.newer.iter().take(SNAPSHOTS).map(|name| clean(name, MAX_NAME)).collect();
        let plan = RollbackPlan {
            snapshot: snapshot.to_string(),
            newer,
            left_out: answer.left_out,
            written_bytes: answer.written_bytes,
        };
        Ok((plan, answer.guid))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tonic::Status;

    #[tokio::test]
    async fn a_guest_that_knows_no_rollbacks_is_told_of_in_words_and_all_else_as_it_was_said() {
        let guest = GuestClient::unconnected("pod");
        let said = |call, status| guest.failed(call, &status).to_string();
        assert!(said(CHECK, Status::unimplemented("")).contains(NO_ROLLBACKS));
        for (call, status) in [(CHECK, Status::failed_precondition("no")), ("Sync", Status::unimplemented("no"))] {
            let text = said(call, status);
            assert!(text.contains(": no") && !text.contains(NO_ROLLBACKS), "{text}");
        }
    }
}
