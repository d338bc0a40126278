use std::fmt;
use std::sync::Arc;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::DescriptorEncoder;
use prometheus_client::registry::Registry;
use zpod_storage::backing::{Backing, Capacity};

use super::gauges;

/// Room on this node, asked for when it is told. A device provider that does not answer is left out.
#[derive(Debug)]
pub struct NodeMetrics {
    node: String,
    backing: Arc<dyn Backing>,
}

impl NodeMetrics {
    /// Registers what a node has.
    pub fn register(registry: &mut Registry, node: &str, backing: Arc<dyn Backing>) {
        registry.register_collector(Box::new(Self { node: node.to_owned(), backing }));
    }
}

impl Collector for NodeMetrics {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let Ok(Capacity { total, available, .. }) = self.backing.capacity() else { return Ok(()) };
        let sample = |value: u64| [([("node", self.node.as_str())], value as f64)];
        let help = "Bytes that the volumes of the node may take together, over-commit included";
        gauges(&mut encoder, "zpod_node_total_bytes", help, sample(total.0))?;
        let help = "Bytes that can still be promised to volumes of the node";
        gauges(&mut encoder, "zpod_node_available_bytes", help, sample(available.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use prometheus_client::encoding::text::encode;
    use zpod_storage::backing::sim::SimBacking;
    use zpod_volume::Bytes;

    #[test]
    fn a_node_tells_its_room() {
        let (mut registry, mut text) = (Registry::default(), String::new());
        NodeMetrics::register(&mut registry, "n1", Arc::new(SimBacking::new(Bytes::gib(4), 1.0)));
        encode(&mut text, &registry).unwrap();
        assert!(text.contains("zpod_node_total_bytes{node=\"n1\"} 4294967296"), "{text}");
        assert!(text.contains("zpod_node_available_bytes{node=\"n1\"} "), "{text}");
    }
}
