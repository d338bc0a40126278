//! A process in a container, and what it prints.

use anyhow::{Context as _, Result, bail};
use zpod_proto::agent;

use crate::agent::AgentClient;

const CHUNK: u32 = 64 << 10;

/// What a process left behind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Output {
    /// Exit code.
    pub code: i32,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

/// A running process of a container. Nothing that is asked of it has a deadline: a read that runs into one would look like
/// the end of what it prints.
#[derive(Debug, Clone)]
pub struct Running {
    pub(super) agent: AgentClient,
    pub(super) container: String,
    pub(super) exec_id: String,
}

impl Running {
    /// Some more of its standard output; `None` at the end.
    pub async fn read(&self) -> Option<Vec<u8>> {
        self.stream("ReadStdout").await
    }

    /// Some more of its standard error; `None` at the end.
    pub async fn read_error(&self) -> Option<Vec<u8>> {
        self.stream("ReadStderr").await
    }

    /// Waits for its end and gives its exit code. What it printed must have been read: see [`Running::finish`].
    ///
    /// # Errors
    /// When the agent doesn't answer.
    pub async fn wait(&self) -> Result<i32> {
        let request = agent::WaitProcessRequest { container_id: self.container.clone(), exec_id: self.exec_id.clone() };
        let answer: agent::WaitProcessResponse = self.agent.call("WaitProcess", &request).await?;
        Ok(answer.status)
    }

    /// Reads both streams to their ends, then asks for the exit code: in the order of the shims, since kata-agent
    /// forgets a process once it was waited for.
    ///
    /// # Errors
    /// When the agent doesn't answer.
    pub async fn finish(self) -> Result<Output> {
        let (stdout, stderr) = tokio::join!(self.drain("ReadStdout"), self.drain("ReadStderr"));
        let code = self.wait().await?;
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        Ok(Output { code, stdout: text(stdout), stderr: text(stderr) })
    }

    /// Sends it a signal.
    ///
    /// # Errors
    /// When the agent refuses.
    pub async fn signal(&self, signal: u32) -> Result<()> {
        let (container_id, exec_id) = (self.container.clone(), self.exec_id.clone());
        let request = agent::SignalProcessRequest { container_id, exec_id, signal };
        self.agent.run("SignalProcess", &request).await.context("signal a process")
    }

    async fn drain(&self, method: &'static str) -> Vec<u8> {
        let mut all = Vec::new();
        while let Some(data) = self.stream(method).await {
            all.extend(data);
        }
        all
    }

    /// kata-agent ends a stream with an error.
    async fn stream(&self, method: &'static str) -> Option<Vec<u8>> {
        let request = agent::ReadStreamRequest {
            container_id: self.container.clone(),
            exec_id: self.exec_id.clone(),
            len: CHUNK,
        };
        let answer: agent::ReadStreamResponse = self.agent.call(method, &request).await.ok()?;
        Some(answer.data).filter(|data| !data.is_empty())
    }
}

impl Output {
    /// Its standard output, without the last line's end; an error when it failed.
    ///
    /// # Errors
    /// See above.
    pub fn ok(self) -> Result<String> {
        if self.code != 0 {
            bail!("exit code {}: {}{}", self.code, self.stdout, self.stderr);
        }
        Ok(self.stdout.trim_end().to_owned())
    }
}
