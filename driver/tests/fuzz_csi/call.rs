//! A CSI call as a value, so that it can be planned, sent, repeated, judged and printed.

use std::fmt;
use std::time::Duration;

use tonic::transport::Channel;
use tonic::{Code, Status};
use zpod_proto::csi::controller_client::ControllerClient;
use zpod_proto::csi::group_controller_client::GroupControllerClient;
use zpod_proto::csi::identity_client::IdentityClient;
use zpod_proto::csi::node_client::NodeClient;
use zpod_proto::csi::*;

/// No call takes as long. What hangs is a fault.
const STUCK: Duration = Duration::from_secs(50);
/// A caller that does not wait for a guest which is not heard: zpod would, for a minute.
const IMPATIENT: Duration = Duration::from_millis(300);

macro_rules! calls {
    ($($client:ident: $($name:ident($request:ident) -> $response:ident = $method:ident),+;)+) => {
        /// A call.
        #[derive(Debug, Clone, PartialEq)]
        pub(crate) enum Call {
            $($($name($request),)+)+
        }

        /// What came back.
        #[derive(Debug, Clone, PartialEq)]
        pub(crate) enum Reply {
            $($($name($response),)+)+
        }

        impl Call {
            async fn send_to(self, channel: Channel) -> Result<Reply, Status> {
                match self {
                    $($(Self::$name(request) => {
                        let answer = $client::new(channel).$method(request).await?;
                        Ok(Reply::$name(answer.into_inner()))
                    })+)+
                }
            }
        }
    };
}

calls! {
    ControllerClient:
        CreateVolume(CreateVolumeRequest) -> CreateVolumeResponse = create_volume,
        DeleteVolume(DeleteVolumeRequest) -> DeleteVolumeResponse = delete_volume,
        Expand(ControllerExpandVolumeRequest) -> ControllerExpandVolumeResponse = controller_expand_volume,
        Modify(ControllerModifyVolumeRequest) -> ControllerModifyVolumeResponse = controller_modify_volume,
        Get(ControllerGetVolumeRequest) -> ControllerGetVolumeResponse = controller_get_volume,
        Validate(ValidateVolumeCapabilitiesRequest) -> ValidateVolumeCapabilitiesResponse
            = validate_volume_capabilities,
        ListVolumes(ListVolumesRequest) -> ListVolumesResponse = list_volumes,
        Capacity(GetCapacityRequest) -> GetCapacityResponse = get_capacity,
        CreateSnapshot(CreateSnapshotRequest) -> CreateSnapshotResponse = create_snapshot,
        DeleteSnapshot(DeleteSnapshotRequest) -> DeleteSnapshotResponse = delete_snapshot,
        GetSnapshot(GetSnapshotRequest) -> GetSnapshotResponse = get_snapshot,
        ListSnapshots(ListSnapshotsRequest) -> ListSnapshotsResponse = list_snapshots;
    GroupControllerClient:
        CreateGroup(CreateVolumeGroupSnapshotRequest) -> CreateVolumeGroupSnapshotResponse
            = create_volume_group_snapshot,
        DeleteGroup(DeleteVolumeGroupSnapshotRequest) -> DeleteVolumeGroupSnapshotResponse
            = delete_volume_group_snapshot,
        GetGroup(GetVolumeGroupSnapshotRequest) -> GetVolumeGroupSnapshotResponse = get_volume_group_snapshot;
    NodeClient:
        Stage(NodeStageVolumeRequest) -> NodeStageVolumeResponse = node_stage_volume,
        Unstage(NodeUnstageVolumeRequest) -> NodeUnstageVolumeResponse = node_unstage_volume,
        Publish(NodePublishVolumeRequest) -> NodePublishVolumeResponse = node_publish_volume,
        Unpublish(NodeUnpublishVolumeRequest) -> NodeUnpublishVolumeResponse = node_unpublish_volume,
        Stats(NodeGetVolumeStatsRequest) -> NodeGetVolumeStatsResponse = node_get_volume_stats,
        NodeExpand(NodeExpandVolumeRequest) -> NodeExpandVolumeResponse = node_expand_volume,
        NodeInfo(NodeGetInfoRequest) -> NodeGetInfoResponse = node_get_info;
    IdentityClient:
        Probe(ProbeRequest) -> ProbeResponse = probe,
        PluginInfo(GetPluginInfoRequest) -> GetPluginInfoResponse = get_plugin_info;
}

/// What is left out of a printed call: fields with nothing in them.
const NOTHING: [&str; 6] = [": {}", ": []", ": None", ": \"\"", ": false", ": 0"];

impl fmt::Display for Call {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut text = format!("{self:?}");
        for nothing in NOTHING {
            while let Some(at) = text.find(&format!("{nothing},")).or_else(|| text.find(&format!("{nothing} }}"))) {
                let from = text[..at].rfind([' ', '(']).unwrap_or(at) + 1;
                let end = at + nothing.len();
                let end = if text[end..].starts_with(", ") { end + 2 } else { end + 1 };
                text.replace_range(from..end, "");
            }
        }
        f.write_str(&text.replace('\n', " "))
    }
}

/// What a call gave.
pub(crate) type Answer = Result<Reply, Status>;

impl Call {
    /// Sends it and waits for the answer. One that does not come is [`Code::DeadlineExceeded`].
    pub(crate) async fn send(self, channel: Channel) -> Answer {
        let patience = if matches!(self, Self::NodeExpand(_)) { IMPATIENT } else { STUCK };
        match tokio::time::timeout(patience, self.send_to(channel)).await {
            Ok(answer) => answer,
            Err(_) => Err(Status::deadline_exceeded(format!("no answer in {patience:?}"))),
        }
    }

    /// Sends it until a full copy that it makes is there: as Kubernetes' sidecars do.
    pub(crate) async fn complete(self, channel: Channel) -> Answer {
        let begun = std::time::Instant::now();
        loop {
            let answer = self.clone().send(channel.clone()).await;
            let copying = match &answer {
                Err(status) => {
                    status.code() == Code::Aborted
                        && status.message().contains("full copy of")
                        && matches!(self, Self::CreateVolume(_))
                }
                Ok(_) => !is_done(&answer),
            };
            if !copying || begun.elapsed() > STUCK {
                return answer;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// What is to be made by it, and its name.
    pub(crate) fn name(&self) -> Option<(&'static str, &str)> {
        match self {
            Self::CreateVolume(request) => Some(("volume", &request.name)),
            Self::CreateSnapshot(request) => Some(("snapshot", &request.name)),
            Self::CreateGroup(request) => Some(("group", &request.name)),
            _ => None,
        }
    }

    /// The call that an orchestrator makes which gives up on this one.
    pub(crate) fn given_up(&self, id: impl Fn(&str) -> String, snapshot: impl Fn(&str) -> String) -> Option<Self> {
        match self {
            Self::CreateVolume(request) => {
                let volume_id = id(&request.name);
                Some(Self::DeleteVolume(DeleteVolumeRequest { volume_id, ..Default::default() }))
            }
            Self::CreateSnapshot(request) => {
                let snapshot_id = snapshot(&request.name);
                Some(Self::DeleteSnapshot(DeleteSnapshotRequest { snapshot_id, ..Default::default() }))
            }
            Self::Publish(request) => Some(Self::Unpublish(NodeUnpublishVolumeRequest {
                volume_id: request.volume_id.clone(),
                target_path: request.target_path.clone(),
            })),
            _ => None,
        }
    }
}

/// Whether a call was done to its end: a full copy goes on behind an answer.
pub(crate) fn is_done(answer: &Answer) -> bool {
    match answer {
        Ok(Reply::CreateSnapshot(response)) => response.snapshot.as_ref().is_some_and(|one| one.ready_to_use),
        Ok(Reply::CreateGroup(response)) => response.group_snapshot.as_ref().is_some_and(|group| group.ready_to_use),
        answer => answer.is_ok(),
    }
}
