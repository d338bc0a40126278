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

/// The right to wait for a second guest while one runs. Of two who did that at once, each would have what the other waits for.
#[derive(Debug)]
pub struct Pair {
    _lock: File,
}

impl Slot {
    /// Waits for a free slot (`ZPOD_E2E_GUESTS`, two unless said otherwise).
    ///
    /// # Errors
    /// When none gets free in a quarter of an hour.
    pub async fn take() -> Result<Self> {
        let slots = std::env::var("ZPOD_E2E_GUESTS").ok().and_then(|text| text.parse().ok()).unwrap_or(DEFAULT_SLOTS);
        let names = (0..slots).map(|number: usize| number.to_string()).collect();
        Ok(Self { _lock: first_free(names).await? })
    }
}

impl Pair {
    /// Waits until nobody else has two guests. To be taken before the first one, and kept as long as both.
    ///
    /// # Errors
    /// When somebody has for a quarter of an hour.
    pub async fn take() -> Result<Self> {
        Ok(Self { _lock: first_free(vec!["pair".to_owned()]).await? })
    }
}

async fn first_free(names: Vec<String>) -> Result<File> {
    let dir = Cache::from_env()?.dir().join("e2e-slots");
    fs::create_dir_all(&dir).with_context(|| format!("create {}", dir.display()))?;
    let deadline = Instant::now() + DEADLINE;
    while Instant::now() < deadline {
        for name in &names {
            let file = File::create(dir.join(name)).context("open a slot")?;
            match file.try_lock() {
                Ok(()) => return Ok(file),
                Err(TryLockError::WouldBlock) => {}
                Err(TryLockError::Error(error)) => return Err(error).context("lock a slot"),
            }
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    bail!("the guest slots {names:?} in {} were taken for {DEADLINE:?}", dir.display())
}
