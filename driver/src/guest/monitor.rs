use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::turns::{Turns, Wanted};
use super::{GuestClient, GuestError, Report};
use crate::kata::{Sandbox, SandboxError, discover};

/// How often sandboxes are looked for.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// A guest that is booting is tried this often ...
const RETRY: Duration = Duration::from_secs(1);
/// ... this many times, and after that (it may have no zpod-guest at all) less often.
const EAGER_TRIES: u32 = 120;
const RETRY_LATER: Duration = Duration::from_secs(15);
/// A guest repeats itself every 30 s.
const PATIENCE: Duration = Duration::from_secs(90);
/// No guest is listened to more often than this, whatever it sends.
const PACE: Duration = Duration::from_millis(200);

/// Who wants to know what guests say.
#[async_trait]
pub trait Listener: Send + Sync + 'static {
    /// A guest said something.
    async fn reported(&self, guest: &GuestClient, report: Report);

    /// A sandbox can't be heard any more: its connection broke.
    fn lost(&self, sandbox: &str);

    /// A sandbox is no more: its shim is gone.
    fn gone(&self, sandbox: &str);

    /// A scan for sandboxes has ended. Gives its number: one more than that of the scan before.
    fn scanned(&self) -> u64;

    /// Whose guests are to be heard.
    fn wanted(&self) -> Wanted;
}

/// Finds sandboxes as they come and go, and listens to the guests that are wanted.
#[derive(Debug)]
pub struct Monitor {
    task: JoinHandle<()>,
}

impl Monitor {
    /// Starts to look in these directories.
    pub fn start(dirs: Vec<PathBuf>, listener: Arc<dyn Listener>) -> Self {
        Self { task: tokio::spawn(run(dirs, listener)) }
    }
}

impl Drop for Monitor {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// The task that listens to one sandbox; ends with its owner.
struct Ear(JoinHandle<()>);

impl Ear {
    /// Ends it, and waits until it has: what it notes of its guest is never noted after that.
    async fn end(mut self) {
        self.0.abort();
        let _ = (&mut self.0).await;
    }
}

impl Drop for Ear {
    fn drop(&mut self) {
        self.0.abort();
    }
}

async fn run(dirs: Vec<PathBuf>, listener: Arc<dyn Listener>) {
    let mut turns = Turns::default();
    let mut ears: HashMap<Sandbox, Ear> = HashMap::new();
    let mut tick = tokio::time::interval(LOOK_EVERY);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        let looked = dirs.clone();
        let Ok(found) = tokio::task::spawn_blocking(move || discover(&looked)).await else { continue };
        for sandbox in turns.found(listener.scanned(), &found) {
            tracing::debug!(sandbox = sandbox.id, "sandbox is gone");
            if let Some(ear) = ears.remove(&sandbox) {
                ear.end().await;
            }
            listener.gone(&sandbox.id);
        }
        let chosen = turns.choose(&listener.wanted(), Instant::now());
        let ended: Vec<_> = ears.extract_if(|sandbox, _| !chosen.contains_key(sandbox)).collect();
        for (sandbox, ear) in ended {
            tracing::debug!(sandbox = sandbox.id, "no publication waits for it: not listened to");
            ear.end().await;
        }
        for (sandbox, again) in chosen {
            ears.entry(sandbox)
                .or_insert_with_key(|sandbox| Ear(tokio::spawn(listen(sandbox.clone(), again, listener.clone()))));
        }
    }
}

/// Why a guest could not be heard.
#[derive(Debug, thiserror::Error)]
enum Silence {
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
    #[error(transparent)]
    Guest(#[from] GuestError),
}

async fn listen(sandbox: Sandbox, mut again: bool, listener: Arc<dyn Listener>) {
    let mut tries = 0;
    loop {
        let mut heard = false;
        if let Err(silence) = hear(&sandbox, again, listener.as_ref(), &mut heard).await {
            // A shim that was killed leaves its socket.
            if let Silence::Sandbox(error) = &silence
                && error.is_gone()
            {
                listener.gone(&sandbox.id);
            }
            // The first silence is worth a line, the hundredth is not, nor is a machine that is about to start.
            let starts = matches!(silence, Silence::Sandbox(SandboxError::NotYet(_)));
            match (heard || tries == 0) && !again && !starts {
                true => tracing::info!(sandbox = sandbox.id, "{silence}"),
                false => tracing::trace!(sandbox = sandbox.id, "{silence}"),
            }
        }
        if heard {
            listener.lost(&sandbox.id);
            (tries, again) = (0, false);
        }
        tries += 1;
        tokio::time::sleep(if tries < EAGER_TRIES { RETRY } else { RETRY_LATER }).await;
    }
}

async fn hear(sandbox: &Sandbox, again: bool, listener: &dyn Listener, heard: &mut bool) -> Result<(), Silence> {
    let url = sandbox.agent_url().await?;
    let guest = GuestClient::connect(&sandbox.id, &url).await?;
    let mut watch = guest.watch().await?;
    loop {
        let report = watch.next(PATIENCE).await?;
        if !*heard {
            match again {
                // Its turn has come once more: nothing new.
                true => tracing::debug!(sandbox = sandbox.id, "guest is heard again"),
                false => tracing::info!(sandbox = sandbox.id, version = report.version, "guest is heard"),
            }
            *heard = true;
        }
        listener.reported(&guest, report).await;
        tokio::time::sleep(PACE).await;
    }
}
