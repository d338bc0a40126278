use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use prometheus_client::encoding::text::encode;
use prometheus_client::registry::Registry;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;

use crate::crowd::Crowd;

/// Connections at the same time. Whoever may reach the port could else take all memory. Nobody proves anything here, so
/// an address with many makes room for one with few, however far its requests are.
const CONNECTIONS: usize = 16;
/// Answers that are written at the same time.
const WRITERS: usize = 2;
/// How long a client has for the head of a request, and for a connection in all.
const HEAD: Duration = Duration::from_secs(5);
const CONNECTION: Duration = Duration::from_secs(60);
/// OpenMetrics 1.0: every Prometheus since 2.5 reads it.
const FORMAT: HeaderValue = HeaderValue::from_static("application/openmetrics-text; version=1.0.0; charset=utf-8");

/// The endpoint for Prometheus; ends when dropped.
#[derive(Debug)]
pub struct Server {
    address: SocketAddr,
    task: JoinHandle<()>,
}

impl Server {
    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Serves a registry: `GET /metrics`.
///
/// # Errors
/// When the address can't be had.
pub async fn serve(address: SocketAddr, registry: Registry) -> io::Result<Server> {
    let listener = TcpListener::bind(address).await?;
    let address = listener.local_addr()?;
    Ok(Server { address, task: tokio::spawn(accept(listener, Arc::new(registry))) })
}

async fn accept(listener: TcpListener, registry: Arc<Registry>) {
    let crowd = Crowd::new(CONNECTIONS, 0);
    let writers = Arc::new(Semaphore::new(WRITERS));
    loop {
        match listener.accept().await {
            Ok((stream, peer)) => {
                let (registry, writers) = (registry.clone(), writers.clone());
                let member = crowd.enter(peer.ip());
                tokio::spawn(async move {
                    // A client that hangs up is its own affair.
                    let connection = tokio::time::timeout(CONNECTION, connection(stream, registry, writers));
                    tokio::select! {
                        _ = connection => {}
                        () = member.pushed_out() => {}
                    }
                });
            }
            Err(error) => {
                tracing::warn!("metrics: {error}");
                // Out of file descriptors, most likely: the next moment is no better.
                tokio::time::sleep(Duration::from_secs(1)).await;
            }
        }
    }
}

async fn connection(stream: TcpStream, registry: Arc<Registry>, writers: Arc<Semaphore>) -> hyper::Result<()> {
    let service = service_fn(move |request| {
        let (registry, writers) = (registry.clone(), writers.clone());
        async move { Ok::<_, Infallible>(answer(&request, registry, writers).await) }
    });
    let mut server = hyper::server::conn::http1::Builder::new();
    server.timer(TokioTimer::new()).header_read_timeout(HEAD).max_buf_size(16 << 10);
    server.serve_connection(TokioIo::new(stream), service).await
}

async fn answer(
    request: &Request<Incoming>,
    registry: Arc<Registry>,
    writers: Arc<Semaphore>,
) -> Response<Full<Bytes>> {
    let plain = |code, text: &'static str| {
        let mut response = Response::new(Full::from(text));
        *response.status_mut() = code;
        response
    };
    if request.uri().path() != "/metrics" {
        return plain(StatusCode::NOT_FOUND, "there is only /metrics\n");
    }
    if request.method() != Method::GET {
        return plain(StatusCode::METHOD_NOT_ALLOWED, "there is only GET\n");
    }
    // Never closed.
    let writer = writers.acquire_owned().await;
    // Some of it is asked of the file system. It goes on when the client has gone, so its turn goes with it.
    let text = tokio::task::spawn_blocking(move || {
        let _writer = writer;
        let mut text = String::new();
        encode(&mut text, &registry).map(|()| text)
    });
    match text.await {
        Ok(Ok(text)) => {
            let mut response = Response::new(Full::from(text));
            response.headers_mut().insert(CONTENT_TYPE, FORMAT);
            response
        }
        _ => plain(StatusCode::INTERNAL_SERVER_ERROR, "the numbers could not be written down\n"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    async fn get(address: SocketAddr, request: &str) -> String {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(format!("{request}\r\nhost: x\r\nconnection: close\r\n\r\n").as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    #[tokio::test]
    async fn prometheus_gets_the_numbers_and_nobody_gets_anything_else() {
        let server = serve("127.0.0.1:0".parse().unwrap(), super::super::registry()).await.unwrap();
        let answer = get(server.address(), "GET /metrics HTTP/1.1").await;
        assert!(answer.starts_with("HTTP/1.1 200") && answer.contains("zpod_build_info{"), "{answer}");
        assert!(answer.contains("application/openmetrics-text"), "{answer}");
        assert!(get(server.address(), "GET /debug HTTP/1.1").await.starts_with("HTTP/1.1 404"));
        assert!(get(server.address(), "POST /metrics HTTP/1.1").await.starts_with("HTTP/1.1 405"));
    }

    #[tokio::test]
    async fn clients_that_say_nothing_keep_nobody_out_for_long() {
        let server = serve("127.0.0.1:0".parse().unwrap(), Registry::default()).await.unwrap();
        let mut silent = Vec::new();
        for _ in 0..200 {
            silent.push(TcpStream::connect(server.address()).await.unwrap());
        }
        let begun = std::time::Instant::now();
        assert!(get(server.address(), "GET /metrics HTTP/1.1").await.starts_with("HTTP/1.1 200"));
        assert!(begun.elapsed() < 3 * HEAD, "{:?}", begun.elapsed());
    }
}
