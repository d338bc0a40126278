//! The shim's management socket: `GET /agent-url` over HTTP/1.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{UnixListener, UnixStream};
use tokio::task::JoinHandle;

/// Serves `<run dir>/<sandbox>/shim-monitor.sock` until it is dropped.
#[derive(Debug)]
pub struct Monitor {
    dir: PathBuf,
    task: JoinHandle<()>,
}

impl Monitor {
    /// Starts serving; every guest behind `vsock` is announced as Kata announces hybrid vsock.
    ///
    /// # Errors
    /// When the socket can't be made.
    pub fn serve(run_dir: &Path, sandbox: &str, vsock: &Path) -> Result<Self> {
        Self::serve_text(run_dir, sandbox, format!("hvsock://{}:1024", vsock.display()))
    }

    /// The same, with any text in the place of the agent's URL.
    ///
    /// # Errors
    /// When the socket can't be made.
    pub fn serve_text(run_dir: &Path, sandbox: &str, url: String) -> Result<Self> {
        let dir = run_dir.join(sandbox);
        fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
        let socket = dir.join("shim-monitor.sock");
        let listener = UnixListener::bind(&socket).with_context(|| format!("listen on {}", socket.display()))?;
        let task = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let url = url.clone();
                // A client that goes away is its own business.
                tokio::spawn(async move { answer(stream, &url).await });
            }
        });
        Ok(Self { dir, task })
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        self.task.abort();
        let _ = fs::remove_dir_all(&self.dir);
    }
}

async fn answer(mut stream: UnixStream, url: &str) -> std::io::Result<()> {
    let mut request = Vec::new();
    while !request.ends_with(b"\r\n\r\n") && request.len() < 8192 {
        request.push(stream.read_u8().await?);
    }
    let (status, body) =
        if request.starts_with(b"GET /agent-url ") { ("200 OK", url) } else { ("404 Not Found", "not found") };
    let length = body.len();
    let head = format!("HTTP/1.1 {status}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n");
    stream.write_all(format!("{head}{body}").as_bytes()).await
}
