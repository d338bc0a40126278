//! At most so many guests at once on this machine, whichever process starts them.

use std::fs::{self, File, TryLockError};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use tokio::time::Instant;
use zpod_image::cache::Cache;

/// How long a test waits for its turn.
const DEADLINE: Duration = Duration::from_secs(900);
const DEFAULT_SLOTS: usize = 2;

/// The right to run one guest, for as long as it lives.
#[derive(Debug)]
pub struct Slot {
    _lock: File,
}

impl Slot {
    /// Waits for a free slot (`ZPOD_E2E_GUESTS`, two unless said otherwise).
    ///
    /// # Errors
    /// When none gets free in a quarter of an hour.
    pub async fn take() -> Result<Self> {
        let slots = std::env::var("ZPOD_E2E_GUESTS").ok().and_then(|text| text.parse().ok()).unwrap_or(DEFAULT_SLOTS);
        let dir = Cache::from_env()?.dir().join("e2e-slots");
        fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
        let deadline = Instant::now() + DEADLINE;
        while Instant::now() < deadline {
            for number in 0..slots {
                let file = File::create(dir.join(number.to_string())).context("open a slot")?;
                match file.try_lock() {
                    Ok(()) => return Ok(Self { _lock: file }),
                    Err(TryLockError::WouldBlock) => {}
                    Err(TryLockError::Error(error)) => return Err(error).context("lock a slot"),
                }
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        bail!("all {slots} guest slots in {} were taken for {DEADLINE:?}", dir.display())
    }
}
