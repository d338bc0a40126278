//! The proxy in front of the agent: every frame passes byte for byte, save the calls that concern volumes.
//!
//! # Design
//! One connection of the host is one connection to the agent; stream ids stay as they are. Each direction is a loop that
//! passes frames on in pieces, however long they are. A call of ours runs in a task of its own: other streams keep
//! flowing, and its frames are put whole between theirs. Calls for one container keep their order ([`order`]).
//!
//! **Fail closed**: a CreateContainer whose volumes are not ready, or that can't be read, never reaches the agent.

use std::collections::HashMap;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::OwnedWriteHalf;
use tokio::sync::{Semaphore, oneshot};
use tokio::time::Instant;
use tonic::Code;

use crate::machine::Machine;
use crate::request::{self, Peek};
use crate::ttrpc::{self, HEADER_BYTES, Header, MAX_BUFFERED};
use crate::volumes::Volumes;

mod call;
mod order;
#[cfg(test)]
mod tests;

use order::Order;

/// How long the agent is waited for: it starts after the proxy.
const AGENT_WAIT: Duration = Duration::from_secs(60);

/// Calls of ours that may run at once on one connection. Each holds at most one frame.
const CALLS: usize = 64;

/// How much of a request is read before it is first looked at: service and method stand at its beginning.
const FIRST_LOOK: usize = 256;

/// The proxy.
#[derive(Debug)]
pub struct Proxy<M> {
    volumes: Arc<Volumes<M>>,
    agent: PathBuf,
    order: Order,
}

impl<M: Machine> Proxy<M> {
    /// A proxy in front of the agent that listens on this unix socket.
    pub fn new(volumes: Arc<Volumes<M>>, agent: impl Into<PathBuf>) -> Arc<Self> {
        Arc::new(Self { volumes, agent: agent.into(), order: Order::default() })
    }

    /// Serves a connection of the host until one side closes it.
    ///
    /// # Errors
    /// When the agent can't be reached, or either side breaks off within a frame.
    pub async fn serve<S>(self: Arc<Self>, host: S) -> io::Result<()>
    where
        S: AsyncRead + AsyncWrite + Send + 'static,
    {
        let (from_agent, to_agent) = self.connect().await?.into_split();
        let (from_host, to_host) = tokio::io::split(host);
        let connection = Arc::new(Connection {
            proxy: self,
            to_agent: tokio::sync::Mutex::new(to_agent),
            to_host: tokio::sync::Mutex::new(Box::new(to_host)),
            answers: Mutex::default(),
            calls: Arc::new(Semaphore::new(CALLS)),
        });
        let result = tokio::select! {
            result = connection.up(BufReader::new(from_host)) => result,
            result = connection.down(BufReader::new(from_agent)) => result,
        };
        connection.close().await;
        result
    }

    async fn connect(&self) -> io::Result<UnixStream> {
        let end = Instant::now() + AGENT_WAIT;
        loop {
            match UnixStream::connect(&self.agent).await {
                Ok(stream) => return Ok(stream),
                Err(error) if Instant::now() >= end => {
                    let text = format!("the agent does not listen at {}: {error}", self.agent.display());
                    return Err(io::Error::new(error.kind(), text));
                }
                Err(_) => tokio::time::sleep(Duration::from_millis(20)).await,
            }
        }
    }
}

/// An answer of the agent to a call of ours.
type Answer = (Header, Vec<u8>);

/// A connection of the host and its connection to the agent.
struct Connection<M> {
    proxy: Arc<Proxy<M>>,
    to_agent: tokio::sync::Mutex<OwnedWriteHalf>,
    to_host: tokio::sync::Mutex<Box<dyn AsyncWrite + Send + Unpin>>,
    /// Who waits for which answer; `None` once the connection is closed.
    answers: Mutex<Answers>,
    calls: Arc<Semaphore>,
}

#[derive(Default)]
struct Answers {
    closed: bool,
    waiting: HashMap<u32, oneshot::Sender<Answer>>,
}

/// Why there is no answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Lost {
    /// The request did not get to the agent whole.
    NotSent,
    /// The connection ended first.
    NotAnswered,
}

impl<M: Machine> Connection<M> {
    /// From the host to the agent.
    async fn up(self: &Arc<Self>, mut from: impl AsyncRead + Send + Unpin) -> io::Result<()> {
        while let Some(header) = read_header(&mut from).await? {
            let length = header.length as usize;
            let mut begun = Vec::new();
            if header.kind == ttrpc::REQUEST && length <= MAX_BUFFERED {
                read_to(&mut from, &mut begun, length).await?;
                match request::whose(&begun) {
                    Ok(Some(method)) => self.begin(method, header, begun).await?,
                    Ok(None) => self.pass_up(header, &begun).await?,
                    Err(error) => self.refuse(header.stream, Code::InvalidArgument, error.to_string()),
                }
                continue;
            }
            let mut whose = if header.kind == ttrpc::REQUEST { Peek::Undecided } else { Peek::Theirs };
            while whose == Peek::Undecided && begun.len() < MAX_BUFFERED {
                let goal = (2 * begun.len()).clamp(FIRST_LOOK, MAX_BUFFERED);
                read_to(&mut from, &mut begun, goal).await?;
                whose = request::peek(&begun);
            }
            match whose {
                // Nobody's request is as long as this and does not say whose it is.
                Peek::Ours(_) | Peek::Undecided | Peek::Malformed => {
                    discard(&mut from, length - begun.len()).await?;
                    let text = format!("the request is {length} bytes long, at most {MAX_BUFFERED} are allowed");
                    self.refuse(header.stream, Code::ResourceExhausted, text);
                }
                Peek::Theirs => {
                    let mut to = self.to_agent.lock().await;
                    relay(&mut from, &mut *to, header, &begun).await?;
                }
            }
        }
        Ok(())
    }

    /// From the agent to the host.
    async fn down(&self, mut from: impl AsyncRead + Send + Unpin) -> io::Result<()> {
        while let Some(header) = read_header(&mut from).await? {
            let waiting = if header.kind == ttrpc::RESPONSE { self.take_waiting(header.stream) } else { None };
            let Some(waiting) = waiting else {
                let mut to = self.to_host.lock().await;
                relay(&mut from, &mut *to, header, &[]).await?;
                continue;
            };
            let length = header.length as usize;
            if length > MAX_BUFFERED {
                let text = format!("the agent's answer on stream {} is {length} bytes long", header.stream);
                return Err(io::Error::new(io::ErrorKind::InvalidData, text));
            }
            let mut payload = Vec::new();
            read_to(&mut from, &mut payload, length).await?;
            if let Err((header, payload)) = waiting.send((header, payload)) {
                self.reply(&header.frame(&payload)).await;
            }
        }
        Ok(())
    }

    fn answers(&self) -> std::sync::MutexGuard<'_, Answers> {
        self.answers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take_waiting(&self, stream: u32) -> Option<oneshot::Sender<Answer>> {
        self.answers().waiting.remove(&stream)
    }

    /// Sends a request on and waits for its answer, which is not passed on.
    async fn ask(&self, header: Header, payload: &[u8]) -> Result<Answer, Lost> {
        let (sender, answer) = oneshot::channel();
        {
            let mut answers = self.answers();
            if answers.closed {
                return Err(Lost::NotSent);
            }
            answers.waiting.insert(header.stream, sender);
        }
        if self.pass_up(header, payload).await.is_err() {
            self.take_waiting(header.stream);
            return Err(Lost::NotSent);
        }
        answer.await.map_err(|_| Lost::NotAnswered)
    }

    /// Sends a whole frame to the agent.
    async fn pass_up(&self, header: Header, payload: &[u8]) -> io::Result<()> {
        self.to_agent.lock().await.write_all(&header.frame(payload)).await
    }

    /// Sends a whole frame to the host. Where that fails the connection is at its end, which the loops notice.
    async fn reply(&self, frame: &[u8]) {
        let mut to = self.to_host.lock().await;
        if let Err(error) = async {
            to.write_all(frame).await?;
            to.flush().await
        }
        .await
        {
            tracing::warn!("an answer could not be sent to the host: {error}");
        }
    }

    /// Answers with an error, without holding up the loop that found it.
    fn refuse(self: &Arc<Self>, stream: u32, code: Code, message: String) {
        tracing::error!("refused with {code:?}: {message}");
        let connection = Arc::clone(self);
        tokio::spawn(async move { connection.reply(&ttrpc::refusal(stream, code, &message)).await });
    }

    async fn close(&self) {
        {
            let mut answers = self.answers();
            answers.closed = true;
            answers.waiting.clear();
        }
        let _ = self.to_agent.lock().await.shutdown().await;
        // A writer that is stuck on a host that does not read ends when the host closes its side.
        if let Ok(mut to) = self.to_host.try_lock() {
            let _ = to.shutdown().await;
        }
    }
}

async fn read_header(from: &mut (impl AsyncRead + Unpin)) -> io::Result<Option<Header>> {
    let mut bytes = [0; HEADER_BYTES];
    // The end of the stream is an end only between two frames.
    if from.read(&mut bytes[..1]).await? == 0 {
        return Ok(None);
    }
    from.read_exact(&mut bytes[1..]).await?;
    Ok(Some(Header::decode(bytes)))
}

async fn read_to(from: &mut (impl AsyncRead + Unpin), buffer: &mut Vec<u8>, goal: usize) -> io::Result<()> {
    let begun = buffer.len();
    if goal > begun {
        buffer.resize(goal, 0);
        from.read_exact(&mut buffer[begun..]).await?;
    }
    Ok(())
}

async fn discard(from: &mut (impl AsyncRead + Unpin), length: usize) -> io::Result<()> {
    pass(from, &mut tokio::io::sink(), length).await
}

/// Passes on a frame whose beginning was read, in pieces.
async fn relay(
    from: &mut (impl AsyncRead + Unpin),
    to: &mut (impl AsyncWrite + Unpin),
    header: Header,
    begun: &[u8],
) -> io::Result<()> {
    let mut start = Vec::with_capacity(HEADER_BYTES + begun.len());
    start.extend_from_slice(&header.encode());
    start.extend_from_slice(begun);
    to.write_all(&start).await?;
    pass(from, to, header.length as usize - begun.len()).await?;
    to.flush().await
}

async fn pass(
    from: &mut (impl AsyncRead + Unpin),
    to: &mut (impl AsyncWrite + Unpin),
    length: usize,
) -> io::Result<()> {
    let passed = tokio::io::copy(&mut from.take(length as u64), to).await?;
    if passed == length as u64 { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
}
