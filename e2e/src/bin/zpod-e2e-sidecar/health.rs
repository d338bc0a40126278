//! `GET /healthz`.

use std::convert::Infallible;

use anyhow::{Context as _, Result};
use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::net::TcpListener;

/// Serves what `check` says, forever.
pub(crate) async fn serve(address: &str, check: impl AsyncFn() -> Result<()>) -> Result<()> {
    let listener = TcpListener::bind(address).await.with_context(|| format!("listen on {address}"))?;
    eprintln!("/healthz is served on {address}");
    loop {
        let (stream, _) = listener.accept().await.context("accept a connection")?;
        let service = service_fn(async |request| Ok::<_, Infallible>(answer(&request, &check).await));
        // One after another: kubelet's probes are all that comes. Close after each, so that none holds the next up.
        let connection = http1::Builder::new().keep_alive(false).serve_connection(TokioIo::new(stream), service);
        if let Err(error) = connection.await {
            eprintln!("a health check broke off: {error}");
        }
    }
}

async fn answer(request: &Request<Incoming>, check: &impl AsyncFn() -> Result<()>) -> Response<Full<Bytes>> {
    let (status, text) = if request.uri().path() == "/healthz" {
        match check().await {
            Ok(()) => (StatusCode::OK, "ok".to_owned()),
            Err(error) => {
                eprintln!("health check failed: {error:#}");
                (StatusCode::INTERNAL_SERVER_ERROR, format!("{error:#}"))
            }
        }
    } else {
        (StatusCode::NOT_FOUND, "only /healthz is here".to_owned())
    };
    let mut response = Response::new(Full::from(text));
    *response.status_mut() = status;
    response
}
