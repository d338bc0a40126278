//! The codec of the control channel: a message is walked, without allocating, before prost builds anything of it. An
//! empty entry of a list is two bytes on the wire and hundreds in memory, so a bound on bytes alone bounds no memory.
//! How many bytes an answer may have is told to tonic with each call ([`Bounded::BYTES`]), which looks at the length in
//! front of the message before it makes room for it.

use std::marker::PhantomData;

use prost::Message;
use tonic::Status;
use tonic::codec::{Codec, DecodeBuf, Decoder};
use tonic_prost::{ProstCodec, ProstDecoder, ProstEncoder};

use crate::guest::*;

/// Volumes in a report: no pod has more.
const VOLUMES: usize = 64;
/// Containers of one volume: 64 volumes with as many names are 384 KiB of `String`s.
const CONTAINERS: usize = 256;
/// Properties in a map: ZFS has about a hundred.
const PROPERTIES: usize = 1024;
/// Send points of a volume: no guest tells more.
const SEND_POINTS: usize = 1024;
/// Snapshots of a volume: with names of 234 bytes they have as much room as send points and a token.
pub const SNAPSHOTS: usize = 512;

/// An answer that says no more than that something is done.
const SHORT: usize = 4 << 10;
/// A report, which zpod-guest keeps to, and the properties of a volume.
pub const LONG: usize = 128 << 10;
/// As many send points as are told, with names of 74 bytes, and a token of 16 KiB to go on with.
const POINTS: usize = 144 << 10;
/// Bytes of a stream in one message.
pub const CHUNK: usize = 256 << 10;

/// A list or map: number of the field, the most entries, and the lists in each entry.
pub struct List(u32, usize, &'static [List]);

/// What a message may be.
pub trait Bounded {
    /// Each of its lists.
    const LISTS: &'static [List] = &[];
    /// Its bytes, where it is an answer.
    const BYTES: usize = SHORT;
}

macro_rules! without_lists {
    ($($message:ident)*) => { $(impl Bounded for $message {})* };
}

without_lists! {
    StatusRequest WatchRequest GrowRequest GrowResponse SetPropertiesResponse SyncRequest SyncResponse ScrubRequest
    ScrubResponse MarkRequest MarkResponse UnmarkRequest UnmarkResponse ProvideKeyRequest ProvideKeyResponse
    PropertiesRequest SendPointsRequest RemoveSendPointRequest RemoveSendPointResponse SnapshotsRequest
    TakeSnapshotRequest TakeSnapshotResponse DestroySnapshotRequest DestroySnapshotResponse CheckRollbackRequest
    SendRequest ReceiveRequest ReceiveResponse
}

impl Bounded for SendResponse {
    const BYTES: usize = CHUNK + SHORT;
}

impl Bounded for StatusResponse {
    const BYTES: usize = LONG;
    const LISTS: &'static [List] = &[List(3, VOLUMES, &[List(19, CONTAINERS, &[])])];
}

impl Bounded for SetPropertiesRequest {
    const LISTS: &'static [List] = &[List(2, PROPERTIES, &[]), List(3, PROPERTIES, &[])];
}

impl Bounded for PropertiesResponse {
    const BYTES: usize = LONG;
    const LISTS: &'static [List] = &[List(1, PROPERTIES, &[]), List(2, PROPERTIES, &[])];
}

impl Bounded for SendPointsResponse {
    const BYTES: usize = POINTS;
    const LISTS: &'static [List] = &[List(1, SEND_POINTS, &[])];
}

impl Bounded for SnapshotsResponse {
    const BYTES: usize = POINTS;
    const LISTS: &'static [List] = &[List(1, SNAPSHOTS, &[])];
}

impl Bounded for CheckRollbackResponse {
    const BYTES: usize = POINTS;
    const LISTS: &'static [List] = &[List(1, SNAPSHOTS, &[])];
}

/// Prost's codec, with [`Bounded`] asked before it decodes.
#[derive(Debug)]
pub struct BoundedCodec<T, U>(PhantomData<(T, U)>);

impl<T, U> Default for BoundedCodec<T, U> {
    fn default() -> Self {
        Self(PhantomData)
    }
}

impl<T, U> Codec for BoundedCodec<T, U>
where
    T: Message + Send + 'static,
    U: Message + Default + Bounded + Send + 'static,
{
    type Encode = T;
    type Decode = U;
    type Encoder = ProstEncoder<T>;
    type Decoder = BoundedDecoder<U>;

    fn encoder(&mut self) -> Self::Encoder {
        ProstCodec::<T, U>::default().encoder()
    }

    fn decoder(&mut self) -> Self::Decoder {
        BoundedDecoder(ProstCodec::<T, U>::default().decoder())
    }
}

/// Walks a message, then lets prost decode it.
#[derive(Debug)]
pub struct BoundedDecoder<U>(ProstDecoder<U>);

impl<U: Message + Default + Bounded> Decoder for BoundedDecoder<U> {
    type Item = U;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<U>, Status> {
        use prost::bytes::Buf as _;
        let message = buffer.chunk();
        if message.len() != buffer.remaining() {
            return Err(Status::internal("the message is not in one piece"));
        }
        walk(message, U::LISTS).map_err(Status::resource_exhausted)?;
        self.0.decode(buffer)
    }
}

/// Whether the message is well formed and each of its lists within its bound.
fn walk(message: &[u8], lists: &[List]) -> Result<(), &'static str> {
    const MALFORMED: &str = "the message is malformed";
    let mut counts = [0_usize; 2];
    let mut rest = message;
    while !rest.is_empty() {
        let key = varint(&mut rest).ok_or(MALFORMED)?;
        let field = u32::try_from(key >> 3).map_err(|_| MALFORMED)?;
        let length = match key & 7 {
            0 => varint(&mut rest).map(|_| 0),
            1 => Some(8),
            2 => varint(&mut rest).and_then(|length| usize::try_from(length).ok()),
            5 => Some(4),
            // Groups too: nothing of ours has any.
            _ => None,
        };
        let (value, after) = length.and_then(|length| rest.split_at_checked(length)).ok_or(MALFORMED)?;
        rest = after;
        for (List(number, most, inner), count) in lists.iter().zip(&mut counts) {
            if *number == field && key & 7 == 2 {
                *count += 1;
                if *count > *most {
                    return Err("the message has more entries than any sound one");
                }
                if !inner.is_empty() {
                    walk(value, inner)?;
                }
            }
        }
    }
    Ok(())
}

fn varint(rest: &mut &[u8]) -> Option<u64> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let (&byte, after) = rest.split_first()?;
        *rest = after;
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn walked<M: Message + Bounded>(message: &M) -> bool {
        walk(&message.encode_to_vec(), M::LISTS).is_ok()
    }

    #[test]
    fn lists_are_counted_before_anything_is_built() {
        let volumes = |count, containers| {
            let volume = VolumeStatus { containers: vec![String::new(); containers], ..VolumeStatus::default() };
            StatusResponse { volumes: vec![volume; count], ..StatusResponse::default() }
        };
        assert!(walked(&volumes(VOLUMES, CONTAINERS)));
        assert!(!walked(&volumes(VOLUMES + 1, 0)));
        assert!(!walked(&volumes(1, CONTAINERS + 1)));
        assert!(walk(&[0x1a, 0].repeat(500_000), StatusResponse::LISTS).is_err());
        assert!(walked(&SendPointsResponse { points: vec![SendPoint::default(); SEND_POINTS], ..Default::default() }));
        assert!(!walked(&SendPointsResponse {
            points: vec![SendPoint::default(); SEND_POINTS + 1],
            ..Default::default()
        }));
    }

    #[test]
    fn all_that_a_guest_may_tell_of_its_send_points_fits() {
        let (guid, created, referenced_bytes, used_bytes) = (u64::MAX, u64::MAX, u64::MAX, u64::MAX);
        let point = SendPoint { name: "n".repeat(74), guid, created, referenced_bytes, used_bytes };
        let all = SendPointsResponse { points: vec![point; SEND_POINTS], resume_token: "f".repeat(16 << 10) };
        assert!(walked(&all) && all.encoded_len() <= SendPointsResponse::BYTES, "{}", all.encoded_len());
        let snapshot = SendPoint { name: "n".repeat(234), guid, created, referenced_bytes, used_bytes };
        let all = SnapshotsResponse { snapshots: vec![snapshot; SNAPSHOTS], left_out: u64::MAX };
        assert!(walked(&all) && all.encoded_len() <= SnapshotsResponse::BYTES, "{}", all.encoded_len());
        let (newer, left_out, written_bytes) = (vec!["n".repeat(234); SNAPSHOTS], u64::MAX, u64::MAX);
        let all = CheckRollbackResponse { newer, left_out, written_bytes, guid: u64::MAX };
        assert!(walked(&all) && all.encoded_len() <= CheckRollbackResponse::BYTES, "{}", all.encoded_len());
        let chunk = SendResponse { data: vec![0; CHUNK], estimated_bytes: u64::MAX };
        assert!(chunk.encoded_len() <= SendResponse::BYTES);
    }

    #[test]
    fn what_looks_like_entries_inside_data_is_data() {
        assert!(walked(&SendResponse { data: [0x0a, 0].repeat(100_000), ..Default::default() }));
    }

    #[test]
    fn malformed_messages_and_groups_are_refused() {
        for message in [&[0x0b, 0x0c][..], &[0x0a, 5, 1], &[0x08], &[0xff; 11], &[0x0d, 1, 2, 3]] {
            assert!(walk(message, StatusResponse::LISTS).is_err(), "{message:?}");
        }
    }
}
