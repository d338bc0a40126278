//! One file for each command.

mod adopt;
mod doctor;
#[cfg(test)]
pub(crate) mod fake;
mod helper;
mod props;
mod receive;
mod rollback;
mod scrub;
mod send;
mod snapshot;
mod snapshots;
mod status;
mod top;
mod transfer;

use crate::Failure;
use crate::admin::{Admin, Line};
use crate::cluster::Cluster;
use crate::options::{Command, Options, Props};
use transfer::Way;

/// Runs what was asked for.
pub(crate) async fn run(options: Options) -> Result<(), Failure> {
    let Options { global, command } = options;
    let format = global.output;
    if let Some(socket) = global.admin_endpoint {
        let line = Line::Unix(socket);
        return match command {
            Command::Doctor(options) => doctor::of_socket(&Admin::new(line), &options, format).await,
            Command::Props(Props::Get(options)) => props::of_socket(&Admin::new(line), &options, format).await,
            Command::Snapshot(options) => snapshot::run(Way::Socket(line), &options, format).await,
            Command::Snapshots(options) => snapshots::of_socket(line, &options, format).await,
            Command::Rollback(options) => rollback::of_socket(line, &options, format).await,
            Command::Send(options) => send::run(Way::Socket(line), &options, format).await,
            Command::Receive(options) => receive::run(Way::Socket(line), &options, format).await,
            _ => Err(Failure::usage(
                "this command reads and writes objects, and a zpod without a cluster has none",
                "on one machine there are doctor, props get, snapshot, snapshots, rollback, send and receive",
            )),
        };
    }
    let cluster = Cluster::connect(&global).await?;
    match command {
        Command::Status(options) => status::run(&cluster, &options, format).await,
        Command::Top(options) => top::run(&cluster, &options, format).await,
        Command::Scrub(options) => scrub::run(&cluster, &options, format).await,
        Command::Props(Props::Get(options)) => props::get(&cluster, &options, format).await,
        Command::Props(Props::Set(options)) => props::set(&cluster, &options, format).await,
        Command::Snapshot(options) => snapshot::run(Way::Cluster(&cluster), &options, format).await,
        Command::Snapshots(options) => snapshots::run(&cluster, &options, format).await,
        Command::Rollback(options) => rollback::run(&cluster, &options, format).await,
        Command::Adopt(options) => adopt::run(&cluster, &options, format).await,
        Command::Doctor(options) => doctor::run(&cluster, &options, format).await,
        Command::Send(options) => send::run(Way::Cluster(&cluster), &options, format).await,
        Command::Receive(options) => receive::run(Way::Cluster(&cluster), &options, format).await,
    }
}
