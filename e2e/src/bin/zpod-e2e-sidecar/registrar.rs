//! node-driver-registrar's part.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use clap::Args;
use tokio::net::UnixListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::mpsc;
use tokio::time::{sleep, timeout};
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::Server;
use tonic::{Code, Request, Response, Status};
use zpod_e2e::authority::Lenient;
use zpod_e2e::csi::Csi;
use zpod_proto::csi::GetPluginInfoRequest;

use crate::{Shared, duration, health};
use wire::registration_server::{Registration, RegistrationServer};
use wire::{InfoRequest, PluginInfo, RegistrationStatus, RegistrationStatusResponse};

#[allow(missing_docs, unreachable_pub, rust_2018_idioms, clippy::all)]
mod wire {
    tonic::include_proto!("pluginregistration");
}

#[derive(Args)]
pub(crate) struct Flags {
    #[command(flatten)]
    pub(crate) shared: Shared,
    /// The driver's socket as kubelet sees it.
    #[arg(long)]
    kubelet_registration_path: String,
    /// The directory in which kubelet looks for drivers, as this program sees it.
    #[arg(long, default_value = "/registration")]
    plugin_registration_path: PathBuf,
    /// How long a CSI call may take.
    #[arg(long, default_value = "1s", value_parser = duration)]
    timeout: Duration,
}

struct Registrar {
    info: PluginInfo,
    // What kubelet found wrong.
    refused: mpsc::Sender<String>,
}

#[tonic::async_trait]
impl Registration for Registrar {
    async fn get_info(&self, _: Request<InfoRequest>) -> Result<Response<PluginInfo>, Status> {
        Ok(Response::new(self.info.clone()))
    }

    async fn notify_registration_status(
        &self,
        request: Request<RegistrationStatus>,
    ) -> Result<Response<RegistrationStatusResponse>, Status> {
        let status = request.into_inner();
        if status.plugin_registered {
            eprintln!("kubelet has registered {}", self.info.name);
        } else {
            // Full when it has been told already.
            let _ = self.refused.try_send(status.error);
        }
        Ok(Response::new(RegistrationStatusResponse {}))
    }
}

/// Serves the registration socket until SIGTERM, or until kubelet refuses: then it fails, to be started again.
pub(crate) async fn run(flags: Flags) -> Result<()> {
    let name = driver_name(&flags.shared.csi_address, flags.timeout).await?;
    let socket = flags.plugin_registration_path.join(format!("{name}-reg.sock"));
    remove(&socket)?;
    let listener = UnixListener::bind(&socket).with_context(|| format!("listen on {}", socket.display()))?;
    eprintln!("{name} is to be registered on {}", socket.display());
    let (refused, mut refusals) = mpsc::channel(1);
    let info = PluginInfo {
        r#type: "CSIPlugin".to_owned(),
        name,
        endpoint: flags.kubelet_registration_path,
        supported_versions: vec!["1.0.0".to_owned()],
    };
    let service = RegistrationServer::new(Registrar { info, refused });
    let incoming = UnixListenerStream::new(listener).map(|stream| stream.map(Lenient::new));
    let serve = Server::builder().add_service(service).serve_with_incoming(incoming);
    let health = async {
        match flags.shared.endpoint() {
            Some(endpoint) => health::serve(&endpoint, async || registered(&socket)).await,
            None => std::future::pending().await,
        }
    };
    let mut terminate = signal(SignalKind::terminate())?;
    let result = tokio::select! {
        result = serve => result.context("serve the registration"),
        result = health => result,
        Some(error) = refusals.recv() => Err(anyhow::anyhow!("kubelet refuses the driver: {error}")),
        _ = terminate.recv() => Ok(()),
    };
    remove(&socket)?;
    result
}

/// As the original judges: somebody else may have removed the socket, and kubelet would not see it again.
fn registered(socket: &Path) -> Result<()> {
    ensure!(socket.exists(), "{} is gone", socket.display());
    Ok(())
}

/// Waits for the driver; only an answer that is none ends it.
async fn driver_name(socket: &Path, within: Duration) -> Result<String> {
    let mut csi = Csi::new(socket);
    loop {
        let answer = timeout(within, csi.identity.get_plugin_info(GetPluginInfoRequest {})).await;
        match answer.unwrap_or_else(|_| Err(Status::unavailable("no answer in time"))) {
            Ok(info) => return Ok(info.into_inner().name),
            Err(status) if status.code() == Code::Unavailable => {
                eprintln!("still connecting to {}: {}", socket.display(), status.message());
                sleep(Duration::from_secs(1)).await;
            }
            Err(status) => bail!("GetPluginInfo: {status}"),
        }
    }
}

fn remove(socket: &Path) -> Result<()> {
    match fs::remove_file(socket) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("remove {}", socket.display()))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use hyper_util::rt::TokioIo;
    use tokio::net::UnixStream;
    use tonic::transport::{Channel, Endpoint};
    use zpod_proto::csi::identity_server::{Identity, IdentityServer};
    use zpod_proto::csi::{
        GetPluginCapabilitiesRequest, GetPluginCapabilitiesResponse, GetPluginInfoResponse, ProbeRequest, ProbeResponse,
    };

    use super::wire::registration_client::RegistrationClient;
    use super::*;

    struct Driver;

    #[tonic::async_trait]
    impl Identity for Driver {
        async fn get_plugin_info(
            &self,
            _: Request<GetPluginInfoRequest>,
        ) -> Result<Response<GetPluginInfoResponse>, Status> {
            Ok(Response::new(GetPluginInfoResponse { name: "csi.test".to_owned(), ..Default::default() }))
        }

        async fn get_plugin_capabilities(
            &self,
            _: Request<GetPluginCapabilitiesRequest>,
        ) -> Result<Response<GetPluginCapabilitiesResponse>, Status> {
            Err(Status::unimplemented("nobody asks"))
        }

        async fn probe(&self, _: Request<ProbeRequest>) -> Result<Response<ProbeResponse>, Status> {
            Err(Status::unimplemented("nobody asks"))
        }
    }

    /// A driver in `dir`, and the registrar's flags for it.
    fn start(dir: &Path) -> Flags {
        let socket = dir.join("csi.sock");
        let incoming = UnixListenerStream::new(UnixListener::bind(&socket).unwrap());
        tokio::spawn(Server::builder().add_service(IdentityServer::new(Driver)).serve_with_incoming(incoming));
        Flags {
            shared: Shared { csi_address: socket, http_endpoint: None, health_port: None, v: None },
            kubelet_registration_path: "/var/lib/kubelet/plugins/csi.test/csi.sock".to_owned(),
            plugin_registration_path: dir.to_owned(),
            timeout: Duration::from_secs(5),
        }
    }

    /// Connects as kubelet does, once the socket is there.
    async fn kubelet(dir: &Path) -> RegistrationClient<Channel> {
        let socket = dir.join("csi.test-reg.sock");
        while !socket.exists() {
            sleep(Duration::from_millis(10)).await;
        }
        let connector = tower::service_fn(move |_| {
            let socket = socket.clone();
            async { UnixStream::connect(socket).await.map(TokioIo::new) }
        });
        RegistrationClient::new(Endpoint::from_static("http://kubelet").connect_with_connector_lazy(connector))
    }

    #[tokio::test]
    async fn kubelet_learns_the_drivers_own_name_and_socket() {
        let dir = tempfile::tempdir().unwrap();
        let registering = async {
            let mut kubelet = kubelet(dir.path()).await;
            let info = kubelet.get_info(InfoRequest {}).await.unwrap().into_inner();
            assert_eq!((info.r#type.as_str(), info.name.as_str()), ("CSIPlugin", "csi.test"));
            assert_eq!(info.endpoint, "/var/lib/kubelet/plugins/csi.test/csi.sock");
            assert_eq!(info.supported_versions, ["1.0.0"]);
            let registered = RegistrationStatus { plugin_registered: true, error: String::new() };
            kubelet.notify_registration_status(registered).await.unwrap();
        };
        tokio::select! {
            ended = run(start(dir.path())) => panic!("the registrar has ended: {ended:?}"),
            () = registering => {}
        }
    }

    #[tokio::test]
    async fn a_refused_driver_ends_the_registrar_with_kubelets_reason_and_without_its_socket() {
        let dir = tempfile::tempdir().unwrap();
        let refused = RegistrationStatus { plugin_registered: false, error: "no such node".to_owned() };
        // The answer may not come any more.
        let refusing = async { kubelet(dir.path()).await.notify_registration_status(refused).await };
        let (result, _) = tokio::join!(run(start(dir.path())), refusing);
        let error = result.unwrap_err();
        assert!(error.to_string().contains("no such node"), "{error:#}");
        assert!(!dir.path().join("csi.test-reg.sock").exists());
    }
}
