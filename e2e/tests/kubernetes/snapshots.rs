//! The snapshot API beside zpod.

use anyhow::{Result, ensure};
use zpod_e2e::cluster::Cluster;

const CLASS: &str = "{apiVersion: snapshot.storage.k8s.io/v1, kind: VolumeSnapshotClass, metadata: {name: note}, \
                     driver: csi.nobody.example, deletionPolicy: Delete}";

pub(crate) async fn the_snapshot_api_can_be_added(cluster: &Cluster) -> Result<()> {
    cluster.add_snapshots().await?;
    cluster.apply(CLASS).await?;
    // The second time it is there.
    cluster.add_snapshots().await?;
    let classes = cluster.kubectl(&["get", "volumesnapshotclasses", "-o", "name"]).await?;
    ensure!(classes.contains("/note"), "classes: {classes}");
    cluster.delete(CLASS).await?;
    Ok(())
}
