use std::fmt;
use std::sync::{Mutex, PoisonError};

use tokio::time::Instant;

/// How far the work on a volume is, for whoever can't wait for its end.
#[derive(Debug, Default)]
pub(super) struct Progress(Mutex<Option<Stage>>);

#[derive(Debug)]
struct Stage {
    name: &'static str,
    since: Instant,
    detail: String,
}

impl Progress {
    pub(super) fn start(&self) {
        self.stage("waiting for earlier work on it");
    }

    pub(super) fn stage(&self, name: &'static str) {
        self.set(Stage { name, since: Instant::now(), detail: String::new() });
    }

    /// More about the stage that runs.
    pub(super) fn detail(&self, detail: &str) {
        if let Some(stage) = self.0.lock().unwrap_or_else(PoisonError::into_inner).as_mut()
            && stage.detail != detail
        {
            detail.clone_into(&mut stage.detail);
        }
    }

    fn set(&self, stage: Stage) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(stage);
    }
}

impl fmt::Display for Progress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &*self.0.lock().unwrap_or_else(PoisonError::into_inner) {
            None => f.write_str("not begun"),
            Some(stage) => {
                write!(f, "{} for {:.1} s", stage.name, stage.since.elapsed().as_secs_f64())?;
                if stage.detail.is_empty() { Ok(()) } else { write!(f, " ({})", stage.detail) }
            }
        }
    }
}
