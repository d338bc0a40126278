//! `zpod-installer`: an init container, and a container beside it, of zpod's node plugin.

use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::mpsc;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use zpod_installer::check::check;
use zpod_installer::install::{Outcome, Places, install};
use zpod_installer::report::{self, Message, say};
use zpod_installer::uninstall::uninstall;
use zpod_installer::watch::Watch;
use zpod_installer::{Error, Result};

#[derive(Parser)]
#[command(version, about)]
struct Cli {
    #[command(subcommand)]
    task: Task,
    #[command(flatten)]
    options: Options,
}

#[derive(Subcommand)]
enum Task {
    /// Install the guest if it is missing or out of date, and end
    Install,
    /// Look every few seconds whether Kata was upgraded, and install again then; ends by SIGTERM
    Watch {
        /// Seconds between two looks
        #[arg(long, value_name = "SECONDS", default_value_t = 15, value_parser = clap::value_parser!(u64).range(1..))]
        interval: u64,
    },
    /// Remove what was installed, and nothing else
    Uninstall,
    /// Say what is there; the exit code says it, too
    Check,
}

#[derive(Args)]
struct Options {
    /// Where the node's root file system, or the parts of it that matter, are mounted
    #[arg(long, global = true, value_name = "DIR", default_value = "/host")]
    host_root: PathBuf,
    /// Our vmlinuz and overlay.cpio.zst, in this container
    #[arg(long, global = true, value_name = "DIR", default_value = "/guest")]
    guest_dir: PathBuf,
    /// Kata's directory on the node
    #[arg(long, global = true, value_name = "DIR", default_value = "/opt/kata", value_parser = absolute)]
    kata_dir: PathBuf,
    /// Kata's initrd on the node [default: found from Kata's installation]
    #[arg(long, global = true, value_name = "FILE", value_parser = absolute)]
    kata_initrd: Option<PathBuf>,
    /// Our directory on the node; Kata's drop-in names guest/vmlinuz and guest/initrd in it
    #[arg(long, global = true, value_name = "DIR", default_value = "/opt/zpod", value_parser = absolute)]
    install_dir: PathBuf,
    /// An initrd that was written to in the last so many seconds may still be incomplete
    #[arg(long, global = true, value_name = "SECONDS", default_value_t = 2)]
    settle: u64,
    /// Where Kubernetes reads the last word of a container from, if it is there
    #[arg(long, global = true, value_name = "FILE", default_value = "/dev/termination-log")]
    termination_log: PathBuf,
}

fn absolute(text: &str) -> Result<PathBuf, String> {
    let path = PathBuf::from(text);
    if path.is_absolute() && path.components().count() > 1 {
        Ok(path)
    } else {
        Err("a path on the node begins with /, and is not / itself".to_owned())
    }
}

fn main() -> ExitCode {
    let Cli { task, options } = Cli::parse();
    let places = Places {
        host_root: options.host_root,
        guest_dir: options.guest_dir,
        kata_dir: options.kata_dir,
        install_dir: options.install_dir,
        kata_initrd: options.kata_initrd,
        settle: Duration::from_secs(options.settle),
        lock_wait: Duration::from_secs(60),
    };
    let (command, done) = match task {
        Task::Install => ("install", run_install(&places)),
        Task::Watch { interval } => ("watch", run_watch(&places, Duration::from_secs(interval))),
        Task::Uninstall => ("uninstall", run_uninstall(&places)),
        Task::Check => match check(&places) {
            Ok(finding) => {
                print!("{}", finding.text);
                return ExitCode::from(finding.exit_code);
            }
            Err(error) => ("check", Err(error)),
        },
    };
    let (message, code) = match done {
        Ok((reason, message)) => (Message::new(command, reason, message), 0),
        Err(error) => (Message::of(command, &error), error.exit_code()),
    };
    message.publish(&options.termination_log);
    ExitCode::from(code)
}

/// One word and a line.
type Done = (&'static str, String);

fn run_install(places: &Places) -> Result<Done> {
    let outcome = install(places)?;
    let reason = if matches!(outcome, Outcome::UpToDate(_)) { "UpToDate" } else { "Installed" };
    Ok((reason, report::outcome(places, &outcome)))
}

fn run_watch(places: &Places, interval: Duration) -> Result<Done> {
    let mut signals = Signals::new([SIGTERM, SIGINT]).map_err(|source| Error::Io {
        action: "handle signals of",
        path: "this process".into(),
        source,
    })?;
    let mut watch = Watch::new(places)?;
    let (stop, stopped) = mpsc::channel();
    std::thread::spawn(move || {
        signals.forever().next();
        // Nobody listens any more: then it is over anyway.
        let _ = stop.send(());
    });
    say(format_args!("looking every {} s whether Kata has changed", interval.as_secs()));
    watch.run(interval, &stopped);
    Ok(("Stopped", "told to stop".to_owned()))
}

fn run_uninstall(places: &Places) -> Result<Done> {
    let removal = uninstall(places)?;
    Ok(("Removed", report::removal(places, &removal)))
}
