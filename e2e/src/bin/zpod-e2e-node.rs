//! A Kubernetes node for the tests: see [`zpod_e2e::cri`]. Killing it ends everything of the node.

use std::process::ExitCode;

use clap::Parser;
use zpod_e2e::cri::{node, process};

/// A Kubernetes node: a mount namespace, a CRI server that runs pods as processes or in guests, and a kubelet.
#[derive(Debug, Parser)]
struct Arguments {
    #[command(flatten)]
    node: node::Options,
}

fn main() -> ExitCode {
    let role = std::env::args().nth(1);
    let result = match process::play(role.as_deref()) {
        Some(result) => result,
        None => node::run(&Arguments::parse().node),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("zpod-e2e-node: {error:#}");
            ExitCode::FAILURE
        }
    }
}
