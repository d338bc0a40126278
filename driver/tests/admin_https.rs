//! The admin endpoint as the API server's proxy sees it: TLS with a certificate that nobody checks, and a token first.

#![allow(clippy::unwrap_used)]

use std::convert::Infallible;
use std::sync::Arc;
use std::time::{Duration, Instant};

use http_body_util::BodyExt as _;
use hyper::{Request, Response};
use kube::client::Body;
use kube::{Client, Config};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::AsyncReadExt as _;
use zpod_driver::admin::{Admin, AdminServer, Doctor, Places, Tokens};
use zpod_driver::kata::DirectVolumes;
use zpod_driver::volumes::{Context, NodeVolumes};
use zpod_storage::backing::late::LateBacking;
use zpod_storage::catalog::dir;

/// An API server that knows one token for each audience: its name behind `good:`.
fn api_server() -> Client {
    let service = tower::service_fn(|request: Request<Body>| async move {
        let body = request.into_body().collect().await.unwrap().to_bytes();
        let mut review: Value = serde_json::from_slice(&body).unwrap();
        let name = "system:serviceaccount:zpod-system:zpod-admin";
        review["status"] = match review["spec"]["token"].as_str() {
            Some(token) if token.starts_with("good:") => {
                json!({"authenticated": review["spec"]["audiences"] == json!([token["good:".len()..]]),
                       "audiences": [token["good:".len()..]], "user": {"username": name}})
            }
            _ => json!({"authenticated": false}),
        };
        Ok::<_, Infallible>(Response::new(Body::from(serde_json::to_vec(&review).unwrap())))
    });
    Client::new(service, "default")
}

const DOCTOR: &str = "good:zpod.storage/n1/doctor";

async fn serve(dir: &TempDir) -> AdminServer {
    let path = |name: &str| dir.path().join(name);
    std::fs::create_dir(path("volumes")).unwrap();
    let backing = Arc::new(LateBacking::open(path("volumes"), 1.0).unwrap());
    let places = Places {
        backing_dir: path("volumes"),
        direct_volume_dir: path("direct"),
        kata_run_dirs: vec![path("kata")],
        guest_dir: path("guest"),
    };
    let doctor = Doctor::new(places, backing.clone());
    let (catalog, snapshots) = dir::open(path("state")).unwrap();
    let boot = Context::boot_id().unwrap();
    let context = Context::new("n1".into(), boot, Arc::new(catalog), Arc::new(snapshots), backing);
    let direct = DirectVolumes::open(&path("direct")).unwrap();
    let volumes = NodeVolumes::load(context, direct).await.unwrap();
    let tokens = Tokens::new(api_server(), "zpod-system");
    AdminServer::https("127.0.0.1:0".parse().unwrap(), Admin::new(volumes, doctor), tokens).await.unwrap()
}

async fn ask(server: &AdminServer, path: &str, token: Option<&str>) -> (u16, Value) {
    let mut config = Config::new(format!("https://{}", server.address().unwrap()).parse().unwrap());
    config.accept_invalid_certs = true;
    config.default_retry = false;
    let client = Client::try_from(config).unwrap();
    let mut request = Request::get(path);
    if let Some(token) = token {
        request = request.header("X-Zpod-Token", token);
    }
    let answer = client.send(request.body(Body::empty()).unwrap()).await.unwrap();
    let code = answer.status().as_u16();
    let body = answer.into_body().collect().await.unwrap().to_bytes();
    (code, serde_json::from_slice(&body).unwrap())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_token_is_asked_for_before_anything_else_is_looked_at() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let server = serve(&dir).await;
    for path in ["/v1/doctor", "/nothing", "/v1/volumes/x/send"] {
        for token in [None, Some("bad")] {
            let (code, answer) = ask(&server, path, token).await;
            assert_eq!(code, 401, "{path} {token:?}: {answer}");
        }
    }
    let (code, checks) = ask(&server, "/v1/doctor", Some(DOCTOR)).await;
    assert_eq!(code, 200, "{checks}");
    assert!(checks.as_array().unwrap().len() > 8, "{checks}");
    // A token opens one call of one volume on one node: whoever is shown it can do nothing else with it.
    let id = zpod_volume::VolumeId::from_name("a");
    let (path, audience) = (format!("/v1/volumes/{id}/send-points"), format!("good:zpod.storage/n1/send-points/{id}"));
    assert_eq!(ask(&server, &path, Some(&audience)).await.0, 404, "taken; there is no such volume");
    let other = zpod_volume::VolumeId::from_name("b");
    for wrong in [
        DOCTOR.to_owned(),
        "good:zpod.storage".to_owned(),
        format!("good:zpod.storage/n2/send-points/{id}"),
        format!("good:zpod.storage/n1/send/{id}"),
        format!("good:zpod.storage/n1/send-points/{other}"),
    ] {
        assert_eq!(ask(&server, &path, Some(&wrong)).await.0, 401, "{wrong}");
    }
    assert_eq!(ask(&server, "/v1/doctor", Some("good:zpod.storage/n2/doctor")).await.0, 401, "another node's");
    assert_eq!(ask(&server, "/nothing", Some(DOCTOR)).await.0, 401, "no token opens what is not there");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_that_say_nothing_are_closed_and_others_are_served() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let server = serve(&dir).await;
    let mut silent = Vec::new();
    for _ in 0..300 {
        silent.push(tokio::net::TcpStream::connect(server.address().unwrap()).await.unwrap());
    }
    let begun = Instant::now();
    assert_eq!(ask(&server, "/v1/doctor", Some(DOCTOR)).await.0, 200);
    assert!(begun.elapsed() < Duration::from_secs(30), "{:?}", begun.elapsed());
    assert_eq!(silent[0].read(&mut [0; 16]).await.unwrap_or(0), 0, "closed");
}
