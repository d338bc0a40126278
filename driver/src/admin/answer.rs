use std::pin::Pin;
use std::task::{Context, Poll};

use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, Full};
use hyper::body::{Body, Bytes, Frame};
use hyper::header::{ALLOW, CONTENT_TYPE, HeaderName, HeaderValue};
use hyper::{Response, StatusCode};
use serde::Serialize;
use zpod_admin::{ESTIMATE_HEADER, Failed, Route, STREAM_TYPE};
use zpod_volume::VolumeId;

use super::tokens::Refused;
use crate::guest::GuestError;
use crate::volumes::VolumeError;

/// The body of an answer: whole, or a stream that may break.
pub(super) type Answer = Response<UnsyncBoxBody<Bytes, GuestError>>;

/// Why something was not done.
#[derive(Debug, thiserror::Error)]
pub enum AdminError {
    /// There is no such path.
    #[error(
        "there is no such path; those of v1: /v1/doctor, /v1/volumes/<id>/{{properties,snapshots,take-snapshot,destroy-snapshot,rollback-plan,rollback,cancel-rollback,send-points,remove-send-point,send,receive}}"
    )]
    Path,
    /// The path is asked with another method.
    #[error("{route} is asked with {allowed}")]
    Method {
        /// What was asked for.
        route: Route,
        /// How it has to be.
        allowed: &'static str,
    },
    /// The query makes no sense.
    #[error("query: {0}")]
    Query(String),
    /// Whoever asks may not, or that is not known now.
    #[error(transparent)]
    Refused(#[from] Refused),
    /// No guest runs it.
    #[error("volume {id} is used by no pod on node {node}, and only a running guest can open its pool; start its pod")]
    NotRunning {
        /// The volume.
        id: VolumeId,
        /// The node.
        node: String,
    },
    /// The pod that has it can't be heard.
    #[error(
        "volume {id} is published on node {node}, and its guest is not heard: it may still be starting; try again, and see \
         what `kubectl zpod doctor {node}` says if this goes on"
    )]
    Silent {
        /// The volume.
        id: VolumeId,
        /// The node.
        node: String,
    },
    /// Another transfer of this volume goes on.
    #[error("volume {0} is being sent or received already; wait for the end of that, or end it")]
    Busy(VolumeId),
    /// There are as many connections with a token as there may be.
    #[error("{0} connections with a token are open already; wait for the end of one of those transfers")]
    Full(usize),
    /// The body of the request broke off.
    #[error(
        "the stream broke off after {bytes} bytes: {reason}; what was received is kept, \
         `kubectl zpod receive --token` has the token to go on with"
    )]
    Broken {
        /// What had been read.
        bytes: u64,
        /// Why.
        reason: String,
    },
    /// The volume is not there.
    #[error(transparent)]
    Volume(#[from] VolumeError),
    /// The guest did not do what it was asked.
    #[error(transparent)]
    Guest(#[from] GuestError),
}

impl AdminError {
    fn code(&self) -> StatusCode {
        match self {
            Self::Path | Self::Volume(VolumeError::NotFound { .. }) => StatusCode::NOT_FOUND,
            Self::Method { .. } => StatusCode::METHOD_NOT_ALLOWED,
            Self::Query(_) | Self::Broken { .. } => StatusCode::BAD_REQUEST,
            Self::Refused(Refused::Missing | Refused::Denied) => StatusCode::UNAUTHORIZED,
            // Not known, or not now: whoever has asked for something can't take it for refused.
            Self::Volume(VolumeError::Catalog(_) | VolumeError::CutShort(_)) => StatusCode::SERVICE_UNAVAILABLE,
            Self::NotRunning { .. } | Self::Busy(_) | Self::Volume(_) => StatusCode::CONFLICT,
            Self::Refused(Refused::Unknown(_)) | Self::Silent { .. } | Self::Full(_) => StatusCode::SERVICE_UNAVAILABLE,
            Self::Guest(GuestError::Timeout { .. }) => StatusCode::GATEWAY_TIMEOUT,
            Self::Guest(GuestError::Unreachable { .. }) => StatusCode::BAD_GATEWAY,
            Self::Guest(_) => StatusCode::UNPROCESSABLE_ENTITY,
        }
    }

    pub(super) fn answer(&self) -> Answer {
        let mut answer = json(&Failed { error: self.to_string() });
        *answer.status_mut() = self.code();
        if let Self::Method { allowed, .. } = self {
            answer.headers_mut().insert(ALLOW, HeaderValue::from_static(allowed));
        }
        answer
    }
}

/// What was found, as JSON.
pub(super) fn json<T: Serialize>(found: &T) -> Answer {
    // Maps and lists of texts and numbers: that does not fail.
    let text = serde_json::to_vec(found).unwrap_or_default();
    let mut answer = Response::new(Full::from(text).map_err(|never| match never {}).boxed_unsync());
    answer.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    answer
}

/// A stream.
pub(super) fn stream(body: impl Body<Data = Bytes, Error = GuestError> + Send + 'static, estimated: u64) -> Answer {
    let mut answer = Response::new(body.boxed_unsync());
    answer.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(STREAM_TYPE));
    if estimated > 0 {
        answer.headers_mut().insert(HeaderName::from_static(ESTIMATE_HEADER), estimated.into());
    }
    answer
}

/// A body that tells somebody of each part of it that passes.
pub(super) struct Told<B, F>(pub(super) B, pub(super) F);

impl<B: Body + Unpin, F: Fn() + Unpin> Body for Told<B, F> {
    type Data = B::Data;
    type Error = B::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<B::Data>, B::Error>>> {
        let frame = Pin::new(&mut self.0).poll_frame(context);
        if frame.is_ready() {
            (self.1)();
        }
        frame
    }

    fn is_end_stream(&self) -> bool {
        self.0.is_end_stream()
    }

    fn size_hint(&self) -> hyper::body::SizeHint {
        self.0.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_error_has_its_code() {
        let id = VolumeId::from_name("a");
        let node = || "n1".to_owned();
        let guest = |error| AdminError::Guest(error);
        let table = [
            (AdminError::Path, 404),
            (AdminError::Method { route: Route::Doctor, allowed: "GET" }, 405),
            (AdminError::Query("x".into()), 400),
            (AdminError::Refused(Refused::Missing), 401),
            (AdminError::Refused(Refused::Denied), 401),
            (AdminError::Refused(Refused::Unknown("away".into())), 503),
            (AdminError::NotRunning { id, node: node() }, 409),
            (AdminError::Silent { id, node: node() }, 503),
            (AdminError::Busy(id), 409),
            (AdminError::Full(32), 503),
            (AdminError::Volume(VolumeError::NotFound { id: "x".into(), node: node() }), 404),
            (guest(GuestError::Unreachable { sandbox: "s".into(), reason: "gone".into() }), 502),
            (guest(GuestError::Refused { sandbox: "s".into(), call: "Send", message: "no".into() }), 422),
        ];
        for (error, code) in table {
            assert_eq!(error.answer().status().as_u16(), code, "{error}");
        }
    }
}
