use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper::{Method, Request};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio::task::JoinHandle;
use tokio::time::Instant;
use zpod_admin::{RollbackQuery, Route, SendQuery, TOKEN_HEADER, canceled};

use super::answer::{Answer, Told, json};
use super::transfer::Transfers;
use super::{Admin, AdminError, Tokens, tls};
use crate::crowd::{Crowd, Member};
use crate::serve::Socket;

/// Connections at the same time that have shown a token, each with a few hundred KiB at most, and those that have not.
const CONNECTIONS: usize = 32;
const UNPROVEN: usize = 32;
/// For the handshake of TLS, and for the head of a request.
const HEAD: Duration = Duration::from_secs(10);
/// A connection on which nothing moves for this long is closed. A guest may be busy for minutes before a stream's first
/// byte and behind its last.
const IDLE: Duration = Duration::from_secs(600);
const LOOK_EVERY: Duration = Duration::from_secs(5);
/// Of a request's head, and of what is read of a stream at once.
const BUFFER: usize = 64 << 10;
const HEADERS: usize = 64;

/// Serves the admin endpoint; ends when dropped.
#[derive(Debug)]
pub struct AdminServer {
    address: Option<SocketAddr>,
    // Removed when dropped.
    _socket: Option<Socket>,
    task: JoinHandle<()>,
}

impl AdminServer {
    /// Serves HTTPS to those who show a token.
    ///
    /// # Errors
    /// When the address can't be had.
    pub async fn https(address: SocketAddr, admin: Arc<Admin>, tokens: Tokens) -> io::Result<Self> {
        let acceptor = tls::acceptor()?;
        let listener = TcpListener::bind(address).await?;
        let address = Some(listener.local_addr()?);
        let service = Arc::new(Service::new(admin, Some(tokens)));
        let crowd = Crowd::new(UNPROVEN, CONNECTIONS);
        let task = tokio::spawn(async move {
            loop {
                let Some((stream, peer)) = accepted(listener.accept().await).await else { continue };
                let member = Arc::new(crowd.enter(peer.ip()));
                let (service, acceptor) = (service.clone(), acceptor.clone());
                tokio::spawn(async move {
                    let connection = async {
                        if let Ok(Ok(stream)) = tokio::time::timeout(HEAD, acceptor.accept(stream)).await {
                            service.connection(stream, Some(member.clone())).await;
                        }
                    };
                    tokio::select! {
                        () = connection => {}
                        () = member.pushed_out() => {}
                    }
                });
            }
        });
        Ok(Self { address, _socket: None, task })
    }

    /// Serves HTTP on a unix socket of mode 0600.
    ///
    /// # Errors
    /// When another process serves it, or something else is at the path.
    pub fn unix(path: &Path, admin: Arc<Admin>) -> io::Result<Self> {
        let mut socket = Socket::bind(path)?;
        let listener = socket.listener().ok_or(io::ErrorKind::NotConnected)?;
        let service = Arc::new(Service::new(admin, None));
        let places = Arc::new(Semaphore::new(CONNECTIONS));
        let task = tokio::spawn(async move {
            loop {
                let Ok(place) = places.clone().acquire_owned().await else { return };
                let Some((stream, _)) = accepted(listener.accept().await).await else { continue };
                let service = service.clone();
                tokio::spawn(async move {
                    let _place = place;
                    service.connection(stream, None).await;
                });
            }
        });
        Ok(Self { address: None, _socket: Some(socket), task })
    }

    /// Where it listens, if that is a port.
    pub fn address(&self) -> Option<SocketAddr> {
        self.address
    }
}

impl Drop for AdminServer {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// What is to be gone back to.
fn back(request: &Request<Incoming>) -> Result<RollbackQuery, AdminError> {
    RollbackQuery::parse(request.uri().query().unwrap_or_default()).map_err(AdminError::Query)
}

async fn accepted<T>(accepted: io::Result<T>) -> Option<T> {
    match accepted {
        Ok(accepted) => Some(accepted),
        Err(error) => {
            tracing::warn!("admin: {error}");
            // Out of file descriptors, most likely: the next moment is no better.
            tokio::time::sleep(Duration::from_secs(1)).await;
            None
        }
    }
}

struct Service {
    admin: Arc<Admin>,
    tokens: Option<Tokens>,
    transfers: Arc<Transfers>,
}

/// When something moved last, in milliseconds since the connection came.
#[derive(Clone)]
struct Pulse(Instant, Arc<AtomicU64>);

impl Pulse {
    fn beat(&self) {
        self.1.store(u64::try_from(self.0.elapsed().as_millis()).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    fn still(&self) -> Duration {
        self.0.elapsed().saturating_sub(Duration::from_millis(self.1.load(Ordering::Relaxed)))
    }
}

impl Service {
    fn new(admin: Arc<Admin>, tokens: Option<Tokens>) -> Self {
        Self { admin, tokens, transfers: Arc::default() }
    }

    async fn connection(
        self: Arc<Self>,
        stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
        member: Option<Arc<Member>>,
    ) {
        let pulse = Pulse(Instant::now(), Arc::default());
        let watched = pulse.clone();
        let service = service_fn(move |request| {
            let (service, pulse, member) = (self.clone(), pulse.clone(), member.clone());
            async move {
                pulse.beat();
                let answer = service.answer(request, &pulse, member.as_deref()).await.unwrap_or_else(|error| {
                    tracing::info!("admin: {error}");
                    error.answer()
                });
                pulse.beat();
                Ok::<_, Infallible>(answer.map(|body| Told(body, move || pulse.beat()).boxed_unsync()))
            }
        });
        let mut server = hyper::server::conn::http1::Builder::new();
        server.timer(TokioTimer::new()).header_read_timeout(HEAD).max_buf_size(BUFFER).max_headers(HEADERS);
        let connection = server.serve_connection(TokioIo::new(stream), service);
        let watch = async {
            while watched.still() < IDLE {
                tokio::time::sleep(LOOK_EVERY).await;
            }
        };
        tokio::select! {
            // Whoever hangs up does so.
            _ = connection => {}
            () = watch => tracing::info!("admin: a connection on which nothing moved for {IDLE:?} is closed"),
        }
    }

    async fn answer(
        &self,
        request: Request<Incoming>,
        pulse: &Pulse,
        member: Option<&Member>,
    ) -> Result<Answer, AdminError> {
        // Which token opens it is said by the path: nothing else is looked at before. No token opens a path that is none.
        let route = Route::parse(request.uri().path());
        if let (Some(tokens), Some(member)) = (&self.tokens, member) {
            let audience = route.map(|route| route.audience(self.admin.volumes.node()));
            let token = request.headers().get(TOKEN_HEADER).map(|token| token.as_bytes());
            tokens.check(member.peer(), token, audience.as_deref()).await?;
            if !member.prove() {
                return Err(AdminError::Full(CONNECTIONS));
            }
        }
        let route = route.ok_or(AdminError::Path)?;
        let allowed = route.method();
        if request.method() != Method::from_bytes(allowed.as_bytes()).unwrap_or_default() {
            return Err(AdminError::Method { route, allowed });
        }
        let admin = &self.admin;
        match route {
            Route::Doctor => Ok(json(&admin.doctor().await)),
            Route::Properties(id) => Ok(json(&admin.properties(id).await?)),
            Route::SendPoints(id) => Ok(json(&admin.send_points(id).await?)),
            Route::RemoveSendPoint(id) => {
                let point = zpod_admin::snapshot(request.uri().query().unwrap_or_default());
                Ok(json(&admin.remove_send_point(id, &point.map_err(AdminError::Query)?).await?))
            }
            Route::Snapshots(id) => Ok(json(&admin.snapshots(id).await?)),
            Route::TakeSnapshot(id) => {
                let name = zpod_admin::new_snapshot_name(request.uri().query().unwrap_or_default());
                Ok(json(&admin.take_snapshot(id, &name.map_err(AdminError::Query)?).await?))
            }
            Route::DestroySnapshot(id) => {
                let name = zpod_admin::snapshot_name(request.uri().query().unwrap_or_default());
                Ok(json(&admin.destroy_snapshot(id, &name.map_err(AdminError::Query)?).await?))
            }
            Route::RollbackPlan(id) => Ok(json(&admin.rollback_plan(id, &back(&request)?).await?)),
            Route::Rollback(id) => Ok(json(&admin.rollback(id, back(&request)?).await?)),
            Route::CancelRollback(id) => {
                let one = canceled(request.uri().query().unwrap_or_default()).map_err(AdminError::Query)?;
                Ok(json(&admin.cancel_rollback(id, one).await?))
            }
            Route::Send(id) => {
                let query = SendQuery::parse(request.uri().query().unwrap_or_default()).map_err(AdminError::Query)?;
                self.transfers.send(admin, id, &query).await
            }
            Route::Receive(id) => {
                let pulse = pulse.clone();
                let body = Told(request.into_body(), move || pulse.beat());
                Ok(json(&self.transfers.receive(admin, id, body).await?))
            }
        }
    }
}
