use std::io::{self, Write as _};

use serde::Serialize;

use crate::Failure;
use crate::options::Format;

/// Shows what was found: as a table's text, or as JSON.
pub(crate) fn show<T: Serialize>(format: Format, found: &T, text: impl FnOnce() -> String) -> Result<(), Failure> {
    let text = match format {
        Format::Table => text(),
        Format::Json => {
            let json = serde_json::to_string_pretty(found);
            json.map_err(|error| Failure::failed(format!("no JSON: {error}"), ""))? + "\n"
        }
    };
    write(&text)
}

/// Writes to stdout. A reader that has seen enough (`| head`) is no failure.
pub(crate) fn write(text: &str) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    match out.write_all(text.as_bytes()).and_then(|()| out.flush()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
            Err(Failure::failed(format!("stdout: {error}"), "see whether there is room where it goes"))
        }
        _ => Ok(()),
    }
}
