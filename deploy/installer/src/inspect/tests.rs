use std::io::Write as _;

use proptest::prelude::*;
use zpod_image::Archive;

use super::*;

const SUMMARY_TEXT: &str = "---\nosbuilder:\n  url: \"https://x\"\n  version: \"4.1.0-7c6ba40c54\"\n\
architecture: \"x86_64\"\nbase-distro:\n  name: \"ubuntu\"\n  version: \"resolute\"\nagent:\n  name: \"kata-agent\"\n  \
version: \"4.1.0\"\n  agent-is-init-daemon: \"yes\"\n";

fn kata() -> Vec<u8> {
    let mut archive = Archive::new();
    archive.file("sbin/init", *b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0rest", 0o755);
    archive.symlink("init", "/sbin/init").file(SUMMARY, SUMMARY_TEXT, 0o644);
    archive.file("usr/lib/large", vec![7; 100_001], 0o644);
    archive.to_cpio().unwrap()
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn look(bytes: &[u8]) -> io::Result<Contents> {
    // As small as a reader may be.
    inspect(&mut io::BufReader::with_capacity(16, bytes))
}

fn expected() -> Contents {
    let text = |text: &str| Some(text.to_owned());
    Contents { init: true, version: text("4.1.0"), architecture: text("x86_64"), ..Contents::default() }
}

#[test]
fn an_initrd_is_read_however_it_is_packed() {
    let plain = kata();
    assert_eq!(look(&plain).unwrap(), expected());
    assert_eq!(look(&gzip(&plain)).unwrap(), expected());
    assert_eq!(look(&zstd::encode_all(&plain[..], 3).unwrap()).unwrap(), expected());
}

#[test]
fn segments_of_all_formats_may_follow_each_other_with_zeros_between_them() {
    let early = Archive::new().file("kernel/x86/microcode", *b"1", 0o644).to_cpio().unwrap();
    let ours = Archive::new().file("zpod/init", *b"1", 0o755).to_zstd().unwrap();
    for zeros in [0, 1, 3, 511] {
        let gap = vec![0; zeros];
        let whole = [&early[..], &gap, &gzip(&kata()), &gap, &ours, &gap].concat();
        assert_eq!(look(&whole).unwrap(), Contents { ours: true, ..expected() });
    }
}

#[test]
fn what_cannot_be_unpacked_here_is_said_to_be_opaque() {
    for (magic, name) in
        [(&b"\xfd7zXZ\0"[..], "xz"), (b"\x02\x21\x4c\x18", "lz4"), (b"\x5d\0\0", "lzma"), (b"BZh9", "bzip2")]
    {
        assert_eq!(look(magic).unwrap(), Contents { opaque: Some(name), ..Contents::default() });
    }
    assert!(look(b"QFI\xfb").is_err());
}

#[test]
fn a_program_says_for_which_machine_it_is_when_there_is_no_summary() {
    let elf = |machine: u8| {
        let mut bytes = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0".to_vec();
        bytes.extend([machine, 0]);
        Archive::new().file("usr/bin/kata-agent", bytes, 0o755).to_cpio().unwrap()
    };
    for (machine, name) in [(62, "x86_64"), (183, "aarch64"), (1, "an unknown architecture")] {
        assert_eq!(look(&elf(machine)).unwrap().architecture.as_deref(), Some(name));
    }
}

#[test]
fn an_agent_of_unknown_version_has_that_of_osbuilder() {
    let text = SUMMARY_TEXT.replace("version: \"4.1.0\"", "version: \"unknown\"");
    assert_eq!(summary_version(&text).as_deref(), Some("4.1.0-7c6ba40c54"));
    assert_eq!(summary_version("agent:\n").as_deref(), None);
}

proptest! {
    #[test]
    fn a_file_that_ends_early_is_never_taken_for_whole(cut in 1_usize..400) {
        let plain = kata();
        for whole in [gzip(&plain), zstd::encode_all(&plain[..], 3).unwrap()] {
            let kept = whole.len().saturating_sub(cut).max(1);
            prop_assert!(look(&whole[..kept]).is_err(), "{kept} of {}", whole.len());
        }
        prop_assert!(look(&plain[..plain.len() - cut.max(124)]).is_err());
    }

    #[test]
    fn a_flipped_bit_in_a_compressed_file_is_noticed(at in 10_usize..200, bit in 0_u8..8) {
        let mut whole = gzip(&kata());
        let at = at % whole.len();
        prop_assume!(at >= 10);
        whole[at] ^= 1 << bit;
        // Or it is the same as before: some bits of a deflate stream mean nothing.
        if let Ok(contents) = look(&whole) { prop_assert_eq!(contents, expected()); }
    }

    #[test]
    fn nothing_makes_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
        let _ = look(&bytes);
        let _ = look(&[b"070701".as_slice(), &bytes].concat());
        let _ = look(&[b"\x1f\x8b\x08".as_slice(), &bytes].concat());
        let _ = look(&[b"\x28\xb5\x2f\xfd".as_slice(), &bytes].concat());
    }
}
