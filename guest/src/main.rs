//! `/zpod/init`: the guest's first process, with `daemon` the proxy and control service, and as `env` what mounts snapshots
//! for the kernel. In containers that may use ZFS, under their names, what starts `zfs` and `zpool`.

use std::process::ExitCode;

use zpod_guest::{automount, daemon, init, launcher};

fn main() -> ExitCode {
    // First: a container's first process has this number too.
    if let Some(tool) = launcher::called(std::env::args_os().next().as_deref()) {
        return launcher::run(tool, std::env::args_os().skip(1));
    }
    if std::process::id() == 1 {
        init::run(std::env::args_os().skip(1));
    }
    let arguments: Vec<_> = std::env::args_os().collect();
    if automount::is_env(arguments.first()) {
        return automount::run(arguments.get(1..).unwrap_or_default());
    }
    match arguments.get(1).and_then(|argument| argument.to_str()) {
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
