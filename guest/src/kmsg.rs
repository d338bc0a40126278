//! Logging to the kernel's log, which ends up on the guest's console and from there with the shim.
//!
//! # Design
//! A subscriber of its own rather than tracing-subscriber: events to lines is all that is needed here, and the binary
//! travels in an initramfs. The rate is bounded: whoever makes this program log must not fill the host's disk.

use std::fmt::{self, Write as _};
use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

/// The kernel cuts a record at about 1000 bytes (`LOG_LINE_MAX`): longer lines are sent in parts.
const LINE: usize = 900;
/// Parts of one message.
const PARTS: usize = 5;
/// Lines that may come at once, and how many more each second.
const BURST: f64 = 200.0;
const PER_SECOND: f64 = 20.0;

/// Writes events to the kernel's log.
#[derive(Debug)]
pub struct KernelLog(Mutex<Log>);

#[derive(Debug)]
struct Log {
    to: File,
    allowance: f64,
    last: Instant,
    dropped: u64,
}

impl KernelLog {
    /// Opens the kernel's log.
    ///
    /// # Errors
    /// When /dev/kmsg can't be opened.
    pub fn open() -> io::Result<Self> {
        // By default the kernel takes ten lines in five seconds from a program, and drops the rest without a word.
        let _ = std::fs::write("/proc/sys/kernel/printk_devkmsg", "on");
        let to = OpenOptions::new().write(true).open("/dev/kmsg")?;
        Ok(Self(Mutex::new(Log { to, allowance: BURST, last: Instant::now(), dropped: 0 })))
    }

    /// Writes a line of level `priority` (syslog: 3 error, 4 warning, 6 information).
    pub fn line(&self, priority: u8, text: &str) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).line(priority, text);
    }
}

impl Log {
    fn line(&mut self, priority: u8, text: &str) {
        let now = Instant::now();
        let earned = now.duration_since(self.last).as_secs_f64() * PER_SECOND;
        (self.allowance, self.last) = ((self.allowance + earned).min(BURST), now);
        if self.allowance < 1.0 {
            self.dropped += 1;
            return;
        }
        self.allowance -= 1.0;
        if self.dropped > 0 {
            let _ = writeln!(self.to, "<4>zpod-guest: {} lines were dropped", std::mem::take(&mut self.dropped));
        }
        for part in parts(text).take(PARTS) {
            // Nowhere to say that the log can't be written.
            let _ = self.to.write_all(format!("<{priority}>zpod-guest: {part}\n").as_bytes());
        }
    }
}

fn parts(text: &str) -> impl Iterator<Item = String> {
    // A newline would begin a record of its own; other control characters have no business on a console.
    let clean: Vec<char> = text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    let parts: Vec<String> = clean.chunks(LINE / 2).map(|part| part.iter().collect()).collect();
    parts.into_iter()
}

impl Subscriber for KernelLog {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        *metadata.level() <= Level::INFO && metadata.target().starts_with("zpod_guest")
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn event(&self, event: &Event<'_>) {
        let mut line = Line::default();
        event.record(&mut line);
        let priority = match *event.metadata().level() {
            Level::ERROR => 3,
            Level::WARN => 4,
            _ => 6,
        };
        self.line(priority, &format!("{}{}", line.message, line.fields));
    }

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

#[derive(Default)]
struct Line {
    message: String,
    fields: String,
}

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        // Writing to a String does not fail.
        let _ = match field.name() {
            "message" => write!(self.message, "{value:?}"),
            name => write!(self.fields, " {name}={value:?}"),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_stays_on_its_lines() {
        let text = format!("a\nb\u{1b}[2J{}", "ü".repeat(LINE));
        let parts: Vec<_> = parts(&text).collect();
        assert!(parts[0].starts_with("a b [2J"));
        assert!(parts.len() > 1 && parts.iter().all(|part| part.len() <= LINE));
    }
}
