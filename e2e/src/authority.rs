//! Connections from clients that name a unix socket's path as HTTP's `:authority`.
//!
//! kubelet dials the registration socket of a CSI driver without `grpc.WithAuthority`
//! (`pluginmanager/operationexecutor`), and grpc-go then sends the socket's path, percent-encoded. RFC 3986 allows
//! that; the `http` crate doesn't, so h2 ends the stream with PROTOCOL_ERROR before any service sees it. grpc-go
//! servers don't look at it.
//!
//! # Design
//! [`Lenient`] reads HTTP/2 frames on their way in and writes `localhost` in the place of each `:authority`. HPACK
//! needs no decoding for that: fields have lengths, and the name has an index of its own in the static table. What it
//! doesn't understand it lets through as it is.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::UnixStream;
use tonic::transport::server::Connected;

const PREFACE: usize = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".len();
const FRAME_HEAD: usize = 9;
/// RFC 9113, section 6.2.
const HEADERS: u8 = 1;
const END_HEADERS: u8 = 4;
const PADDED_OR_PRIORITY: u8 = 0x28;
/// RFC 7541, appendix A.
const AUTHORITY: usize = 1;
const INSTEAD: &[u8] = b"\x09localhost";

/// A server's end of a connection.
#[derive(Debug)]
pub struct Lenient {
    stream: UnixStream,
    begun: bool,
    raw: Vec<u8>,
    ready: Vec<u8>,
}

impl Lenient {
    /// On a connection that was just accepted.
    pub fn new(stream: UnixStream) -> Self {
        Self { stream, begun: false, raw: Vec::new(), ready: Vec::new() }
    }

    /// Passes on what is complete.
    fn sift(&mut self) {
        if !self.begun {
            if self.raw.len() < PREFACE {
                return;
            }
            self.ready.extend(self.raw.drain(..PREFACE));
            self.begun = true;
        }
        while let [a, b, c, kind, flags, ..] = self.raw[..] {
            let end = FRAME_HEAD + u32::from_be_bytes([0, a, b, c]) as usize;
            if self.raw.len() < end {
                return;
            }
            let frame: Vec<u8> = self.raw.drain(..end).collect();
            let whole = kind == HEADERS && flags & END_HEADERS != 0 && flags & PADDED_OR_PRIORITY == 0;
            match rewrite(&frame[FRAME_HEAD..]).filter(|_| whole) {
                Some(block) => {
                    let [_, length @ ..] = u32::try_from(block.len()).unwrap_or_default().to_be_bytes();
                    self.ready.extend(length);
                    self.ready.extend(&frame[3..FRAME_HEAD]);
                    self.ready.extend(block);
                }
                None => self.ready.extend(frame),
            }
        }
    }
}

/// A header block with another authority; `None` where it is broken.
fn rewrite(block: &[u8]) -> Option<Vec<u8>> {
    let (mut out, mut at) = (Vec::with_capacity(block.len()), 0);
    while let Some(&first) = block.get(at) {
        let start = at;
        let (prefix, literal) = match first {
            0x80.. => (7, false),
            0x40..0x80 => (6, true),
            0x20..0x40 => (5, false),
            _ => (4, true),
        };
        let name = integer(block, &mut at, prefix)?;
        if literal && name == 0 {
            string(block, &mut at)?;
        }
        let value = at;
        if literal {
            string(block, &mut at)?;
        }
        if literal && name == AUTHORITY {
            out.extend(&block[start..value]);
            out.extend(INSTEAD);
        } else {
            out.extend(&block[start..at]);
        }
    }
    Some(out)
}

/// RFC 7541, section 5.1.
fn integer(block: &[u8], at: &mut usize, prefix: u32) -> Option<usize> {
    let most = (1 << prefix) - 1;
    let mut value = usize::from(*block.get(*at)?) & most;
    *at += 1;
    if value < most {
        return Some(value);
    }
    for shift in (0..28).step_by(7) {
        let byte = usize::from(*block.get(*at)?);
        *at += 1;
        value += (byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

/// RFC 7541, section 5.2: Huffman-coded or not, it has its length first.
fn string(block: &[u8], at: &mut usize) -> Option<()> {
    let length = integer(block, at, 7)?;
    *at = at.checked_add(length).filter(|end| *end <= block.len())?;
    Some(())
}

impl AsyncRead for Lenient {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        while this.ready.is_empty() {
            let mut buffer = [0; 4096];
            let mut read = ReadBuf::new(&mut buffer);
            ready!(Pin::new(&mut this.stream).poll_read(context, &mut read))?;
            if read.filled().is_empty() {
                return Poll::Ready(Ok(()));
            }
            this.raw.extend(read.filled());
            this.sift();
        }
        let size = this.ready.len().min(out.remaining());
        out.put_slice(&this.ready[..size]);
        this.ready.drain(..size);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Lenient {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, data)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

impl Connected for Lenient {
    type ConnectInfo = ();

    fn connect_info(&self) {}
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    #[test]
    fn an_authority_of_any_length_and_coding_is_replaced_and_nothing_else() {
        // RFC 7541, C.3.1 and C.4.1: plain and Huffman-coded.
        let expected = b"\x82\x86\x84\x41\x09localhost";
        assert_eq!(rewrite(b"\x82\x86\x84\x41\x0fwww.example.com").unwrap(), expected);
        let coded = b"\x82\x86\x84\x41\x8c\xf1\xe3\xc2\xe5\xf2\x3a\x6b\xa0\xab\x90\xf4\xff";
        assert_eq!(rewrite(coded).unwrap(), expected);
        let long = [b"\x41\x7f\x49".as_slice(), &[b'%'; 200], b"\x00\x01a\x01b\x3f\xe1\x1f"].concat();
        assert_eq!(rewrite(&long).unwrap(), b"\x41\x09localhost\x00\x01a\x01b\x3f\xe1\x1f");
        assert_eq!(rewrite(b"\x82\x41\x0fwww"), None);
    }

    #[tokio::test]
    async fn frames_come_through_in_order_however_they_arrive() {
        let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00";
        let data = b"\x00\x00\x02\x00\x01\x00\x00\x00\x01hi";
        let sent = [preface.as_slice(), b"\x00\x00\x05\x01\x04\x00\x00\x00\x01\x82\x41\x02%2", data].concat();
        let expected =
            [preface.as_slice(), b"\x00\x00\x0c\x01\x04\x00\x00\x00\x01\x82\x41\x09localhost", data].concat();
        let (mut client, server) = UnixStream::pair().unwrap();
        let writer = tokio::spawn(async move {
            for byte in sent {
                client.write_all(&[byte]).await.unwrap();
            }
        });
        let mut received = Vec::new();
        Lenient::new(server).read_to_end(&mut received).await.unwrap();
        writer.await.unwrap();
        assert_eq!(received, expected);
    }
}
