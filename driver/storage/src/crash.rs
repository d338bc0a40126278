//! Crash points: places between two steps where a test kills the process.
//!
//! With the feature `crash-points` and `ZPOD_CRASH_AT=N` in the environment, the Nth point that the process reaches
//! ends it as `kill -9` would. Without the feature a point is nothing.

/// A place between two steps. The name is for the log of the test.
#[cfg(not(feature = "crash-points"))]
#[inline(always)]
pub fn point(_name: &'static str) {}

/// A place between two steps. The name is for the log of the test.
#[cfg(feature = "crash-points")]
pub fn point(name: &'static str) {
    use std::sync::LazyLock;
    use std::sync::atomic::{AtomicU64, Ordering};

    static AT: LazyLock<Option<u64>> = LazyLock::new(|| std::env::var("ZPOD_CRASH_AT").ok()?.parse().ok());
    static REACHED: AtomicU64 = AtomicU64::new(0);

    let Some(at) = *AT else { return };
    if REACHED.fetch_add(1, Ordering::SeqCst) + 1 == at {
        eprintln!("crash point {at}: {name}");
        // No destructor, no flush, no handler: as if killed.
        let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
        std::process::abort();
    }
}
