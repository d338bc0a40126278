use std::future::Future as _;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Instant, Sleep};

/// So many frames and reads may come at once.
const BURST: f64 = 1000.0;
/// And so many each second, for ever.
const RATE: f64 = 100.0;
/// And one more for each so many bytes of what is carried, be it read or written: a stream of data has its frames, and
/// those by which its receiver makes room for more.
const BYTES_OF_ONE: f64 = 1024.0;
/// How much is taken at a time: as much as HTTP/2 carries in a frame by default, or 1,820 frames that carry nothing.
const READ: usize = 16 << 10;
/// Length (24 bits), type, flags, stream (RFC 9113, section 4.1).
const HEADER: usize = 9;

/// A connection to a guest that is read no faster than such a connection needs.
///
/// # Design
/// What a guest says is bounded by its messages, but frames that say nothing are not: PING, SETTINGS, WINDOW_UPDATE, empty
/// DATA, or data in pieces of one byte each cost a processor, and HTTP/2 has an answer to some. So frames and reads are
/// counted. Who has had its part is read later: the kernel's buffer fills, and the guest waits. Nothing is lost, and a
/// connection on which nothing else gets through ends by HTTP/2's own pings.
#[derive(Debug)]
pub(super) struct Paced<S> {
    stream: S,
    left: f64,
    counted: Instant,
    frames: Frames,
    waiting: Option<Pin<Box<Sleep>>>,
}

impl<S> Paced<S> {
    pub(super) fn new(stream: S) -> Self {
        Self { stream, left: BURST, counted: Instant::now(), frames: Frames::default(), waiting: None }
    }

    fn refill(&mut self) {
        let now = Instant::now();
        self.add(now.duration_since(self.counted).as_secs_f64() * RATE);
        self.counted = now;
    }

    fn add(&mut self, more: f64) {
        self.left = (self.left + more).min(BURST);
    }

    fn carried(&mut self, bytes: usize) {
        self.add(bytes as f64 / BYTES_OF_ONE);
    }
}

/// Finds the frames in a stream of bytes.
#[derive(Debug, Default)]
struct Frames {
    header: [u8; HEADER],
    known: usize,
    /// Of what the frame carries, what is to come.
    payload: usize,
}

impl Frames {
    /// How many frames begin in these bytes.
    fn count(&mut self, mut bytes: &[u8]) -> usize {
        let mut frames = 0;
        while !bytes.is_empty() {
            let passed = self.payload.min(bytes.len());
            (self.payload, bytes) = (self.payload - passed, &bytes[passed..]);
            let taken = (HEADER - self.known).min(bytes.len());
            self.header[self.known..self.known + taken].copy_from_slice(&bytes[..taken]);
            (self.known, bytes) = (self.known + taken, &bytes[taken..]);
            if self.known == HEADER {
                let [a, b, c, ..] = self.header;
                self.payload = u32::from_be_bytes([0, a, b, c]) as usize;
                self.known = 0;
                frames += 1;
            }
        }
        frames
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Paced<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        loop {
            self.refill();
            if self.left >= 1.0 {
                self.waiting = None;
                break;
            }
            // A timer has milliseconds.
            let pause = Duration::from_secs_f64((1.0 - self.left) / RATE).max(Duration::from_millis(1));
            let waiting = self.waiting.insert(Box::pin(tokio::time::sleep(pause)));
            ready!(waiting.as_mut().poll(cx));
        }
        let this = &mut *self;
        let mut part = ReadBuf::new(buf.initialize_unfilled_to(buf.remaining().min(READ)));
        ready!(Pin::new(&mut this.stream).poll_read(cx, &mut part))?;
        let (read, frames) = (part.filled().len(), this.frames.count(part.filled()));
        buf.advance(read);
        this.carried(read);
        this.left -= (frames + 1) as f64;
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Paced<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = ready!(Pin::new(&mut self.stream).poll_write(cx, bytes))?;
        self.carried(written);
        Poll::Ready(Ok(written))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    const DATA: u8 = 0;
    const PING: u8 = 6;
    const WINDOW_UPDATE: u8 = 8;

    fn frame(kind: u8, payload: usize) -> Vec<u8> {
        let [_, a, b, c] = u32::try_from(payload).unwrap().to_be_bytes();
        let mut frame = vec![a, b, c, kind, 0, 0, 0, 0, 1];
        frame.resize(HEADER + payload, 7);
        frame
    }

    /// How many of these frames are read in a time, of a guest that always has more of them.
    async fn frames_in(time: Duration, frame: Vec<u8>, at_once: usize) -> usize {
        let (ours, mut guests) = tokio::io::duplex(1 << 16);
        let length = frame.len();
        let flood = frame.repeat(at_once);
        tokio::spawn(async move { while guests.write_all(&flood).await.is_ok() {} });
        let (mut paced, mut read, mut buffer) = (Paced::new(ours), 0, vec![0; 1 << 16]);
        let end = Instant::now() + time;
        while let Ok(Ok(bytes)) = tokio::time::timeout_at(end, paced.read(&mut buffer)).await {
            read += bytes;
        }
        read / length
    }

    #[tokio::test(start_paused = true)]
    async fn a_flood_of_frames_that_say_nothing_is_read_at_a_bounded_pace() {
        for frame in [frame(PING, 8), frame(DATA, 0), frame(WINDOW_UPDATE, 4), frame(4, 0)] {
            for at_once in [1, 100] {
                let frames = frames_in(Duration::from_secs(60), frame.clone(), at_once).await;
                // A burst, a minute's part, and what was taken with the last of it.
                let most = 1000 + 60 * 100 + READ / frame.len() + 1;
                // With a token for each KiB that they are themselves.
                let most = most + most * frame.len() / 1024 * 2;
                assert!((3000..=most).contains(&frames), "{frames} frames of {} bytes, not {most}", frame.len());
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_of_data_is_not_held_up_in_either_direction() {
        let begun = Instant::now();
        let bytes = 64 << 20;
        // Frames of 16 KiB, as HTTP/2 has them by default.
        let (ours, mut guests) = tokio::io::duplex(1 << 16);
        let data = frame(DATA, 16 << 10);
        let sender = tokio::spawn(async move {
            for _ in 0..bytes / data.len() {
                guests.write_all(&data).await.unwrap();
            }
        });
        tokio::io::copy(&mut Paced::new(ours), &mut tokio::io::sink()).await.unwrap();
        sender.await.unwrap();
        // And the other way, with the receiver's two frames for each of them.
        let (ours, mut guests) = tokio::io::duplex(1 << 16);
        let receiver = tokio::spawn(async move {
            let (mut buffer, answer) = (vec![0; HEADER + (16 << 10)], frame(WINDOW_UPDATE, 4).repeat(2));
            while guests.read_exact(&mut buffer).await.is_ok() {
                guests.write_all(&answer).await.unwrap();
            }
        });
        let mut paced = Paced::new(ours);
        let (data, mut buffer) = (frame(DATA, 16 << 10), vec![0; 2 * (HEADER + 4)]);
        for _ in 0..bytes / data.len() {
            paced.write_all(&data).await.unwrap();
            paced.read_exact(&mut buffer).await.unwrap();
        }
        drop(paced);
        receiver.await.unwrap();
        assert_eq!(begun.elapsed(), Duration::ZERO);
    }

    #[test]
    fn frames_are_found_wherever_a_read_ends() {
        let bytes = [frame(DATA, 0), frame(DATA, 300), frame(PING, 8), frame(DATA, 1)].concat();
        for piece in [1, 2, 8, 9, 10, 299, 5000] {
            let mut frames = Frames::default();
            let found: usize = bytes.chunks(piece).map(|piece| frames.count(piece)).sum();
            assert_eq!(found, 4, "in pieces of {piece}");
        }
    }
}
