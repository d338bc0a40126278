//! `zpod --standalone`: controller and node in one process, with the catalog in a directory.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;

use clap::Parser;
use zpod_storage::backing::late::LateBacking;
use zpod_storage::catalog::dir;

use super::{DoctorOptions, EndpointOptions, Failure, MetricsOptions, NodeOptions, absolute, main_of, told_to_end};
use crate::admin::{Admin, AdminServer, Doctor};
use crate::csi::{ControllerService, GroupControllerService, IdentityService, NodeService};
use crate::guest::Monitor;
use crate::kata::{DirectVolumes, udev_rule};
use crate::metrics::{self, NodeMetrics, VolumeMetrics};
use crate::serve::{Services, Socket, endpoint_path, serve};
use crate::volumes::{Context, NodeVolumes, Provisioner, Snapshotter};

/// CSI driver whose ZFS pools live inside each pod's Kata guest: the whole driver on one machine, without a cluster.
#[derive(Debug, Clone, Parser)]
#[command(name = "zpod", version)]
struct Options {
    /// Run controller and node in one process, with the catalog in --state-dir, without a cluster.
    #[arg(long)]
    standalone: bool,
    #[command(flatten)]
    endpoint: EndpointOptions,
    #[command(flatten)]
    node: NodeOptions,
    #[command(flatten)]
    metrics: MetricsOptions,
    /// Where volumes are recorded.
    #[arg(long, default_value = "/var/lib/zpod/state", value_parser = absolute())]
    state_dir: PathBuf,
    /// Where to serve the admin endpoint of `kubectl zpod`, such as unix:///run/zpod/admin.sock: only root can open it.
    /// Nowhere, if it is not given.
    #[arg(long, value_parser = endpoint_path)]
    admin_endpoint: Option<PathBuf>,
    #[command(flatten)]
    doctor: DoctorOptions,
}

/// Parses the command line, runs, and says why where that failed.
pub fn run() -> ExitCode {
    main_of("zpod", run_until_signal(Options::parse()))
}

async fn run_until_signal(options: Options) -> Result<(), Failure> {
    if !options.standalone {
        return Err("give --standalone; in a cluster, zpod-controller and zpod-node are what runs".into());
    }
    let (end, node) = (told_to_end()?, options.node);
    let backing = Arc::new(LateBacking::open(&node.backing_dir, node.overprovision)?);
    let doctor = Doctor::new(options.doctor.places(&node), backing.clone());
    let (catalog, snapshots) = dir::open(&options.state_dir)?;
    let direct = DirectVolumes::open(&node.direct_volume_dir)?;
    udev_rule::write(&node.udev_dir, &node.volume_dirs())?;
    let (mirrors, boot) = (node.mirrors(&backing), Context::boot_id()?);
    let (catalog, snapshots) = (Arc::new(catalog), Arc::new(snapshots));
    let context = Context::with_mirrors(node.node_name, boot, catalog, snapshots, backing.clone(), mirrors);
    context.allow_zfs_access(node.access.allow_zfs_access);
    let mut registry = metrics::registry();
    NodeMetrics::register(&mut registry, context.node(), backing);
    let told = VolumeMetrics::register(&mut registry, context.node());
    let _metrics = options.metrics.serve(registry).await?;
    let volumes = NodeVolumes::load(context.clone(), direct).await?.observed_by(told);
    let volumes = volumes.with_ephemeral(node.inline.limits());
    tokio::spawn(volumes.clone().keep_scrubbing());
    tokio::spawn(volumes.clone().keep_ending_abandoned());
    let _monitor = Monitor::start(node.kata_run_dir, Arc::new(volumes.clone()));
    let admin = options.admin_endpoint.as_deref().map(|path| {
        let server = AdminServer::unix(path, Admin::new(volumes.clone(), doctor));
        server.map_err(|error| format!("--admin-endpoint {}: {error}", path.display()))
    });
    let _admin = admin.transpose()?;
    let endpoint = options.endpoint.endpoint;
    let socket = Socket::bind(&endpoint).map_err(|e| format!("{}: {e}", endpoint.display()))?;
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        node = context.node(),
        endpoint = %endpoint.display(),
        devices = %context.location().display(),
        "serving"
    );
    let snapshots = Arc::new(Snapshotter::new(context.clone()));
    let provisioner = Provisioner::new(context.clone()).telling(volumes.clone());
    let (unmade, untaken) = (provisioner.clone(), snapshots.clone());
    tokio::spawn(async move {
        unmade.collect().await;
        untaken.collect().await;
    });
    let services = Services {
        identity: IdentityService::new(context.clone()),
        controller: Some(ControllerService::new(Arc::new(provisioner), snapshots.clone())),
        groups: Some(GroupControllerService::new(snapshots)),
        node: Some(NodeService::new(volumes)),
    };
    let end = async {
        end.await;
        context.end();
    };
    serve(socket, services, end).await?;
    Ok(())
}
