use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::body::Bytes;
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;

const SOCKET: &str = "shim-monitor.sock";
const DEADLINE: Duration = Duration::from_secs(5);
const MAX_ANSWER: usize = 4096;
/// More sandboxes than any node runs.
const MAX_SANDBOXES: usize = 4096;

/// A running sandbox: one virtual machine, one pod.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Sandbox {
    /// Its id, as its shim names its directory.
    pub id: String,
    /// The shim's management socket.
    pub socket: PathBuf,
    /// The socket's inode: tells it from another one at the same place.
    pub inode: u64,
}

/// Where a guest is reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AgentUrl {
    /// A vsock address of the host kernel.
    Vsock {
        /// Context id of the guest.
        cid: u32,
    },
    /// A unix socket on which the VMM takes `CONNECT <port>`.
    Hybrid {
        /// The socket.
        socket: PathBuf,
    },
}

/// Why a shim did not tell where its guest is.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// The socket can't be connected to.
    #[error("shim of sandbox {id}: {source}")]
    Connect {
        /// The sandbox.
        id: String,
        /// Why.
        source: std::io::Error,
    },
    /// The answer did not come in time.
    #[error("shim of sandbox {0} did not answer GET /agent-url within {DEADLINE:?}")]
    Timeout(String),
    /// runtime-rs answers before its virtual machine has an address.
    #[error("the virtual machine of sandbox {0} has no address yet")]
    NotYet(String),
    /// The answer is none.
    #[error("shim of sandbox {id}: GET /agent-url: {reason}")]
    Answer {
        /// The sandbox.
        id: String,
        /// What came instead.
        reason: String,
    },
}

impl SandboxError {
    /// Whether nobody listens on the shim's socket any more.
    pub fn is_gone(&self) -> bool {
        use std::io::ErrorKind;
        matches!(self, Self::Connect { source, .. }
            if matches!(source.kind(), ErrorKind::ConnectionRefused | ErrorKind::NotFound))
    }
}

/// The sandboxes whose shims have a socket in one of these directories: `/run/kata` of the runtime in Rust,
/// `/run/vc/sbs` of the one in Go.
pub fn discover(dirs: &[PathBuf]) -> Vec<Sandbox> {
    let entries = dirs.iter().filter_map(|dir| std::fs::read_dir(dir).ok()).flatten().flatten();
    let sandboxes = entries.filter_map(|entry| {
        let socket = entry.path().join(SOCKET);
        let id = entry.file_name().into_string().ok()?;
        let inode = std::fs::metadata(&socket).ok()?.ino();
        Some(Sandbox { id, socket, inode })
    });
    sandboxes.take(MAX_SANDBOXES).collect()
}

impl Sandbox {
    /// Asks the shim where its guest is.
    ///
    /// # Errors
    /// When the shim does not answer in time, or not with an address.
    pub async fn agent_url(&self) -> Result<AgentUrl, SandboxError> {
        let answer = tokio::time::timeout(DEADLINE, self.get_agent_url()).await;
        let text = answer.map_err(|_| SandboxError::Timeout(self.id.clone()))??;
        if text.starts_with(':') {
            return Err(SandboxError::NotYet(self.id.clone()));
        }
        let reason = || SandboxError::Answer { id: self.id.clone(), reason: format!("{text:?} is not an address") };
        AgentUrl::parse(&text).ok_or_else(reason)
    }

    async fn get_agent_url(&self) -> Result<String, SandboxError> {
        let connected = UnixStream::connect(&self.socket).await;
        let stream = connected.map_err(|source| SandboxError::Connect { id: self.id.clone(), source })?;
        let answer = |reason: String| SandboxError::Answer { id: self.id.clone(), reason };
        let handshake = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await;
        let (mut sender, connection) = handshake.map_err(|e| answer(e.to_string()))?;
        let exchange = async {
            let request = hyper::Request::get("/agent-url").header(hyper::header::HOST, "shim");
            let request = request.body(Empty::<Bytes>::new()).map_err(|e| answer(e.to_string()))?;
            let response = sender.send_request(request).await.map_err(|e| answer(e.to_string()))?;
            if !response.status().is_success() {
                return Err(answer(format!("HTTP status {}", response.status())));
            }
            let body = Limited::new(response.into_body(), MAX_ANSWER).collect().await;
            let body = body.map_err(|e| answer(e.to_string()))?.to_bytes();
            Ok(String::from_utf8_lossy(&body).trim().to_owned())
        };
        // The connection makes progress only while it is polled, and ends with the exchange.
        tokio::pin!(connection, exchange);
        tokio::select! {
            text = &mut exchange => text,
            _ = &mut connection => exchange.await,
        }
    }
}

impl AgentUrl {
    fn parse(text: &str) -> Option<Self> {
        let (scheme, rest) = text.split_once("://")?;
        let (place, port) = rest.rsplit_once(':')?;
        port.parse::<u32>().ok()?;
        match scheme {
            "vsock" => place.parse().ok().filter(|cid| *cid > 2).map(|cid| Self::Vsock { cid }),
            "hvsock" => Path::new(place).is_absolute().then(|| Self::Hybrid { socket: place.into() }),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::UnixListener;

    #[test]
    fn addresses_of_both_forms_are_read_and_nothing_else() {
        assert_eq!(AgentUrl::parse("vsock://42:1024"), Some(AgentUrl::Vsock { cid: 42 }));
        let hybrid = AgentUrl::Hybrid { socket: "/run/vc/vm/a:b/clh.sock".into() };
        assert_eq!(AgentUrl::parse("hvsock:///run/vc/vm/a:b/clh.sock:1024"), Some(hybrid));
        // CIDs 0 to 2 are the hypervisor, the local loop and the host itself.
        for text in ["", "vsock://2:1024", "vsock://x:1", "hvsock://rel:1", "unix:///x", "vsock://3", "vsock://3:x"] {
            assert_eq!(AgentUrl::parse(text), None, "{text}");
        }
    }

    fn shim(dir: &Path, answer: &'static str) -> Vec<Sandbox> {
        std::fs::create_dir(dir.join("sandbox-1")).unwrap();
        std::fs::create_dir(dir.join("no-shim")).unwrap();
        let listener = UnixListener::bind(dir.join("sandbox-1").join(SOCKET)).unwrap();
        tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = [0; 1024];
            let n = stream.read(&mut request).await.unwrap();
            assert!(request[..n].starts_with(b"GET /agent-url HTTP/1.1\r\n"));
            stream.write_all(answer.as_bytes()).await.unwrap();
            if answer.is_empty() {
                tokio::time::sleep(Duration::from_secs(3600)).await;
            }
        });
        discover(&[dir.to_owned(), dir.join("missing")])
    }

    #[tokio::test]
    async fn a_shim_is_found_and_tells_where_its_guest_is() {
        let dir = tempfile::tempdir().unwrap();
        let found = shim(dir.path(), "HTTP/1.1 200 OK\r\nContent-Length: 18\r\n\r\nvsock://77:1024   ");
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].id, "sandbox-1");
        assert_eq!(found[0].agent_url().await.unwrap(), AgentUrl::Vsock { cid: 77 });
    }

    #[tokio::test]
    async fn a_machine_that_has_no_address_yet_is_no_error_of_its_shim() {
        let dir = tempfile::tempdir().unwrap();
        let found = shim(dir.path(), "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n:1024");
        assert!(matches!(found[0].agent_url().await, Err(SandboxError::NotYet(id)) if id == "sandbox-1"));
    }

    #[tokio::test]
    async fn a_shim_that_is_silent_or_talks_nonsense_does_not_hold_anybody_up() {
        for answer in ["", "HTTP/1.1 500 No\r\nContent-Length: 0\r\n\r\n", "nonsense\r\n\r\n"] {
            let dir = tempfile::tempdir().unwrap();
            let found = shim(dir.path(), answer);
            assert!(found[0].agent_url().await.is_err(), "{answer}");
        }
    }
}
