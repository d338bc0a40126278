//! The command line of `zpod`.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use clap::Parser;
use tokio::signal::unix::{SignalKind, signal};
use zpod_storage::backing::file::FileBacking;
use zpod_storage::catalog::dir::DirCatalog;

use crate::csi::{ControllerService, IdentityService, NodeService};
use crate::guest::Monitor;
use crate::kata::DirectVolumes;
use crate::serve::{Socket, endpoint_path, serve};
use crate::volumes::{Context, NodeVolumes, Provisioner};

/// Two threads keep two cores busy; the work itself waits for the kernel.
const WORKERS: usize = 2;
/// Calls that wait for the disk at the same time.
const BLOCKING: usize = 16;

/// CSI driver whose ZFS pools live inside each pod's Kata guest.
#[derive(Debug, Clone, Parser)]
#[command(name = "zpod", version)]
pub struct Options {
    /// Run controller and node in one process, with the catalog in --state-dir, without a cluster.
    #[arg(long)]
    pub standalone: bool,
    /// Where to serve CSI.
    #[arg(long, env = "CSI_ENDPOINT", default_value = "unix:///run/zpod/csi.sock", value_parser = endpoint_path)]
    pub endpoint: PathBuf,
    /// The node's name.
    #[arg(long, env = "NODE_NAME")]
    pub node_name: String,
    /// Where volumes are recorded.
    #[arg(long, default_value = "/var/lib/zpod/state")]
    pub state_dir: PathBuf,
    /// Where the volumes' devices are. Must exist: it is not made, for the mount that should be there may be missing.
    #[arg(long, default_value = "/var/lib/zpod/volumes")]
    pub backing_dir: PathBuf,
    /// How much may be promised for each byte there is: 1.0 keeps every promise, less keeps some space back.
    #[arg(long, default_value_t = 1.0, value_parser = overprovision)]
    pub overprovision: f64,
    /// Where Kata looks for direct volumes.
    #[arg(long, default_value = "/run/kata-containers/shared/direct-volumes")]
    pub direct_volume_dir: PathBuf,
    /// Where Kata's shims have the directories of their sandboxes. May be given more than once.
    #[arg(long, default_values = ["/run/kata", "/run/vc/sbs"])]
    pub kata_run_dir: Vec<PathBuf>,
}

fn overprovision(text: &str) -> Result<f64, String> {
    let ratio = text.parse().ok().filter(|ratio: &f64| *ratio > 0.0 && *ratio <= 1000.0);
    ratio.ok_or_else(|| "more than 0, up to 1000, is allowed; 1.0 keeps every promise".into())
}

type Failure = Box<dyn std::error::Error + Send + Sync>;

/// Parses the command line, runs, and says why where that failed.
pub fn run() -> ExitCode {
    let options = Options::parse();
    let filter = tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "info".into());
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
        .with_writer(std::io::stderr)
        .init();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(WORKERS)
        .max_blocking_threads(BLOCKING)
        .enable_all()
        .build();
    match runtime.map_err(Failure::from).and_then(|runtime| runtime.block_on(run_until_signal(options))) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("zpod: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn run_until_signal(options: Options) -> Result<(), Failure> {
    if !options.standalone {
        return Err("only --standalone is there yet: the catalog in Kubernetes comes next".into());
    }
    if options.node_name.is_empty() || options.node_name.len() > 253 {
        return Err("--node-name: 1 to 253 characters are allowed".into());
    }
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    let backing = FileBacking::open(&options.backing_dir, options.overprovision)?;
    let catalog = DirCatalog::open(&options.state_dir)?;
    let direct = DirectVolumes::open(&options.direct_volume_dir)?;
    let context = Context::new(options.node_name, Context::boot_id()?, Arc::new(catalog), Arc::new(backing));
    let volumes = NodeVolumes::load(context.clone(), direct).await?;
    let _monitor = Monitor::start(options.kata_run_dir, Arc::new(volumes.clone()));
    let socket = Socket::bind(&options.endpoint).map_err(|e| format!("{}: {e}", options.endpoint.display()))?;
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        node = context.node(),
        endpoint = %options.endpoint.display(),
        devices = %context.location().display(),
        "serving"
    );
    let end = async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    };
    let controller = ControllerService::new(Provisioner::new(context.clone()));
    serve(socket, IdentityService::new(context), controller, NodeService::new(volumes), end).await?;
    Ok(())
}
