//! Waiting for a state.

use std::time::{Duration, Instant};

/// Waits until something holds; fails with `what` where it does not.
pub(crate) async fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !holds() {
        assert!(Instant::now() < deadline, "{what}: did not happen");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
