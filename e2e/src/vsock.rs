//! Hybrid vsock: a guest's ports behind one unix socket.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::UnixStream;
use tokio::time::timeout;

/// Connects to a port of the guest: `CONNECT <port>`, answered by `OK <port>`.
///
/// # Errors
/// When nobody listens there yet.
pub async fn connect(socket: &Path, port: u32, deadline: Duration) -> Result<UnixStream> {
    timeout(deadline, dial(socket, port)).await.with_context(|| format!("vsock port {port}: no answer"))?
}

async fn dial(socket: &Path, port: u32) -> Result<UnixStream> {
    let mut stream = UnixStream::connect(socket).await.context("connect to the vsock device")?;
    stream.write_all(format!("CONNECT {port}\n").as_bytes()).await?;
    let mut answer = Vec::new();
    // Byte by byte: what follows the line is the peer's.
    while answer.last() != Some(&b'\n') {
        if answer.len() > 32 {
            bail!("vsock port {port}: answer is too long");
        }
        answer.push(stream.read_u8().await.with_context(|| format!("vsock port {port}: refused"))?);
    }
    if !answer.starts_with(b"OK ") {
        bail!("vsock port {port}: {}", String::from_utf8_lossy(&answer).trim());
    }
    Ok(stream)
}
