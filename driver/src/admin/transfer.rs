//! Streams between a client and a guest. A few chunks are in memory, whoever is slow.

use std::collections::HashSet;
use std::pin::Pin;
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use futures_util::{Stream, StreamExt as _, stream};
use http_body_util::{BodyExt as _, StreamBody};
use hyper::body::{Body, Bytes, Frame};
use tokio::sync::mpsc;
use zpod_admin::{Received, SendQuery};
use zpod_proto::guest::ReceiveRequest;
use zpod_volume::VolumeId;

use super::answer::{self, Answer};
use super::{Admin, AdminError};
use crate::guest::{MAX_CHUNK, Sending};

/// How long a guest may be silent in the middle of a stream: its disk may be slow, and hundreds of GiB of holes take
/// time.
const PATIENCE: Duration = Duration::from_secs(300);
/// Chunks on their way to a guest.
const AHEAD: usize = 2;

/// The volumes that are being sent or received now. One at a time each: a guest has other things to do.
#[derive(Debug, Default)]
pub(super) struct Transfers(Mutex<HashSet<VolumeId>>);

/// One of them; over when dropped.
#[derive(Debug)]
struct Transfer {
    all: Arc<Transfers>,
    id: VolumeId,
}

impl Drop for Transfer {
    fn drop(&mut self) {
        self.all.0.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.id);
    }
}

impl Transfers {
    fn begin(self: &Arc<Self>, id: VolumeId) -> Result<Transfer, AdminError> {
        let fresh = self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(id);
        if fresh { Ok(Transfer { all: self.clone(), id }) } else { Err(AdminError::Busy(id)) }
    }

    /// Has a guest write a volume out.
    pub(super) async fn send(
        self: &Arc<Self>,
        admin: &Admin,
        id: VolumeId,
        query: &SendQuery,
    ) -> Result<Answer, AdminError> {
        let transfer = self.begin(id)?;
        let guest = admin.guest(id).await?.apart().await?;
        let sending = guest.send(id, query).await?;
        tracing::info!(volume = %id, %query, estimated = sending.estimated, "sending");
        let estimated = sending.estimated;
        Ok(answer::stream(StreamBody::new(Box::pin(chunks(sending, transfer))), estimated))
    }

    /// Has a guest read a volume in.
    pub(super) async fn receive(
        self: &Arc<Self>,
        admin: &Admin,
        id: VolumeId,
        body: impl Body<Data = Bytes, Error = hyper::Error> + Send + Unpin,
    ) -> Result<Received, AdminError> {
        let _transfer = self.begin(id)?;
        let guest = admin.guest(id).await?.apart().await?;
        tracing::info!(volume = %id, "receiving");
        let (parts, incoming) = mpsc::channel(AHEAD);
        let first = ReceiveRequest { volume_id: id.to_string(), data: Vec::new() };
        let requests = stream::once(std::future::ready(first)).chain(Parts(incoming));
        let call = guest.receive(id, requests);
        let pump = pump(body, parts);
        tokio::pin!(call, pump);
        let answered = tokio::select! {
            // A guest that refuses says so before the end.
            answer = &mut call => answer,
            pumped = &mut pump => {
                // Cut short, the call is dropped: the guest's answer is not waited for. It may take the reset for an end, as
                // hyper does; a ZFS stream has an end of its own, with a checksum, and is no whole one without.
                pumped?;
                call.await
            }
        };
        let received = answered?;
        tracing::info!(volume = %id, snapshot = received.snapshot, bytes = received.bytes, "received");
        Ok(received)
    }
}

/// The parts of what a guest writes out. The transfer ends with the stream, or when nobody wants more of it.
fn chunks(
    sending: Sending,
    transfer: Transfer,
) -> impl Stream<Item = Result<Frame<Bytes>, crate::guest::GuestError>> + Send {
    stream::unfold(Some((sending, transfer)), |state| async {
        let (mut sending, transfer) = state?;
        match sending.next(PATIENCE).await {
            Ok(Some(data)) => Some((Ok(Frame::data(Bytes::from(data))), Some((sending, transfer)))),
            Ok(None) => None,
            Err(error) => {
                // The client sees a stream without an end.
                tracing::warn!(volume = %transfer.id, "the stream broke off: {error}");
                Some((Err(error), None))
            }
        }
    })
}

/// Part of a stream on its way to a guest, or its end.
enum Part {
    Data(Vec<u8>),
    End,
}

/// Reads a body to its end and says that it has come.
async fn pump(
    mut body: impl Body<Data = Bytes, Error = hyper::Error> + Unpin,
    parts: mpsc::Sender<Part>,
) -> Result<(), AdminError> {
    let mut bytes = 0;
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| AdminError::Broken { bytes, reason: error.to_string() })?;
        let Ok(mut data) = frame.into_data() else { continue };
        bytes += data.len() as u64;
        while !data.is_empty() {
            let chunk = data.split_to(data.len().min(MAX_CHUNK));
            if parts.send(Part::Data(chunk.to_vec())).await.is_err() {
                // The guest has heard enough; its answer says why.
                return std::future::pending().await;
            }
        }
    }
    if parts.send(Part::End).await.is_err() {
        return std::future::pending().await;
    }
    Ok(())
}

/// What is left of it when it is dropped before its end never ends: whoever reads it must not take what it has for the
/// whole.
struct Parts(mpsc::Receiver<Part>);

impl Stream for Parts {
    type Item = ReceiveRequest;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<ReceiveRequest>> {
        match self.0.poll_recv(context) {
            Poll::Ready(Some(Part::Data(data))) => Poll::Ready(Some(ReceiveRequest { volume_id: String::new(), data })),
            Poll::Ready(Some(Part::End)) => Poll::Ready(None),
            Poll::Ready(None) | Poll::Pending => Poll::Pending,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_stream_that_is_cut_short_has_no_end() {
        let (sender, receiver) = mpsc::channel(AHEAD);
        let mut parts = Parts(receiver);
        sender.send(Part::Data(vec![1])).await.unwrap();
        drop(sender);
        assert_eq!(parts.next().await.unwrap().data, [1]);
        assert!(tokio::time::timeout(Duration::from_millis(50), parts.next()).await.is_err());
    }

    #[tokio::test]
    async fn a_volume_is_in_one_transfer_at_a_time_and_free_when_that_ends() {
        let transfers = Arc::<Transfers>::default();
        let id = VolumeId::from_name("a");
        let one = transfers.begin(id).unwrap();
        assert!(matches!(transfers.begin(id), Err(AdminError::Busy(_))));
        drop(transfers.begin(VolumeId::from_name("b")).unwrap());
        drop(one);
        transfers.begin(id).unwrap();
    }
}
