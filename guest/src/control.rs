//! The control service: what the node asks of this guest over vsock. Parses, calls, maps.

mod report;
mod transfer;

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};
use zpod_proto::guest::guest_server::{Guest, GuestServer};
use zpod_proto::guest::scrub_request::Action;
use zpod_proto::guest::{
    CheckRollbackRequest, CheckRollbackResponse, DestroySnapshotRequest, DestroySnapshotResponse, GrowRequest,
    GrowResponse, MarkRequest, MarkResponse, PropertiesRequest, PropertiesResponse, ProvideKeyRequest,
    ProvideKeyResponse, QuotaMode, ReceiveRequest, ReceiveResponse, RemoveSendPointRequest, RemoveSendPointResponse,
    ScrubRequest, ScrubResponse, SendPointsRequest, SendPointsResponse, SendRequest, SendResponse,
    SetPropertiesRequest, SetPropertiesResponse, SnapshotsRequest, SnapshotsResponse, StatusRequest, StatusResponse,
    SyncRequest, SyncResponse, TakeSnapshotRequest, TakeSnapshotResponse, UnmarkRequest, UnmarkResponse, WatchRequest,
};
use zpod_volume::{Bytes, Mark, SnapshotSchedule, VolumeId};

use crate::key::{Key, KeyError, Keys};
use crate::machine::{Machine, Scrub, Step};
use crate::volumes::Volumes;
use crate::volumes::attributes::Attributes;
use crate::volumes::status::DETAIL_AGE;
use report::state;

/// Longest message that is taken.
const MESSAGE: usize = 512 << 10;
/// How often a watched state is looked at, and how often it is sent when it stays the same.
const LOOK: Duration = Duration::from_secs(1);
const REPEAT: Duration = Duration::from_secs(30);
/// How old details may be for who asks once.
const FRESH: Duration = Duration::from_secs(1);

/// The control service.
#[derive(Debug)]
pub struct Control<M> {
    volumes: Arc<Volumes<M>>,
}

impl<M: Machine> Control<M> {
    /// The service for these volumes, with its messages bounded.
    pub fn server(volumes: Arc<Volumes<M>>) -> GuestServer<Self> {
        GuestServer::new(Self { volumes }).max_decoding_message_size(MESSAGE)
    }
}

fn id(text: &str) -> Result<VolumeId, Status> {
    text.parse().map_err(|error: zpod_volume::ParseNameError| Status::invalid_argument(format!("volume_id: {error}")))
}

fn quota_mode(number: i32) -> Result<zpod_volume::QuotaMode, Status> {
    match QuotaMode::try_from(number) {
        Ok(QuotaMode::Refquota) => Ok(zpod_volume::QuotaMode::Refquota),
        Ok(QuotaMode::Quota) => Ok(zpod_volume::QuotaMode::Quota),
        Ok(QuotaMode::None) => Ok(zpod_volume::QuotaMode::None),
        Ok(QuotaMode::Unspecified) | Err(_) => Err(Status::invalid_argument(format!("quota: {number} is not known"))),
    }
}

fn schedule(text: &str) -> Result<Option<SnapshotSchedule>, Status> {
    SnapshotSchedule::parse(text).map_err(|allowed| Status::invalid_argument(format!("snapshot_schedule: {allowed}")))
}

fn mark(text: &str) -> Result<Mark, Status> {
    text.parse().map_err(|error: zpod_volume::ParseNameError| Status::invalid_argument(format!("mark: {error}")))
}

#[tonic::async_trait]
impl<M: Machine> Guest for Control<M> {
    type SendStream = ReceiverStream<Result<SendResponse, Status>>;
    type WatchStream = ReceiverStream<Result<StatusResponse, Status>>;

    async fn status(&self, _: Request<StatusRequest>) -> Result<Response<StatusResponse>, Status> {
        Ok(Response::new(state(&self.volumes, FRESH).await))
    }

    async fn watch(&self, _: Request<WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        let (sender, receiver) = mpsc::channel(1);
        let volumes = Arc::clone(&self.volumes);
        tokio::spawn(async move {
            let mut sent: Option<(StatusResponse, Instant)> = None;
            while !sender.is_closed() {
                let now = state(&volumes, DETAIL_AGE).await;
                let quiet = sent.as_ref().is_some_and(|(last, at)| *last == now && at.elapsed() < REPEAT);
                if !quiet {
                    if sender.send(Ok(now.clone())).await.is_err() {
                        return;
                    }
                    sent = Some((now, Instant::now()));
                }
                tokio::time::sleep(LOOK).await;
            }
        });
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    async fn grow(&self, request: Request<GrowRequest>) -> Result<Response<GrowResponse>, Status> {
        let request = request.into_inner();
        let (capacity, partition) = (Bytes(request.capacity_bytes), Bytes(request.partition_bytes));
        let grown = self.volumes.grow(id(&request.volume_id)?, capacity, partition).await?;
        Ok(Response::new(GrowResponse { capacity_bytes: grown.capacity.0, partition_bytes: grown.partition.0 }))
    }

    async fn set_properties(
        &self,
        request: Request<SetPropertiesRequest>,
    ) -> Result<Response<SetPropertiesResponse>, Status> {
        let request = request.into_inner();
        let attributes = Attributes {
            pool: request.pool_properties.into_iter().collect(),
            dataset: request.dataset_properties.into_iter().collect(),
            quota: request.quota.map(quota_mode).transpose()?,
            reservation: request.reservation_bytes.map(Bytes),
            schedule: request.snapshot_schedule.as_deref().map(schedule).transpose()?,
        };
        self.volumes.change(id(&request.volume_id)?, &attributes).await?;
        Ok(Response::new(SetPropertiesResponse { follows_schedule: attributes.schedule.is_some() }))
    }

    async fn sync(&self, request: Request<SyncRequest>) -> Result<Response<SyncResponse>, Status> {
        self.volumes.sync(id(&request.into_inner().volume_id)?).await?;
        Ok(Response::new(SyncResponse {}))
    }

    async fn scrub(&self, request: Request<ScrubRequest>) -> Result<Response<ScrubResponse>, Status> {
        let request = request.into_inner();
        let action = match Action::try_from(request.action) {
            Ok(Action::Start) => Scrub::Start,
            Ok(Action::Pause) => Scrub::Pause,
            Ok(Action::Stop) => Scrub::Stop,
            Err(_) => return Err(Status::invalid_argument(format!("action: {} is not known", request.action))),
        };
        self.volumes.scrub(id(&request.volume_id)?, action).await?;
        Ok(Response::new(ScrubResponse {}))
    }

    async fn mark(&self, request: Request<MarkRequest>) -> Result<Response<MarkResponse>, Status> {
        let request = request.into_inner();
        self.volumes.mark(id(&request.volume_id)?, &mark(&request.mark)?).await?;
        Ok(Response::new(MarkResponse {}))
    }

    async fn unmark(&self, request: Request<UnmarkRequest>) -> Result<Response<UnmarkResponse>, Status> {
        let request = request.into_inner();
        let step = self.volumes.unmark(id(&request.volume_id)?, &mark(&request.mark)?).await?;
        Ok(Response::new(UnmarkResponse { removed: Some(step == Step::Changed) }))
    }

    async fn provide_key(&self, request: Request<ProvideKeyRequest>) -> Result<Response<ProvideKeyResponse>, Status> {
        let request = request.into_inner();
        // First of all into what overwrites them: nothing below returns before.
        let (key, previous) = (Key::new(request.key), Some(request.previous_key).filter(|key| !key.is_empty()));
        let previous = previous.map(Key::new).transpose();
        let id = id(&request.volume_id)?;
        let bad = |field: &'static str| {
            move |error: KeyError| Status::invalid_argument(format!("volume {id}: {field}: {error}"))
        };
        let keys = Keys { key: key.map_err(bad("key"))?, previous: previous.map_err(bad("previous_key"))? };
        let token = request.token.parse().map_err(|_| Status::invalid_argument("token: it is not a UUID"))?;
        let changed = self.volumes.provide_key(id, token, keys).await? == Step::Changed;
        Ok(Response::new(ProvideKeyResponse { changed }))
    }

    async fn properties(&self, request: Request<PropertiesRequest>) -> Result<Response<PropertiesResponse>, Status> {
        let (dataset, pool) = self.volumes.properties(id(&request.into_inner().volume_id)?).await?;
        let (dataset, pool) = (dataset.into_iter().collect(), pool.into_iter().collect());
        Ok(Response::new(PropertiesResponse { dataset, pool }))
    }

    async fn send_points(&self, request: Request<SendPointsRequest>) -> Result<Response<SendPointsResponse>, Status> {
        transfer::send_points(&self.volumes, id(&request.into_inner().volume_id)?).await.map(Response::new)
    }

    async fn remove_send_point(
        &self,
        request: Request<RemoveSendPointRequest>,
    ) -> Result<Response<RemoveSendPointResponse>, Status> {
        let request = request.into_inner();
        self.volumes.remove_send_point(id(&request.volume_id)?, &request.snapshot).await?;
        Ok(Response::new(RemoveSendPointResponse {}))
    }

    async fn snapshots(&self, request: Request<SnapshotsRequest>) -> Result<Response<SnapshotsResponse>, Status> {
        transfer::snapshots(&self.volumes, id(&request.into_inner().volume_id)?).await.map(Response::new)
    }

    async fn take_snapshot(
        &self,
        request: Request<TakeSnapshotRequest>,
    ) -> Result<Response<TakeSnapshotResponse>, Status> {
        let request = request.into_inner();
        self.volumes.take_snapshot(id(&request.volume_id)?, &request.snapshot).await?;
        Ok(Response::new(TakeSnapshotResponse {}))
    }

    async fn destroy_snapshot(
        &self,
        request: Request<DestroySnapshotRequest>,
    ) -> Result<Response<DestroySnapshotResponse>, Status> {
        let request = request.into_inner();
        self.volumes.destroy_snapshot(id(&request.volume_id)?, &request.snapshot).await?;
        Ok(Response::new(DestroySnapshotResponse {}))
    }

    async fn check_rollback(
        &self,
        request: Request<CheckRollbackRequest>,
    ) -> Result<Response<CheckRollbackResponse>, Status> {
        transfer::check_rollback(&self.volumes, request.into_inner()).await.map(Response::new)
    }

    async fn send(&self, request: Request<SendRequest>) -> Result<Response<Self::SendStream>, Status> {
        let request = request.into_inner();
        let stream = transfer::send(&self.volumes, id(&request.volume_id)?, &request).await?;
        Ok(Response::new(stream))
    }

    async fn receive(&self, request: Request<Streaming<ReceiveRequest>>) -> Result<Response<ReceiveResponse>, Status> {
        let mut stream = request.into_inner();
        let first = stream.message().await?.ok_or_else(|| Status::invalid_argument("the first message is missing"))?;
        transfer::receive(&self.volumes, id(&first.volume_id)?, first.data, stream).await.map(Response::new)
    }
}
