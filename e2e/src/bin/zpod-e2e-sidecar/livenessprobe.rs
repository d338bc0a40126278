//! livenessprobe's part.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use clap::Args;
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::timeout;
use zpod_e2e::csi::Csi;

use crate::{Shared, duration, health};

#[derive(Args)]
pub(crate) struct Flags {
    #[command(flatten)]
    pub(crate) shared: Shared,
    /// How long Probe may take.
    #[arg(long, default_value = "1s", value_parser = duration)]
    probe_timeout: Duration,
}

/// Answers until SIGTERM.
pub(crate) async fn run(flags: Flags) -> Result<()> {
    let endpoint = flags.shared.endpoint().unwrap_or_else(|| "0.0.0.0:9808".to_owned());
    let csi = Csi::new(&flags.shared.csi_address);
    let check = async || {
        let mut csi = csi.clone();
        let ready = timeout(flags.probe_timeout, csi.probe()).await.context("Probe: no answer in time")?;
        ensure!(ready.context("Probe")?, "Probe: the driver is not ready");
        Ok(())
    };
    let mut terminate = signal(SignalKind::terminate())?;
    tokio::select! {
        result = health::serve(&endpoint, check) => result,
        _ = terminate.recv() => Ok(()),
    }
}
