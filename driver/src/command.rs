//! The command lines of the three programs: `zpod` (one machine, no cluster), `zpod-controller` and `zpod-node`.

pub mod controller;
mod log;
pub mod node;
pub mod standalone;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use clap::Args;
use clap::builder::{PathBufValueParser, TypedValueParser};
use tokio::signal::unix::{SignalKind, signal};
use zpod_storage::backing::late::LateBacking;
use zpod_storage::backing::mirrored::Mirrored;
use zpod_volume::Bytes;

use crate::admin::Places;
use crate::kata::MappedHalves;
use crate::metrics::{Registry, Server};
use crate::serve::endpoint_path;
use crate::volumes::{InlineLimits, Mirrors, NO_MIRRORS, Share};

/// Two threads keep two cores busy; the work itself waits for the kernel and the network.
const WORKERS: usize = 2;
/// Calls that wait for the disk at the same time.
const BLOCKING: usize = 16;

type Failure = Box<dyn std::error::Error + Send + Sync>;

/// What a program that keeps volumes is told about its node.
#[derive(Debug, Clone, Args)]
pub struct NodeOptions {
    /// The node's name.
    #[arg(long, env = "NODE_NAME", value_parser = node_name)]
    pub node_name: String,
    /// Where the volumes' devices are. Must exist: it is not made, for the mount that should be there may be missing.
    #[arg(long, default_value = "/var/lib/zpod/volumes", value_parser = absolute())]
    pub backing_dir: PathBuf,
    /// A second directory, on another disk: volumes of classes with `vdevs: mirror-2` have one half in each. Needs
    /// device-mapper and dmsetup. Nowhere, if it is not given: then there are no such volumes.
    #[arg(long, value_parser = absolute())]
    pub mirror_dir: Option<PathBuf>,
    /// How much may be promised for each byte there is: 1.0 keeps every promise, less keeps some space back.
    #[arg(long, default_value_t = 1.0, value_parser = overprovision)]
    pub overprovision: f64,
    /// Where Kata looks for direct volumes.
    #[arg(long, default_value = "/run/kata-containers/shared/direct-volumes", value_parser = absolute())]
    pub direct_volume_dir: PathBuf,
    /// Where Kata's shims have the directories of their sandboxes. May be given more than once.
    #[arg(long, default_values = ["/run/kata", "/run/vc/sbs"], value_parser = absolute())]
    pub kata_run_dir: Vec<PathBuf>,
    /// Where udev of the node has its files, if it has any. A rule there keeps it away from what guests write.
    #[arg(long, default_value = "/run/udev", value_parser = absolute())]
    pub udev_dir: PathBuf,
    /// What pods may have inline.
    #[command(flatten)]
    pub inline: InlineOptions,
    /// What containers may have of ZFS.
    #[command(flatten)]
    pub access: AccessOptions,
}

/// What containers may have of ZFS.
#[derive(Debug, Clone, Copy, Args)]
pub struct AccessOptions {
    /// Allow volumes of classes with `zfsAccess: volume`: their pods' containers get /dev/zfs of their own guest's kernel,
    /// and its tools. Forbidden, if it is not given.
    #[arg(long)]
    pub allow_zfs_access: bool,
}

/// What pods may have inline.
#[derive(Debug, Clone, Args)]
pub struct InlineOptions {
    /// The largest volume that a pod may have inline (CSI ephemeral volumes), which no quota of its namespace counts: a
    /// number of bytes, or one with Ki, Mi, Gi or Ti behind it. 0: there are none.
    #[arg(long, default_value = "16Gi")]
    pub ephemeral_max_size: Bytes,
    /// How many inline volumes one pod may have.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..))]
    pub ephemeral_pod_count: u32,
    /// What the inline volumes of one pod may hold together: a size, or a share of what volumes may take on this node, such
    /// as 10%.
    #[arg(long, default_value = "32Gi")]
    pub ephemeral_pod_size: Share,
    /// How many inline volumes the pods of one namespace may have on this node.
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..))]
    pub ephemeral_namespace_count: u32,
    /// What the inline volumes of one namespace may hold together on this node: a size or a share.
    #[arg(long, default_value = "25%")]
    pub ephemeral_namespace_size: Share,
}

impl InlineOptions {
    /// The bounds.
    pub fn limits(&self) -> InlineLimits {
        InlineLimits {
            largest: self.ephemeral_max_size,
            pod_count: self.ephemeral_pod_count,
            pod_size: self.ephemeral_pod_size,
            namespace_count: self.ephemeral_namespace_count,
            namespace_size: self.ephemeral_namespace_size,
        }
    }
}

impl NodeOptions {
    /// Every directory that has images.
    pub fn volume_dirs(&self) -> Vec<&Path> {
        [Some(self.backing_dir.as_path()), self.mirror_dir.as_deref()].into_iter().flatten().collect()
    }

    /// What there is for volumes with two devices, or why there is nothing. A second directory that can't be used keeps
    /// nobody from the other halves.
    pub fn mirrors(&self, first: &Arc<LateBacking>) -> Result<Mirrors, String> {
        let Some(dir) = &self.mirror_dir else { return Err(NO_MIRRORS.to_owned()) };
        let halves = MappedHalves::open().map_err(|error| error.to_string()).inspect_err(|error| {
            tracing::error!("no volumes with two devices: {error}");
        })?;
        let second = LateBacking::open_beside(&self.backing_dir, dir, self.overprovision);
        let backing = match second {
            Ok(second) => Mirrored::new(first.clone(), Arc::new(second)),
            Err(error) => {
                tracing::error!("volumes with two devices go on without the second one: {error}");
                Mirrored::without_second(first.clone(), dir, error.to_string())
            }
        };
        Ok(Mirrors { backing: Arc::new(backing), halves: Arc::new(halves) })
    }
}

/// Where `kubectl zpod` finds the guest's kernel.
#[derive(Debug, Clone, Args)]
pub struct DoctorOptions {
    /// Where the guest's kernel and initrd are on the node, for the doctor to look at.
    #[arg(long, default_value = "/opt/zpod/guest")]
    pub guest_dir: PathBuf,
}

impl DoctorOptions {
    /// What the doctor looks at.
    pub fn places(&self, node: &NodeOptions) -> Places {
        Places {
            backing_dir: node.backing_dir.clone(),
            direct_volume_dir: node.direct_volume_dir.clone(),
            kata_run_dirs: node.kata_run_dir.clone(),
            guest_dir: self.guest_dir.clone(),
        }
    }
}

/// Where CSI is served.
#[derive(Debug, Clone, Args)]
pub struct EndpointOptions {
    /// Where to serve CSI.
    #[arg(long, env = "CSI_ENDPOINT", default_value = "unix:///run/zpod/csi.sock", value_parser = endpoint_path)]
    pub endpoint: PathBuf,
}

/// Where Prometheus is answered.
#[derive(Debug, Clone, Args)]
pub struct MetricsOptions {
    /// Where to answer `GET /metrics`, such as 0.0.0.0:9810. Nowhere, if it is not given.
    #[arg(long)]
    pub metrics_address: Option<SocketAddr>,
}

impl MetricsOptions {
    async fn serve(&self, registry: Registry) -> Result<Option<Server>, Failure> {
        let Some(address) = self.metrics_address else { return Ok(None) };
        let server = crate::metrics::serve(address, registry).await;
        let server = server.map_err(|error| format!("--metrics-address {address}: {error}"))?;
        tracing::info!(address = %server.address(), "metrics are served");
        Ok(Some(server))
    }
}

/// A path from the root, whatever was given: Kata, and whoever else reads what zpod writes, has another working directory.
fn absolute() -> impl TypedValueParser<Value = PathBuf> {
    PathBufValueParser::new().try_map(std::path::absolute)
}

fn node_name(text: &str) -> Result<String, String> {
    // Kubernetes: names of nodes are DNS subdomains.
    let allowed = (1..=253).contains(&text.len());
    if allowed { Ok(text.to_owned()) } else { Err("1 to 253 characters are allowed".into()) }
}

fn overprovision(text: &str) -> Result<f64, String> {
    let ratio = text.parse().ok().filter(|ratio: &f64| *ratio > 0.0 && *ratio <= 1000.0);
    ratio.ok_or_else(|| "more than 0, up to 1000, is allowed; 1.0 keeps every promise".into())
}

/// Logs to stderr, runs to the end, and says why where that failed.
fn main_of(program: &str, work: impl Future<Output = Result<(), Failure>>) -> ExitCode {
    log::begin();
    match crate::memory::keep_private() {
        Ok(true) => {}
        Ok(false) => tracing::info!("memory is not locked (RLIMIT_MEMLOCK): with swap, keys may get to its disk"),
        Err(error) => {
            eprintln!("{program}: core dumps can't be switched off: {error}");
            return ExitCode::FAILURE;
        }
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(WORKERS)
        .max_blocking_threads(BLOCKING)
        .enable_all()
        .build();
    match runtime.map_err(Failure::from).and_then(|runtime| runtime.block_on(work)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{program}: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Ends when the process is told to.
fn told_to_end() -> Result<impl Future<Output = ()>, Failure> {
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        node: NodeOptions,
    }

    #[test]
    fn every_directory_is_named_from_the_root() {
        let given = [
            "--backing-dir=volumes",
            "--mirror-dir=./more",
            "--direct-volume-dir=kata/direct",
            "--kata-run-dir=shims",
            "--udev-dir=udev",
        ];
        let line = Line::parse_from(["zpod", "--node-name=n"].into_iter().chain(given));
        let NodeOptions { backing_dir, mirror_dir, direct_volume_dir, kata_run_dir, udev_dir, .. } = line.node;
        let here = std::env::current_dir().unwrap();
        assert_eq!(backing_dir, here.join("volumes"));
        assert_eq!(mirror_dir, Some(here.join("more")));
        assert_eq!(direct_volume_dir, here.join("kata/direct"));
        assert_eq!(kata_run_dir, [here.join("shims")]);
        assert_eq!(udev_dir, here.join("udev"));
        assert_eq!(Line::parse_from(["zpod", "--node-name=n", "--backing-dir=/a"]).node.backing_dir, Path::new("/a"));
    }
}
