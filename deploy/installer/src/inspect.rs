//! A look into an initrd: whether it is whole, and what it says of itself.
//!
//! # Design
//! It is read to its end once, when it is used: gzip's and zstd's checksums then tell a whole file from one that is
//! still being copied. osbuilder, which makes Kata's images, leaves a summary in them (`create_summary_file` in
//! tools/osbuilder/scripts/lib.sh) with version and architecture. Formats that nothing here can unpack (xz, lz4, lzma,
//! bzip2) are taken as they are.

use std::io::{self, BufRead, Read};

/// osbuilder's summary.
const SUMMARY: &str = "var/lib/osbuilder/osbuilder.yaml";
/// Where Kata's agent is: beside an init, or as the init.
const PROGRAMS: [&str; 3] = ["usr/bin/kata-agent", "sbin/init", "init"];
/// What our overlay consists of.
const OURS: &str = "zpod";
/// No path in an initrd is longer: PATH_MAX.
const LONGEST_NAME: u64 = 4096;
/// osbuilder's summary has a kilobyte or two.
const LONGEST_TEXT: u64 = 256 << 10;
const HEADER: usize = 110;
const TRAILER: &str = "TRAILER!!!";

/// What was found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Contents {
    /// It has something to start: `/init` or `/sbin/init`.
    pub init: bool,
    /// It has our overlay in it already.
    pub ours: bool,
    /// The version that osbuilder wrote.
    pub version: Option<String>,
    /// The architecture, as `uname -m` names it.
    pub architecture: Option<String>,
    /// A part of it could not be looked into: how that is compressed.
    pub opaque: Option<&'static str>,
}

/// Reads a whole initrd.
///
/// # Errors
/// `UnexpectedEof` or `InvalidData` if it is not whole.
pub fn inspect(reader: &mut impl BufRead) -> io::Result<Contents> {
    let mut contents = Contents::default();
    // The kernel skips zeros between segments, and so does everybody else.
    while let Some(byte) = skip_zeros(reader)? {
        match byte {
            b'0' => archive(reader, &mut contents)?,
            0x1f => {
                let mut unpacked = io::BufReader::new(flate2::bufread::GzDecoder::new(&mut *reader));
                archives(&mut unpacked, &mut contents)?;
            }
            0x28 => {
                let frame = zstd::stream::read::Decoder::with_buffer(&mut *reader)?.single_frame();
                archives(&mut io::BufReader::new(frame), &mut contents)?;
            }
            other => {
                contents.opaque = Some(format_of(other).ok_or_else(|| broken("it has a part of unknown format"))?);
                break;
            }
        }
    }
    Ok(contents)
}

fn format_of(first: u8) -> Option<&'static str> {
    match first {
        0xfd => Some("xz"),
        0x02 | 0x04 => Some("lz4"),
        0x5d => Some("lzma"),
        b'B' => Some("bzip2"),
        _ => None,
    }
}

/// All that a compressed segment holds, up to its end: its checksum comes last.
fn archives(reader: &mut impl BufRead, contents: &mut Contents) -> io::Result<()> {
    while skip_zeros(reader)?.is_some() {
        archive(reader, contents)?;
    }
    Ok(())
}

/// One cpio archive in the "newc" format, up to its trailer.
fn archive(reader: &mut impl Read, contents: &mut Contents) -> io::Result<()> {
    loop {
        let mut header = [0; HEADER];
        reader.read_exact(&mut header)?;
        if !(header.starts_with(b"070701") || header.starts_with(b"070702")) {
            return Err(broken("an entry has no cpio header"));
        }
        let (mode, size, name_length) = (field(&header, 1)?, field(&header, 6)?, field(&header, 11)?);
        if name_length > LONGEST_NAME {
            return Err(broken("an entry's name is too long"));
        }
        let mut name = Vec::new();
        exactly(reader, name_length, &mut name)?;
        skip(reader, padding(HEADER as u64 + name_length))?;
        let name = String::from_utf8_lossy(name.strip_suffix(b"\0").unwrap_or(&name)).into_owned();
        if name == TRAILER {
            return Ok(());
        }
        let name = name.strip_prefix("./").unwrap_or(&name).trim_start_matches('/');
        let mut start = Vec::new();
        let wanted = if name == SUMMARY { size.min(LONGEST_TEXT) } else { size.min(20) };
        exactly(reader, wanted, &mut start)?;
        skip(reader, size - wanted + padding(size))?;
        contents.see(name, mode, &start);
    }
}

impl Contents {
    fn see(&mut self, name: &str, mode: u64, start: &[u8]) {
        self.init |= matches!(name, "init" | "sbin/init");
        self.ours |= name == OURS || name.starts_with("zpod/");
        let regular = mode & 0o170_000 == 0o100_000;
        if name == SUMMARY {
            let text = String::from_utf8_lossy(start);
            self.version = summary_version(&text);
            self.architecture = value(&text, "architecture").map(str::to_owned).or(self.architecture.take());
        } else if regular && PROGRAMS.contains(&name) && self.architecture.is_none() {
            self.architecture = elf_architecture(start).map(str::to_owned);
        }
    }
}

/// The agent's version, or that of osbuilder, which is the same number: tools/osbuilder/VERSION is a link to Kata's.
fn summary_version(text: &str) -> Option<String> {
    let agent = text.split_once("\nagent:").map_or("", |(_, agent)| agent);
    let candidates =
        [value(agent, "version"), text.split_once("osbuilder:").and_then(|(_, rest)| value(rest, "version"))];
    candidates.into_iter().flatten().find(|version| *version != "unknown" && !version.is_empty()).map(str::to_owned)
}

/// The first `key: "value"` in a summary. Made by a shell script, it needs no more of YAML than this.
fn value<'a>(text: &'a str, key: &str) -> Option<&'a str> {
    let of = |line: &'a str| line.trim().strip_prefix(key)?.strip_prefix(':');
    text.lines().find_map(of).map(|value| value.trim().trim_matches('"'))
}

/// What a program is for, by its ELF header, as `uname -m` names it.
pub(crate) fn elf_architecture(start: &[u8]) -> Option<&'static str> {
    if !start.starts_with(b"\x7fELF") {
        return None;
    }
    let machine = start.get(18..20)?.try_into().ok()?;
    // EI_DATA: 1 is little-endian.
    let machine = if start[5] == 1 { u16::from_le_bytes(machine) } else { u16::from_be_bytes(machine) };
    Some(match machine {
        62 => "x86_64",
        183 => "aarch64",
        22 => "s390x",
        21 => "ppc64le",
        243 => "riscv64",
        _ => "an unknown architecture",
    })
}

fn field(header: &[u8; HEADER], index: usize) -> io::Result<u64> {
    let at = 6 + index * 8;
    let digits = std::str::from_utf8(&header[at..at + 8]).ok();
    digits.and_then(|digits| u64::from_str_radix(digits, 16).ok()).ok_or_else(|| broken("a cpio header is damaged"))
}

fn padding(length: u64) -> u64 {
    length.wrapping_neg() % 4
}

fn exactly(reader: &mut impl Read, count: u64, into: &mut Vec<u8>) -> io::Result<()> {
    if reader.take(count).read_to_end(into)? as u64 == count {
        Ok(())
    } else {
        Err(io::ErrorKind::UnexpectedEof.into())
    }
}

fn skip(reader: &mut impl Read, count: u64) -> io::Result<()> {
    if io::copy(&mut reader.take(count), &mut io::sink())? == count {
        Ok(())
    } else {
        Err(io::ErrorKind::UnexpectedEof.into())
    }
}

/// Skips zeros and shows what follows them; nothing at the end.
fn skip_zeros(reader: &mut impl BufRead) -> io::Result<Option<u8>> {
    loop {
        let buffer = reader.fill_buf()?;
        let (length, zeros) = (buffer.len(), buffer.iter().take_while(|byte| **byte == 0).count());
        let next = buffer.get(zeros).copied();
        reader.consume(zeros);
        if next.is_some() || length == 0 {
            return Ok(next);
        }
    }
}

fn broken(why: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}

#[cfg(test)]
mod tests;
