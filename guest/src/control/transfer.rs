//! Streams over the control channel. Their backpressure is that of the connection: a message is made once the one before
//! it is on its way.

use std::sync::Arc;

use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt as _};
use tonic::Status;
use zpod_proto::bounded::SNAPSHOTS;
use zpod_proto::guest::{
    CheckRollbackRequest, CheckRollbackResponse, ReceiveRequest, ReceiveResponse, SendPoint, SendPointsResponse,
    SendRequest, SendResponse, SnapshotsResponse,
};
use zpod_volume::VolumeId;

use crate::machine::{Machine, streams};
use crate::volumes::{Volumes, stream};

/// Send points that are told.
const POINTS: usize = 1024;

pub(super) async fn send_points<M: Machine>(volumes: &Volumes<M>, id: VolumeId) -> Result<SendPointsResponse, Status> {
    let (points, token) = volumes.send_points(id).await?;
    let points = points.into_iter().take(POINTS).map(told).collect();
    Ok(SendPointsResponse { points, resume_token: token.unwrap_or_default() })
}

pub(super) async fn snapshots<M: Machine>(volumes: &Volumes<M>, id: VolumeId) -> Result<SnapshotsResponse, Status> {
    let all = volumes.snapshots(id).await?;
    let left_out = all.len().saturating_sub(SNAPSHOTS);
    let snapshots = all.into_iter().skip(left_out).map(told).collect();
    Ok(SnapshotsResponse { snapshots, left_out: left_out as u64 })
}

pub(super) async fn check_rollback<M: Machine>(
    volumes: &Volumes<M>,
    request: CheckRollbackRequest,
) -> Result<CheckRollbackResponse, Status> {
    let id = super::id(&request.volume_id)?;
    let losses = volumes.check_rollback(id, &request.snapshot, request.destroy_newer).await?;
    let left_out = losses.newer.len().saturating_sub(SNAPSHOTS) as u64;
    let newer = losses.newer.into_iter().take(SNAPSHOTS).collect();
    Ok(CheckRollbackResponse { newer, left_out, written_bytes: losses.written, guid: losses.guid })
}

fn told(snapshot: streams::SendPoint) -> SendPoint {
    SendPoint {
        name: snapshot.name,
        guid: snapshot.guid,
        created: snapshot.created,
        referenced_bytes: snapshot.referenced,
        used_bytes: snapshot.used,
    }
}

pub(super) async fn send<M: Machine>(
    volumes: &Arc<Volumes<M>>,
    id: VolumeId,
    request: &SendRequest,
) -> Result<ReceiverStream<Result<SendResponse, Status>>, Status> {
    let what = stream::what(id, &request.snapshot, &request.from, &request.resume_token)?;
    let mut sending = volumes.send(id, &what).await?;
    let (sender, receiver) = mpsc::channel(1);
    tokio::spawn(async move {
        let begin = SendResponse { data: Vec::new(), estimated_bytes: sending.estimated };
        if sender.send(Ok(begin)).await.is_err() {
            return;
        }
        loop {
            // Nobody reads any more: dropped, it ends.
            let next = tokio::select! {
                next = sending.next() => next,
                () = sender.closed() => return,
            };
            let message = match next {
                Ok(None) => return,
                Ok(Some(data)) => Ok(SendResponse { data, estimated_bytes: 0 }),
                Err(error) => {
                    tracing::warn!("{error}");
                    Err(error.into())
                }
            };
            if sender.send(message).await.is_err() {
                return;
            }
        }
    });
    Ok(ReceiverStream::new(receiver))
}

pub(super) async fn receive<M: Machine>(
    volumes: &Volumes<M>,
    id: VolumeId,
    first: Vec<u8>,
    rest: impl Stream<Item = Result<ReceiveRequest, Status>> + Send + Unpin,
) -> Result<ReceiveResponse, Status> {
    let rest = rest.map(|message| message.map(|message| message.data).map_err(|status| status.message().to_owned()));
    let received = volumes.receive(id, tokio_stream::once(Ok(first)).chain(rest)).await?;
    Ok(ReceiveResponse { snapshot: received.snapshot, bytes: received.bytes })
}
