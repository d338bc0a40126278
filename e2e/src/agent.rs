//! A client of the agent: what the shim sends.

use std::time::Duration;

use prost::Message;
use tokio::net::UnixStream;
use ttrpc::asynchronous::{Client, transport::Socket};
use ttrpc::proto::Request;
use zpod_proto::agent::{self, HEALTH_SERVICE, SERVICE};

/// `dial_timeout`-like deadlines of the shims: 30 s in runtime-rs, 60 s in Go. Ours is the one that zpod's runtime
/// configuration sets for CreateContainer.
pub const DEADLINE: Duration = Duration::from_secs(120);

/// kata-agent's `SetGuestDateTimeRequest`.
#[derive(Clone, PartialEq, Message)]
pub struct SetGuestDateTimeRequest {
    /// Seconds since 1970.
    #[prost(int64, tag = "1")]
    pub sec: i64,
    /// Microseconds.
    #[prost(int64, tag = "2")]
    pub usec: i64,
}

/// What a call fails with.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// The agent, or the proxy before it, refused.
    #[error("{method}: {code:?}: {message}")]
    Refused {
        /// The method.
        method: &'static str,
        /// The status.
        code: ttrpc::Code,
        /// What kubelet would show.
        message: String,
    },
    /// No answer.
    #[error("{method}: {source}")]
    Broken {
        /// The method.
        method: &'static str,
        /// Why.
        source: ttrpc::Error,
    },
    /// An answer that isn't one.
    #[error("{method}: {source}")]
    Garbled {
        /// The method.
        method: &'static str,
        /// Why.
        source: prost::DecodeError,
    },
}

/// The shim's connection.
#[derive(Clone)]
pub struct AgentClient {
    client: Client,
    deadline: Duration,
}

impl std::fmt::Debug for AgentClient {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("AgentClient")
    }
}

impl AgentClient {
    /// Over a connected stream.
    pub fn new(stream: UnixStream) -> Self {
        Self { client: Client::new(Socket::new(stream)), deadline: DEADLINE }
    }

    /// The same connection without deadlines, as the shims wait for a container's output and its end. A guest that is
    /// gone ends the waiting too.
    #[must_use]
    pub fn patient(&self) -> Self {
        Self { client: self.client.clone(), deadline: Duration::ZERO }
    }

    /// The health check, with a short deadline: the shim repeats it.
    ///
    /// # Errors
    /// When the agent doesn't answer in time.
    pub async fn check(&self, deadline: Duration) -> Result<(), AgentError> {
        let request = agent::CheckRequest::default();
        let answer: agent::HealthCheckResponse = self.request(HEALTH_SERVICE, "Check", &request, deadline).await?;
        debug_assert_eq!(answer.status, 1);
        Ok(())
    }

    /// Calls a method of the agent's service.
    ///
    /// # Errors
    /// When it is refused or not answered within [`DEADLINE`], if it has one.
    pub async fn call<A: Message + Default>(
        &self,
        method: &'static str,
        request: &impl Message,
    ) -> Result<A, AgentError> {
        self.request(SERVICE, method, request, self.deadline).await
    }

    /// Calls a method that answers nothing.
    ///
    /// # Errors
    /// As [`AgentClient::call`].
    pub async fn run(&self, method: &'static str, request: &impl Message) -> Result<(), AgentError> {
        self.call::<()>(method, request).await
    }

    async fn request<A: Message + Default>(
        &self,
        service: &str,
        method: &'static str,
        request: &impl Message,
        deadline: Duration,
    ) -> Result<A, AgentError> {
        let request = Request {
            service: service.to_owned(),
            method: method.to_owned(),
            payload: request.encode_to_vec(),
            // Zero means none.
            timeout_nano: i64::try_from(deadline.as_nanos()).unwrap_or(i64::MAX),
            ..Request::default()
        };
        let response = self.client.request(request).await.map_err(|error| match error {
            ttrpc::Error::RpcStatus(status) => {
                AgentError::Refused { method, code: status.code(), message: status.message().to_owned() }
            }
            source => AgentError::Broken { method, source },
        })?;
        A::decode(response.payload.as_slice()).map_err(|source| AgentError::Garbled { method, source })
    }
}
