//! `/zpod/init`: the guest's first process, and with `daemon` the proxy and control service. In containers that may use
//! ZFS, under their names, what starts `zfs` and `zpool`.

use std::process::ExitCode;

use zpod_guest::{daemon, init, launcher};

fn main() -> ExitCode {
    // First: a container's first process has this number too.
    if let Some(tool) = launcher::called(std::env::args_os().next().as_deref()) {
        return launcher::run(tool, std::env::args_os().skip(1));
    }
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
