use std::io;
use std::path::Path;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tokio_vsock::{VsockAddr, VsockStream};
use tonic::transport::{Channel, Endpoint, Uri};
use zpod_proto::guest::PORT;

use super::pace::Paced;
use crate::kata::AgentUrl;

/// For the whole way to a guest: socket, handshake of the VMM, HTTP/2.
const CONNECT_DEADLINE: Duration = Duration::from_secs(5);
/// `OK 1073741824\n` and room to spare.
const MAX_HANDSHAKE: usize = 64;

/// A stream of either kind.
trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// Connects to the control service of the guest whose agent is at that address.
pub(super) async fn connect(url: &AgentUrl) -> Result<Channel, String> {
    let endpoint = Endpoint::from_static("http://guest")
        .http2_max_header_list_size(16 << 10)
        .initial_stream_window_size(64 << 10)
        .initial_connection_window_size(128 << 10)
        // A guest that hangs is noticed by pings that it does not answer.
        .http2_keep_alive_interval(Duration::from_secs(15))
        .keep_alive_timeout(Duration::from_secs(15));
    let url = url.clone();
    let connector = tower::service_fn(move |_: Uri| {
        let url = url.clone();
        async move { open(&url).await.map(Paced::new).map(TokioIo::new) }
    });
    match tokio::time::timeout(CONNECT_DEADLINE, endpoint.connect_with_connector(connector)).await {
        Ok(Ok(channel)) => Ok(channel),
        Ok(Err(error)) => Err(with_sources(&error)),
        Err(_) => Err(format!("no connection within {CONNECT_DEADLINE:?}")),
    }
}

async fn open(url: &AgentUrl) -> io::Result<Box<dyn Stream>> {
    let open = async {
        match url {
            AgentUrl::Vsock { cid } => {
                let stream = VsockStream::connect(VsockAddr::new(*cid, PORT)).await?;
                Ok(Box::new(stream) as Box<dyn Stream>)
            }
            AgentUrl::Hybrid { socket } => hybrid(socket).await.map(|stream| Box::new(stream) as Box<dyn Stream>),
        }
    };
    tokio::time::timeout(CONNECT_DEADLINE, open).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}

/// The handshake of a VMM's unix socket: `CONNECT <port>`, answered by `OK <port>`.
async fn hybrid(socket: &Path) -> io::Result<UnixStream> {
    let mut stream = UnixStream::connect(socket).await?;
    stream.write_all(format!("CONNECT {PORT}\n").as_bytes()).await?;
    let mut line = Vec::with_capacity(MAX_HANDSHAKE);
    // Byte by byte: what follows the line belongs to HTTP/2.
    loop {
        match stream.read_u8().await? {
            b'\n' => break,
            byte if line.len() < MAX_HANDSHAKE => line.push(byte),
            _ => return Err(io::Error::other("the VMM's answer to CONNECT is too long")),
        }
    }
    if line.starts_with(b"OK ") { Ok(stream) } else { Err(io::Error::other("the VMM refused CONNECT")) }
}

fn with_sources(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    super::clean(&text, 256)
}
