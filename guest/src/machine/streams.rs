//! ZFS streams: a volume's contents on their way out of the machine, and into it.

use async_trait::async_trait;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::task::JoinSet;

use super::Fault;

/// What is to be sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum What {
    /// A snapshot: all of it, or what has changed since an earlier one.
    Snapshot {
        /// Its name.
        snapshot: String,
        /// The earlier one.
        from: Option<String>,
    },
    /// What is left of a stream that broke off, by the token of the receiver.
    Rest(String),
}

/// A snapshot of a dataset.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SendPoint {
    /// What stands behind the @.
    pub name: String,
    /// The same wherever it is received.
    pub guid: u64,
    /// When it was taken, in seconds since 1970.
    pub created: u64,
    /// Bytes it refers to.
    pub referenced: u64,
    /// Bytes it alone holds.
    pub used: u64,
    /// It has a hold or a clone, and can't be destroyed.
    pub pinned: bool,
}

/// A stream that comes out of a program, or goes into one, and how the program ends. Dropping it kills the program.
pub struct Flow<S: ?Sized> {
    /// The stream.
    pub data: Box<S>,
    /// The program: one task.
    pub end: JoinSet<Result<(), Fault>>,
}

impl<S: ?Sized> Flow<S> {
    /// How the program ended.
    ///
    /// # Errors
    /// What it said.
    pub async fn finish(end: &mut JoinSet<Result<(), Fault>>) -> Result<(), Fault> {
        let ended = end.join_next().await.and_then(Result::ok);
        ended.unwrap_or_else(|| Err(Fault::new("the work was cut off")))
    }
}

/// A stream out of the machine.
pub type Outward = Flow<dyn AsyncRead + Send + Unpin>;
/// A stream into the machine.
pub type Inward = Flow<dyn AsyncWrite + Send + Unpin>;

/// The part of the machine that streams are made by.
#[async_trait]
pub trait Streams {
    /// The snapshots of a dataset, oldest first.
    async fn send_points(&self, dataset: &str) -> Result<Vec<SendPoint>, Fault>;

    /// Where a receive into a dataset broke off.
    async fn resume_token(&self, dataset: &str) -> Result<Option<String>, Fault>;

    /// Forgets a receive that broke off.
    async fn forget_receive(&self, dataset: &str) -> Result<(), Fault>;

    /// How large a stream will be, in bytes.
    async fn estimate(&self, dataset: &str, what: &What) -> Result<u64, Fault>;

    /// Begins to send, with encrypted contents as they are on the disk.
    async fn send(&self, dataset: &str, what: &What) -> Result<Outward, Fault>;

    /// Begins to receive into a dataset that is there: what is in it is replaced at the end of the stream, at once. Or
    /// into a new one.
    async fn receive(&self, dataset: &str, new: bool) -> Result<Inward, Fault>;

    /// Gives a dataset another name in its pool. One that is mounted stays so.
    async fn rename(&self, dataset: &str, to: &str) -> Result<(), Fault>;

    /// Destroys a dataset and its snapshots.
    async fn destroy(&self, dataset: &str) -> Result<(), Fault>;
}
