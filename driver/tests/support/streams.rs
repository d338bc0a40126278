//! Streams of a guest that has no pool: a pattern of any length out, and whatever comes in counted.

use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};
use zpod_proto::guest::*;

const CHUNK: usize = 256 << 10;

/// What passed.
#[derive(Debug, Default)]
pub(crate) struct Passed {
    /// Send points that were removed.
    pub(crate) removed: Mutex<Vec<String>>,
    /// Snapshots that were taken.
    pub(crate) taken: Mutex<Vec<String>>,
    /// It is of an image from before there were rollbacks.
    pub(crate) knows_no_rollbacks: AtomicBool,
    /// Bytes that were taken from the guest's sends.
    pub(crate) sent: AtomicU64,
    /// Bytes that have come in by now.
    pub(crate) coming: AtomicU64,
    /// What each receive came to: bytes, and whether there was an end.
    pub(crate) received: Mutex<Vec<(u64, bool)>>,
    /// Where a receive broke off.
    pub(crate) resume_token: Mutex<String>,
}

/// What is newer than a snapshot that was taken.
pub(crate) fn check_rollback(
    passed: &Passed,
    request: &CheckRollbackRequest,
) -> Result<Response<CheckRollbackResponse>, Status> {
    if passed.knows_no_rollbacks.load(Ordering::SeqCst) {
        return Err(Status::unimplemented(""));
    }
    let taken = passed.taken.lock().unwrap();
    let place = taken.iter().position(|name| *name == request.snapshot);
    let place = place.ok_or_else(|| Status::failed_precondition(format!("it has no snapshot {}", request.snapshot)))?;
    let newer = taken[place + 1..].to_vec();
    if !newer.is_empty() && !request.destroy_newer {
        return Err(Status::failed_precondition(format!(
            "these are newer and would be destroyed: {}",
            newer.join(", ")
        )));
    }
    Ok(Response::new(CheckRollbackResponse { newer, left_out: 0, written_bytes: 4096, guid: u64::MAX }))
}

/// Sends as many MiB as the snapshot's name says: `zpod-send-<MiB>`. `zpod-send-<MiB>-breaks` fails then.
pub(crate) fn send(
    passed: &std::sync::Arc<super::State>,
    request: &SendRequest,
) -> Result<Response<ReceiverStream<Result<SendResponse, Status>>>, Status> {
    let name = request.snapshot.strip_prefix("zpod-send-").unwrap_or_default();
    let (mib, rest) = name.split_once('-').unwrap_or((name, ""));
    let bytes = mib.parse::<u64>().map_err(|_| Status::failed_precondition("there is no such\nsnapshot"))? << 20;
    let (sender, receiver) = tokio::sync::mpsc::channel(1);
    let (state, breaks) = (passed.clone(), rest == "breaks");
    tokio::spawn(async move {
        let mut left = bytes;
        let mut estimated_bytes = bytes;
        while left > 0 {
            let length = left.min(CHUNK as u64);
            let data = vec![(left >> 20) as u8; length as usize];
            if sender.send(Ok(SendResponse { data, estimated_bytes })).await.is_err() {
                return;
            }
            state.passed.sent.fetch_add(length, Ordering::Relaxed);
            (left, estimated_bytes) = (left - length, 0);
        }
        if breaks {
            let _ = sender.send(Err(Status::data_loss("the pool is suspended"))).await;
        }
    });
    Ok(Response::new(ReceiverStream::new(receiver)))
}

/// Reads to the end. A stream that begins with `x` is refused, one with `s` is read slowly.
pub(crate) async fn receive(
    state: &super::State,
    request: Request<Streaming<ReceiveRequest>>,
) -> Result<Response<ReceiveResponse>, Status> {
    let mut stream = request.into_inner();
    let first = stream.message().await?.ok_or_else(|| Status::invalid_argument("nothing came"))?;
    assert!(!first.volume_id.is_empty());
    let mut bytes = 0;
    loop {
        match stream.message().await {
            Ok(Some(message)) => {
                assert!(message.data.len() <= CHUNK && message.volume_id.is_empty());
                if bytes == 0 && message.data.first() == Some(&b'x') {
                    return Err(Status::failed_precondition("it is not a ZFS stream"));
                }
                if message.data.first() == Some(&b's') {
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
                bytes += message.data.len() as u64;
                state.passed.coming.store(bytes, Ordering::Relaxed);
            }
            Ok(None) => break,
            Err(status) => {
                state.passed.received.lock().unwrap().push((bytes, false));
                return Err(status);
            }
        }
    }
    state.passed.received.lock().unwrap().push((bytes, true));
    Ok(Response::new(ReceiveResponse { snapshot: "zpod-send-a".into(), bytes }))
}
