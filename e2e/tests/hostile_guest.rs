//! Guests that lie, babble or fall silent on the control channel. No machine is booted: each is a unix socket.

use std::path::Path;
use std::pin::Pin;
use std::time::Duration;

use anyhow::{Context as _, Result};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};
use zpod_e2e::csi::Publish;
use zpod_e2e::direct_volume::DirectVolume;
use zpod_e2e::shim::Monitor;
use zpod_e2e::{Node, workdir::Workdir};
use zpod_proto::guest::guest_server::{Guest, GuestServer};
use zpod_proto::guest::*;
use zpod_volume::{Bytes, Create, VolumeSpec};

/// What a call may take with bad guests about: a few deadlines on guests, none of them kubelet's two minutes.
const PATIENCE: Duration = Duration::from_secs(60);
const LIE: u64 = 0x00BA_DBAD;
const NO_TOKEN: &str = "00000000-0000-0000-0000-000000000000";

#[derive(Debug, Clone, Copy, PartialEq)]
enum Manner {
    NeverAnswersConnect,
    AnswersWithoutEnd,
    HangsUp,
    SpeaksNoise,
    FallsSilentAfterOk,
    Lies,
    LiesAtLength,
}

const MANNERS: [Manner; 7] = [
    Manner::NeverAnswersConnect,
    Manner::AnswersWithoutEnd,
    Manner::HangsUp,
    Manner::SpeaksNoise,
    Manner::FallsSilentAfterOk,
    Manner::Lies,
    Manner::LiesAtLength,
];

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hostile_guests_neither_hang_nor_crash_zpod_nor_speak_for_others_volumes() -> Result<()> {
    let mut node = Node::start().await?;
    let sockets = Workdir::new()?;
    let volume = node.csi.create("pvc-victim", Bytes::mib(256), &[]).await?;
    let target = node.target("one", "pv")?;
    node.csi.publish(&volume, &target, &Publish::default()).await?;

    let mut monitors = Vec::new();
    for (number, manner) in MANNERS.into_iter().enumerate() {
        let socket = sockets.path().join(number.to_string());
        start(&socket, manner, &volume.volume_id, NO_TOKEN)?;
        monitors.push(Monitor::serve(&node.kata_run_dir(), &format!("hostile{number}"), &socket)?);
    }
    for (number, url) in hostile_urls().into_iter().enumerate() {
        monitors.push(Monitor::serve_text(&node.kata_run_dir(), &format!("url{number}"), url)?);
    }
    let silent = silent_monitor(&node.kata_run_dir())?;

    // Time for whatever runs in the background to meet them all.
    for _ in 0..8 {
        sleep(Duration::from_secs(1)).await;
        node.zpod_must_run()?;
        // With no honest guest there are no stats; but there is an answer, and not the liars'.
        let answer = timeout(PATIENCE, node.csi.stats(&volume, &target)).await.context("stats hang")?;
        if let Ok(stats) = answer {
            let lie = i64::try_from(LIE)?;
            assert!(stats.usage.iter().all(|usage| usage.total != lie && usage.used != lie), "{stats:?}");
            let message = stats.volume_condition.map(|condition| condition.message).unwrap_or_default();
            assert!(message.len() < 2000 && !message.contains("LIE"), "{message}");
        }
    }
    let grown = timeout(PATIENCE, node.csi.node_expand(&volume, &target, Bytes::mib(512))).await;
    assert!(grown.context("expand hangs")?.is_err(), "nobody has grown it");

    // Other work goes on.
    let begin = Instant::now();
    let other = node.csi.create("pvc-other", Bytes::mib(256), &[]).await?;
    let other_target = node.target("two", "pv")?;
    timeout(PATIENCE, node.csi.publish(&other, &other_target, &Publish::default()))
        .await
        .context("publish hangs")??;
    timeout(PATIENCE, node.csi.unpublish(&other, &other_target)).await.context("unpublish hangs")??;
    node.csi.delete(&other).await?;
    println!("create to delete took {:?}", begin.elapsed());

    // A lie about the pool would forbid to make it: the next publication must still allow it.
    timeout(PATIENCE, node.csi.unpublish(&volume, &target)).await.context("unpublish hangs")??;
    node.csi.publish(&volume, &target, &Publish::default()).await?;
    let entry = DirectVolume::read(&node.direct_volume_dir(), &target)?;
    let option = entry.options.iter().find_map(|option| option.strip_prefix("zpod=")).context("no zpod= option")?;
    assert!(VolumeSpec::decode(option)?.create == Create::Fresh, "a guest without the token was believed");
    node.csi.unpublish(&volume, &target).await?;
    node.csi.delete(&volume).await?;
    silent.abort();
    drop(monitors);
    node.zpod_must_run()
}

/// A guest that was broken into has its own volume's token: what it says then is bounded all the same.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_guest_that_lies_about_its_own_volume_yields_no_absurd_numbers_and_no_escape_sequences() -> Result<()> {
    let mut node = Node::start().await?;
    let sockets = Workdir::new()?;
    for (number, manner) in [Manner::Lies, Manner::LiesAtLength].into_iter().enumerate() {
        let volume = node.csi.create(&format!("pvc-{number}"), Bytes::mib(256), &[]).await?;
        let target = node.target("one", &format!("pv-{number}"))?;
        node.csi.publish(&volume, &target, &Publish::default()).await?;
        let entry = DirectVolume::read(&node.direct_volume_dir(), &target)?;
        let option = entry.options.iter().find_map(|option| option.strip_prefix("zpod=")).context("no zpod= option")?;
        let token = VolumeSpec::decode(option)?.token.to_string();
        let socket = sockets.path().join(number.to_string());
        start(&socket, manner, &volume.volume_id, &token)?;
        let _monitor = Monitor::serve(&node.kata_run_dir(), &format!("hostile{number}"), &socket)?;
        for _ in 0..4 {
            sleep(Duration::from_secs(1)).await;
            node.zpod_must_run()?;
            let answer = timeout(PATIENCE, node.csi.stats(&volume, &target)).await.context("stats hang")?;
            let Ok(stats) = answer else { continue };
            println!("{manner:?}: {stats:?}");
            assert!(stats.usage.iter().all(|usage| usage.total >= 0 && usage.used >= 0 && usage.available >= 0));
            let message = stats.volume_condition.map(|condition| condition.message).unwrap_or_default();
            assert!(message.len() < 2000 && !message.contains(char::is_control), "{message:?}");
        }
        timeout(PATIENCE, node.csi.unpublish(&volume, &target)).await.context("unpublish hangs")??;
        node.csi.delete(&volume).await?;
    }
    node.zpod_must_run()
}

fn hostile_urls() -> Vec<String> {
    vec![
        String::new(),
        "hvsock:///etc/passwd:1024".into(),
        "hvsock://../../x:99999999999999999999".into(),
        "vsock://4294967295:1024".into(),
        "http://127.0.0.1/".into(),
        format!("hvsock://{}:1024", "/x".repeat(1 << 20)),
    ]
}

/// A shim that takes connections and says nothing.
fn silent_monitor(run_dir: &Path) -> Result<tokio::task::JoinHandle<()>> {
    let dir = run_dir.join("silent");
    std::fs::create_dir_all(&dir)?;
    let listener = UnixListener::bind(dir.join("shim-monitor.sock"))?;
    Ok(tokio::spawn(async move {
        let mut held = Vec::new();
        while let Ok((stream, _)) = listener.accept().await {
            held.push(stream);
        }
    }))
}

fn start(socket: &Path, manner: Manner, volume: &str, token: &str) -> Result<()> {
    let listener = UnixListener::bind(socket)?;
    let (volume, token) = (volume.to_owned(), token.to_owned());
    let (sender, connections) = mpsc::channel::<std::io::Result<UnixStream>>(16);
    if matches!(manner, Manner::Lies | Manner::LiesAtLength) {
        let liar = Liar { volume, token, at_length: manner == Manner::LiesAtLength };
        let server = tonic::transport::Server::builder().add_service(GuestServer::new(liar));
        tokio::spawn(async move { server.serve_with_incoming(ReceiverStream::new(connections)).await });
    }
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let sender = sender.clone();
            tokio::spawn(async move { behave(stream, manner, sender).await });
        }
    });
    Ok(())
}

async fn behave(
    mut stream: UnixStream,
    manner: Manner,
    sender: mpsc::Sender<std::io::Result<UnixStream>>,
) -> std::io::Result<()> {
    while stream.read_u8().await? != b'\n' {}
    match manner {
        Manner::NeverAnswersConnect => {}
        Manner::AnswersWithoutEnd => loop {
            stream.write_all(&[b'O'; 4096]).await?;
        },
        Manner::HangsUp => return Ok(()),
        Manner::SpeaksNoise => {
            stream.write_all(b"OK 10240\n").await?;
            for byte in 0.. {
                stream.write_all(&[byte as u8 ^ 0x5a; 512]).await?;
            }
        }
        Manner::FallsSilentAfterOk => stream.write_all(b"OK 10240\n").await?,
        Manner::Lies | Manner::LiesAtLength => {
            stream.write_all(b"OK 10240\n").await?;
            let _ = sender.send(Ok(stream)).await;
            return Ok(());
        }
    }
    sleep(Duration::from_secs(3600)).await;
    Ok(())
}

/// Speaks the protocol well, and claims a volume whose token it never got.
struct Liar {
    volume: String,
    token: String,
    at_length: bool,
}

impl Liar {
    fn status(&self) -> StatusResponse {
        let length = if self.at_length { 100_000 } else { 8 };
        let text = format!("LIE\n\x1b[31m{}", "x".repeat(length));
        let one = VolumeStatus {
            volume_id: self.volume.clone(),
            pool: "../../etc".into(),
            health: 999,
            message: text.clone(),
            refusal: text.clone(),
            trouble: text.clone(),
            rolled_back: Some(RolledBack { id: text.clone(), state: 999, message: text.clone() }),
            snapshot_bytes: u64::MAX,
            snapshots_paused: 999,
            total_bytes: LIE,
            used_bytes: u64::MAX,
            available_bytes: u64::MAX,
            compress_ratio: f64::NAN,
            containers: vec![text.clone(); 3],
            quota_bytes: LIE,
            partition_bytes: u64::MAX,
            disk_bytes: u64::MAX,
            token: self.token.clone(),
            ..VolumeStatus::default()
        };
        let volumes = vec![one; if self.at_length { 500 } else { 2 }];
        StatusResponse { version: text.clone(), zfs_version: text, volumes }
    }
}

type Stream = Pin<Box<dyn tokio_stream::Stream<Item = Result<StatusResponse, Status>> + Send>>;

#[tonic::async_trait]
impl Guest for Liar {
    type SendStream = ReceiverStream<Result<SendResponse, Status>>;
    type WatchStream = Stream;

    async fn status(&self, _: Request<StatusRequest>) -> Result<Response<StatusResponse>, Status> {
        Ok(Response::new(self.status()))
    }

    async fn watch(&self, _: Request<WatchRequest>) -> Result<Response<Stream>, Status> {
        let status = self.status();
        // As fast as it goes, without an end.
        Ok(Response::new(Box::pin(tokio_stream::iter(std::iter::repeat_with(move || Ok(status.clone()))))))
    }

    async fn grow(&self, request: Request<GrowRequest>) -> Result<Response<GrowResponse>, Status> {
        let GrowRequest { capacity_bytes, partition_bytes, .. } = request.into_inner();
        Ok(Response::new(GrowResponse { capacity_bytes, partition_bytes }))
    }

    async fn set_properties(
        &self,
        _: Request<SetPropertiesRequest>,
    ) -> Result<Response<SetPropertiesResponse>, Status> {
        Ok(Response::new(SetPropertiesResponse { follows_schedule: true }))
    }

    async fn sync(&self, _: Request<SyncRequest>) -> Result<Response<SyncResponse>, Status> {
        std::future::pending().await
    }

    async fn scrub(&self, _: Request<ScrubRequest>) -> Result<Response<ScrubResponse>, Status> {
        Err(Status::internal("LIE".repeat(10_000)))
    }

    async fn mark(&self, _: Request<MarkRequest>) -> Result<Response<MarkResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn unmark(&self, _: Request<UnmarkRequest>) -> Result<Response<UnmarkResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn provide_key(&self, _: Request<ProvideKeyRequest>) -> Result<Response<ProvideKeyResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn properties(&self, _: Request<PropertiesRequest>) -> Result<Response<PropertiesResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn send_points(&self, _: Request<SendPointsRequest>) -> Result<Response<SendPointsResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn remove_send_point(
        &self,
        _: Request<RemoveSendPointRequest>,
    ) -> Result<Response<RemoveSendPointResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn snapshots(&self, _: Request<SnapshotsRequest>) -> Result<Response<SnapshotsResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn take_snapshot(&self, _: Request<TakeSnapshotRequest>) -> Result<Response<TakeSnapshotResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn destroy_snapshot(
        &self,
        _: Request<DestroySnapshotRequest>,
    ) -> Result<Response<DestroySnapshotResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn check_rollback(
        &self,
        _: Request<CheckRollbackRequest>,
    ) -> Result<Response<CheckRollbackResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn send(&self, _: Request<SendRequest>) -> Result<Response<Self::SendStream>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn receive(&self, _: Request<Streaming<ReceiveRequest>>) -> Result<Response<ReceiveResponse>, Status> {
        Err(Status::unimplemented(""))
    }
}
