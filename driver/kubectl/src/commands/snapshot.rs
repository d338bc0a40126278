use k8s_openapi::jiff::Timestamp;
use zpod_admin::NewSnapshotName;

use super::transfer::{Way, with_guest};
use crate::Failure;
use crate::options::{Format, Snapshot};
use crate::output::show;

/// Takes a snapshot in a volume's pool.
pub(super) async fn run(way: Way<'_>, options: &Snapshot, format: Format) -> Result<(), Failure> {
    let (named, name) = options.meant()?;
    let name = name.map_or_else(named_after_the_time, Ok)?;
    with_guest(
        way,
        &named,
        &options.helper,
        |_| Ok(()),
        |reached| async move {
            let taken = reached.admin.take_snapshot(reached.id, &name).await?;
            show(format, &taken, || format!("snapshot {} is taken\n", taken.snapshot))
        },
    )
    .await
}

/// To the second, so that two of a minute have names of their own.
fn named_after_the_time() -> Result<NewSnapshotName, Failure> {
    let name = Timestamp::now().strftime("manual-%Y%m%dT%H%M%SZ").to_string();
    name.parse().map_err(|error| Failure::failed(format!("{error}"), "give a name"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_makes_a_name_that_may_be_one() {
        assert!(named_after_the_time().unwrap().to_string().starts_with("manual-20"));
    }
}
