//! A sandbox whose guest answers every call with bytes of the test's choice.

use std::convert::Infallible;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};

use futures_util::stream::{self, StreamExt as _};
use http_body_util::StreamBody;
use hyper::body::{Bytes, Frame};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{UnixListener, UnixStream};
use tokio::task::JoinHandle;
use tokio_stream::wrappers::ReceiverStream;
use tonic::body::Body;
use tonic::codegen::http::{Request, Response};
use tonic::server::NamedService;

use crate::fake_guest::serve_shim;

/// What comes behind the first message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Then {
    /// The same, as fast as it is taken.
    Again,
    /// The same but for its last byte, which never comes.
    Stalls,
}

/// A sandbox; gone when dropped.
pub(crate) struct RawGuest {
    dir: PathBuf,
    tasks: Vec<JoinHandle<()>>,
    /// Messages that were taken from it.
    pub(crate) taken: Arc<AtomicUsize>,
}

impl RawGuest {
    pub(crate) fn start(kata_dir: &Path, id: &str, message: &[u8], then: Then) -> Self {
        let dir = kata_dir.join(id);
        fs::create_dir(&dir).unwrap();
        let uds = dir.join("vm.sock");
        let vmm = UnixListener::bind(&uds).unwrap();
        let shim = UnixListener::bind(dir.join("shim-monitor.sock")).unwrap();
        // gRPC: not compressed, and the length.
        let length = u32::try_from(message.len()).unwrap();
        let message = Bytes::from([&[0][..], &length.to_be_bytes(), message].concat());
        let taken = Arc::new(AtomicUsize::new(0));
        let service = Service { message, then, taken: Arc::clone(&taken) };
        let tasks = vec![tokio::spawn(serve_shim(shim, uds)), tokio::spawn(serve_vmm(vmm, service))];
        Self { dir, tasks, taken }
    }
}

impl Drop for RawGuest {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
        let _ = fs::remove_dir_all(&self.dir);
    }
}

async fn serve_vmm(listener: UnixListener, service: Service) {
    let (connections, incoming) = tokio::sync::mpsc::channel::<std::io::Result<UnixStream>>(8);
    let server = tonic::transport::Server::builder().add_service(service);
    let serve = server.serve_with_incoming(ReceiverStream::new(incoming));
    let accept = async {
        while let Ok((mut stream, _)) = listener.accept().await {
            // Whoever is dialled may have been hung up on by now.
            while stream.read_u8().await.is_ok_and(|byte| byte != b'\n') {}
            if stream.write_all(b"OK 1073741824\n").await.is_ok() {
                connections.send(Ok(stream)).await.unwrap();
            }
        }
    };
    tokio::select! {
        _ = serve => {}
        () = accept => {}
    }
}

#[derive(Debug, Clone)]
struct Service {
    message: Bytes,
    then: Then,
    taken: Arc<AtomicUsize>,
}

impl NamedService for Service {
    const NAME: &'static str = "zpod.guest.v1.Guest";
}

impl tower::Service<Request<Body>> for Service {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = std::future::Ready<Result<Response<Body>, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, _: Request<Body>) -> Self::Future {
        let (message, taken) = (self.message.clone(), Arc::clone(&self.taken));
        let again = message.clone();
        let rest = match self.then {
            Then::Again => stream::repeat_with(move || again.clone()).boxed(),
            Then::Stalls => {
                let most = again.slice(..again.len() - 1);
                stream::iter([most]).chain(stream::pending()).boxed()
            }
        };
        let all = stream::iter([message]).chain(rest).map(move |bytes| {
            taken.fetch_add(1, Ordering::Relaxed);
            Ok::<_, Infallible>(Frame::data(bytes))
        });
        let response = Response::builder().header("content-type", "application/grpc");
        std::future::ready(Ok(response.body(Body::new(StreamBody::new(all))).unwrap()))
    }
}
