use std::path::{Path, PathBuf};

use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, Empty};
use hyper::body::{Bytes, Incoming};
use hyper::header::{HOST, HeaderValue};
use hyper::{Request, Response, Uri};
use hyper_util::rt::{TokioExecutor, TokioIo};
use k8s_openapi::api::authentication::v1::{TokenRequest, TokenRequestSpec};
use k8s_openapi::api::core::v1::{Pod, ServiceAccount};
use kube::api::{ListParams, PostParams};
use kube::client::ConfigExt as _;
use kube::{Api, Config};
use tower::util::BoxCloneSyncService;
use tower::{BoxError, ServiceBuilder, ServiceExt as _};
use zpod_admin::{AUDIENCE, PORT, SERVICE_ACCOUNT, TOKEN_HEADER};

use crate::Failure;
use crate::cluster::Cluster;
use crate::failure::with_causes;

/// The body of a request.
pub(crate) type Out = UnsyncBoxBody<Bytes, std::io::Error>;

/// How long a token is good: it is shown when a transfer begins, and that is all.
const TOKEN_SECONDS: i64 = 600;
/// What the pods of zpod-node have.
const SELECTOR: &str = "app.kubernetes.io/name=zpod-node";

pub(crate) fn nothing() -> Out {
    Empty::new().map_err(|never| match never {}).boxed_unsync()
}

/// The way to an admin endpoint.
pub(crate) enum Line {
    /// Through the API server's proxy to a pod.
    Pod { path: String, token: HeaderValue, server: BoxCloneSyncService<Request<Out>, Response<Incoming>, BoxError> },
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
            token: token(cluster).await?,
            server: api_server(config)?,
        })
    }

    /// Asks, and gives the answer as soon as its head is there.
    pub(crate) async fn ask(&self, mut request: Request<Out>) -> Result<Response<Incoming>, Failure> {
        match self {
            Self::Pod { path, token, server } => {
                let uri = format!("{path}{}", request.uri());
                *request.uri_mut() =
                    uri.parse::<Uri>().map_err(|error| Failure::failed(format!("{uri}: {error}"), ""))?;
                request.headers_mut().insert(TOKEN_HEADER, token.clone());
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

/// The API server as kube-rs connects to it, but for bodies that stream: kube's own client takes whole ones only.
fn api_server(config: &Config) -> Result<BoxCloneSyncService<Request<Out>, Response<Incoming>, BoxError>, Failure> {
    let failed = |error: kube::Error| {
        Failure::failed(format!("the kubeconfig can't be used: {}", with_causes(&error)), "see `kubectl config view`")
    };
    let https = config.rustls_https_connector().map_err(failed)?;
    let client = hyper_util::client::legacy::Client::builder(TokioExecutor::new()).build::<_, Out>(https);
    let service = ServiceBuilder::new()
        .layer(config.base_uri_layer())
        .option_layer(config.auth_layer().map_err(failed)?)
        .map_err(BoxError::from)
        .service(client);
    Ok(BoxCloneSyncService::new(service))
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

/// A token that opens the admin endpoint and nothing else.
async fn token(cluster: &Cluster) -> Result<HeaderValue, Failure> {
    let accounts: Api<ServiceAccount> = Api::namespaced(cluster.client.clone(), &cluster.zpod_namespace);
    let spec = TokenRequestSpec {
        audiences: vec![AUDIENCE.into()],
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
