//! An API server of a few objects, for tests.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::{Arc, Mutex};

use http_body_util::BodyExt as _;
use hyper::{Method, Request, Response, StatusCode};
use kube::Client;
use kube::client::Body;
use serde_json::{Value, json};
use tower::service_fn;
use zpod_storage::catalog::{Phase, Volume};
use zpod_volume::{Bytes, VolumeParameters};

use crate::volumes::{CLAIM_NAME, CLAIM_NAMESPACE};

/// What it answers, and what it was asked.
#[derive(Debug, Clone, Default)]
pub(super) struct Answers(Arc<Mutex<Inner>>);

#[derive(Debug, Default)]
struct Inner {
    objects: BTreeMap<String, Value>,
    failing: bool,
    conflicts: usize,
    asked: Vec<Asked>,
}

/// A request that changes something.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Asked {
    pub(super) method: Method,
    pub(super) path: String,
    pub(super) query: String,
    pub(super) body: Value,
}

impl Answers {
    pub(super) fn with(self, path: &str, object: Value) -> Self {
        self.0.lock().unwrap().objects.insert(path.into(), object);
        self
    }

    pub(super) fn failing(self) -> Self {
        self.fail(true);
        self
    }

    pub(super) fn fail(&self, failing: bool) {
        self.0.lock().unwrap().failing = failing;
    }

    /// So many changes are refused, because somebody else was first.
    pub(super) fn conflict(&self, times: usize) {
        self.0.lock().unwrap().conflicts = times;
    }

    /// What was written since the last time.
    pub(super) fn writes(&self) -> Vec<Asked> {
        std::mem::take(&mut self.0.lock().unwrap().asked)
    }

    pub(super) fn client(&self) -> Client {
        let answers = self.clone();
        let service = service_fn(move |request: Request<Body>| {
            let answers = answers.clone();
            async move {
                let (head, body) = request.into_parts();
                if head.uri.query().is_some_and(|query| query.contains("watch=true")) {
                    // Nothing ever changes but by being asked for.
                    std::future::pending::<()>().await;
                }
                let body = body.collect().await.unwrap().to_bytes();
                Ok::<_, Infallible>(answers.answer(&head, &body))
            }
        });
        Client::new(service, "default")
    }

    fn answer(&self, head: &hyper::http::request::Parts, body: &[u8]) -> Response<Body> {
        let mut inner = self.0.lock().unwrap();
        let path = head.uri.path().to_owned();
        let (code, answer) = if inner.failing {
            (StatusCode::SERVICE_UNAVAILABLE, status(503, "away"))
        } else if head.method == Method::GET {
            match inner.objects.get(&path) {
                Some(object) => (StatusCode::OK, object.clone()),
                None => (StatusCode::NOT_FOUND, status(404, "NotFound")),
            }
        } else {
            let body: Value = serde_json::from_slice(body).unwrap();
            let query = head.uri.query().unwrap_or_default().to_owned();
            let known = match head.method {
                Method::POST => Some(body.clone()),
                _ => inner.objects.get(path.trim_end_matches("/status")).cloned(),
            };
            inner.asked.push(Asked { method: head.method.clone(), path, query, body });
            let conflict = inner.conflicts > 0;
            inner.conflicts = inner.conflicts.saturating_sub(1);
            let known = known.map(|object| (StatusCode::OK, object));
            let known = if conflict { Some((StatusCode::CONFLICT, status(409, "Conflict"))) } else { known };
            known.unwrap_or_else(|| (StatusCode::NOT_FOUND, status(404, "NotFound")))
        };
        let mut response = Response::new(Body::from(serde_json::to_vec(&answer).unwrap()));
        *response.status_mut() = code;
        response
    }
}

fn status(code: u16, reason: &str) -> Value {
    json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure", "message": reason,
           "reason": reason, "code": code})
}

/// A volume of a claim in namespace `prod`.
pub(super) fn volume(claim: &str) -> Volume {
    Volume {
        phase: Phase::Ready,
        table_capacity: Bytes::gib(1),
        labels: [(CLAIM_NAME, claim), (CLAIM_NAMESPACE, "prod")].map(|(k, v)| (k.into(), v.into())).into(),
        revision: 1,
        ..Volume::wanted(claim, Bytes::gib(1), VolumeParameters::default(), "n1")
    }
}
