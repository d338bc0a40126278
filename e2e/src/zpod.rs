//! The program under test: `zpod --standalone`.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result};
use tokio::time::{Instant, sleep};

use crate::csi::Csi;
use crate::process::Process;
use crate::{PATIENCE, inputs};

/// Starts it in a node's directory and waits until it answers Probe.
///
/// # Errors
/// When it doesn't.
pub(crate) async fn start(dir: &Path, csi: &mut Csi, more: &[String]) -> Result<Process> {
    let place = |name: &str| dir.join(name).display().to_string();
    let arguments = [
        "--standalone".to_owned(),
        "--endpoint".to_owned(),
        format!("unix://{}", place("csi.sock")),
        "--admin-endpoint".to_owned(),
        format!("unix://{}", place("admin.sock")),
        "--node-name".to_owned(),
        "node-1".to_owned(),
        "--state-dir".to_owned(),
        place("state"),
        "--backing-dir".to_owned(),
        place("volumes"),
        "--direct-volume-dir".to_owned(),
        place("direct-volumes"),
        "--kata-run-dir".to_owned(),
        place("kata"),
        "--udev-dir".to_owned(),
        place("udev"),
        "--metrics-address".to_owned(),
        "127.0.0.1:0".to_owned(),
    ];
    let arguments: Vec<_> = arguments.into_iter().chain(more.iter().cloned()).collect();
    let filter = std::env::var("ZPOD_E2E_LOG").unwrap_or_else(|_| "info".to_owned());
    let mut process = Process::start(&inputs::zpod()?, arguments, &[("RUST_LOG", &filter)], &dir.join("zpod.log"))?;
    let deadline = Instant::now() + PATIENCE;
    loop {
        process.must_run()?;
        match csi.probe().await {
            Ok(true) => return Ok(process),
            Err(error) if Instant::now() >= deadline => {
                return Err(error).with_context(|| format!("zpod doesn't answer Probe: {}", process.tail()));
            }
            _ => sleep(Duration::from_millis(30)).await,
        }
    }
}
