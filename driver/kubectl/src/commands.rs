//! One file for each command.

#[cfg(test)]
pub(crate) mod fake;
mod props;
mod scrub;
mod snapshots;
mod status;
mod top;

use crate::Failure;
use crate::cluster::Cluster;
use crate::options::{Command, Options, Props};

/// Runs what was asked for.
pub(crate) async fn run(options: Options) -> Result<(), Failure> {
    let Options { global, command } = options;
    let format = global.output;
    let cluster = Cluster::connect(&global).await?;
    match command {
        Command::Status(options) => status::run(&cluster, &options, format).await,
        Command::Top(options) => top::run(&cluster, &options, format).await,
        Command::Scrub(options) => scrub::run(&cluster, &options, format).await,
        Command::Props(Props::Get(options)) => props::get(&cluster, &options, format).await,
        Command::Props(Props::Set(options)) => props::set(&cluster, &options, format).await,
        Command::Snapshots(options) => snapshots::run(&cluster, &options, format).await,
        _ => Err(Failure::failed("not there yet", "")),
    }
}
