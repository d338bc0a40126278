//! What Prometheus is told.
//!
//! # Design
//! Numbers of volumes are read when they are asked for, from the last report of each guest, and only of volumes that
//! are published here: what is withdrawn is not told any more, so their count is bounded by the pods of the node.
//! Labels are names from the orchestrator and words of ours, never a guest's.

mod node;
mod operations;
mod server;
mod volumes;

pub use node::NodeMetrics;
pub use operations::observe;
pub use prometheus_client::registry::Registry;
pub use server::{Server, serve};
pub use volumes::VolumeMetrics;

use std::fmt;

use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric as _};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::metrics::info::Info;

/// A registry with what every program of ours tells: its version, and how long the calls of CSI took.
pub fn registry() -> Registry {
    let mut registry = Registry::default();
    let version = Info::new(vec![("version", env!("CARGO_PKG_VERSION"))]);
    registry.register("zpod_build", "The version that runs", version);
    operations::register(&mut registry);
    registry
}

/// Writes a family of gauges.
fn gauges<L: EncodeLabelSet>(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    samples: impl IntoIterator<Item = (L, f64)>,
) -> fmt::Result {
    let mut samples = samples.into_iter().peekable();
    if samples.peek().is_none() {
        return Ok(());
    }
    let mut family = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
    samples.try_for_each(|(labels, value)| ConstGauge::new(value).encode(family.encode_family(&labels)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use prometheus_client::encoding::text::encode;

    #[test]
    fn every_program_tells_its_version() {
        let mut text = String::new();
        encode(&mut text, &registry()).unwrap();
        assert!(text.contains(concat!("zpod_build_info{version=\"", env!("CARGO_PKG_VERSION"), "\"} 1")), "{text}");
        assert!(text.ends_with("# EOF\n"), "{text}");
    }
}
