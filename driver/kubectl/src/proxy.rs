//! The way to the API server where a proxy stands between.
//!
//! # Design
//! Users expect what kubectl does, so the rules are those of Go's `net/http`. kube's client has proxies of its own; it
//! looks for the proxy's address in `NO_PROXY`, not for the API server's, and its streams of bodies can't be used.

mod bypass;

use std::time::Duration;

use hyper::body::{Body, Bytes, Incoming};
use hyper::rt::{Read, Write};
use hyper::{Request, Response, Uri};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::proxy::{SocksV5, Tunnel};
use hyper_util::client::legacy::connect::{Connection, HttpConnector};
use hyper_util::client::proxy::matcher::{Intercept, Matcher};
use hyper_util::rt::TokioExecutor;
use kube::Config;
use kube::client::ConfigExt as _;
use tower::util::BoxCloneSyncService;
use tower::{BoxError, Service, ServiceBuilder};

use crate::Failure;

/// How long a connection may take. kube's client waits as long.
const CONNECT: Duration = Duration::from_secs(30);

/// A service that asks the API server.
pub(crate) type Server<B> = BoxCloneSyncService<Request<B>, Response<Incoming>, BoxError>;

/// What the environment says of proxies.
#[derive(Debug, Default)]
pub(crate) struct Environment {
    https_proxy: String,
    no_proxy: String,
}

impl Environment {
    pub(crate) fn of_process() -> Self {
        let first = |names: [&str; 2]| {
            names.into_iter().filter_map(|name| std::env::var(name).ok()).find(|value| !value.is_empty())
        };
        Self {
            https_proxy: first(["HTTPS_PROXY", "https_proxy"]).unwrap_or_default(),
            no_proxy: first(["NO_PROXY", "no_proxy"]).unwrap_or_default(),
        }
    }
}

/// A proxy.
#[derive(Debug, Clone)]
pub(crate) struct Proxy(Intercept);

impl Proxy {
    /// The proxy to a server: the one that the kubeconfig names, whatever `NO_PROXY` says, or else the environment's.
    pub(crate) fn choose(
        server: &Uri,
        of_cluster: Option<&str>,
        environment: &Environment,
    ) -> Result<Option<Self>, Failure> {
        if let Some(url) = of_cluster {
            return Self::parse(url, "proxy-url of the kubeconfig").map(Some);
        }
        let skipped = server.scheme_str() != Some("https") || bypass::contains(&environment.no_proxy, server);
        if environment.https_proxy.is_empty() || skipped {
            return Ok(None);
        }
        Self::parse(&environment.https_proxy, "HTTPS_PROXY").map(Some)
    }

    /// The address is not shown where it is wrong: it may hold a password.
    fn parse(url: &str, from: &str) -> Result<Self, Failure> {
        let found = Matcher::builder().all(url).build().intercept(&Uri::from_static("https://server"));
        let known =
            found.filter(|found| matches!(found.uri().scheme_str(), Some("http" | "https" | "socks5" | "socks5h")));
        known.map(Self).ok_or_else(|| {
            Failure::usage(
                format!("{from} is not the address of a proxy that kubectl zpod can use"),
                "give http://HOST:PORT, https://HOST:PORT or socks5://HOST:PORT, with USER:PASSWORD@ before the host where \
                 the proxy wants it, special characters of it percent-encoded",
            )
        })
    }
}

/// The API server, whose requests have bodies of any kind.
pub(crate) fn api_server<B>(config: &Config, proxy: Option<&Proxy>) -> Result<Server<B>, kube::Error>
where
    B: Body<Data = Bytes> + Send + Unpin + 'static,
    B::Error: Into<BoxError>,
{
    let mut http = HttpConnector::new();
    http.enforce_http(false);
    http.set_connect_timeout(Some(config.connect_timeout.unwrap_or(CONNECT)));
    let Some(Proxy(proxy)) = proxy else { return over(config, http) };
    let uri = proxy.uri().clone();
    match uri.scheme_str() {
        Some("socks5" | "socks5h") => {
            let socks = SocksV5::new(uri, http);
            over(
                config,
                match proxy.raw_auth() {
                    Some((user, password)) => socks.with_auth(user.to_owned(), password.to_owned()),
                    None => socks,
                },
            )
        }
        Some("https") => {
            let tls = config.rustls_https_connector_with_connector(http)?;
            over(config, with_auth(Tunnel::new(uri, tls), proxy))
        }
        _ => over(config, with_auth(Tunnel::new(uri, http), proxy)),
    }
}

fn with_auth<C>(tunnel: Tunnel<C>, proxy: &Intercept) -> Tunnel<C> {
    match proxy.basic_auth() {
        Some(auth) => tunnel.with_auth(auth.clone()),
        None => tunnel,
    }
}

fn over<B, C>(config: &Config, connector: C) -> Result<Server<B>, kube::Error>
where
    B: Body<Data = Bytes> + Send + Unpin + 'static,
    B::Error: Into<BoxError>,
    C: Service<Uri> + Clone + Send + Sync + 'static,
    C::Response: Connection + Read + Write + Send + Unpin + 'static,
    C::Future: Send + 'static,
    C::Error: Into<BoxError>,
{
    let https = config.rustls_https_connector_with_connector(connector)?;
    let client = Client::builder(TokioExecutor::new()).build::<_, B>(https);
    let service = ServiceBuilder::new()
        .layer(config.base_uri_layer())
        .option_layer(config.auth_layer()?)
        .map_err(BoxError::from)
        .service(client);
    Ok(BoxCloneSyncService::new(service))
}

#[cfg(test)]
mod tests;
