//! The admin endpoint of a node, seen from here.

mod line;

use std::time::Duration;

use futures_util::TryFutureExt as _;
use http_body_util::{BodyExt as _, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::{Request, Response, StatusCode};
use serde::de::DeserializeOwned;
use uuid::Uuid;
use zpod_admin::{
    Check, ESTIMATE_HEADER, Failed, NewSnapshotName, PoolSnapshots, Properties, Received, Removed, RollbackPlan,
    RollbackQuery, RollbackRequested, Route, STREAM_TYPE, SendName, SendPoints, SendQuery, SnapshotName, Taken,
};
use zpod_volume::VolumeId;

use crate::{Failure, Kind};
pub(crate) use line::{Line, Out};

/// Answers but streams are small.
const MAX_ANSWER: usize = 4 << 20;
const DEADLINE: Duration = Duration::from_secs(45);
/// A guest takes the snapshot and estimates its size before the first byte.
const BEGIN: Duration = Duration::from_secs(180);

/// The admin endpoint of a node.
pub(crate) struct Admin {
    line: Line,
}

/// Why it did not answer with what it was asked for.
#[derive(Debug)]
pub(crate) enum Trouble {
    /// No guest can be asked, now: 409 or 503.
    NotNow(Failure),
    /// Anything else.
    Other(Failure),
}

impl From<Trouble> for Failure {
    fn from(trouble: Trouble) -> Self {
        match trouble {
            Trouble::NotNow(failure) | Trouble::Other(failure) => failure,
        }
    }
}

impl Admin {
    pub(crate) fn new(line: Line) -> Self {
        Self { line }
    }

    pub(crate) async fn doctor(&self) -> Result<Vec<Check>, Failure> {
        Ok(self.get(Route::Doctor).await?)
    }

    pub(crate) async fn properties(&self, id: VolumeId) -> Result<Properties, Failure> {
        Ok(self.get(Route::Properties(id)).await?)
    }

    pub(crate) async fn send_points(&self, id: VolumeId) -> Result<SendPoints, Trouble> {
        self.get(Route::SendPoints(id)).await
    }

    /// Destroys a send point.
    pub(crate) async fn remove_send_point(&self, id: VolumeId, point: &SendName) -> Result<Removed, Failure> {
        self.ask(Route::RemoveSendPoint(id), &format!("snapshot={point}")).await
    }

    pub(crate) async fn snapshots(&self, id: VolumeId) -> Result<PoolSnapshots, Trouble> {
        self.get(Route::Snapshots(id)).await
    }

    /// Takes a snapshot in the pool.
    pub(crate) async fn take_snapshot(&self, id: VolumeId, name: &NewSnapshotName) -> Result<Taken, Failure> {
        self.ask(Route::TakeSnapshot(id), &format!("snapshot={name}")).await
    }

    /// Destroys one.
    pub(crate) async fn destroy_snapshot(&self, id: VolumeId, name: &SnapshotName) -> Result<Removed, Failure> {
        self.ask(Route::DestroySnapshot(id), &format!("snapshot={name}")).await
    }

    /// What going back to a snapshot would take.
    pub(crate) async fn rollback_plan(&self, id: VolumeId, query: &RollbackQuery) -> Result<RollbackPlan, Failure> {
        self.ask(Route::RollbackPlan(id), &query.to_string()).await
    }

    /// Asks for it. With a failure comes whether it was refused: otherwise it may be recorded all the same.
    pub(crate) async fn rollback(
        &self,
        id: VolumeId,
        query: &RollbackQuery,
    ) -> Result<RollbackRequested, (Failure, bool)> {
        let route = Route::Rollback(id);
        let request = request(route, Some(&query.to_string()), line::nothing()).map_err(|failure| (failure, true))?;
        let answer = within(BEGIN, self.line.ask(route, request).map_err(Trouble::Other)).await;
        let answer = answer.map_err(|trouble| (trouble.into(), false))?;
        let refused = answer.status().is_client_error();
        let answer = good(answer).await.map_err(|trouble| (trouble.into(), refused))?;
        read(answer).await.map_err(|failure| (failure, false))
    }

    /// Takes it back, or one request alone.
    pub(crate) async fn cancel_rollback(&self, id: VolumeId, one: Option<Uuid>) -> Result<RollbackRequested, Failure> {
        let query = one.map(|one| format!("id={one}")).unwrap_or_default();
        self.ask(Route::CancelRollback(id), &query).await
    }

    /// Begins to send: the stream, and how long it will be by ZFS's estimate.
    pub(crate) async fn send(&self, id: VolumeId, query: &SendQuery) -> Result<(Incoming, Option<u64>), Failure> {
        let request = request(Route::Send(id), Some(&query.to_string()), line::nothing())?;
        let answer = within(BEGIN, self.line.ask(Route::Send(id), request).map_err(Trouble::Other)).await?;
        let answer = good(answer).await?;
        let estimate = answer.headers().get(ESTIMATE_HEADER).and_then(|value| value.to_str().ok()?.parse().ok());
        Ok((answer.into_body(), estimate))
    }

    /// Has a stream received. It takes as long as it takes.
    pub(crate) async fn receive(&self, id: VolumeId, stream: Out) -> Result<Received, Failure> {
        let mut request = request(Route::Receive(id), None, stream)?;
        request.headers_mut().insert(hyper::header::CONTENT_TYPE, hyper::header::HeaderValue::from_static(STREAM_TYPE));
        let answer = self.line.ask(Route::Receive(id), request).await?;
        read(good(answer).await?).await
    }

    async fn ask<T: DeserializeOwned>(&self, route: Route, query: &str) -> Result<T, Failure> {
        let request = request(route, Some(query), line::nothing())?;
        let answer = within(BEGIN, self.line.ask(route, request).map_err(Trouble::Other)).await?;
        read(good(answer).await?).await
    }

    async fn get<T: DeserializeOwned>(&self, route: Route) -> Result<T, Trouble> {
        let request = request(route, None, line::nothing()).map_err(Trouble::Other)?;
        let answer = async {
            let answer = self.line.ask(route, request).await.map_err(Trouble::Other)?;
            read(good(answer).await?).await.map_err(Trouble::Other)
        };
        within(DEADLINE, answer).await
    }
}

fn request(route: Route, query: Option<&str>, body: Out) -> Result<Request<Out>, Failure> {
    let query = query.map(|query| format!("?{query}")).unwrap_or_default();
    let request = Request::builder().method(route.method()).uri(format!("{route}{query}")).body(body);
    request.map_err(|error| Failure::failed(format!("no request: {error}"), ""))
}

async fn within<T>(deadline: Duration, answer: impl Future<Output = Result<T, Trouble>>) -> Result<T, Trouble> {
    let remedy = "see the log of zpod-node, and whether its pod is ready";
    let late =
        |_| Trouble::Other(Failure::timed_out(format!("the admin endpoint has not answered in {deadline:?}"), remedy));
    tokio::time::timeout(deadline, answer).await.unwrap_or_else(|elapsed| Err(late(elapsed)))
}

/// The answer, if it is one.
async fn good(answer: Response<Incoming>) -> Result<Response<Incoming>, Trouble> {
    let code = answer.status();
    if code == StatusCode::OK {
        return Ok(answer);
    }
    let body = bounded(answer).await.map_err(Trouble::Other)?;
    let failure = refused(code, &body);
    match code {
        StatusCode::CONFLICT | StatusCode::SERVICE_UNAVAILABLE | StatusCode::BAD_GATEWAY => {
            Err(Trouble::NotNow(failure))
        }
        _ => Err(Trouble::Other(failure)),
    }
}

async fn read<T: DeserializeOwned>(answer: Response<Incoming>) -> Result<T, Failure> {
    let body = bounded(answer).await?;
    serde_json::from_slice(&body).map_err(|error| {
        let what = format!("the admin endpoint's answer is not what was expected: {error}");
        Failure::failed(what, "kubectl-zpod and zpod-node may be of different versions: use the same")
    })
}

async fn bounded(answer: Response<Incoming>) -> Result<Bytes, Failure> {
    let body = Limited::new(answer.into_body(), MAX_ANSWER).collect().await;
    body.map(http_body_util::Collected::to_bytes)
        .map_err(|error| Failure::failed(format!("the admin endpoint's answer broke off: {error}"), "try again"))
}

/// What a refusal says: zpod-node's own words, or the API server's.
fn refused(code: StatusCode, body: &[u8]) -> Failure {
    let kind = if code == StatusCode::NOT_FOUND { Kind::NotFound } else { Kind::Failed };
    if let Ok(Failed { error }) = serde_json::from_slice(body) {
        return Failure::new(kind, error, "");
    }
    let text = match serde_json::from_slice::<kube::core::Status>(body) {
        Ok(status) if !status.message.is_empty() => status.message,
        _ => String::from_utf8_lossy(body).chars().take(300).collect(),
    };
    let remedy = match code.as_u16() {
        401 | 403 => "your account needs pods/proxy in zpod's namespace: docs/kubectl-zpod.md has the rules",
        502..=504 => "see whether zpod-node's pod is ready and was started with --admin-address 0.0.0.0:9812",
        _ => "",
    };
    Failure::new(kind, format!("the way to zpod-node: {code}: {}", text.trim()), remedy)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zpod_nodes_words_are_passed_on_and_the_api_servers_are_told_apart() {
        let ours = refused(StatusCode::CONFLICT, br#"{"error":"volume x is used by no pod"}"#);
        assert_eq!(ours.to_string(), "error: volume x is used by no pod\n");
        let theirs =
            refused(StatusCode::FORBIDDEN, br#"{"kind":"Status","status":"Failure","message":"no","code":403}"#);
        assert!(theirs.to_string().contains("403 Forbidden: no"), "{theirs}");
        assert!(theirs.to_string().contains("pods/proxy"), "{theirs}");
        let proxy = refused(StatusCode::BAD_GATEWAY, b"error trying to reach service: dial tcp: refused");
        assert!(proxy.to_string().contains("--admin-address"), "{proxy}");
    }
}
