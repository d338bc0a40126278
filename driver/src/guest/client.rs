mod marks;
mod rollback;
mod transfer;

use std::time::Duration;

use tonic::transport::Channel;
use tonic::{Code, Status, Streaming};
use uuid::Uuid;
use zpod_proto::bounded::Bounded;
use zpod_proto::guest::guest_client::GuestClient as Stub;
use zpod_proto::guest::scrub_request::Action;
use zpod_proto::guest::{
    GrowRequest, GrowResponse, ProvideKeyRequest, ProvideKeyResponse, ScrubRequest, ScrubResponse, StatusRequest,
    StatusResponse, WatchRequest,
};
use zpod_volume::{Bytes, VolumeId};

use super::{Report, clean, connect};
use crate::kata::AgentUrl;
use crate::volumes::{KeyPair, Secret};

pub use marks::Changes;
pub use transfer::{MAX_CHUNK, Sending};

const STATUS_DEADLINE: Duration = Duration::from_secs(3);
const CALL_DEADLINE: Duration = Duration::from_secs(10);
/// Partition table, kernel, `zpool online -e`, quota: seconds on a slow machine.
const GROW_DEADLINE: Duration = Duration::from_secs(30);
/// Deriving a key from a passphrase (PBKDF2), twice where it is changed, and a transaction group.
const KEY_DEADLINE: Duration = Duration::from_secs(30);

/// Why a guest did not do what it was asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GuestError {
    /// There is no connection, or it broke.
    #[error("the guest of sandbox {sandbox} can't be reached: {reason}")]
    Unreachable {
        /// The sandbox.
        sandbox: String,
        /// Why.
        reason: String,
    },
    /// It did not answer in time.
    #[error("the guest of sandbox {sandbox} did not answer {call} within {deadline:?}")]
    Timeout {
        /// The sandbox.
        sandbox: String,
        /// The call.
        call: &'static str,
        /// How long it had.
        deadline: Duration,
    },
    /// The disk it sees is smaller than what was asked for.
    #[error("the guest of sandbox {sandbox} says that its disk is too small: {message}")]
    DiskTooSmall {
        /// The sandbox.
        sandbox: String,
        /// What it said.
        message: String,
    },
    /// It refused.
    #[error("the guest of sandbox {sandbox} refused {call}: {message}")]
    Refused {
        /// The sandbox.
        sandbox: String,
        /// The call.
        call: &'static str,
        /// What it said.
        message: String,
    },
}

/// A connection to the control service of one guest. Cheap to clone.
#[derive(Debug, Clone)]
pub struct GuestClient {
    sandbox: String,
    url: AgentUrl,
    channel: Channel,
}

impl GuestClient {
    /// Connects.
    ///
    /// # Errors
    /// [`GuestError::Unreachable`].
    pub async fn connect(sandbox: &str, url: &AgentUrl) -> Result<Self, GuestError> {
        let channel = connect::connect(url)
            .await
            .map_err(|reason| GuestError::Unreachable { sandbox: sandbox.to_owned(), reason })?;
        Ok(Self { sandbox: sandbox.to_owned(), url: url.clone(), channel })
    }

    /// For a call with this answer, of which no more is taken than such an answer may have.
    fn stub<Answer: Bounded>(&self) -> Stub<Channel> {
        Stub::new(self.channel.clone()).max_decoding_message_size(Answer::BYTES)
    }

    /// The sandbox it belongs to.
    pub fn sandbox(&self) -> &str {
        &self.sandbox
    }

    /// What the guest holds now.
    ///
    /// # Errors
    /// When it does not answer in time, or refuses.
    pub async fn status(&self) -> Result<Report, GuestError> {
        let mut stub = self.stub::<StatusResponse>();
        let answer = self.call("Status", STATUS_DEADLINE, stub.status(StatusRequest {})).await?;
        Ok(Report::new(answer))
    }

    /// What the guest holds now, and each change.
    ///
    /// # Errors
    /// When the stream does not begin in time, or the guest refuses.
    pub async fn watch(&self) -> Result<Watch, GuestError> {
        let mut stub = self.stub::<StatusResponse>();
        let stream = self.call("Watch", CALL_DEADLINE, stub.watch(WatchRequest {})).await?;
        Ok(Watch { client: self.clone(), stream })
    }

    /// Grows a volume.
    ///
    /// # Errors
    /// [`GuestError::DiskTooSmall`] beyond the disk that the guest sees.
    pub async fn grow(&self, id: VolumeId, capacity: Bytes, partition: Bytes) -> Result<(), GuestError> {
        let mut stub = self.stub::<GrowResponse>();
        let request =
            GrowRequest { volume_id: id.to_string(), capacity_bytes: capacity.0, partition_bytes: partition.0 };
        self.call("Grow", GROW_DEADLINE, stub.grow(request)).await.map(|_| ())
    }

    /// Gives the guest the key of a volume of its own. Whether the volume's key was changed to it.
    ///
    /// # Errors
    /// When it does not fit. The error never shows it, whatever the guest said.
    pub async fn provide_key(&self, id: VolumeId, token: Uuid, keys: &KeyPair) -> Result<bool, GuestError> {
        let mut stub = self.stub::<ProvideKeyResponse>();
        let request = ProvideKeyRequest {
            volume_id: id.to_string(),
            token: token.to_string(),
            key: keys.key.reveal().to_vec(),
            previous_key: keys.previous.as_ref().map(Secret::reveal).unwrap_or_default().to_vec(),
        };
        let answer = async {
            let answer = stub.provide_key(request).await;
            answer.map_err(|status| Status::new(status.code(), keys.cut_from(status.message())))
        };
        self.call("ProvideKey", KEY_DEADLINE, answer).await.map(|answer| answer.changed)
    }

    /// Starts a scrub of a volume. One that runs goes on.
    ///
    /// # Errors
    /// When the guest does not answer in time, or refuses.
    pub async fn scrub(&self, id: VolumeId) -> Result<(), GuestError> {
        let mut stub = self.stub::<ScrubResponse>();
        let request = ScrubRequest { volume_id: id.to_string(), action: Action::Start.into() };
        self.call("Scrub", GROW_DEADLINE, stub.scrub(request)).await.map(|_| ())
    }

    async fn call<T>(
        &self,
        call: &'static str,
        deadline: Duration,
        answer: impl Future<Output = Result<tonic::Response<T>, Status>>,
    ) -> Result<T, GuestError> {
        match tokio::time::timeout(deadline, answer).await {
            Ok(Ok(response)) => Ok(response.into_inner()),
            Ok(Err(status)) => Err(self.failed(call, &status)),
            Err(_) => Err(GuestError::Timeout { sandbox: self.sandbox.clone(), call, deadline }),
        }
    }

    fn failed(&self, call: &'static str, status: &Status) -> GuestError {
        let (sandbox, message) = (self.sandbox.clone(), clean(status.message(), 512));
        match status.code() {
            Code::Unavailable | Code::Cancelled | Code::Unknown => GuestError::Unreachable { sandbox, reason: message },
            Code::OutOfRange if call == "Grow" => GuestError::DiskTooSmall { sandbox, message },
            Code::Unimplemented if call == rollback::CHECK => {
                GuestError::Refused { sandbox, call, message: rollback::NO_ROLLBACKS.into() }
            }
            code => GuestError::Refused { sandbox, call, message: format!("{code:?}: {message}") },
        }
    }
}

#[cfg(test)]
impl GuestClient {
    /// One that reaches nobody.
    pub(crate) fn unconnected(sandbox: &str) -> Self {
        let channel = tonic::transport::Endpoint::from_static("http://nobody").connect_lazy();
        let url = AgentUrl::Vsock { cid: u32::MAX };
        Self { sandbox: sandbox.to_owned(), url, channel }
    }
}

/// The stream of a guest's reports.
#[derive(Debug)]
pub struct Watch {
    client: GuestClient,
    stream: Streaming<StatusResponse>,
}

impl Watch {
    /// The next report. A guest repeats itself every 30 s, so silence for longer than `patience` is an end as well.
    ///
    /// # Errors
    /// When the stream ends, breaks, or stays silent.
    pub async fn next(&mut self, patience: Duration) -> Result<Report, GuestError> {
        let sandbox = || self.client.sandbox.clone();
        match tokio::time::timeout(patience, self.stream.message()).await {
            Ok(Ok(Some(answer))) => Ok(Report::new(answer)),
            Ok(Ok(None)) => Err(GuestError::Unreachable { sandbox: sandbox(), reason: "it ended the stream".into() }),
            Ok(Err(status)) => Err(self.client.failed("Watch", &status)),
            Err(_) => Err(GuestError::Timeout { sandbox: sandbox(), call: "Watch", deadline: patience }),
        }
    }
}
