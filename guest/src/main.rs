//! `/zpod/init`: the guest's first process, and with `daemon` the proxy and control service.

use std::process::ExitCode;

use zpod_guest::{daemon, init};

fn main() -> ExitCode {
    if std::process::id() == 1 {
        init::run(std::env::args_os().skip(1));
    }
    match std::env::args().nth(1).as_deref() {
        Some("daemon") => match daemon::run() {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("zpod-guest: {error}");
                ExitCode::FAILURE
            }
        },
        Some("--version") => {
            println!("zpod-guest {}", env!("CARGO_PKG_VERSION"));
            ExitCode::SUCCESS
        }
        _ => {
            eprintln!("usage: as the first process of a guest (rdinit=/zpod/init), or: zpod-guest daemon");
            ExitCode::from(2)
        }
    }
}
