//! Stand-ins of node-driver-registrar and livenessprobe: they take the same flags and speak the same protocols, so that
//! a chart which names the official images runs where these can't be had.
//!
//! # Limitations
//! No metrics, and of the official flags only those below; another one is an error, as in the originals.

mod health;
mod livenessprobe;
mod registrar;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use clap::{Args, Parser};

#[derive(Parser)]
#[command(about = "Stand-ins of CSI sidecars")]
enum Sidecar {
    /// Makes a CSI driver known to kubelet.
    NodeDriverRegistrar(registrar::Flags),
    /// Answers HTTP with what CSI's Probe says.
    Livenessprobe(livenessprobe::Flags),
}

/// Flags that all CSI sidecars have.
#[derive(Args)]
struct Shared {
    /// The driver's socket.
    #[arg(long, default_value = "/run/csi/socket", value_parser = socket)]
    csi_address: PathBuf,
    /// Where `/healthz` is served, as `:9808`.
    #[arg(long, conflicts_with = "health_port")]
    http_endpoint: Option<String>,
    /// The older way to say it.
    #[arg(long)]
    health_port: Option<u16>,
    /// klog's verbosity.
    #[arg(long, short)]
    v: Option<u8>,
}

impl Shared {
    /// The address of `/healthz`, in the form that sockets take.
    fn endpoint(&self) -> Option<String> {
        let named = self.http_endpoint.clone().or_else(|| self.health_port.map(|port| format!(":{port}")));
        named.map(|text| if text.starts_with(':') { format!("0.0.0.0{text}") } else { text })
    }
}

#[expect(clippy::unnecessary_wraps, reason = "clap wants a Result")]
fn socket(text: &str) -> Result<PathBuf, String> {
    Ok(PathBuf::from(text.strip_prefix("unix://").unwrap_or(text)))
}

/// A duration in Go's notation, with one unit.
fn duration(text: &str) -> Result<Duration> {
    let digits = text.find(|letter: char| !letter.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let number: u64 = number.parse().with_context(|| format!("{text} is not a duration like 3s"))?;
    Ok(match unit {
        "ms" => Duration::from_millis(number),
        "s" => Duration::from_secs(number),
        "m" => Duration::from_secs(60 * number),
        _ => bail!("{text} is not a duration like 3s"),
    })
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<()> {
    match Sidecar::parse() {
        Sidecar::NodeDriverRegistrar(flags) => registrar::run(flags).await,
        Sidecar::Livenessprobe(flags) => livenessprobe::run(flags).await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_flags_of_the_official_sidecars_are_understood() {
        let registrar = "sidecar node-driver-registrar --csi-address=/csi/csi.sock --v=5 --http-endpoint=:9809 \
            --kubelet-registration-path=/var/lib/kubelet/plugins/csi.zpod.storage/csi.sock --timeout=10s";
        let Sidecar::NodeDriverRegistrar(flags) = Sidecar::parse_from(registrar.split_whitespace()) else {
            panic!("another sidecar");
        };
        assert_eq!(flags.shared.endpoint().as_deref(), Some("0.0.0.0:9809"));
        let probe = "sidecar livenessprobe --csi-address=unix:///csi/csi.sock --probe-timeout=3s --health-port=9808";
        let Sidecar::Livenessprobe(flags) = Sidecar::parse_from(probe.split_whitespace()) else {
            panic!("another sidecar");
        };
        assert_eq!(flags.shared.csi_address, PathBuf::from("/csi/csi.sock"));
        assert_eq!(flags.shared.endpoint().as_deref(), Some("0.0.0.0:9808"));
        assert!(Sidecar::try_parse_from(["sidecar", "livenessprobe", "--no-such-flag"]).is_err());
    }

    #[test]
    fn durations_are_read_as_go_writes_them() {
        for (text, expected) in [("500ms", 500), ("3s", 3_000), ("2m", 120_000)] {
            assert_eq!(duration(text).unwrap(), Duration::from_millis(expected));
        }
        assert!(["", "s", "3", "3h2m", "-1s"].iter().all(|text| duration(text).is_err()));
    }
}
