//! The driver: see `zpod --help`.

use std::process::ExitCode;

fn main() -> ExitCode {
    zpod_driver::command::standalone::run()
}
