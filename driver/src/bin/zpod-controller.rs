//! zpod-controller: see `zpod-controller --help`.

use std::process::ExitCode;

fn main() -> ExitCode {
    zpod_driver::command::controller::run()
}
