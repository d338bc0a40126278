//! ZFS's label at the beginning of a device: what it says of its pool.
//!
//! # Design
//! Read from the disk itself, since no tool tells the state of a pool that is not imported in a form for programs. The label
//! is an nvlist in XDR (`nvpair.c` in OpenZFS) 16 KiB behind its beginning (`vdev_label_t`), of which some numbers and the
//! pool's name are taken. The first of the four labels is enough: all are written before an import or an export returns.

use crate::machine::Label;

/// Where the nvlist begins, in bytes from the beginning of the device.
pub const OFFSET: u64 = 16 << 10;
/// How long it may be.
pub const BYTES: usize = 112 << 10;

/// `NV_ENCODE_XDR`
const XDR: u8 = 1;
/// `DATA_TYPE_UINT64`
const UINT64: u32 = 8;
/// `DATA_TYPE_STRING`
const STRING: u32 = 9;
/// `POOL_STATE_EXPORTED`
const EXPORTED: u64 = 1;
/// `POOL_STATE_DESTROYED`
const DESTROYED: u64 = 2;
/// So much of a name is kept. It is whatever somebody has written there.
const NAME: usize = 64;

/// Reads a label; `None` where there is none that is whole.
pub fn decode(bytes: &[u8]) -> Option<Label> {
    let (header, mut rest) = bytes.split_at_checked(12)?;
    if header.first() != Some(&XDR) {
        return None;
    }
    let (mut state, mut txg, mut guid, mut name, mut devices) = (None, None, None, String::new(), 1);
    loop {
        let length = usize::try_from(number(rest)?).ok()?;
        if length == 0 {
            break;
        }
        let (pair, next) = rest.split_at_checked(length)?;
        match value(pair) {
            Some((b"state", Value::Number(value))) => state = Some(value),
            Some((b"txg", Value::Number(value))) => txg = Some(value),
            Some((b"pool_guid", Value::Number(value))) => guid = Some(value),
            Some((b"vdev_children", Value::Number(value))) => devices = value,
            Some((b"name", Value::Text(text))) => name = clean(text),
            _ => {}
        }
        rest = next;
    }
    let state = state?;
    Some(Label { guid: guid?, txg: txg?, exported: state == EXPORTED, destroyed: state == DESTROYED, name, devices })
}

fn number(bytes: &[u8]) -> Option<u32> {
    Some(u32::from_be_bytes(bytes.get(..4)?.try_into().ok()?))
}

enum Value<'a> {
    Number(u64),
    Text(&'a [u8]),
}

/// A part of these bytes that has its length before it, and what is behind its padding.
fn counted(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let length = usize::try_from(number(bytes)?).ok()?;
    let part = bytes.get(4..)?.get(..length)?;
    Some((part, bytes.get(4..)?.get(length.checked_next_multiple_of(4)?..)?))
}

/// Name and value of a pair that is a number or a text: sizes, name, type and number of elements before it.
fn value(pair: &[u8]) -> Option<(&[u8], Value<'_>)> {
    let (name, after) = counted(pair.get(8..)?)?;
    let value = after.get(8..)?;
    let value = match number(after)? {
        UINT64 => Value::Number(u64::from_be_bytes(value.get(..8)?.try_into().ok()?)),
        STRING => Value::Text(counted(value)?.0),
        _ => return None,
    };
    Some((name, value))
}

/// What a pool's name may have in it (zpoolconcepts(7)), and a question mark for anything else.
fn clean(name: &[u8]) -> String {
    let plain = |byte: &u8| byte.is_ascii_alphanumeric() || b"_.:-".contains(byte);
    name.iter().take(NAME).map(|byte| if plain(byte) { char::from(*byte) } else { '?' }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn pair(name: &str, kind: u32, value: &[u8]) -> Vec<u8> {
        let mut body = (name.len() as u32).to_be_bytes().to_vec();
        body.extend(name.as_bytes());
        body.resize(4 + name.len().next_multiple_of(4), 0);
        body.extend(kind.to_be_bytes());
        body.extend(1u32.to_be_bytes());
        body.extend(value);
        let mut pair = (body.len() as u32 + 8).to_be_bytes().to_vec();
        pair.extend([0; 4]);
        pair.extend(body);
        pair
    }

    fn label(state: u64, name: &[u8]) -> Vec<u8> {
        let mut bytes = vec![XDR, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];
        let number = |name: &str, value: u64| pair(name, UINT64, &value.to_be_bytes());
        // A string between them, and a list that has a `txg` of its own.
        bytes.extend(number("version", 5000));
        bytes.extend(pair(
            "name",
            STRING,
            &[&name.len().to_be_bytes()[4..], name, &[0; 4][..(4 - name.len() % 4) % 4]].concat(),
        ));
        bytes.extend(number("vdev_children", 2));
        bytes.extend([number("state", state), number("txg", 77), number("pool_guid", 42)].concat());
        bytes.extend(pair("vdev_tree", 19, &[&[0; 8], &number("txg", 1)[..], &[0; 8]].concat()));
        bytes.extend([0; 8]);
        bytes.resize(4096, 0);
        bytes
    }

    #[test]
    fn a_label_tells_its_pools_name_and_whether_it_was_exported_or_destroyed() {
        let told = Label { guid: 42, txg: 77, name: "pool".into(), devices: 2, ..Label::default() };
        assert_eq!(decode(&label(0, b"pool")), Some(told.clone()));
        assert_eq!(decode(&label(1, b"pool")), Some(Label { exported: true, ..told.clone() }));
        assert_eq!(decode(&label(2, b"pool")), Some(Label { destroyed: true, ..told }));
        assert_eq!(decode(&[0; BYTES]), None);
        assert_eq!(decode(&[]), None);
    }

    #[test]
    fn a_name_is_short_and_has_nothing_in_it_that_a_terminal_acts_on() {
        let name = |bytes: &[u8]| decode(&label(0, bytes)).unwrap().name;
        assert_eq!(name(b"a b\x1b[31m\n\xe9"), "a?b??31m??");
        assert_eq!(name(&[b'x'; 300]), "x".repeat(NAME));
    }

    proptest! {
        #[test]
        fn nothing_that_is_read_makes_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = decode(&bytes);
            let _ = decode(&[&[XDR; 12][..], &bytes].concat());
        }

        #[test]
        fn a_label_that_is_cut_off_is_none(at in 0usize..160) {
            prop_assert_eq!(decode(&label(1, b"pool")[..at]), None);
        }
    }
}
