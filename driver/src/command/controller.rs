//! `zpod-controller`: serves CSI's controller to the sidecars of its pod. Any number may run.

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::Parser;

use super::{EndpointOptions, Failure, MetricsOptions, main_of, told_to_end};
use crate::cluster::{ClusterProvisioner, Nodes};
use crate::csi::{ControllerService, IdentityService};
use crate::metrics;
use crate::serve::{Services, Socket, serve};

/// CSI controller of zpod: asks the nodes for volumes through ZfsVolume objects.
#[derive(Debug, Clone, Parser)]
#[command(name = "zpod-controller", version)]
struct Options {
    #[command(flatten)]
    endpoint: EndpointOptions,
    #[command(flatten)]
    metrics: MetricsOptions,
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
    let _metrics = options.metrics.serve(metrics::registry()).await?;
    let client = zpod_kubernetes::connect().await?;
    let nodes = Arc::new(Nodes::watch(client.clone()));
    let provisioner = ClusterProvisioner::new(client, nodes, Duration::from_secs(options.node_timeout));
    let endpoint = options.endpoint.endpoint;
    let socket = Socket::bind(&endpoint).map_err(|e| format!("{}: {e}", endpoint.display()))?;
    tracing::info!(version = env!("CARGO_PKG_VERSION"), endpoint = %endpoint.display(), "serving");
    let services = Services {
        identity: IdentityService::new(Arc::new(provisioner.clone())),
        controller: Some(ControllerService::new(Arc::new(provisioner))),
        node: None,
    };
    serve(socket, services, end).await?;
    Ok(())
}
