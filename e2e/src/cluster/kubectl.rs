//! kubectl and Helm, as a person runs them.

use std::fmt::Debug;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow, bail};
use tokio::io::AsyncWriteExt as _;
use tokio::process::Command;
use tokio::time::{Instant, sleep, timeout};

use crate::inputs;

/// Longer than anything here takes, `kubectl wait` and `helm --wait` included.
const DEADLINE: Duration = Duration::from_secs(600);
/// Each kubectl costs a tenth of a second of processor time.
const INTERVAL: Duration = Duration::from_millis(300);

/// A user's command line.
#[derive(Debug, Clone)]
pub(crate) struct Kubectl {
    kubeconfig: PathBuf,
    home: PathBuf,
}

impl Kubectl {
    /// With a kubeconfig, and a directory for caches.
    pub(crate) fn new(kubeconfig: &Path, home: &Path) -> Self {
        Self { kubeconfig: kubeconfig.to_owned(), home: home.to_owned() }
    }

    pub(crate) async fn run(&self, arguments: &[&str]) -> Result<String> {
        self.run_program("kubectl", arguments, None).await
    }

    /// What a program printed; an error with its complaint when it fails.
    pub(crate) async fn run_program(&self, name: &str, arguments: &[&str], input: Option<&str>) -> Result<String> {
        let shown = || format!("{name} {}", arguments.join(" "));
        let mut command = Command::new(inputs::kubernetes(name)?);
        command.args(arguments).env("KUBECONFIG", &self.kubeconfig).env("HOME", &self.home).kill_on_drop(true);
        command.stdin(if input.is_some() { Stdio::piped() } else { Stdio::null() });
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().with_context(|| format!("start {name}"))?;
        if let (Some(text), Some(mut stdin)) = (input, child.stdin.take()) {
            stdin.write_all(text.as_bytes()).await.with_context(shown)?;
        }
        let output = timeout(DEADLINE, child.wait_with_output())
            .await
            .map_err(|_| anyhow!("{}: not done after {DEADLINE:?}", shown()))?
            .with_context(shown)?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        if !output.status.success() {
            let complaint = String::from_utf8_lossy(&output.stderr);
            bail!("{}: {}: {}{}", shown(), output.status, text, complaint.trim());
        }
        Ok(text)
    }
}

/// Asks until there is an answer. The outer error of `check` ends it at once, the inner one is what the failure says.
pub(crate) async fn poll<T>(
    deadline: Instant,
    what: &str,
    mut check: impl AsyncFnMut() -> Result<Result<T>>,
) -> Result<T> {
    let started = Instant::now();
    loop {
        match check().await? {
            Ok(found) => return Ok(found),
            Err(error) if Instant::now() >= deadline => {
                return Err(error.context(format!("{what}: not after {:?}", started.elapsed())));
            }
            Err(_) => sleep(INTERVAL).await,
        }
    }
}

/// The last value that was seen, for an error's text.
pub(crate) fn not_yet<T>(seen: &impl Debug) -> Result<T> {
    Err(anyhow!("last seen: {seen:?}"))
}
