//! ZFS's label at the beginning of a device: what it says of its pool.
//!
//! # Design
//! Read from the disk itself, since no tool tells the state of a pool that is not imported in a form for programs. The label
//! is an nvlist in XDR (`nvpair.c` in OpenZFS) 16 KiB behind its beginning (`vdev_label_t`), of which three numbers are
//! taken. The first of the four labels is enough: all are written before an import or an export returns.

use crate::machine::Label;

/// Where the nvlist begins, in bytes from the beginning of the device.
pub const OFFSET: u64 = 16 << 10;
/// How long it may be.
pub const BYTES: usize = 112 << 10;

/// `NV_ENCODE_XDR`
const XDR: u8 = 1;
/// `DATA_TYPE_UINT64`
const UINT64: u32 = 8;
/// `POOL_STATE_EXPORTED`
const EXPORTED: u64 = 1;

/// Reads a label; `None` where there is none that is whole.
pub fn decode(bytes: &[u8]) -> Option<Label> {
    let (header, mut rest) = bytes.split_at_checked(12)?;
    if header.first() != Some(&XDR) {
        return None;
    }
    let (mut state, mut txg, mut guid) = (None, None, None);
    loop {
        let length = usize::try_from(number(rest)?).ok()?;
        if length == 0 {
            break;
        }
        let (pair, next) = rest.split_at_checked(length)?;
        match uint64(pair) {
            Some((b"state", value)) => state = Some(value),
            Some((b"txg", value)) => txg = Some(value),
            Some((b"pool_guid", value)) => guid = Some(value),
            _ => {}
        }
        rest = next;
    }
    Some(Label { guid: guid?, txg: txg?, exported: state? == EXPORTED })
}

fn number(bytes: &[u8]) -> Option<u32> {
    Some(u32::from_be_bytes(bytes.get(..4)?.try_into().ok()?))
}

/// Name and value of a pair that is a number: sizes, name and type before it.
fn uint64(pair: &[u8]) -> Option<(&[u8], u64)> {
    let length = usize::try_from(number(pair.get(8..)?)?).ok()?;
    let name = pair.get(12..)?.get(..length)?;
    let after = pair.get(12..)?.get(length.checked_next_multiple_of(4)?..)?;
    let value = after.get(8..)?.get(..8)?;
    (number(after)? == UINT64).then_some((name, u64::from_be_bytes(value.try_into().ok()?)))
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

    fn label(state: u64) -> Vec<u8> {
        let mut bytes = vec![XDR, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];
        let number = |name: &str, value: u64| pair(name, UINT64, &value.to_be_bytes());
        // A string between them, and a list that has a `txg` of its own.
        bytes.extend(number("version", 5000));
        bytes.extend(pair("name", 9, b"\0\0\0\x04pool"));
        bytes.extend([number("state", state), number("txg", 77), number("pool_guid", 42)].concat());
        bytes.extend(pair("vdev_tree", 19, &[&[0; 8], &number("txg", 1)[..], &[0; 8]].concat()));
        bytes.extend([0; 8]);
        bytes.resize(4096, 0);
        bytes
    }

    #[test]
    fn a_label_tells_whether_its_pool_was_exported() {
        assert_eq!(decode(&label(0)), Some(Label { guid: 42, txg: 77, exported: false }));
        assert_eq!(decode(&label(1)), Some(Label { guid: 42, txg: 77, exported: true }));
        assert_eq!(decode(&[0; BYTES]), None);
        assert_eq!(decode(&[]), None);
    }

    proptest! {
        #[test]
        fn nothing_that_is_read_makes_it_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = decode(&bytes);
            let _ = decode(&[&[XDR; 12][..], &bytes].concat());
        }

        #[test]
        fn a_label_that_is_cut_off_is_none(at in 0usize..160) {
            prop_assert_eq!(decode(&label(1)[..at]), None);
        }
    }
}
