//! Child processes that can't outlive their test.

use std::ffi::OsStr;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};

use anyhow::{Context as _, Result};

use crate::console;

/// A running program. Killed on drop; and by the kernel when the *thread* that started it ends, so start it from a
/// thread that lives as long as it is needed.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Starts a program with its output in a file.
    ///
    /// # Errors
    /// When it can't be started.
    pub fn start(
        program: &Path,
        args: impl IntoIterator<Item = impl AsRef<OsStr>>,
        environment: &[(&str, &str)],
        log: &Path,
    ) -> Result<Self> {
        let name = program.file_name().unwrap_or(program.as_os_str()).to_string_lossy().into_owned();
        let file = File::options().create(true).append(true).open(log).context("open the log")?;
        // util-linux's setpriv sets PR_SET_PDEATHSIG and executes: without unsafe code here.
        let child = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "--"])
            .arg(program)
            .args(args)
            .envs(environment.iter().copied())
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file)
            .spawn()
            .with_context(|| format!("start {name}"))?;
        Ok(Self { name, child, log: log.to_owned() })
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Whether and how it has ended.
    ///
    /// # Errors
    /// When the kernel doesn't tell.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        self.child.try_wait().with_context(|| format!("ask for {}", self.name))
    }

    /// Fails when it has ended, with the end of its output.
    ///
    /// # Errors
    /// See above.
    pub fn must_run(&mut self) -> Result<()> {
        match self.ended()? {
            None => Ok(()),
            Some(status) => anyhow::bail!("{} has ended ({status}): {}", self.name, self.tail()),
        }
    }

    /// The end of its output.
    pub fn tail(&self) -> String {
        console::tail(&self.log, 20)
    }

    /// SIGKILL, and waits until it is gone.
    pub fn kill(&mut self) {
        // Both fail only when it is gone already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}
