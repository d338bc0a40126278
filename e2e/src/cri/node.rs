//! A node: a mount namespace, a CRI server, a kubelet.

use std::fs;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use tokio::net::UnixListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::sleep;
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::Server;

use super::api::image_service_server::ImageServiceServer;
use super::api::runtime_service_server::RuntimeServiceServer;
use super::images::Images;
use super::kubelet::Kubelet;
use super::network::{Network, Subnet};
use super::runtime::Runtime;
use super::service::Service;
use crate::shim::Handler;

/// Directories that a node has of its own: below its directory, bound over the path of the same name.
const OWN: [&str; 11] = [
    "var/lib/kubelet",
    "var/lib/zpod",
    "var/log/pods",
    "var/log/containers",
    "run/kata-containers",
    "run/kata",
    "run/vc",
    "run/udev",
    "opt/kata",
    "opt/zpod",
    "etc/kata-containers",
];

/// What kubelet wants these settings to be (`setupKernelTunables`). It would change them for the whole machine: here
/// it finds them right, in files of the node.
const TUNABLES: [(&str, &str); 6] = [
    ("vm/overcommit_memory", "1"),
    ("vm/panic_on_oom", "0"),
    ("kernel/panic", "10"),
    ("kernel/panic_on_oops", "1"),
    ("kernel/keys/root_maxkeys", "1000000"),
    ("kernel/keys/root_maxbytes", "25000000"),
];

/// How a node is started.
#[derive(Debug, Clone, clap::Args)]
pub struct Options {
    /// The node's name in Kubernetes.
    #[arg(long)]
    pub name: String,
    /// Its directory; short, since unix sockets lie in it.
    #[arg(long)]
    pub root: PathBuf,
    /// The kubelet to start. Without one there is only the CRI server.
    #[arg(long)]
    pub kubelet: Option<PathBuf>,
    /// Kubelet's way to the API server.
    #[arg(long)]
    pub kubeconfig: Option<PathBuf>,
    /// The directory of image files.
    #[arg(long)]
    pub images: PathBuf,
    /// The name servers of pods; the gateway unless said otherwise, who refuses at once where there is none.
    #[arg(long)]
    pub cluster_dns: Vec<Ipv4Addr>,
    /// Where the addresses of this node's pods come from; within the bridge's network, each node its own.
    #[arg(long, default_value = "10.88.1.0/24")]
    pub pod_subnet: Subnet,
    /// The bridge's address, with the prefix of the network of all pods.
    #[arg(long, default_value = "10.88.0.1/16")]
    pub gateway: Subnet,
    /// The bridge.
    #[arg(long, default_value = "cni0")]
    pub bridge: String,
    /// The node's address, one of this machine's; the gateway's unless said otherwise.
    #[arg(long)]
    pub node_ip: Option<Ipv4Addr>,
    /// Kubelet's port; any free one unless said otherwise.
    #[arg(long)]
    pub kubelet_port: Option<u16>,
    /// Labels of the node: `name=value,...`.
    #[arg(long, default_value = "")]
    pub labels: String,
    /// Runtime handlers whose pods get a guest, and which of Kata's runtimes each stands for.
    #[arg(long = "runtime-handler", default_value = "kata-zpod=go")]
    pub runtime_handlers: Vec<Handler>,
}

impl Options {
    /// Where the node's CRI server listens.
    pub fn socket(&self) -> PathBuf {
        socket(&self.root)
    }
}

/// Where the CRI server of the node in this directory listens.
pub fn socket(root: &Path) -> PathBuf {
    root.join("run/cri.sock")
}

/// Makes the node's mount namespace and serves until it is told to end. To be called before there are threads.
///
/// # Errors
/// When a part of the node can't be started, or kubelet ends.
pub fn run(options: &Options) -> Result<()> {
    enter_namespace(&options.root)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    // Children die with the thread that started them: the workers live as long as the runtime.
    runtime.block_on(async {
        let options = options.clone();
        tokio::spawn(async move { serve(&options).await }).await?
    })
}

async fn serve(options: &Options) -> Result<()> {
    let socket = options.socket();
    // Of a node that was killed.
    let _ = fs::remove_file(&socket);
    let listener = UnixListener::bind(&socket).with_context(|| format!("listen on {}", socket.display()))?;
    let images = Images::new(options.images.clone());
    let network = Network::new(options.bridge.clone(), options.gateway, options.pod_subnet);
    let handlers = options.runtime_handlers.clone();
    let runtime = Arc::new(Runtime::new(images.clone(), network, handlers, options.root.join("run/pods")));
    let server = Server::builder()
        .add_service(RuntimeServiceServer::new(Service::new(Arc::clone(&runtime))))
        .add_service(ImageServiceServer::new(images))
        .serve_with_incoming(UnixListenerStream::new(listener));
    let mut terminate = signal(SignalKind::terminate())?;
    tokio::select! {
        result = server => result.context("serve CRI"),
        result = keep_kubelet(options, &socket) => result,
        _ = terminate.recv() => {
            for pod in runtime.pods() {
                if let Err(error) = runtime.stop_pod(&pod.id).await {
                    eprintln!("pod {}: {error:#}", pod.name());
                }
            }
            Ok(())
        }
    }
}

async fn keep_kubelet(options: &Options, socket: &Path) -> Result<()> {
    let (Some(program), Some(kubeconfig)) = (&options.kubelet, &options.kubeconfig) else {
        return std::future::pending().await;
    };
    let gateway = [options.gateway.address];
    let kubelet = Kubelet {
        program,
        node: &options.name,
        node_ip: options.node_ip.unwrap_or(options.gateway.address),
        port: options.kubelet_port,
        kubeconfig,
        socket,
        cluster_dns: if options.cluster_dns.is_empty() { &gateway } else { &options.cluster_dns },
        labels: &options.labels,
        dir: &options.root,
    };
    let mut process = kubelet.start()?;
    loop {
        process.must_run()?;
        sleep(Duration::from_millis(200)).await;
    }
}

fn enter_namespace(root: &Path) -> Result<()> {
    unshare(CloneFlags::CLONE_NEWNS).context("unshare the mount namespace")?;
    let change = |path: &Path, flags| mount(None::<&str>, path, None::<&str>, flags, None::<&str>);
    change(Path::new("/"), MsFlags::MS_PRIVATE | MsFlags::MS_REC).context("/ rprivate")?;
    let bind = |source: &Path, target: &Path| {
        mount(Some(source), target, None::<&str>, MsFlags::MS_BIND, None::<&str>)
            .with_context(|| format!("bind {} to {}", source.display(), target.display()))
    };
    for name in OWN {
        let (source, target) = (root.join(name), Path::new("/").join(name));
        for dir in [&source, &target] {
            fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))?;
        }
        bind(&source, &target)?;
        // Volumes that a container mounts below it are to be seen by kubelet and by other containers.
        change(&target, MsFlags::MS_SHARED).with_context(|| format!("share {}", target.display()))?;
    }
    let tunables = root.join("run/tunables");
    fs::create_dir_all(&tunables).with_context(|| format!("create {}", tunables.display()))?;
    for (name, value) in TUNABLES {
        let (file, target) = (tunables.join(name.replace('/', ".")), Path::new("/proc/sys").join(name));
        fs::write(&file, format!("{value}\n"))?;
        bind(&file, &target)?;
    }
    Ok(())
}
