//! A sandbox that is none: the sockets of a shim and of a VMM, and a guest that answers as the test wants.

#[path = "late.rs"]
pub(crate) mod late;
#[path = "streams.rs"]
mod streams;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{UnixListener, UnixStream};
use tokio::task::JoinHandle;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};
use zpod_proto::guest::guest_server::{Guest, GuestServer};
use zpod_proto::guest::*;

/// How a guest behaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Behaviour {
    /// As zpod-guest does.
    Honest,
    /// Takes the connection and says nothing.
    Silent,
    /// Sends bytes that are no HTTP/2.
    Garbage,
    /// Sends reports as fast as it can.
    Flood,
    /// Sends reports larger than any message may be.
    Huge,
    /// Serves the stream of reports and no call.
    DeafToCalls,
}

/// What the test and the guest share.
#[derive(Debug, Default)]
pub(crate) struct State {
    pub(crate) volumes: Mutex<Vec<VolumeStatus>>,
    pub(crate) grown: Mutex<Vec<GrowRequest>>,
    /// Properties that were set.
    pub(crate) set: Mutex<Vec<SetPropertiesRequest>>,
    /// It is of an image from before there were schedules of snapshots.
    pub(crate) knows_no_schedules: AtomicBool,
    /// Volumes that were told to be scrubbed, in that order.
    pub(crate) scrubbed: Mutex<Vec<String>>,
    /// The key that the volumes' contents are encrypted with, and what came so far.
    pub(crate) key: Mutex<Vec<u8>>,
    pub(crate) provided: Mutex<Vec<ProvideKeyRequest>>,
    /// Marks that were taken, of which volume and by which name.
    pub(crate) marks: Mutex<BTreeSet<(String, String)>>,
    /// Somebody in the pod destroys each snapshot as soon as it is taken.
    pub(crate) loses_marks: AtomicBool,
    /// When Mark and Unmark are answered.
    pub(crate) late: late::Late,
    /// What was sent and received.
    pub(crate) passed: streams::Passed,
    /// How often it was dialled, and by how many its reports are listened to now.
    pub(crate) dialled: AtomicUsize,
    pub(crate) watches: AtomicUsize,
    /// Reports that were sent to them.
    pub(crate) reports: AtomicUsize,
}

/// A sandbox; gone when dropped.
pub(crate) struct FakeGuest {
    dir: PathBuf,
    pub(crate) state: Arc<State>,
    tasks: Vec<JoinHandle<()>>,
}

impl FakeGuest {
    pub(crate) fn start(kata_dir: &Path, id: &str, behaviour: Behaviour, volumes: Vec<VolumeStatus>) -> Self {
        let dir = kata_dir.join(id);
        fs::create_dir(&dir).unwrap();
        let state = Arc::new(State { volumes: Mutex::new(volumes), ..State::default() });
        let uds = dir.join("vm.sock");
        let vmm = UnixListener::bind(&uds).unwrap();
        let shim = UnixListener::bind(dir.join("shim-monitor.sock")).unwrap();
        let tasks =
            vec![tokio::spawn(serve_shim(shim, uds)), tokio::spawn(serve_vmm(vmm, behaviour, Arc::clone(&state)))];
        Self { dir, state, tasks }
    }
}

impl Drop for FakeGuest {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
        let _ = fs::remove_dir_all(&self.dir);
    }
}

pub(crate) async fn serve_shim(listener: UnixListener, uds: PathBuf) {
    let url = format!("hvsock://{}:1024", uds.display());
    while let Ok((mut stream, _)) = listener.accept().await {
        let mut request = [0; 1024];
        let _ = stream.read(&mut request).await;
        let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{url}", url.len());
        let _ = stream.write_all(answer.as_bytes()).await;
    }
}

async fn serve_vmm(listener: UnixListener, behaviour: Behaviour, state: Arc<State>) {
    let (connections, incoming) = tokio::sync::mpsc::channel::<std::io::Result<UnixStream>>(8);
    let service = GuestServer::new(Service { behaviour, state: Arc::clone(&state) });
    let server = tonic::transport::Server::builder().add_service(service);
    let _server = AbortOnDrop(tokio::spawn(async move {
        let _ = server.serve_with_incoming(ReceiverStream::new(incoming)).await;
    }));
    let mut kept = Vec::new();
    while let Ok((mut stream, _)) = listener.accept().await {
        let mut line = Vec::new();
        while !line.ends_with(b"\n")
            && let Ok(byte) = stream.read_u8().await
        {
            line.push(byte);
        }
        if !line.ends_with(b"\n") {
            // Whoever dialled was killed in the middle of it.
            continue;
        }
        assert_eq!(line, b"CONNECT 10240\n");
        state.dialled.fetch_add(1, Ordering::SeqCst);
        match behaviour {
            Behaviour::Silent => kept.push(stream),
            Behaviour::Garbage => {
                let _ = stream.write_all(b"OK 1\n").await;
                let _ = stream.write_all(&[0x55; 1 << 16]).await;
                kept.push(stream);
            }
            _ => {
                if stream.write_all(b"OK 1073741824\n").await.is_ok() {
                    connections.send(Ok(stream)).await.unwrap();
                }
            }
        }
    }
}

struct AbortOnDrop(JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

struct Service {
    behaviour: Behaviour,
    state: Arc<State>,
}

impl Service {
    fn report(&self) -> StatusResponse {
        let mut report = StatusResponse { version: "test".into(), ..Default::default() };
        report.volumes = self.state.volumes.lock().unwrap().clone();
        if self.behaviour == Behaviour::Huge {
            report.zfs_version = "x".repeat(8 << 20);
        }
        report
    }

    async fn deaf(&self) {
        if self.behaviour == Behaviour::DeafToCalls {
            tokio::time::sleep(Duration::from_secs(3600)).await;
        }
    }
}

#[tonic::async_trait]
impl Guest for Service {
    type SendStream = ReceiverStream<Result<SendResponse, Status>>;
    type WatchStream = ReceiverStream<Result<StatusResponse, Status>>;

    async fn status(&self, _: Request<StatusRequest>) -> Result<Response<StatusResponse>, Status> {
        self.deaf().await;
        Ok(Response::new(self.report()))
    }

    async fn watch(&self, _: Request<WatchRequest>) -> Result<Response<Self::WatchStream>, Status> {
        let (sender, receiver) = tokio::sync::mpsc::channel(1);
        let service = Self { behaviour: self.behaviour, state: Arc::clone(&self.state) };
        tokio::spawn(async move {
            service.state.watches.fetch_add(1, Ordering::SeqCst);
            while sender.send(Ok(service.report())).await.is_ok() {
                service.state.reports.fetch_add(1, Ordering::SeqCst);
                if service.behaviour != Behaviour::Flood {
                    tokio::time::sleep(Duration::from_millis(300)).await;
                }
            }
            service.state.watches.fetch_sub(1, Ordering::SeqCst);
        });
        Ok(Response::new(ReceiverStream::new(receiver)))
    }

    async fn grow(&self, request: Request<GrowRequest>) -> Result<Response<GrowResponse>, Status> {
        self.deaf().await;
        let request = request.into_inner();
        let mut volumes = self.state.volumes.lock().unwrap();
        let volume = volumes.iter_mut().find(|volume| volume.volume_id == request.volume_id);
        let volume = volume.ok_or_else(|| Status::not_found("no such volume"))?;
        volume.partition_bytes = request.partition_bytes;
        volume.quota_bytes = request.capacity_bytes;
        let answer = GrowResponse { capacity_bytes: request.capacity_bytes, partition_bytes: request.partition_bytes };
        self.state.grown.lock().unwrap().push(request);
        Ok(Response::new(answer))
    }

    async fn set_properties(
        &self,
        request: Request<SetPropertiesRequest>,
    ) -> Result<Response<SetPropertiesResponse>, Status> {
        let request = request.into_inner();
        let follows_schedule =
            request.snapshot_schedule.is_some() && !self.state.knows_no_schedules.load(Ordering::SeqCst);
        self.state.set.lock().unwrap().push(request);
        Ok(Response::new(SetPropertiesResponse { follows_schedule }))
    }

    async fn sync(&self, _: Request<SyncRequest>) -> Result<Response<SyncResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn scrub(&self, request: Request<ScrubRequest>) -> Result<Response<ScrubResponse>, Status> {
        let id = request.into_inner().volume_id;
        let running = LastScrub { state: last_scrub::State::Running.into(), ..LastScrub::default() };
        let mut volumes = self.state.volumes.lock().unwrap();
        volumes.iter_mut().filter(|volume| volume.volume_id == id).for_each(|volume| volume.scrub = Some(running));
        self.state.scrubbed.lock().unwrap().push(id);
        Ok(Response::new(ScrubResponse {}))
    }

    async fn mark(&self, request: Request<MarkRequest>) -> Result<Response<MarkResponse>, Status> {
        self.deaf().await;
        self.state.late.hold("Mark").await;
        let MarkRequest { volume_id, mark, .. } = request.into_inner();
        if !self.state.loses_marks.load(Ordering::SeqCst) {
            self.state.marks.lock().unwrap().insert((volume_id, mark));
        }
        Ok(Response::new(MarkResponse {}))
    }

    async fn unmark(&self, request: Request<UnmarkRequest>) -> Result<Response<UnmarkResponse>, Status> {
        self.deaf().await;
        self.state.late.hold("Unmark").await;
        let UnmarkRequest { volume_id, mark, .. } = request.into_inner();
        let removed = self.state.marks.lock().unwrap().remove(&(volume_id, mark));
        Ok(Response::new(UnmarkResponse { removed: Some(removed) }))
    }

    async fn provide_key(&self, request: Request<ProvideKeyRequest>) -> Result<Response<ProvideKeyResponse>, Status> {
        self.deaf().await;
        let request = request.into_inner();
        self.state.provided.lock().unwrap().push(request.clone());
        let (mut volumes, mut key) = (self.state.volumes.lock().unwrap(), self.state.key.lock().unwrap());
        let volume = volumes.iter_mut().find(|volume| volume.volume_id == request.volume_id);
        let volume = volume.filter(|volume| volume.token == request.token);
        let volume = volume.ok_or_else(|| Status::permission_denied("no such volume, or not this token"))?;
        let changed = *key != request.key;
        if changed && *key != request.previous_key {
            // No guest of ours says it; a hostile one might.
            let said = String::from_utf8_lossy(&request.key).into_owned();
            return Err(Status::failed_precondition(format!("the key {said} does not fit")));
        }
        *key = request.key;
        volume.awaits_key = false;
        volume.health = Health::Online.into();
        Ok(Response::new(ProvideKeyResponse { changed }))
    }

    async fn properties(&self, request: Request<PropertiesRequest>) -> Result<Response<PropertiesResponse>, Status> {
        self.deaf().await;
        let dataset = [("compression", "zstd"), ("volume", &request.into_inner().volume_id), ("bad key", "x")];
        let dataset = dataset.map(|(key, value)| (key.to_owned(), value.to_owned())).into();
        Ok(Response::new(PropertiesResponse { dataset, ..PropertiesResponse::default() }))
    }

    async fn send_points(&self, _: Request<SendPointsRequest>) -> Result<Response<SendPointsResponse>, Status> {
        let resume_token = self.state.passed.resume_token.lock().unwrap().clone();
        let point = SendPoint { name: "zpod-send-a\u{1b}".into(), guid: u64::MAX, ..SendPoint::default() };
        Ok(Response::new(SendPointsResponse { points: vec![point], resume_token }))
    }

    async fn remove_send_point(
        &self,
        request: Request<RemoveSendPointRequest>,
    ) -> Result<Response<RemoveSendPointResponse>, Status> {
        let RemoveSendPointRequest { snapshot, .. } = request.into_inner();
        if snapshot != "zpod-send-a" {
            return Err(Status::failed_precondition(format!("it has no send point {snapshot}")));
        }
        self.state.passed.removed.lock().unwrap().push(snapshot);
        Ok(Response::new(RemoveSendPointResponse {}))
    }

    async fn snapshots(&self, _: Request<SnapshotsRequest>) -> Result<Response<SnapshotsResponse>, Status> {
        let taken = self.state.passed.taken.lock().unwrap().clone();
        let snapshots = taken.into_iter().map(|name| SendPoint { name, ..SendPoint::default() }).collect();
        Ok(Response::new(SnapshotsResponse { snapshots, left_out: 7 }))
    }

    async fn take_snapshot(
        &self,
        request: Request<TakeSnapshotRequest>,
    ) -> Result<Response<TakeSnapshotResponse>, Status> {
        self.state.passed.taken.lock().unwrap().push(request.into_inner().snapshot);
        Ok(Response::new(TakeSnapshotResponse {}))
    }

    async fn destroy_snapshot(
        &self,
        request: Request<DestroySnapshotRequest>,
    ) -> Result<Response<DestroySnapshotResponse>, Status> {
        let DestroySnapshotRequest { snapshot, .. } = request.into_inner();
        let mut taken = self.state.passed.taken.lock().unwrap();
        let before = taken.len();
        taken.retain(|name| *name != snapshot);
        if taken.len() == before {
            return Err(Status::failed_precondition(format!("it has no snapshot {snapshot}")));
        }
        Ok(Response::new(DestroySnapshotResponse {}))
    }

    async fn check_rollback(
        &self,
        request: Request<CheckRollbackRequest>,
    ) -> Result<Response<CheckRollbackResponse>, Status> {
        streams::check_rollback(&self.state.passed, request.get_ref())
    }

    async fn send(&self, request: Request<SendRequest>) -> Result<Response<Self::SendStream>, Status> {
        streams::send(&self.state, request.get_ref())
    }

    async fn receive(&self, request: Request<Streaming<ReceiveRequest>>) -> Result<Response<ReceiveResponse>, Status> {
        streams::receive(&self.state, request).await
    }
}
