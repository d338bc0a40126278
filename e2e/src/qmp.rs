//! QEMU's machine protocol: one JSON object a line.

use std::collections::VecDeque;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::time::{Instant, sleep, timeout};

const ANSWER: Duration = Duration::from_secs(120);

/// A connection with its capabilities negotiated.
#[derive(Debug)]
pub struct Qmp {
    lines: tokio::io::Lines<BufReader<OwnedReadHalf>>,
    writer: OwnedWriteHalf,
    events: VecDeque<Value>,
}

impl Qmp {
    /// Connects, waiting until QEMU listens.
    ///
    /// # Errors
    /// When it doesn't within the deadline.
    pub async fn connect(socket: &Path, deadline: Duration) -> Result<Self> {
        let end = Instant::now() + deadline;
        let stream = loop {
            match UnixStream::connect(socket).await {
                Ok(stream) => break stream,
                Err(error) if Instant::now() >= end => return Err(error).context("connect to QMP"),
                Err(_) => sleep(Duration::from_millis(20)).await,
            }
        };
        let (reader, writer) = stream.into_split();
        let mut qmp = Self { lines: BufReader::new(reader).lines(), writer, events: VecDeque::new() };
        let greeting = qmp.next().await?;
        if greeting.get("QMP").is_none() {
            bail!("QMP begins with {greeting}");
        }
        qmp.execute("qmp_capabilities", json!({})).await?;
        Ok(qmp)
    }

    /// Runs a command and gives what it returns.
    ///
    /// # Errors
    /// When QEMU refuses it or doesn't answer.
    pub async fn execute(&mut self, command: &str, arguments: Value) -> Result<Value> {
        let mut line = json!({"execute": command, "arguments": arguments}).to_string();
        line.push('\n');
        self.writer.write_all(line.as_bytes()).await.context("write to QMP")?;
        loop {
            let mut answer = self.next().await.with_context(|| format!("wait for {command}"))?;
            if answer.get("event").is_some() {
                self.events.push_back(answer);
            } else if let Some(error) = answer.get("error") {
                bail!("QMP {command}: {error}");
            } else {
                return Ok(answer["return"].take());
            }
        }
    }

    /// Waits for `DEVICE_DELETED` of a device: the guest has let go of it.
    ///
    /// # Errors
    /// When it doesn't come within the deadline.
    pub async fn device_deleted(&mut self, id: &str, deadline: Duration) -> Result<()> {
        let deleted = |event: &Value| event["event"] == "DEVICE_DELETED" && event["data"]["device"] == id;
        if let Some(position) = self.events.iter().position(deleted) {
            self.events.remove(position);
            return Ok(());
        }
        let wait = async {
            loop {
                let event = self.next().await?;
                if deleted(&event) {
                    return Ok(());
                }
                self.events.push_back(event);
            }
        };
        timeout(deadline, wait).await.with_context(|| format!("the guest keeps {id} after {deadline:?}"))?
    }

    async fn next(&mut self) -> Result<Value> {
        let line = timeout(ANSWER, self.lines.next_line()).await.context("QMP is silent")??;
        let Some(line) = line else { bail!("QEMU closed QMP") };
        serde_json::from_str(&line).with_context(|| format!("QMP says {line}"))
    }
}
