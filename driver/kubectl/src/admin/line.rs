use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, Empty};
use hyper::body::{Bytes, Incoming};
use hyper::header::{HOST, HeaderValue};
use hyper::{Request, Response, Uri};
use hyper_util::rt::TokioIo;
use k8s_openapi::api::authentication::v1::{TokenRequest, TokenRequestSpec};
use k8s_openapi::api::core::v1::{Pod, ServiceAccount};
use kube::Api;
use kube::api::{ListParams, PostParams};
use tokio::sync::Mutex;
use tokio::time::Instant;
use tower::util::BoxCloneSyncService;
use tower::{BoxError, ServiceExt as _};
use zpod_admin::{PORT, Route, SERVICE_ACCOUNT, TOKEN_HEADER};

use crate::Failure;
use crate::cluster::Cluster;
use crate::failure::with_causes;
use crate::proxy;

/// The body of a request.
pub(crate) type Out = UnsyncBoxBody<Bytes, std::io::Error>;

/// How long a token is good: it is shown when a transfer begins, and that is all.
const TOKEN_SECONDS: i64 = 600;
/// How long it is shown again for the same call: a guest that starts is asked every second.
const SHOWN_FOR: Duration = Duration::from_secs(300);
/// What the pods of zpod-node have.
const SELECTOR: &str = "app.kubernetes.io/name=zpod-node";

pub(crate) fn nothing() -> Out {
    Empty::new().map_err(|never| match never {}).boxed_unsync()
}

/// The way to an admin endpoint.
pub(crate) enum Line {
    /// Through the API server's proxy to a pod.
    Pod { path: String, tokens: Box<Tokens>, server: BoxCloneSyncService<Request<Out>, Response<Incoming>, BoxError> },
    /// A socket on this machine.
    Unix(PathBuf),
}

impl Line {
    /// To the pod of zpod-node on a node.
    pub(crate) async fn to_node(cluster: &Cluster, node: &str) -> Result<Self, Failure> {
        let pod = pod_of(cluster, node).await?;
        let namespace = &cluster.zpod_namespace;
        let Some(config) = &cluster.config else { return Err(Failure::failed("there is no cluster", "")) };
        Ok(Self::Pod {
            path: format!("/api/v1/namespaces/{namespace}/pods/https:{pod}:{PORT}/proxy"),
            tokens: Box::new(Tokens { cluster: cluster.clone(), node: node.to_owned(), made: Mutex::default() }),
            // kube's own client takes whole bodies only, and these stream.
            server: proxy::api_server(config, cluster.proxy.as_ref()).map_err(|error| {
                let what = format!("the kubeconfig can't be used: {}", with_causes(&error));
                Failure::failed(what, "see `kubectl config view`")
            })?,
        })
    }

    /// The same socket once more.
    pub(crate) fn socket(&self) -> Option<Self> {
        match self {
            Self::Unix(path) => Some(Self::Unix(path.clone())),
            Self::Pod { .. } => None,
        }
    }

    /// Asks, and gives the answer as soon as its head is there. The request is one of that route.
    pub(crate) async fn ask(&self, route: Route, mut request: Request<Out>) -> Result<Response<Incoming>, Failure> {
        match self {
            Self::Pod { path, tokens, server } => {
                let uri = format!("{path}{}", request.uri());
                *request.uri_mut() =
                    uri.parse::<Uri>().map_err(|error| Failure::failed(format!("{uri}: {error}"), ""))?;
                request.headers_mut().insert(TOKEN_HEADER, tokens.of(route).await?);
                let answer = server.clone().oneshot(request).await;
                answer.map_err(|error| {
                    let what = format!("the API server: {}", with_causes(error.as_ref()));
                    Failure::failed(what, "try again; see whether `kubectl version` reaches the API server")
                })
            }
            Self::Unix(socket) => unix(socket, request).await,
        }
    }
}

async fn unix(socket: &Path, mut request: Request<Out>) -> Result<Response<Incoming>, Failure> {
    let failed = |error: &dyn std::error::Error| {
        let remedy = "only root can open it; see whether zpod runs with that --admin-endpoint";
        Failure::failed(format!("{}: {}", socket.display(), with_causes(error)), remedy)
    };
    let stream = tokio::net::UnixStream::connect(socket).await.map_err(|error| failed(&error))?;
    request.headers_mut().insert(HOST, HeaderValue::from_static("zpod"));
    let handshake = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await;
    let (mut sender, connection) = handshake.map_err(|error| failed(&error))?;
    tokio::spawn(connection);
    sender.send_request(request).await.map_err(|error| failed(&error))
}

async fn pod_of(cluster: &Cluster, node: &str) -> Result<String, Failure> {
    let namespace = &cluster.zpod_namespace;
    let pods: Api<Pod> = Api::namespaced(cluster.client.clone(), namespace);
    let which = ListParams::default().labels(SELECTOR).fields(&format!("spec.nodeName={node}"));
    let found = pods.list(&which).await.map_err(|error| Failure::api("the pods of zpod-node", &error))?;
    let running = found.items.iter().find(|pod| {
        let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
        phase == Some("Running") && pod.metadata.deletion_timestamp.is_none()
    });
    running.and_then(|pod| pod.metadata.name.clone()).ok_or_else(|| {
        Failure::not_found(
            format!("no pod of zpod-node runs on node {node} in namespace {namespace}"),
            format!(
                "--zpod-namespace says where zpod is; `kubectl -n {namespace} get pods -o wide -l {SELECTOR}` lists its pods"
            ),
        )
    })
}

/// Tokens for a node, each for one call of one volume: a node that is shown one can't use it for anything else, and not
/// on any other node.
pub(crate) struct Tokens {
    cluster: Cluster,
    node: String,
    made: Mutex<HashMap<String, (Instant, HeaderValue)>>,
}

impl Tokens {
    async fn of(&self, route: Route) -> Result<HeaderValue, Failure> {
        let audience = route.audience(&self.node);
        let mut made = self.made.lock().await;
        if let Some((_, token)) = made.get(&audience).filter(|(since, _)| since.elapsed() < SHOWN_FOR) {
            return Ok(token.clone());
        }
        let token = token(&self.cluster, &audience).await?;
        made.insert(audience, (Instant::now(), token.clone()));
        Ok(token)
    }
}

async fn token(cluster: &Cluster, audience: &str) -> Result<HeaderValue, Failure> {
    let accounts: Api<ServiceAccount> = Api::namespaced(cluster.client.clone(), &cluster.zpod_namespace);
    let spec = TokenRequestSpec {
        audiences: vec![audience.into()],
        expiration_seconds: Some(TOKEN_SECONDS),
        ..TokenRequestSpec::default()
    };
    let request = TokenRequest { spec, ..TokenRequest::default() };
    let made = accounts.create_token_request(SERVICE_ACCOUNT, &PostParams::default(), &request).await;
    let what = format!("a token of ServiceAccount {}/{SERVICE_ACCOUNT}", cluster.zpod_namespace);
    let made = made.map_err(|error| match &error {
        kube::Error::Api(status) if status.code == 404 => Failure::not_found(
            format!("{what}: there is no such account"),
            "--zpod-namespace says where zpod is; its chart makes the account with admin.enabled",
        ),
        _ => Failure::api(&what, &error),
    })?;
    let mut token = HeaderValue::from_str(&made.status.map(|status| status.token).unwrap_or_default())
        .map_err(|_| Failure::failed(format!("{what}: the API server gave none"), ""))?;
    token.set_sensitive(true);
    Ok(token)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::fake::Answers;
    use serde_json::json;
    use zpod_volume::VolumeId;

    #[tokio::test]
    async fn a_token_is_made_for_each_call_volume_and_node_and_shown_again_for_the_same() {
        tokio::time::pause();
        let path = "/api/v1/namespaces/zpod-system/serviceaccounts/zpod-admin/token";
        let made = json!({"metadata": {}, "spec": {"audiences": []},
                          "status": {"token": "t", "expirationTimestamp": "2026-01-01T00:00:00Z"}});
        let answers = Answers::default().with(path, made);
        let of = |node: &str| Tokens { cluster: answers.cluster(), node: node.into(), made: Mutex::default() };
        let (one, two) = (of("n1"), of("n2"));
        let id = VolumeId::from_name("a");
        for (tokens, route) in [
            (&one, Route::Doctor),
            (&one, Route::Doctor),
            (&two, Route::Doctor),
            (&one, Route::SendPoints(id)),
            (&one, Route::Send(id)),
        ] {
            tokens.of(route).await.unwrap();
        }
        tokio::time::advance(SHOWN_FOR).await;
        one.of(Route::Doctor).await.unwrap();
        let asked = answers.writes();
        let audiences: Vec<_> = asked.iter().map(|asked| asked.body["spec"]["audiences"].clone()).collect();
        let want = [
            json!(["zpod.storage/n1/doctor"]),
            json!(["zpod.storage/n2/doctor"]),
            json!([format!("zpod.storage/n1/send-points/{id}")]),
            json!([format!("zpod.storage/n1/send/{id}")]),
            json!(["zpod.storage/n1/doctor"]),
        ];
        assert_eq!(audiences, want);
        assert!(asked.iter().all(|asked| asked.body["spec"]["expirationSeconds"] == 600));
    }
}
