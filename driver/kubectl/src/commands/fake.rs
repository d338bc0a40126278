//! An API server of a few objects.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::{Arc, Mutex};

use http_body_util::BodyExt as _;
use hyper::{Method, Request, Response, StatusCode};
use kube::Client;
use kube::client::Body;
use serde_json::{Value, json};
use tower::service_fn;
use zpod_volume::VolumeId;

use crate::cluster::Cluster;

/// What it answers, and what it was asked.
#[derive(Debug, Clone, Default)]
pub(crate) struct Answers(Arc<Mutex<Inner>>);

#[derive(Debug, Default)]
struct Inner {
    objects: BTreeMap<String, Value>,
    asked: Vec<Asked>,
}

/// A request that changes something.
#[derive(Debug, Clone)]
pub(crate) struct Asked {
    pub(crate) method: Method,
    pub(crate) path: String,
    pub(crate) query: String,
    pub(crate) body: Value,
}

impl Answers {
    pub(crate) fn with(self, path: &str, object: Value) -> Self {
        self.0.lock().unwrap().objects.insert(path.into(), object);
        self
    }

    /// What was written since the last time.
    pub(crate) fn writes(&self) -> Vec<Asked> {
        std::mem::take(&mut self.0.lock().unwrap().asked)
    }

    pub(crate) fn cluster(&self) -> Cluster {
        let answers = self.clone();
        let service = service_fn(move |request: Request<Body>| {
            let answers = answers.clone();
            async move {
                let (head, body) = request.into_parts();
                let body = body.collect().await.unwrap().to_bytes();
                Ok::<_, Infallible>(answers.answer(&head, &body))
            }
        });
        let client = Client::new(service, "default");
        Cluster { client, config: None, proxy: None, namespace: "prod".into(), zpod_namespace: "zpod-system".into() }
    }

    fn answer(&self, head: &hyper::http::request::Parts, body: &[u8]) -> Response<Body> {
        let mut inner = self.0.lock().unwrap();
        let path = head.uri.path().to_owned();
        let missing = json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
                             "message": "not found", "reason": "NotFound", "code": 404});
        let known = inner.objects.get(&path).cloned();
        if head.method != Method::GET {
            let body = serde_json::from_slice(body).unwrap_or_default();
            let query = head.uri.query().unwrap_or_default().to_owned();
            inner.asked.push(Asked { method: head.method.clone(), path, query, body });
        }
        let code = if known.is_some() { StatusCode::OK } else { StatusCode::NOT_FOUND };
        let mut response = Response::new(Body::from(serde_json::to_vec(&known.unwrap_or(missing)).unwrap()));
        *response.status_mut() = code;
        response
    }
}

/// The id of a volume, always the same, and its object.
pub(crate) fn volume(claim: &str, status: Value) -> (String, Value) {
    let id = VolumeId::from_name("pvc-1").to_string();
    let object = json!({
        "apiVersion": "zpod.storage/v1alpha1", "kind": "ZfsVolume", "metadata": {"name": id},
        "spec": {
            "volumeName": "pvc-1", "nodeName": "n1", "capacity": "10Gi",
            "parameters": {"backing": "file", "provisioning": "thin", "headroom": "8x", "quota": "refquota"},
            "claim": {"namespace": "prod", "name": claim},
        },
        "status": status,
    });
    (id, object)
}

/// Where it is.
pub(crate) fn path(id: &str) -> String {
    format!("/apis/zpod.storage/v1alpha1/zfsvolumes/{id}")
}

/// A claim, and the PersistentVolume that is bound to it, of [`volume`].
pub(crate) fn bound(claim: &str, mode: &str) -> (Value, Value) {
    let id = VolumeId::from_name("pvc-1").to_string();
    let owned = json!({"metadata": {"name": claim, "namespace": "prod", "uid": "uid-1"},
                       "spec": {"volumeName": "pv", "volumeMode": mode}, "status": {"phase": "Bound"}});
    let persistent = json!({"metadata": {"name": "pv"}, "spec": {
        "csi": {"driver": "csi.zpod.storage", "volumeHandle": id},
        "claimRef": {"namespace": "prod", "name": claim, "uid": "uid-1"}}});
    (owned, persistent)
}
