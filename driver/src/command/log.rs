//! The log: lines on stderr, of which no tenant makes more than its part.
//!
//! # Design
//! A guest decides how often it is refused something, and a pod how often it is started. So of each kind of line (the place
//! in the code that writes it) there are so many for each volume and for each sandbox, whoever causes them: [`BURST`] at
//! once, then one each [`EVERY`]. The next line that is written says how many were left out before it. What names neither
//! a volume nor a sandbox is of no tenant, and is written always.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;
use tracing::field::{Field, Visit};
use tracing::{Event, Subscriber};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;

use crate::bucket::Bucket;

/// So many lines of one kind about one volume may come at once.
const BURST: u32 = 20;
/// After that, one in this time.
const EVERY: Duration = Duration::from_secs(30);
/// So many kinds of lines of volumes and sandboxes are kept in mind. A node has some hundred volumes.
const KEPT: usize = 4096;
/// Where there are more at the same time, those together have the part of one.
const MANY: (u32, String) = (0, String::new());
/// The fields by which a line is a tenant's, and those that tell one kind from another beside its place.
const KEYS: [&str; 4] = ["volume", "sandbox", "snapshot", "call"];

/// Begins to log, as `RUST_LOG` says.
pub(super) fn begin() {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| "info".into());
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
        .with_writer(std::io::stderr)
        .map_event_format(Bounded::new)
        .init();
}

/// A format that leaves lines out where there are too many.
struct Bounded<F> {
    format: F,
    /// By place and tenant.
    kinds: Mutex<HashMap<(u32, String), Kind>>,
}

struct Kind {
    bucket: Bucket,
    left_out: u64,
}

impl<F> Bounded<F> {
    fn new(format: F) -> Self {
        Self { format, kinds: Mutex::default() }
    }

    /// How many lines were left out before this one; nothing where it is left out as well.
    fn admit(&self, place: u32, whose: String, now: Instant) -> Option<u64> {
        let mut kinds = self.kinds.lock().unwrap_or_else(PoisonError::into_inner);
        let mut key = (place, whose);
        if kinds.len() >= KEPT && !kinds.contains_key(&key) {
            kinds.retain(|_, kind| !kind.bucket.is_full(now));
            if kinds.len() >= KEPT {
                key = MANY;
            }
        }
        let kind = kinds.entry(key).or_insert_with(|| Kind { bucket: Bucket::new(BURST, EVERY), left_out: 0 });
        if kind.bucket.try_take(now) {
            return Some(std::mem::take(&mut kind.left_out));
        }
        kind.left_out += 1;
        None
    }
}

impl<S, N, F> FormatEvent<S, N> for Bounded<F>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
    F: FormatEvent<S, N>,
{
    fn format_event(&self, context: &FmtContext<'_, S, N>, mut writer: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let mut whose = Whose(String::new());
        event.record(&mut whose);
        if whose.0.is_empty() {
            return self.format.format_event(context, writer, event);
        }
        let place = event.metadata();
        let key = format!("{} {}", place.target(), whose.0);
        match self.admit(place.line().unwrap_or_default(), key, Instant::now()) {
            None => Ok(()),
            Some(0) => self.format.format_event(context, writer, event),
            Some(left_out) => {
                writeln!(writer, "{left_out} lines like the next one were left out")?;
                self.format.format_event(context, writer, event)
            }
        }
    }
}

/// What tells whose a line is.
struct Whose(String);

impl Visit for Whose {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        use fmt::Write as _;
        if KEYS.contains(&field.name()) {
            let _ = write!(self.0, "{}={value:?} ", field.name());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io;
    use std::sync::Arc;

    #[derive(Clone, Default)]
    struct Lines(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl Lines {
        fn take(&self) -> Vec<String> {
            let bytes = std::mem::take(&mut *self.0.lock().unwrap());
            String::from_utf8(bytes).unwrap().lines().map(str::to_owned).collect()
        }
    }

    fn refused(volume: &str) {
        tracing::warn!(volume, "refused");
    }

    #[tokio::test(start_paused = true)]
    async fn one_tenant_writes_its_part_of_the_log_and_others_theirs() {
        let lines = Lines::default();
        let writer = lines.clone();
        let subscriber = tracing_subscriber::fmt()
            .with_ansi(false)
            .with_writer(move || writer.clone())
            .map_event_format(Bounded::new)
            .finish();
        let _guard = tracing::subscriber::set_default(subscriber);
        for _ in 0..10_000 {
            refused("hostile");
        }
        refused("victim");
        tracing::warn!(volume = "hostile", "of another kind");
        tracing::info!("of nobody");
        let written = lines.take();
        assert_eq!(written.iter().filter(|line| line.contains("hostile") && line.contains("refused")).count(), 20);
        for one in ["victim", "of another kind", "of nobody"] {
            assert_eq!(written.iter().filter(|line| line.contains(one)).count(), 1, "{one}: {written:#?}");
        }
        for _ in 0..600 {
            tokio::time::advance(Duration::from_secs(1)).await;
            refused("hostile");
        }
        let written = lines.take();
        let passed = written.iter().filter(|line| line.contains("refused")).count();
        assert!((20..=21).contains(&passed), "{written:#?}");
        assert_eq!(written[0], "10009 lines like the next one were left out", "9980 and those of half a minute");
    }

    #[tokio::test(start_paused = true)]
    async fn whoever_makes_up_names_makes_no_memory_grow() {
        let format = Bounded::new(());
        let names = (0..3 * KEPT).map(|number| number.to_string());
        let admitted = names.filter(|name| format.admit(1, name.clone(), Instant::now()).is_some()).count();
        assert_eq!(admitted, KEPT + BURST as usize);
        assert_eq!(format.kinds.lock().unwrap().len(), KEPT + 1);
        tokio::time::advance(EVERY).await;
        assert_eq!(format.admit(1, "victim".into(), Instant::now()), Some(0));
        assert!(format.kinds.lock().unwrap().len() <= 2);
    }
}
