//! The program that is measured, on directories of its own.

use std::fs;
use std::net::{SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use zpod_e2e::csi::Csi;
use zpod_e2e::inputs;
use zpod_e2e::process::Process;
use zpod_e2e::workdir::Workdir;
use zpod_volume::Bytes;

/// A running `zpod --standalone`; it ends, and its directory goes, on drop.
pub(crate) struct Server {
    process: Process,
    dir: Workdir,
    metrics: SocketAddr,
}

impl Server {
    /// Starts it on `store`.
    pub(crate) async fn start(store: &Path) -> Result<Self> {
        let dir = Workdir::within(store)?;
        // zpod makes no backing directory: a missing one may be a missing mount.
        dir.subdirectory("volumes")?;
        Self::start_on(dir).await
    }

    /// Ends it and starts it again on what there is.
    pub(crate) async fn restart(self) -> Result<Self> {
        let Self { process, dir, .. } = self;
        drop(process);
        Self::start_on(dir).await
    }

    async fn start_on(dir: Workdir) -> Result<Self> {
        let metrics = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
        let path = |name: &str| dir.path().join(name).display().to_string();
        let mut arguments = vec!["--standalone".to_owned()];
        for (flag, value) in [
            ("--endpoint", format!("unix://{}", path("csi.sock"))),
            ("--node-name", "bench".to_owned()),
            ("--state-dir", path("state")),
            ("--backing-dir", path("volumes")),
            ("--direct-volume-dir", path("direct-volumes")),
            ("--kata-run-dir", path("kata")),
            ("--udev-dir", path("udev")),
            ("--metrics-address", metrics.to_string()),
            // Thousands of sparse volumes: what they could take is not what is measured.
            ("--overprovision", "1000".to_owned()),
        ] {
            arguments.extend([flag.to_owned(), value]);
        }
        let log = dir.path().join("zpod.log");
        let process = Process::start(&inputs::zpod()?, arguments, &[("RUST_LOG", "warn")], &log)?;
        let server = Self { process, dir, metrics };
        let deadline = Instant::now() + Duration::from_secs(20);
        while server.csi().probe().await.is_err() {
            if Instant::now() > deadline {
                bail!("zpod doesn't answer: {}", server.process.tail());
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        Ok(server)
    }

    /// A client with a connection of its own.
    pub(crate) fn csi(&self) -> Csi {
        Csi::new(&self.dir.path().join("csi.sock"))
    }

    /// Where metrics are served.
    pub(crate) fn metrics(&self) -> SocketAddr {
        self.metrics
    }

    /// The image of a volume.
    pub(crate) fn image(&self, id: &str) -> PathBuf {
        self.dir.path().join(format!("volumes/{id}.img"))
    }

    /// A target path for a client.
    pub(crate) fn target(&self, client: usize) -> PathBuf {
        self.dir.path().join(format!("pods/{client}/mount"))
    }

    /// Resident memory.
    pub(crate) fn resident(&self) -> Result<Bytes> {
        let path = format!("/proc/{}/status", self.process.id());
        let status = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
        let kib: u64 = line.trim().trim_end_matches(" kB").parse().context("VmRSS is no number")?;
        Ok(Bytes::kib(kib))
    }
}
