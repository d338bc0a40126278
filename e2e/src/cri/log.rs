//! Container logs in CRI's format: `<RFC 3339 time> <stream> <F|P> <text>`, a line each; `P` where the line goes on.

use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::Path;

use jiff::Timestamp;

/// Longer lines are cut into parts: kubelet reads lines into memory.
const LONGEST: usize = 16 << 10;

/// One stream of a container's log.
#[derive(Debug)]
pub(super) struct LogStream {
    file: File,
    stream: &'static str,
    pending: Vec<u8>,
}

impl LogStream {
    /// Both streams of a log, in a file that may be there already.
    ///
    /// # Errors
    /// When it can't be opened.
    pub(super) fn both(path: &Path) -> io::Result<[Self; 2]> {
        if let Some(dir) = path.parent() {
            fs::create_dir_all(dir)?;
        }
        let file = File::options().create(true).append(true).open(path)?;
        let other = file.try_clone()?;
        Ok([(file, "stdout"), (other, "stderr")].map(|(file, stream)| Self { file, stream, pending: Vec::new() }))
    }

    /// Some more output.
    ///
    /// # Errors
    /// When it can't be written.
    pub(super) fn add(&mut self, data: &[u8]) -> io::Result<()> {
        self.pending.extend_from_slice(data);
        let mut rest = std::mem::take(&mut self.pending);
        while let Some((end, whole)) = cut(&rest) {
            self.write(&rest[..end], whole)?;
            rest.drain(..end + usize::from(whole));
        }
        self.pending = rest;
        Ok(())
    }

    /// The end of the output: what has no line's end yet is written too.
    ///
    /// # Errors
    /// When it can't be written.
    pub(super) fn finish(&mut self) -> io::Result<()> {
        let rest = std::mem::take(&mut self.pending);
        if rest.is_empty() { Ok(()) } else { self.write(&rest, false) }
    }

    fn write(&mut self, text: &[u8], whole: bool) -> io::Result<()> {
        let tag = if whole { "F" } else { "P" };
        let mut line = format!("{:.9} {} {tag} ", Timestamp::now(), self.stream).into_bytes();
        line.extend_from_slice(text);
        line.push(b'\n');
        // One write: the other stream appends to the same file.
        self.file.write_all(&line)
    }
}

/// Where the next entry ends, and whether a line ends there.
fn cut(data: &[u8]) -> Option<(usize, bool)> {
    let line = data.iter().take(LONGEST + 1).position(|byte| *byte == b'\n');
    line.map(|end| (end, true)).or((data.len() >= LONGEST).then_some((LONGEST, false)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_whole_wherever_the_pieces_end_and_long_ones_are_cut() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ns_pod_uid/app/0.log");
        let [mut out, mut err] = LogStream::both(&path).unwrap();
        out.add(b"one\ntw").unwrap();
        err.add(b"oops\n").unwrap();
        out.add(b"o\n\n").unwrap();
        out.add(&vec![b'x'; LONGEST + 10]).unwrap();
        out.add(b"\nend").unwrap();
        out.finish().unwrap();
        err.finish().unwrap();
        let text = fs::read_to_string(&path).unwrap();
        let entries: Vec<_> = text.lines().map(|line| line.split_once(' ').unwrap()).collect();
        assert!(entries.iter().all(|(time, _)| time.parse::<Timestamp>().is_ok() && time.len() == 30), "{text}");
        let long = format!("stdout P {}", "x".repeat(LONGEST));
        let texts: Vec<_> = entries.into_iter().map(|(_, text)| text).collect();
        let expected = ["stdout F one", "stderr F oops", "stdout F two", "stdout F ", &long];
        assert_eq!(texts[..5], expected);
        assert_eq!(texts[5..], ["stdout F xxxxxxxxxx", "stdout P end"]);
    }
}
