//! zpod-node: see `zpod-node --help`.

use std::process::ExitCode;

fn main() -> ExitCode {
    zpod_driver::command::node::run()
}
