use std::sync::LazyLock;
use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::Registry;
use tonic::Code;

/// From what a lookup takes to the longest that a sidecar waits.
const BUCKETS: [f64; 12] = [0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0];

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Labels {
    method: &'static str,
    code: String,
}

type Operations = Family<Labels, Histogram, fn() -> Histogram>;

/// One for the process, like the log: whoever answers a call would else have to be handed it.
static OPERATIONS: LazyLock<Operations> = LazyLock::new(|| Family::new_with_constructor(|| Histogram::new(BUCKETS)));

/// Notes how a call of CSI ended, and what it took.
pub fn observe(method: &'static str, code: Code, took: Duration) {
    OPERATIONS.get_or_create(&Labels { method, code: format!("{code:?}") }).observe(took.as_secs_f64());
}

pub(super) fn register(registry: &mut Registry) {
    let help = "How long the calls of CSI took, by method and gRPC code";
    registry.register("zpod_csi_operation_duration_seconds", help, OPERATIONS.clone());
}

#[cfg(test)]
mod tests {
    use super::*;
    use prometheus_client::encoding::text::encode;

    #[test]
    fn a_call_is_counted_by_method_and_code() {
        observe("Test", Code::FailedPrecondition, Duration::from_millis(7));
        observe("Test", Code::FailedPrecondition, Duration::from_secs(60));
        let (mut registry, mut text) = (Registry::default(), String::new());
        register(&mut registry);
        encode(&mut text, &registry).unwrap();
        let labels = r#"method="Test",code="FailedPrecondition""#;
        for line in [
            format!("zpod_csi_operation_duration_seconds_count{{{labels}}} 2"),
            format!(r#"zpod_csi_operation_duration_seconds_bucket{{le="0.01",{labels}}} 1"#),
            format!(r#"zpod_csi_operation_duration_seconds_bucket{{le="30.0",{labels}}} 1"#),
        ] {
            assert!(text.contains(&line), "{line} in {text}");
        }
    }
}
