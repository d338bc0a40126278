//! `kubectl zpod`: what people ask of ZFS volumes in pods, without a shell on a node.
//!
//! # Design
//! What is known of volumes is in their objects, and most commands read and write those alone: [`commands`] asks,
//! [`view`] makes plain data of the answers, and [`text`] writes it down. Only what has to come out of a guest or from a
//! node's own eyes (properties as they are, sends and receives, the doctor) goes to the admin endpoint of the node's
//! zpod-node ([`admin`]), through the API server: no port of a node has to be reachable from here.
//!
//! # Exit codes
//! 0 done; 1 failed; 2 wrong arguments; 3 no such thing; 4 `doctor` found something broken; 5 waited too long; 130 ended
//! by a signal.

mod admin;
mod cluster;
mod commands;
mod failure;
mod options;
mod output;
mod progress;
mod proxy;
mod text;
mod view;

use std::process::ExitCode;

use clap::Parser as _;

pub use failure::{Failure, Kind};
pub use options::Options;

/// Parses the command line, runs, and says why where that failed.
pub fn run() -> ExitCode {
    let options = Options::parse();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let done = match runtime {
        Ok(runtime) => {
            let done = runtime.block_on(commands::run(options));
            // A read of stdin that nobody waits for any more must not keep the process.
            runtime.shutdown_background();
            done
        }
        Err(error) => Err(Failure::failed(format!("no threads: {error}"), "")),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprint!("{failure}");
            ExitCode::from(failure.kind.code())
        }
    }
}
