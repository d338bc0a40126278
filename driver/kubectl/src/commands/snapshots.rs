use serde::Serialize;

use zpod_admin::PoolSnapshots;
use zpod_kubernetes::crd::ZfsVolume;

use super::send::in_pool as pool_text;
use super::transfer::{Way, with_guest};
use crate::Failure;
use crate::admin::{Admin, Line};
use crate::cluster::Cluster;
use crate::options::{Format, Snapshots};
use crate::output::show;
use crate::text::{or_dash, size, table, when};
use crate::view::SnapshotView;

#[derive(Debug, Default, Serialize)]
#[serde(rename_all = "camelCase")]
struct Found {
    /// Copies on the node.
    snapshots: Vec<SnapshotView>,
    /// Those in the pool, where its guest could be asked.
    #[serde(skip_serializing_if = "Option::is_none")]
    pool: Option<PoolSnapshots>,
    /// Why it could not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pool_unknown: Option<String>,
}

pub(super) async fn run(cluster: &Cluster, options: &Snapshots, format: Format) -> Result<(), Failure> {
    if !options.remove.is_empty() {
        return remove(Way::Cluster(cluster), options, format).await;
    }
    let named = options.target.named()?;
    let volume = cluster.volume(&named).await?;
    let (pool, pool_unknown) = match in_pool(cluster, &volume).await {
        Ok(pool) => (Some(pool), None),
        Err(failure) => (None, Some(failure.what().to_owned())),
    };
    let id = volume.metadata.name.unwrap_or_default();
    let all = cluster.all_snapshots().await?;
    let mut snapshots: Vec<_> =
        all.iter().filter(|snapshot| snapshot.spec.volume == id).map(SnapshotView::new).collect();
    snapshots.sort_by_cached_key(|view| (view.creation_time.as_ref().map(|time| time.0), view.snapshot.clone()));
    let none = snapshots.is_empty() && pool.as_ref().is_some_and(|pool| pool.snapshots.is_empty());
    if none && format == Format::Table {
        let what = format!("there is no snapshot of {named}");
        let remedy = "a VolumeSnapshot of the claim makes one, or `kubectl zpod snapshot` in its pool";
        return Err(Failure::not_found(what, remedy));
    }
    let found = Found { snapshots, pool, pool_unknown };
    show(format, &found, || text_of(&found))
}

/// Without a cluster there are those in the pool.
pub(super) async fn of_socket(line: Line, options: &Snapshots, format: Format) -> Result<(), Failure> {
    if !options.remove.is_empty() {
        return remove(Way::Socket(line), options, format).await;
    }
    let id = options.target.named()?.on_one_machine()?;
    let found = Found { pool: Some(Admin::new(line).snapshots(id).await?), ..Found::default() };
    show(format, &found, || text_of(&found))
}

async fn in_pool(cluster: &Cluster, volume: &ZfsVolume) -> Result<PoolSnapshots, Failure> {
    if volume.status.as_ref().is_none_or(|status| status.publication.is_none()) {
        return Err(Failure::failed("no pod uses the volume, and only a running guest can open its pool", ""));
    }
    let name = volume.metadata.name.clone().unwrap_or_default();
    let id = name.parse().map_err(|_| Failure::failed(format!("{name} is not the id of a volume"), ""))?;
    Ok(Admin::new(Line::to_node(cluster, &volume.spec.node_name).await?).snapshots(id).await?)
}

async fn remove(way: Way<'_>, options: &Snapshots, format: Format) -> Result<(), Failure> {
    let named = options.target.named()?;
    with_guest(
        way,
        &named,
        &options.helper,
        |_| Ok(()),
        |reached| async move {
            for name in &options.remove {
                let removed = reached.admin.destroy_snapshot(reached.id, name).await?;
                show(format, &removed, || format!("snapshot {} is destroyed\n", removed.snapshot))?;
            }
            Ok(())
        },
    )
    .await
}

fn text_of(found: &Found) -> String {
    let mut parts = Vec::new();
    if !found.snapshots.is_empty() {
        parts.push(format!("copies on the node (VolumeSnapshots):\n{}", text(&found.snapshots)));
    }
    match (&found.pool, &found.pool_unknown) {
        (Some(pool), _) if !pool.snapshots.is_empty() => {
            let earlier = match pool.left_out {
                0 => String::new(),
                more => format!("{more} earlier ones are left out\n"),
            };
            parts.push(format!("in the pool:\n{}{earlier}", pool_text(&pool.snapshots)));
        }
        (None, Some(why)) => parts.push(format!("in the pool: not known now: {why}\n")),
        _ => {}
    }
    parts.join("\n")
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
    use zpod_admin::SendPoint;

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
        let snapshots = vec![
            snapshot(
                "a",
                None,
                json!({"phase": "Ready", "restoreSize": "10Gi", "creationTime": "2026-11-23T20:00:00Z"}),
            ),
            snapshot("b", Some("both"), json!({"phase": "Copying", "progress": 40})),
            snapshot("c", None, json!(null)),
        ];
        let told = SendPoint {
            name: "before".into(),
            guid: "7".into(),
            created: 1_764_000_000,
            referenced_bytes: 3 << 30,
            used_bytes: 0,
        };
        let pool = PoolSnapshots { snapshots: vec![told], left_out: 2 };
        let found = Found { snapshots, pool: Some(pool), pool_unknown: None };
        let text = text_of(&found);
        let want = "\
copies on the node (VolumeSnapshots):
SNAPSHOT   NAME         STATE         SIZE   TAKEN                  GROUP   MESSAGE
a          snapshot-a   Ready         10Gi   2026-11-23T20:00:00Z   -
b          snapshot-b   Copying 40%   -      -                      both
c          snapshot-c   Pending       -      -                      -

in the pool:
SNAPSHOT   TAKEN                  REFERS   USED   GUID
before     2025-11-24T16:00:00Z   3Gi      0      7
2 earlier ones are left out
";
        assert_eq!(text, want, "\n{text}");
    }
}
