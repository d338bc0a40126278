use std::io::IsTerminal as _;
use std::time::Duration;

use super::status::{Volumes, nothing, top_text};
use crate::Failure;
use crate::cluster::Cluster;
use crate::options::{Format, Top};
use crate::output::{show, write};
use crate::view::{VolumeView, sort};

/// Home, and all below gone.
const CLEAR: &str = "\u{1b}[H\u{1b}[J";

pub(super) async fn run(cluster: &Cluster, options: &Top, format: Format) -> Result<(), Failure> {
    loop {
        let objects = cluster.all_volumes(options.all_namespaces).await?;
        let mut volumes: Vec<_> = objects.iter().map(|object| VolumeView::new(object, &[])).collect();
        let once = !options.watch;
        if volumes.is_empty() && once && format == Format::Table {
            return Err(nothing(cluster, options.all_namespaces));
        }
        sort(&mut volumes, options.sort);
        if options.watch && format == Format::Table && std::io::stdout().is_terminal() {
            write(CLEAR)?;
        }
        let mut found = Volumes { volumes };
        if format == Format::Table {
            write(&top_text(&mut found.volumes, options.sort))?;
        } else {
            show(format, &found, String::new)?;
        }
        if once {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_secs(options.interval)).await;
    }
}
