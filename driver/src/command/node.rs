//! `zpod-node`: keeps the devices of its node, publishes volumes to its pods and listens to their guests.

use std::net::SocketAddr;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::Parser;
use k8s_openapi::api::core::v1::Node;
use kube::{Api, Client};
use tokio::sync::Notify;
use uuid::Uuid;
use zpod_kubernetes::KubeCatalog;
use zpod_kubernetes::crd::ZfsSnapshot;
use zpod_kubernetes::crd::ZfsVolume;
use zpod_storage::backing::late::LateBacking;
use zpod_storage::catalog::CatalogError;

use super::{DoctorOptions, EndpointOptions, Failure, MetricsOptions, NodeOptions, main_of, told_to_end};
use crate::admin::{Admin, AdminServer, Doctor, Tokens};
use crate::cluster::{
    ClusterPods, NodeReporter, PoolEvents, PoolStates, reconcile_snapshots, reconcile_volumes, report_node,
    write_events, write_states,
};
use crate::csi::{IdentityService, NodeService};
use crate::guest::Monitor;
use crate::kata::{DirectVolumes, RuntimeHandler, udev_rule};
use crate::metrics::{self, NodeMetrics, VolumeMetrics};
use crate::serve::{Services, Socket, serve};
use crate::volumes::{Context, NodeVolumes, Observer, Provisioner, Snapshotter, VolumeError};

/// How often an API server that is away is asked again.
const RETRY: Duration = Duration::from_secs(2);

/// CSI node plugin of zpod: makes the devices that ZfsVolume objects ask for, and hands them to the pods' guests.
#[derive(Debug, Clone, Parser)]
#[command(name = "zpod-node", version)]
struct Options {
    #[command(flatten)]
    endpoint: EndpointOptions,
    #[command(flatten)]
    node: NodeOptions,
    #[command(flatten)]
    metrics: MetricsOptions,
    /// Where to serve the admin endpoint of `kubectl zpod`, such as 0.0.0.0:9812: HTTPS, opened by tokens of the
    /// ServiceAccount zpod-admin for audience zpod.storage. Nowhere, if it is not given.
    #[arg(long)]
    admin_address: Option<SocketAddr>,
    /// The namespace of that ServiceAccount: zpod's own.
    #[arg(long, env = "POD_NAMESPACE", default_value = "zpod-system")]
    namespace: String,
    #[command(flatten)]
    doctor: DoctorOptions,
    /// Handlers of RuntimeClasses whose guests have zpod-guest. A pod on any other can't use a volume. With =go or =rust
    /// behind it, which of Kata's runtimes it is: what that is known not to do is refused. May be given more than once.
    #[arg(long, default_values = ["kata-zpod=go"])]
    runtime_handler: Vec<RuntimeHandler>,
}

/// Parses the command line, runs, and says why where that failed.
pub fn run() -> ExitCode {
    let options = Options::parse();
    // Before the runtime makes threads: each would keep what it has.
    if let Err(error) = crate::privileges::drop_unneeded().and_then(|()| crate::system_calls::refuse_unneeded()) {
        eprintln!("zpod-node: privileges can't be given up: {error}");
        return ExitCode::FAILURE;
    }
    main_of("zpod-node", run_until_signal(options))
}

async fn run_until_signal(options: Options) -> Result<(), Failure> {
    let (end, node) = (told_to_end()?, options.node);
    let client = zpod_kubernetes::connect().await?;
    let backing = Arc::new(LateBacking::open(&node.backing_dir, node.overprovision)?);
    let doctor = Doctor::new(options.doctor.places(&node), backing.clone())
        .in_cluster(client.clone(), options.runtime_handler.iter().map(|handler| handler.name.clone()).collect());
    let direct = DirectVolumes::open(&node.direct_volume_dir)?;
    udev_rule::write(&node.udev_dir, &node.volume_dirs())?;
    let catalog = KubeCatalog::<ZfsVolume>::of_node(client.clone(), &node.node_name);
    let snapshots = KubeCatalog::<ZfsSnapshot>::of_node(client.clone(), &node.node_name);
    let boot_id = Context::boot_id()?;
    let (mirrors, boot) = (node.mirrors(&backing), boot_id.clone());
    let (catalog, snapshots) = (Arc::new(catalog), Arc::new(snapshots));
    let context = Context::with_mirrors(node.node_name, boot, catalog, snapshots, backing.clone(), mirrors);
    context.allow_zfs_access(node.access.allow_zfs_access);
    if let Some(uid) = node_uid(&client, context.node()).await? {
        context.set_node_uid(uid);
    }
    let mut registry = metrics::registry();
    NodeMetrics::register(&mut registry, context.node(), backing);
    let states = PoolStates::new(context.node(), &boot_id);
    let (events, waiting) = PoolEvents::new(context.node());
    let observers: Vec<Arc<dyn Observer>> =
        vec![VolumeMetrics::register(&mut registry, context.node()), states.clone(), events];
    let _metrics = options.metrics.serve(registry).await?;
    let pods = ClusterPods::new(client.clone(), options.runtime_handler.clone());
    let volumes = load(&context, direct).await?.with_ephemeral(node.inline.limits());
    let volumes = volumes.observed_by(Arc::new(observers)).checking_pods(Arc::new(pods));
    tokio::spawn(volumes.clone().keep_scrubbing());
    tokio::spawn(volumes.clone().keep_finding_unheard());
    tokio::spawn(volumes.clone().keep_ending_abandoned());
    tokio::spawn(volumes.clone().keep_withdrawing_abandoned());
    let _monitor = Monitor::start(node.kata_run_dir, Arc::new(volumes.clone()));
    let _admin = match options.admin_address {
        Some(address) => {
            let (admin, tokens) =
                (Admin::new(volumes.clone(), doctor), Tokens::new(client.clone(), &options.namespace));
            let server = AdminServer::https(address, admin, tokens).await;
            Some(server.map_err(|error| format!("--admin-address {address}: {error}"))?)
        }
        None => None,
    };
    let endpoint = options.endpoint.endpoint;
    let socket = Socket::bind(&endpoint).map_err(|e| format!("{}: {e}", endpoint.display()))?;
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        node = context.node(),
        endpoint = %endpoint.display(),
        devices = %context.location().display(),
        runtime_handlers = ?options.runtime_handler,
        "serving"
    );
    let changed = Arc::new(Notify::new());
    let provisioner = Provisioner::new(context.clone()).telling(volumes.clone());
    let reporter = NodeReporter { context: context.clone(), changed: changed.clone() };
    let services = Services {
        identity: IdentityService::new(context.clone()),
        controller: None,
        groups: None,
        node: Some(NodeService::new(volumes.clone())),
    };
    let ending = context.clone();
    let end = async move {
        end.await;
        ending.end();
    };
    let name = context.node().to_owned();
    let snapshotter = Snapshotter::new(context.clone());
    tokio::select! {
        served = serve(socket, services, end) => served?,
        () = reconcile_volumes(client.clone(), name.clone(), volumes, provisioner, changed.clone(), states.clone()) => {
            return Err("the watch of ZfsVolumes has ended".into());
        }
        () = reconcile_snapshots(client.clone(), name, snapshotter, changed) => {
            return Err("the watch of ZfsSnapshots has ended".into());
        }
        () = report_node(client.clone(), reporter) => {}
        () = write_states(client.clone(), states) => {}
        () = write_events(client, waiting) => {}
    }
    Ok(())
}

/// The UID of this node, after which its inline volumes are named; nothing where the node is not known yet.
async fn node_uid(client: &Client, name: &str) -> Result<Option<Uuid>, Failure> {
    let nodes: Api<Node> = Api::all(client.clone());
    loop {
        match nodes.get_metadata_opt(name).await {
            Ok(found) => {
                let uid = found.and_then(|node| node.metadata.uid);
                return Ok(uid.and_then(|uid| uid.parse().ok()));
            }
            Err(kube::Error::Api(status)) if status.code < 429 => {
                return Err(format!("node {name} can't be looked up: {status}").into());
            }
            Err(error) => tracing::warn!("node {name} can't be looked up: {error}; trying again"),
        }
        tokio::time::sleep(RETRY).await;
    }
}

/// Takes up where an earlier process left off. The API server may be away just now: that is no reason to end.
async fn load(context: &Arc<Context>, direct: DirectVolumes) -> Result<NodeVolumes, VolumeError> {
    loop {
        match NodeVolumes::load(context.clone(), direct.clone()).await {
            Err(error @ VolumeError::Catalog(CatalogError::Unavailable { .. })) => {
                tracing::warn!("{error}; trying again")
            }
            loaded => return loaded,
        }
        tokio::time::sleep(RETRY).await;
    }
}
