//! `zpod-controller`: serves CSI's controller to the sidecars of its pod. Any number may run.

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::Parser;
use kube::Client;

use super::{AccessOptions, EndpointOptions, Failure, MetricsOptions, main_of, told_to_end};
use crate::cluster::{ClusterProvisioner, ClusterSnapshotter, Election, Groups, Nodes, Orphans};
use crate::csi::{ControllerService, GroupControllerService, IdentityService};
use crate::metrics;
use crate::serve::{Services, Socket, serve};

/// How often an election that can't be held is tried again.
const RETRY: Duration = Duration::from_secs(10);

/// CSI controller of zpod: asks the nodes for volumes through ZfsVolume objects.
#[derive(Debug, Clone, Parser)]
#[command(name = "zpod-controller", version)]
struct Options {
    #[command(flatten)]
    endpoint: EndpointOptions,
    #[command(flatten)]
    metrics: MetricsOptions,
    #[command(flatten)]
    access: AccessOptions,
    /// The namespace of the Lease by which controllers choose a leader.
    #[arg(long, env = "POD_NAMESPACE", default_value = "default")]
    namespace: String,
    /// This process's name in that choice: its pod's.
    #[arg(long, env = "POD_NAME", default_value = "zpod-controller")]
    identity: String,
    /// How long a node is waited for, in seconds. Less than --timeout of the sidecars, so that they hear why.
    #[arg(long, default_value_t = 40, value_parser = clap::value_parser!(u64).range(1..=600))]
    node_timeout: u64,
}

/// Parses the command line, runs, and says why where that failed.
pub fn run() -> ExitCode {
    main_of("zpod-controller", run_until_signal(Options::parse()))
}

async fn run_until_signal(options: Options) -> Result<(), Failure> {
    let end = told_to_end()?;
    let mut registry = metrics::registry();
    let orphans = Orphans::register(&mut registry);
    let _metrics = options.metrics.serve(registry).await?;
    let client = zpod_kubernetes::connect().await?;
    tokio::spawn(lead(client.clone(), options.namespace, options.identity, orphans));
    let nodes = Arc::new(Nodes::watch(client.clone()));
    let patience = Duration::from_secs(options.node_timeout);
    let snapshots = Arc::new(ClusterSnapshotter::new(client.clone(), patience));
    let provisioner =
        ClusterProvisioner::new(client, nodes, patience).allowing_zfs_access(options.access.allow_zfs_access);
    let endpoint = options.endpoint.endpoint;
    let socket = Socket::bind(&endpoint).map_err(|e| format!("{}: {e}", endpoint.display()))?;
    tracing::info!(version = env!("CARGO_PKG_VERSION"), endpoint = %endpoint.display(), "serving");
    let services = Services {
        identity: IdentityService::new(Arc::new(provisioner.clone())),
        controller: Some(ControllerService::new(Arc::new(provisioner), snapshots.clone())),
        groups: Some(GroupControllerService::new(snapshots)),
        node: None,
    };
    serve(socket, services, end).await?;
    Ok(())
}

/// Does what one controller alone should do, while this is the one.
async fn lead(client: Client, namespace: String, identity: String, orphans: Orphans) {
    loop {
        match Election::join(client.clone(), &namespace, &identity).await {
            Ok(election) => {
                let leads = || election.leads.clone();
                tokio::join!(orphans.clone().watch(client.clone(), leads()), Groups.watch(client.clone(), leads()));
            }
            Err(error) => tracing::warn!("election: {error}"),
        }
        tokio::time::sleep(RETRY).await;
    }
}
