//! Nodes with more and with less room.

use anyhow::{Context as _, Result, ensure};
use zpod_e2e::cluster::Cluster;
use zpod_e2e::disk;

const SMALL: &str = "node-b";
/// More than the small node has.
const CLAIMS: usize = 3;

/// A second node has a backing file system of 1 GiB. Claims of 2 GiB all go to the first, and one that fits nowhere is
/// told that there is no room.
pub(crate) async fn the_scheduler_goes_where_the_room_is(cluster: &Cluster) -> Result<()> {
    cluster.install_chart().await?;
    let backing = cluster.node_dir(SMALL).join("var/lib/zpod");
    disk::mount_xfs(&backing, 1 << 30)?;
    cluster.add_node(SMALL).await?;
    let result = claims_go_where_the_room_is(cluster).await;
    cluster.remove_node(SMALL).await?;
    disk::unmount(&backing)?;
    result
}

async fn claims_go_where_the_room_is(cluster: &Cluster) -> Result<()> {
    cluster
        .wait("the scheduler knows both nodes' room", async || {
            let capacities = cluster.kubectl_json(&["get", "csistoragecapacities", "-A"]).await?;
            let items = capacities["items"].as_array().context("no list")?;
            let of = |node: &str| {
                items.iter().find(|item| {
                    item["storageClassName"] == "zpod"
                        && item["nodeTopology"]["matchLabels"]["csi.zpod.storage/node"] == node
                })
            };
            ensure!(of("node-a").is_some() && of(SMALL).is_some(), "capacities: {capacities}");
            Ok(())
        })
        .await?;
    for number in 0..CLAIMS {
        cluster.apply(&claim_and_pod(&format!("room-{number}"), "2Gi")).await?;
    }
    for number in 0..CLAIMS {
        let name = format!("room-{number}");
        cluster
            .wait("the claim is bound", async || {
                let claim = cluster.kubectl_json(&["get", "pvc", &name]).await?;
                ensure!(claim["status"]["phase"] == "Bound", "it is {}", claim["status"]);
                Ok(())
            })
            .await?;
    }
    let volumes = cluster.kubectl(&["get", "zfsvolumes", "-o", "jsonpath={.items[*].spec.nodeName}"]).await?;
    ensure!(volumes.split(' ').all(|node| node == "node-a"), "volumes are on {volumes}");

    cluster.apply(&claim_and_pod("room-nowhere", "900Ti")).await?;
    cluster
        .wait("an event that says that there is no room", async || {
            let events = cluster.events_of("default", "room-nowhere").await;
            ensure!(events.contains("did not have enough free storage"), "the events are: {events}");
            Ok(())
        })
        .await?;
    for name in (0..CLAIMS).map(|number| format!("room-{number}")).chain(["room-nowhere".to_owned()]) {
        cluster.delete(&claim_and_pod(&name, "2Gi")).await?;
    }
    cluster.wait_for_no_volumes().await
}

/// The pod is scheduled and never started: it has not even a runtime that could have the volume.
fn claim_and_pod(name: &str, size: &str) -> String {
    format!(
        "apiVersion: v1\nkind: PersistentVolumeClaim\nmetadata: {{name: {name}}}\nspec:\n  storageClassName: zpod\n  \
         accessModes: [ReadWriteOncePod]\n  resources: {{requests: {{storage: {size}}}}}\n---\napiVersion: v1\nkind: \
         Pod\nmetadata: {{name: {name}}}\nspec:\n  terminationGracePeriodSeconds: 1\n  containers:\n  - {{name: shell, image: \
         'busybox:1.37', command: [sleep, '1000000'], volumeMounts: [{{name: data, mountPath: /data}}]}}\n  volumes:\n  - \
         {{name: data, persistentVolumeClaim: {{claimName: {name}}}}}\n"
    )
}
