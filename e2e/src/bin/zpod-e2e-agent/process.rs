//! A process of a container: its streams and its end.

use std::os::unix::process::ExitStatusExt as _;
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use serde::Serialize;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _};
use tokio::process::{Child, ChildStderr, ChildStdin, ChildStdout, Command};
use tokio::sync::{Mutex, watch};

/// How long output that a child of the process still holds open is waited for once the process is gone.
const AFTER_EXIT: Duration = Duration::from_millis(200);

#[derive(Debug)]
pub(crate) struct Process {
    pub(crate) pid: u32,
    stdin: Mutex<Option<ChildStdin>>,
    stdout: Mutex<ChildStdout>,
    stderr: Mutex<ChildStderr>,
    exit: watch::Receiver<Option<i32>>,
}

/// Which stream to read.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Stream {
    Stdout,
    Stderr,
}

impl Process {
    /// Starts this binary in the given role and waits until it says `ready`.
    pub(crate) async fn spawn(role: &str, spec: &impl Serialize) -> Result<Self> {
        let mut child = Command::new("/proc/self/exe")
            .arg(role)
            .arg(serde_json::to_string(spec)?)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("start a process")?;
        let (Some(pid), Some(stdin), Some(mut stdout), Some(stderr)) =
            (child.id(), child.stdin.take(), child.stdout.take(), child.stderr.take())
        else {
            bail!("the process has no id or no streams");
        };
        let (sender, exit) = watch::channel(None);
        tokio::spawn(async move { sender.send(Some(wait(&mut child).await)) });
        let line = first_line(&mut stdout).await.context("hear from the process")?;
        if line != "ready" {
            bail!("{line}");
        }
        Ok(Self { pid, stdin: Mutex::new(Some(stdin)), stdout: Mutex::new(stdout), stderr: Mutex::new(stderr), exit })
    }

    /// Lets a container's first process become its program, and closes its input.
    pub(crate) async fn start(&self) -> Result<()> {
        let Some(mut stdin) = self.stdin.lock().await.take() else { bail!("started already") };
        stdin.write_all(b"start\n").await.context("start the program")
    }

    /// Waits for the end; the exit code, or the signal's number as in kata-agent.
    pub(crate) async fn wait(&self) -> i32 {
        let mut exit = self.exit.clone();
        exit.wait_for(Option::is_some).await.ok().and_then(|code| *code).unwrap_or(-1)
    }

    /// Reads up to `len` bytes; at the end an error, as kata-agent does.
    pub(crate) async fn read(&self, stream: Stream, len: usize) -> Result<Vec<u8>> {
        match stream {
            Stream::Stdout => self.read_from(&mut *self.stdout.lock().await, len).await,
            Stream::Stderr => self.read_from(&mut *self.stderr.lock().await, len).await,
        }
    }

    async fn read_from(&self, pipe: &mut (impl AsyncRead + Unpin), len: usize) -> Result<Vec<u8>> {
        let mut buffer = vec![0; len.clamp(1, 1 << 20)];
        let size = tokio::select! {
            biased;
            size = pipe.read(&mut buffer) => size?,
            _ = self.ended() => 0,
        };
        if size == 0 {
            bail!("read meet eof");
        }
        buffer.truncate(size);
        Ok(buffer)
    }

    async fn ended(&self) {
        self.wait().await;
        tokio::time::sleep(AFTER_EXIT).await;
    }
}

async fn wait(child: &mut Child) -> i32 {
    let code = |status: ExitStatus| status.code().or(status.signal()).unwrap_or(-1);
    child.wait().await.map_or(-1, code)
}

/// Reads no byte beyond the line: what follows belongs to the program.
async fn first_line(stdout: &mut ChildStdout) -> Result<String> {
    let mut line = Vec::new();
    loop {
        match stdout.read_u8().await? {
            b'\n' => return Ok(String::from_utf8_lossy(&line).into_owned()),
            byte => line.push(byte),
        }
    }
}
