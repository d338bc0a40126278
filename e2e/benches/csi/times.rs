//! How long calls took.

use std::collections::BTreeMap;
use std::time::Duration;

use serde_json::{Value, json};

/// Latencies of one call.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Latency {
    pub(crate) p50: f64,
    pub(crate) p99: f64,
}

/// Times of a run, by call.
#[derive(Debug, Default)]
pub(crate) struct Times {
    calls: BTreeMap<&'static str, Vec<Duration>>,
    pub(crate) per_second: f64,
}

impl Times {
    pub(crate) fn add(&mut self, call: &'static str, time: Duration) {
        self.calls.entry(call).or_default().push(time);
    }

    pub(crate) fn merge(&mut self, other: Self) {
        for (call, times) in other.calls {
            self.calls.entry(call).or_default().extend(times);
        }
    }

    /// In milliseconds.
    pub(crate) fn of(&self, call: &str) -> Latency {
        let mut times = self.calls.get(call).cloned().unwrap_or_default();
        times.sort_unstable();
        let at = |percent: usize| {
            let index = (times.len() * percent / 100).min(times.len().saturating_sub(1));
            times.get(index).map_or(0.0, |time| time.as_secs_f64() * 1e3)
        };
        Latency { p50: at(50), p99: at(99) }
    }

    pub(crate) fn json(&self) -> Value {
        let calls = self.calls.keys().map(|call| {
            let latency = self.of(call);
            ((*call).to_owned(), json!({ "p50": latency.p50, "p99": latency.p99 }))
        });
        Value::Object(calls.collect())
    }
}
