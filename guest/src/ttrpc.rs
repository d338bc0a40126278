//! ttrpc frames: a header of ten bytes and a payload (PROTOCOL.md of containerd/ttrpc).

use prost::Message as _;
use tonic::Code;
use zpod_proto::ttrpc::{Response, Status};

/// Bytes of a header.
pub const HEADER_BYTES: usize = 10;

/// The longest frame that is held in memory: ttrpc's own limit for a message. Longer ones are only passed on.
pub const MAX_BUFFERED: usize = 4 << 20;

/// Longest text of an error that is sent.
const MAX_MESSAGE: usize = 4 << 10;

/// Type of a request frame.
pub const REQUEST: u8 = 1;
/// Type of a response frame.
pub const RESPONSE: u8 = 2;

/// The header of a frame. Every sequence of ten bytes is one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Bytes of payload.
    pub length: u32,
    /// The call it belongs to.
    pub stream: u32,
    /// 1 request, 2 response, 3 data.
    pub kind: u8,
    /// Flags of the kind.
    pub flags: u8,
}

impl Header {
    /// Reads a header.
    pub const fn decode(bytes: [u8; HEADER_BYTES]) -> Self {
        let [a, b, c, d, e, f, g, h, kind, flags] = bytes;
        Self { length: u32::from_be_bytes([a, b, c, d]), stream: u32::from_be_bytes([e, f, g, h]), kind, flags }
    }

    /// The header as it stands on the wire.
    pub fn encode(self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[..4].copy_from_slice(&self.length.to_be_bytes());
        bytes[4..8].copy_from_slice(&self.stream.to_be_bytes());
        bytes[8] = self.kind;
        bytes[9] = self.flags;
        bytes
    }

    /// A whole frame: this header, with the length of the payload, and the payload.
    pub fn frame(self, payload: &[u8]) -> Vec<u8> {
        // Payloads come from buffers of MAX_BUFFERED bytes, with less taken out than put in.
        let length = u32::try_from(payload.len()).unwrap_or(u32::MAX);
        let mut frame = Vec::with_capacity(HEADER_BYTES + payload.len());
        frame.extend_from_slice(&Self { length, ..self }.encode());
        frame.extend_from_slice(payload);
        frame
    }
}

/// A response of our own: the answer `payload` to a call.
pub fn answer(stream: u32, payload: Vec<u8>) -> Vec<u8> {
    respond(stream, Status { code: Code::Ok as i32, message: String::new() }, payload)
}

/// A response of our own: an error.
pub fn refusal(stream: u32, code: Code, message: &str) -> Vec<u8> {
    let mut end = message.len().min(MAX_MESSAGE);
    while !message.is_char_boundary(end) {
        end -= 1;
    }
    respond(stream, Status { code: code as i32, message: message[..end].to_owned() }, Vec::new())
}

fn respond(stream: u32, status: Status, payload: Vec<u8>) -> Vec<u8> {
    let response = Response { status: Some(status), payload };
    Header { length: 0, stream, kind: RESPONSE, flags: 0 }.frame(&response.encode_to_vec())
}

/// How the agent answered a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It was done.
    Done,
    /// There is no such container.
    NotFound,
    /// It failed, or the answer can't be read.
    Failed,
}

/// What the payload of a response says.
pub fn outcome(payload: &[u8]) -> Outcome {
    let Ok(response) = Response::decode(payload) else { return Outcome::Failed };
    match response.status {
        None => Outcome::Done,
        Some(status) if status.code == Code::Ok as i32 => Outcome::Done,
        Some(status) if status.code == Code::NotFound as i32 => Outcome::NotFound,
        // kata-agent 4.1.0 has no code for it: `do_remove_container` (src/agent/src/rpc.rs) answers INTERNAL and this.
        Some(status) if status.message.contains("Invalid container id") => Outcome::NotFound,
        Some(_) => Outcome::Failed,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_header_is_big_endian_as_ttrpc_says() {
        let header = Header { length: 0x0102, stream: 3, kind: REQUEST, flags: 0 };
        assert_eq!(header.encode(), [0, 0, 1, 2, 0, 0, 0, 3, 1, 0]);
    }

    #[test]
    fn the_agents_answers_are_told_apart() {
        let response = |code, message: &str| {
            Response { status: Some(Status { code, message: message.into() }), payload: vec![] }.encode_to_vec()
        };
        assert_eq!(outcome(&[]), Outcome::Done);
        assert_eq!(outcome(&response(0, "")), Outcome::Done);
        assert_eq!(outcome(&response(5, "")), Outcome::NotFound);
        assert_eq!(outcome(&response(13, "Invalid container id")), Outcome::NotFound);
        assert_eq!(outcome(&response(13, "ETIME")), Outcome::Failed);
        assert_eq!(outcome(&[0xff]), Outcome::Failed);
    }

    #[test]
    fn a_refusal_is_cut_at_a_character() {
        let frame = refusal(1, Code::Internal, &"ü".repeat(MAX_MESSAGE));
        let response = Response::decode(&frame[HEADER_BYTES..]).unwrap();
        assert!(response.status.unwrap().message.len() <= MAX_MESSAGE);
    }

    proptest! {
        #[test]
        fn any_ten_bytes_are_a_header_and_come_back(bytes in any::<[u8; HEADER_BYTES]>()) {
            prop_assert_eq!(Header::decode(bytes).encode(), bytes);
        }

        #[test]
        fn no_answer_of_the_agent_makes_the_parser_panic(payload in any::<Vec<u8>>()) {
            let _ = outcome(&payload);
        }
    }
}
