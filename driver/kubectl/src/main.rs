//! `kubectl zpod`: see the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    zpod_kubectl::run()
}
