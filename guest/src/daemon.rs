//! The daemon: proxy and control service. Started by our init before the agent is, and lives as long as the guest.

use std::io::{self, Write as _};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Semaphore, mpsc, watch};
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::ReceiverStream;
use tokio_vsock::{VMADDR_CID_ANY, VMADDR_CID_HOST, VsockAddr, VsockListener, VsockStream};
use zpod_proto::{agent, guest};

use crate::automount;
use crate::control::Control;
use crate::init::ROOT;
use crate::kmsg::KernelLog;
use crate::machine::LinuxMachine;
use crate::modules::{self, Group};
use crate::mounts;
use crate::proxy::Proxy;
use crate::volumes::Volumes;

/// What the daemon says to our init when it listens.
pub const READY: &[u8] = b"ready\n";

/// Where the agent listens when the kernel's command line does not say.
const AGENT: &str = "/run/kata-agent.sock";
/// Connections of the host at once. A shim has one or two; one it gives up on before the agent is up stays until then.
const CONNECTIONS: usize = 128;
/// Calls of the control service at once on one connection.
const CONTROL_CALLS: usize = 16;
/// Threads for calls that block.
const THREADS: usize = 64;

/// Runs the daemon. Returns only when it can't go on.
///
/// # Errors
/// When the sockets can't be opened.
pub fn run() -> io::Result<()> {
    // The agent must not take the daemon with it, nor the memory of the pod's containers.
    let _ = rustix::process::setsid();
    let _ = std::fs::write("/proc/self/oom_score_adj", "-1000");
    keep_memory_private();
    let log = KernelLog::open()?;
    // Nobody else sets one.
    let _ = tracing::subscriber::set_global_default(log);
    if let Err(error) = automount::install(&Path::new(ROOT).join("init")) {
        tracing::warn!("nobody will be able to go into snapshots (.zfs/snapshot): {error}");
    }
    let command_line = std::fs::read_to_string("/proc/cmdline").unwrap_or_default();
    let agent = agent_socket(&command_line).to_owned();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().max_blocking_threads(THREADS).build()?;
    let result = runtime.block_on(serve(&agent));
    if let Err(error) = &result {
        tracing::error!("the daemon ends: {error}");
    }
    result
}

/// Keeps the keys that it holds out of files: there is no core dump of the daemon, nor of the tools of ZFS's that it hands
/// them to, and its memory is not swapped out (a guest has swap where Kata's `enable_guest_swap` says so). The agent and
/// the containers are not started by it, and have their limits as ever.
fn keep_memory_private() {
    use rustix::mm::{MlockAllFlags, mlockall};
    use rustix::process::{DumpableBehavior, Resource, Rlimit, set_dumpable_behavior, setrlimit};
    // Refused to nobody; a guest that runs without is better than none.
    let _ = set_dumpable_behavior(DumpableBehavior::NotDumpable);
    let _ = setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) });
    let _ = mlockall(MlockAllFlags::CURRENT | MlockAllFlags::FUTURE | MlockAllFlags::ONFAULT);
}

/// `agent.server_addr` of the kernel's command line, which is where we tell the agent to listen.
fn agent_socket(command_line: &str) -> &str {
    let addresses = command_line.split_ascii_whitespace().filter_map(|word| word.strip_prefix("agent.server_addr="));
    addresses.filter_map(|address| address.strip_prefix("unix://")).next_back().unwrap_or(AGENT)
}

async fn serve(agent: &str) -> io::Result<()> {
    let root = Path::new(ROOT);
    let proxy_listener = VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, agent::PORT))?;
    let control_listener = VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, guest::PORT))?;
    let bases = root.join("volumes");
    mounts::prepare_bases(&bases)?;
    let (loaded, zfs) = watch::channel(None);
    let volumes = Volumes::new(LinuxMachine::new(root, zfs), bases);
    announce()?;
    tokio::spawn(Arc::clone(&volumes).keep_resuming());
    tokio::spawn(Arc::clone(&volumes).keep_snapshots());
    std::thread::spawn(move || loaded.send_replace(Some(load_zfs(root))));

    let (sender, streams) = mpsc::channel(CONNECTIONS);
    tokio::spawn(accept(control_listener, move |stream| {
        // Full: a caller that is not served yet. This one is dropped and comes again.
        let _ = sender.try_send(Ok::<_, io::Error>(stream));
    }));
    let control = tonic::transport::Server::builder()
        .concurrency_limit_per_connection(CONTROL_CALLS)
        .http2_keepalive_interval(Some(Duration::from_secs(30)))
        .add_service(Control::server(Arc::clone(&volumes)))
        .serve_with_incoming(ReceiverStream::new(streams).map(|stream| stream));
    tokio::spawn(async move {
        if let Err(error) = control.await {
            tracing::error!("the control service ended: {error}");
        }
    });

    let (proxy, places) = (Proxy::new(volumes, agent), Arc::new(Semaphore::new(CONNECTIONS)));
    accept(proxy_listener, move |stream| {
        let Ok(place) = Arc::clone(&places).try_acquire_owned() else {
            tracing::warn!("more than {CONNECTIONS} connections: one is refused");
            return;
        };
        let proxy = Arc::clone(&proxy);
        tokio::spawn(async move {
            if let Err(error) = proxy.serve(stream).await {
                tracing::warn!("a connection of the shim ended: {error}");
            }
            drop(place);
        });
    })
    .await;
    Ok(())
}

/// Takes connections of the host, and of nobody else: a container could reach the port too.
async fn accept(listener: VsockListener, mut serve: impl FnMut(VsockStream)) {
    loop {
        match listener.accept().await {
            Ok((stream, peer)) if peer.cid() == VMADDR_CID_HOST => serve(stream),
            Ok((_, peer)) => tracing::warn!("a connection from CID {} is refused: only the host may", peer.cid()),
            Err(error) => {
                tracing::warn!("accepting a connection failed: {error}");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

/// Tells our init that the agent may start, and the log when that was.
fn announce() -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(READY)?;
    stdout.flush()?;
    // From here on nobody reads it.
    if let Ok(null) = std::fs::File::options().write(true).open("/dev/null") {
        rustix::stdio::dup2_stdout(&null)?;
    }
    tracing::info!("proxy ready after {} ms", since_boot().as_millis());
    Ok(())
}

fn since_boot() -> Duration {
    rustix::time::clock_gettime(rustix::time::ClockId::Boottime).try_into().unwrap_or_default()
}

fn load_zfs(root: &Path) -> Result<(), String> {
    let result = modules::load(&root.join("modules"), Group::Zfs).map_err(|error| error.to_string());
    match &result {
        Ok(_) => tracing::info!("ZFS ready after {} ms", since_boot().as_millis()),
        Err(error) => tracing::error!("ZFS can't be loaded, containers with volumes won't start: {error}"),
    }
    result.map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_agents_socket_is_read_from_the_command_line() {
        assert_eq!(agent_socket("quiet agent.server_addr=unix:///run/a.sock x=y\n"), "/run/a.sock");
        assert_eq!(agent_socket("agent.server_addr=vsock://-1:1024"), AGENT);
        assert_eq!(agent_socket(""), AGENT);
    }
}
