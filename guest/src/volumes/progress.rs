use std::fmt::{self, Write as _};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// Stages that took less are left out of the log.
const SHOWN: Duration = Duration::from_millis(1);

/// How far the work on a volume is, for whoever can't wait for its end.
#[derive(Debug, Default)]
pub(super) struct Progress(Mutex<Stages>);

#[derive(Debug, Default)]
struct Stages {
    now: Option<Stage>,
    /// What the stages before took.
    past: Vec<(&'static str, Duration)>,
}

#[derive(Debug)]
struct Stage {
    name: &'static str,
    since: Instant,
    detail: String,
}

impl Progress {
    pub(super) fn start(&self) {
        *self.stages() = Stages::default();
        self.stage("waiting for earlier work on it");
    }

    pub(super) fn stage(&self, name: &'static str) {
        let now = Stage { name, since: Instant::now(), detail: String::new() };
        let mut stages = self.stages();
        let past = stages.now.replace(now).map(|stage| (stage.name, stage.since.elapsed()));
        stages.past.extend(past);
    }

    /// What each stage took, the one that runs included.
    pub(super) fn timings(&self) -> String {
        let stages = self.stages();
        let now = stages.now.iter().map(|stage| (stage.name, stage.since.elapsed()));
        let mut text = String::new();
        for (name, time) in stages.past.iter().copied().chain(now).filter(|(_, time)| *time >= SHOWN) {
            // Writing to a String does not fail.
            let _ = write!(text, "{}{name} {} ms", if text.is_empty() { "" } else { ", " }, time.as_millis());
        }
        text
    }

    fn stages(&self) -> MutexGuard<'_, Stages> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// More about the stage that runs.
    pub(super) fn detail(&self, detail: &str) {
        if let Some(stage) = self.stages().now.as_mut()
            && stage.detail != detail
        {
            detail.clone_into(&mut stage.detail);
        }
    }
}

impl fmt::Display for Progress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.stages().now {
            None => f.write_str("not begun"),
            Some(stage) => {
                write!(f, "{} for {:.1} s", stage.name, stage.since.elapsed().as_secs_f64())?;
                if stage.detail.is_empty() { Ok(()) } else { write!(f, " ({})", stage.detail) }
            }
        }
    }
}
