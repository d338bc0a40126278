use serde::Serialize;

use crate::Failure;
use crate::cluster::Cluster;
use crate::options::{Format, Snapshots};
use crate::output::show;
use crate::text::{or_dash, size, table, when};
use crate::view::SnapshotView;

#[derive(Debug, Serialize)]
struct Found {
    snapshots: Vec<SnapshotView>,
}

pub(super) async fn run(cluster: &Cluster, options: &Snapshots, format: Format) -> Result<(), Failure> {
    let named = options.target.named()?;
    let volume = cluster.volume(&named).await?;
    let id = volume.metadata.name.unwrap_or_default();
    let all = cluster.all_snapshots().await?;
    let mut snapshots: Vec<_> =
        all.iter().filter(|snapshot| snapshot.spec.volume == id).map(SnapshotView::new).collect();
    snapshots.sort_by_cached_key(|view| (view.creation_time.as_ref().map(|time| time.0), view.snapshot.clone()));
    if snapshots.is_empty() && format == Format::Table {
        let what = format!("there is no snapshot of {named}");
        return Err(Failure::not_found(what, "a VolumeSnapshot of the claim makes one"));
    }
    let found = Found { snapshots };
    show(format, &found, || text(&found.snapshots))
}

fn text(snapshots: &[SnapshotView]) -> String {
    table(
        &["SNAPSHOT", "NAME", "STATE", "SIZE", "TAKEN", "GROUP", "MESSAGE"],
        snapshots.iter().map(|view| {
            vec![
                view.snapshot.clone(),
                view.name.clone(),
                view.state(),
                view.restore_size_bytes.map_or_else(|| "-".into(), size),
                view.creation_time.as_ref().map_or_else(|| "-".into(), when),
                or_dash(&view.group),
                view.message.clone(),
            ]
        }),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn snapshots_show_how_far_they_are_and_what_they_belong_to() {
        let snapshot = |name: &str, group: Option<&str>, status: serde_json::Value| {
            let group = group.map(|name| json!({"id": "g", "name": name, "size": 2}));
            let object = serde_json::from_value(json!({
                "apiVersion": "zpod.storage/v1alpha1", "kind": "ZfsSnapshot", "metadata": {"name": name},
                "spec": {"snapshotName": format!("snapshot-{name}"), "volume": "v", "nodeName": "n1", "group": group},
                "status": status,
            }));
            SnapshotView::new(&object.unwrap())
        };
        let text = text(&[
            snapshot(
                "a",
                None,
                json!({"phase": "Ready", "restoreSize": "10Gi", "creationTime": "2026-11-23T20:00:00Z"}),
            ),
            snapshot("b", Some("both"), json!({"phase": "Copying", "progress": 40})),
            snapshot("c", None, json!(null)),
        ]);
        let want = "\
SNAPSHOT   NAME         STATE         SIZE   TAKEN                  GROUP   MESSAGE
a          snapshot-a   Ready         10Gi   2026-11-23T20:00:00Z   -
b          snapshot-b   Copying 40%   -      -                      both
c          snapshot-c   Pending       -      -                      -
";
        assert_eq!(text, want, "\n{text}");
    }
}
