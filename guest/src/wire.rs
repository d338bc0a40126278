//! Protobuf on the wire: walking over the fields of a message, and rewriting some of them.
//!
//! # Design
//! Requests are never decoded and encoded again: fields that this program does not know must reach the agent as they
//! were sent. A message that is not changed comes out as the very same bytes, longer-than-needed varints included.
//!
//! # Limitations
//! Groups (wire types 3 and 4, deprecated since proto2) are refused. Kata's messages have none.

use std::ops::Range;

/// Bytes that are not a protobuf message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// The message ends within a field.
    #[error("the message ends within a field")]
    Truncated,
    /// A varint of more than ten bytes, a field number of zero or beyond 2^29, or an unknown wire type.
    #[error("not a protobuf message")]
    Malformed,
}

/// What a field holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Value {
    /// A number.
    Varint(u64),
    /// Four or eight bytes, which nobody here looks at.
    Fixed,
    /// A string, bytes or a message: where its content lies.
    Bytes(Range<usize>),
}

/// A field of a message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Field {
    /// Its number.
    pub number: u32,
    /// Where it lies, tag included.
    pub whole: Range<usize>,
    /// Where its tag lies.
    pub tag: Range<usize>,
    /// What it holds.
    pub value: Value,
}

impl Field {
    /// The content, where it is of the kind that has a length.
    pub fn bytes<'a>(&self, message: &'a [u8]) -> Option<&'a [u8]> {
        match &self.value {
            Value::Bytes(range) => message.get(range.clone()),
            _ => None,
        }
    }
}

/// The fields of a message in the order they stand. Ends after the first error.
#[derive(Debug, Clone)]
pub struct Fields<'a> {
    message: &'a [u8],
    at: usize,
}

/// Walks over a message.
pub fn fields(message: &[u8]) -> Fields<'_> {
    Fields { message, at: 0 }
}

impl Iterator for Fields<'_> {
    type Item = Result<Field, WireError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.at >= self.message.len() {
            return None;
        }
        let field = self.field();
        self.at = field.as_ref().map_or(self.message.len(), |field| field.whole.end);
        Some(field)
    }
}

impl Fields<'_> {
    fn field(&self) -> Result<Field, WireError> {
        let start = self.at;
        let (tag, after_tag) = varint(self.message, start)?;
        let number = u32::try_from(tag >> 3).map_err(|_| WireError::Malformed)?;
        if number == 0 || number >= 1 << 29 {
            return Err(WireError::Malformed);
        }
        let (value, end) = match tag & 7 {
            0 => {
                let (number, end) = varint(self.message, after_tag)?;
                (Value::Varint(number), end)
            }
            1 => (Value::Fixed, self.skip(after_tag, 8)?),
            2 => {
                let (length, content) = varint(self.message, after_tag)?;
                let end = self.skip(content, length)?;
                (Value::Bytes(content..end), end)
            }
            5 => (Value::Fixed, self.skip(after_tag, 4)?),
            _ => return Err(WireError::Malformed),
        };
        Ok(Field { number, whole: start..end, tag: start..after_tag, value })
    }

    fn skip(&self, at: usize, length: u64) -> Result<usize, WireError> {
        let end = usize::try_from(length).ok().and_then(|length| at.checked_add(length));
        end.filter(|end| *end <= self.message.len()).ok_or(WireError::Truncated)
    }
}

/// Reads the varint at `at`: its value, and where it ends.
fn varint(message: &[u8], at: usize) -> Result<(u64, usize), WireError> {
    let mut value = 0u64;
    for (index, byte) in message.get(at..).unwrap_or_default().iter().enumerate() {
        let bits = u64::from(byte & 0x7f);
        // The tenth byte holds the 64th bit and nothing else.
        if index == 9 && *byte > 1 {
            return Err(WireError::Malformed);
        }
        value |= bits << (7 * index);
        if byte & 0x80 == 0 {
            return Ok((value, at + index + 1));
        }
    }
    Err(WireError::Truncated)
}

fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// Adds a field with a number.
pub fn put_number(out: &mut Vec<u8>, field: u32, value: u64) {
    put_varint(out, u64::from(field) << 3);
    put_varint(out, value);
}

/// Adds a field with a message.
pub fn put_message(out: &mut Vec<u8>, field: u32, content: &[u8]) {
    put_varint(out, u64::from(field) << 3 | 2);
    put_varint(out, content.len() as u64);
    out.extend_from_slice(content);
}

/// What becomes of a field.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Edit {
    /// It stays as it is.
    Keep,
    /// It goes.
    Drop,
    /// Its content is replaced; only for fields that have a length.
    Replace(Vec<u8>),
}

/// Rewrites a message field by field. `None` when nothing was changed: then the message itself is the result.
///
/// # Errors
/// When the message is none, or `edit` fails.
pub fn rewrite<E: From<WireError>>(
    message: &[u8],
    mut edit: impl FnMut(&Field) -> Result<Edit, E>,
) -> Result<Option<Vec<u8>>, E> {
    let mut out: Option<Vec<u8>> = None;
    for field in fields(message) {
        let field = field?;
        let edit = edit(&field)?;
        if edit == Edit::Keep {
            if let Some(out) = &mut out {
                out.extend_from_slice(&message[field.whole.clone()]);
            }
            continue;
        }
        // The first change: what stands before it is kept.
        let out = out.get_or_insert_with(|| message[..field.whole.start].to_vec());
        if let (Edit::Replace(content), Value::Bytes(_)) = (edit, &field.value) {
            out.extend_from_slice(&message[field.tag.clone()]);
            put_varint(out, content.len() as u64);
            out.extend_from_slice(&content);
        }
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn keep(_: &Field) -> Result<Edit, WireError> {
        Ok(Edit::Keep)
    }

    #[test]
    fn every_kind_of_field_is_seen_where_it_is() {
        // 1: varint 150; 2: "hi"; 3: fixed32; 4: fixed64.
        let message = [8, 0x96, 1, 0x12, 2, b'h', b'i', 0x1d, 1, 2, 3, 4, 0x21, 1, 2, 3, 4, 5, 6, 7, 8];
        let seen: Vec<_> = fields(&message).collect::<Result<_, _>>().unwrap();
        assert_eq!(seen.iter().map(|f| f.number).collect::<Vec<_>>(), [1, 2, 3, 4]);
        assert_eq!(seen[0].value, Value::Varint(150));
        assert_eq!(seen[1].bytes(&message), Some(&b"hi"[..]));
        assert_eq!(seen[3].whole, 12..21);
    }

    #[test]
    fn what_is_no_message_is_told_apart_from_one_that_goes_on() {
        for (bytes, want) in [
            (&[0x08][..], WireError::Truncated),
            (&[0x12, 5, 1], WireError::Truncated),
            (&[0x21, 1, 2], WireError::Truncated),
            (&[0x80], WireError::Truncated),
            (&[0x00, 0], WireError::Malformed),
            (&[0x0b], WireError::Malformed),
            (&[0x0e], WireError::Malformed),
            (&[8, 255, 255, 255, 255, 255, 255, 255, 255, 255, 2], WireError::Malformed),
            (&[0x12, 255, 255, 255, 255, 255, 255, 255, 255, 255, 1], WireError::Truncated),
        ] {
            assert_eq!(fields(bytes).last(), Some(Err(want)), "{bytes:?}");
        }
    }

    #[test]
    fn a_longer_than_needed_varint_is_kept_as_it_was_sent() {
        let message = [0x88, 0x00, 0x81, 0x80, 0x00, 0x12, 0x82, 0x00, b'h', b'i', 0x18, 1];
        let out =
            rewrite(&message, |field| Ok::<_, WireError>(if field.number == 3 { Edit::Drop } else { Edit::Keep }));
        assert_eq!(out.unwrap().unwrap(), message[..10]);
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_walk_panic_or_run_on(message in any::<Vec<u8>>()) {
            prop_assert!(fields(&message).count() <= message.len());
            prop_assert!(rewrite(&message, keep).map_or(true, |out| out.is_none()));
            let _ = rewrite(&message, |_| Ok::<_, WireError>(Edit::Replace(vec![1])));
        }

        #[test]
        fn the_fields_of_a_message_cover_it_without_gaps(message in any::<Vec<u8>>()) {
            if let Ok(all) = fields(&message).collect::<Result<Vec<_>, _>>() {
                let mut at = 0;
                for field in &all {
                    prop_assert_eq!(field.whole.start, at);
                    at = field.whole.end;
                }
                prop_assert_eq!(at, message.len());
            }
        }

        #[test]
        fn a_varint_comes_back(value in any::<u64>()) {
            let mut out = Vec::new();
            put_varint(&mut out, value);
            prop_assert_eq!(varint(&out, 0), Ok((value, out.len())));
        }
    }
}
