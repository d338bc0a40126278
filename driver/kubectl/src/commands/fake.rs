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
    /// Writes are carried out, with this answer to whoever makes an object.
    keeps: Option<StatusCode>,
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

    /// Carries out what is written: changes of the version that is there, ends of what nothing holds, new objects.
    pub(crate) fn keeping(self) -> Self {
        self.making(StatusCode::CREATED);
        self
    }

    /// What whoever makes an object is answered from now on.
    pub(crate) fn making(&self, code: StatusCode) {
        self.0.lock().unwrap().keeps = Some(code);
    }

    /// An object as it is now.
    pub(crate) fn object(&self, path: &str) -> Option<Value> {
        self.0.lock().unwrap().objects.get(path).cloned()
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
            inner.asked.push(Asked {
                method: head.method.clone(),
                path: path.clone(),
                query,
                body: Value::clone(&body),
            });
            if let Some(made) = inner.keeps {
                let (code, answer) = inner.carry_out(&head.method, &path, body, made);
                let mut response = Response::new(Body::from(serde_json::to_vec(&answer).unwrap()));
                *response.status_mut() = code;
                return response;
            }
        }
        let known = known.or_else(|| inner.list(&path));
        let code = if known.is_some() { StatusCode::OK } else { StatusCode::NOT_FOUND };
        let mut response = Response::new(Body::from(serde_json::to_vec(&known.unwrap_or(missing)).unwrap()));
        *response.status_mut() = code;
        response
    }
}

impl Inner {
    /// All that is kept below a path.
    fn list(&self, path: &str) -> Option<Value> {
        self.keeps.filter(|_| path.ends_with('s'))?;
        let below = |found: &&String| found.strip_prefix(path).is_some_and(|rest| rest.starts_with('/'));
        let items: Vec<_> = self.objects.keys().filter(below).map(|found| self.objects[found].clone()).collect();
        Some(json!({"apiVersion": "zpod.storage/v1alpha1", "kind": "List", "metadata": {}, "items": items}))
    }

    fn carry_out(&mut self, method: &Method, path: &str, body: Value, made: StatusCode) -> (StatusCode, Value) {
        let status = |code: StatusCode| {
            let status = json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
                                "message": code.to_string(), "reason": "", "code": code.as_u16()});
            (code, status)
        };
        if *method == Method::POST {
            let path = format!("{path}/{}", body["metadata"]["name"].as_str().unwrap());
            if made != StatusCode::CREATED {
                return status(made);
            }
            if self.objects.contains_key(&path) {
                return status(StatusCode::CONFLICT);
            }
            self.objects.insert(path, body.clone());
            return (made, body);
        }
        let Some(object) = self.objects.get_mut(path) else { return status(StatusCode::NOT_FOUND) };
        if body["metadata"]["resourceVersion"] != object["metadata"]["resourceVersion"] {
            return status(StatusCode::CONFLICT);
        }
        object["metadata"]["finalizers"] = body["metadata"]["finalizers"].clone();
        let (object, held) =
            (object.clone(), object["metadata"]["finalizers"].as_array().is_some_and(|all| !all.is_empty()));
        if !held && !object["metadata"]["deletionTimestamp"].is_null() {
            self.objects.remove(path);
        }
        (StatusCode::OK, object)
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
