use std::sync::{Arc, Mutex};

use http_body_util::{BodyExt as _, Empty, Full};
use hyper::Method;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use k8s_openapi::api::core::v1::Pod;
use kube::Api;
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::PrivateKeyDer;
use tower::ServiceExt as _;

use super::*;

/// A name that only the proxy knows.
const HOST: &str = "api.example";

/// An API server behind TLS. Gives its port and its certificate.
async fn server() -> (u16, Vec<u8>) {
    let made = rcgen::generate_simple_self_signed(vec![HOST.to_owned()]).unwrap();
    let key = PrivateKeyDer::Pkcs8(made.signing_key.serialize_der().into());
    let config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![made.cert.der().clone()], key)
        .unwrap();
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let acceptor = acceptor.clone();
            tokio::spawn(async move {
                let stream = acceptor.accept(stream).await.unwrap();
                let answer = service_fn(|_: Request<Incoming>| async {
                    let pods =
                        r#"{"kind":"PodList","apiVersion":"v1","metadata":{},"items":[{"metadata":{"name":"db"}}]}"#;
                    Ok::<_, std::convert::Infallible>(Response::new(Full::new(Bytes::from(pods))))
                });
                let _ended =
                    hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), answer).await;
            });
        }
    });
    (port, made.cert.der().to_vec())
}

/// A proxy that connects whatever it is asked for to a port of this machine. Gives its port and what it was asked.
async fn proxy(to: u16) -> (u16, Arc<Mutex<Vec<String>>>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let asked = Arc::<Mutex<Vec<String>>>::default();
    let heard = asked.clone();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let heard = heard.clone();
            tokio::spawn(async move {
                let mut stream = BufReader::new(stream);
                let mut head = String::new();
                while !head.ends_with("\r\n\r\n") {
                    assert_ne!(stream.read_line(&mut head).await.unwrap(), 0);
                }
                heard.lock().unwrap().push(head);
                let mut on = TcpStream::connect(("127.0.0.1", to)).await.unwrap();
                stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await.unwrap();
                let _ended = tokio::io::copy_bidirectional(&mut stream, &mut on).await;
            });
        }
    });
    (port, asked)
}

#[tokio::test]
async fn objects_and_streams_go_through_the_proxy_and_its_password_is_shown_to_it() {
    let (port, certificate) = server().await;
    let (proxy_port, asked) = proxy(port).await;
    let mut config = Config::new(format!("https://{HOST}:6443").parse().unwrap());
    config.root_cert = Some(vec![certificate]);
    let environment = Environment {
        https_proxy: format!("http://user:p%40ss@127.0.0.1:{proxy_port}"),
        no_proxy: "other.example,127.0.0.0/8".into(),
    };
    let proxy = Proxy::choose(&config.cluster_url, None, &environment).unwrap();

    let client = kube::Client::new(api_server(&config, proxy.as_ref()).unwrap(), "default");
    let pods = Api::<Pod>::default_namespaced(client).list(&kube::api::ListParams::default()).await.unwrap();
    assert_eq!(pods.items[0].metadata.name.as_deref(), Some("db"));

    let streams = api_server::<Empty<Bytes>>(&config, proxy.as_ref()).unwrap();
    let request = Request::builder().method(Method::GET).uri("/x").body(Empty::new()).unwrap();
    let answer = streams.oneshot(request).await.unwrap().into_body().collect().await.unwrap().to_bytes();
    assert!(answer.starts_with(b"{"), "{answer:?}");

    let asked = asked.lock().unwrap();
    assert_eq!(asked.len(), 2, "{asked:?}");
    for head in &*asked {
        assert!(head.starts_with(&format!("CONNECT {HOST}:6443 HTTP/1.1\r\n")), "{head}");
        // user:p@ss
        assert!(head.to_ascii_lowercase().contains("proxy-authorization: basic "), "{head}");
        assert!(head.contains("dXNlcjpwQHNz"), "{head}");
    }
}

#[test]
fn the_kubeconfigs_proxy_comes_first_and_no_proxy_is_for_the_environments() {
    let server = Uri::from_static("https://api.example:6443");
    let environment = |no_proxy: &str| Environment { https_proxy: "proxy:3128".into(), no_proxy: no_proxy.into() };
    let chosen = |of_cluster, environment: &Environment, server: &Uri| {
        Proxy::choose(server, of_cluster, environment).unwrap().map(|proxy| proxy.0.uri().to_string())
    };
    let of_environment = Some("http://proxy:3128/".to_owned());
    assert_eq!(chosen(None, &environment(""), &server), of_environment);
    assert_eq!(chosen(None, &environment("proxy"), &server), of_environment);
    assert_eq!(chosen(None, &environment("api.example"), &server), None);
    assert_eq!(chosen(None, &Environment::default(), &server), None);
    assert_eq!(chosen(None, &environment(""), &Uri::from_static("http://api.example")), None);
    let named = chosen(Some("socks5://near:1080"), &environment("*"), &server);
    assert_eq!(named.as_deref(), Some("socks5://near:1080/"));
}

#[test]
fn an_address_that_is_no_proxys_is_refused_without_its_password() {
    let server = Uri::from_static("https://api.example:6443");
    for url in ["ftp://user:secret@proxy", "socks4://user:secret@proxy:1", "http://user:sec ret@proxy", "http://"] {
        let failure = Proxy::choose(&server, Some(url), &Environment::default()).unwrap_err();
        assert!(failure.to_string().contains("proxy-url of the kubeconfig"), "{failure}");
        assert!(!failure.to_string().contains("sec"), "{failure}");
    }
}
