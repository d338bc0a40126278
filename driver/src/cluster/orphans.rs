use std::collections::HashSet;
use std::time::Duration;

use k8s_openapi::api::core::v1::PersistentVolume;
use k8s_openapi::jiff::Timestamp;
use kube::api::{Api, ListParams};
use kube::{Client, ResourceExt as _};
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use tokio::sync::watch;
use zpod_kubernetes::KubeCatalog;
use zpod_kubernetes::crd::ZfsVolume;
use zpod_volume::VolumeId;

use super::unmade::{discard_snapshots, discard_volume, is_old};
use crate::csi::DRIVER;

/// How often orphans are looked for.
const LOOK_EVERY: Duration = Duration::from_secs(600);
/// Objects the API server is asked for at once.
const PAGE: u32 = 500;
/// Each is named in the log, up to so many.
const NAMED: usize = 20;

/// Counts volumes that no PersistentVolume speaks of any more, such as one whose claim was deleted at the moment the
/// provisioner ended. They are told of and not touched: whether their data is wanted, a person must say. Only the record of one
/// that was never made is removed.
#[derive(Debug, Clone, Default)]
pub struct Orphans {
    count: Gauge,
}

impl Orphans {
    /// Tells their number as `zpod_orphaned_volumes`.
    pub fn register(registry: &mut Registry) -> Self {
        let orphans = Self::default();
        let help =
            "ZfsVolumes without a PersistentVolume, or deleted by hand, as the leading controller last counted them";
        registry.register("zpod_orphaned_volumes", help, orphans.count.clone());
        orphans
    }

    /// Looks for them while this process leads.
    pub async fn watch(self, client: Client, mut leads: watch::Receiver<bool>) {
        while leads.wait_for(|leads| *leads).await.is_ok() {
            match self.look(&client).await {
                Ok(count) => tracing::debug!(count, "volumes without a PersistentVolume"),
                Err(error) => tracing::info!("orphans could not be looked for: {error}"),
            }
            let _ = tokio::time::timeout(LOOK_EVERY, leads.wait_for(|leads| !*leads)).await;
            if !*leads.borrow() {
                self.count.set(0);
            }
        }
    }

    async fn look(&self, client: &Client) -> Result<usize, Box<dyn std::error::Error + Send + Sync>> {
        let known = persistent_volumes(client).await?;
        let (catalog, mut token, mut count) = (KubeCatalog::<ZfsVolume>::of_cluster(client.clone()), None::<String>, 0);
        loop {
            let (objects, next) = catalog.page(token.as_deref(), PAGE).await?;
            for object in objects.iter().filter(|object| is_orphan(object, &known, Timestamp::now())) {
                match discard_volume(&catalog, client, object).await {
                    Ok(true) => continue,
                    Ok(false) => {}
                    Err(error) => tracing::info!("whether {} is wanted is not known: {error}", object.name_any()),
                }
                count += 1;
                if count <= NAMED && object.metadata.deletion_timestamp.is_some() {
                    let (name, node) = (object.name_any(), &object.spec.node_name);
                    tracing::warn!(
                        "ZfsVolume {name} on node {node} was deleted by hand: its data is kept, and can't be changed or \
                         copied. To undo the deletion: kubectl zpod adopt {name}"
                    );
                } else if count <= NAMED {
                    let (name, node, volume) = (object.name_any(), &object.spec.node_name, &object.spec.volume_name);
                    tracing::warn!(
                        "ZfsVolume {name} on node {node} has no PersistentVolume {volume}: its data is kept. To destroy \
                         it: kubectl patch zfsvolume {name} --type=merge -p '{{\"spec\":{{\"destroy\":true}}}}' && kubectl \
                         delete zfsvolume {name}"
                    );
                }
            }
            token = next;
            if token.is_none() {
                break;
            }
        }
        self.count.set(i64::try_from(count).unwrap_or(i64::MAX));
        discard_snapshots(client).await?;
        Ok(count)
    }
}

/// The ids of the volumes that PersistentVolumes are of, by their handle: one that an administrator has made for a volume
/// that was kept has another name. 16 bytes for each, whatever is in them.
async fn persistent_volumes(client: &Client) -> Result<HashSet<VolumeId>, kube::Error> {
    let volumes: Api<PersistentVolume> = Api::all(client.clone());
    let (mut known, mut params) = (HashSet::new(), ListParams::default().limit(PAGE));
    loop {
        let page = volumes.list(&params).await?;
        let ours = page.items.iter().filter_map(|volume| volume.spec.as_ref()?.csi.as_ref());
        known.extend(
            ours.filter(|csi| csi.driver == DRIVER).filter_map(|csi| csi.volume_handle.parse::<VolumeId>().ok()),
        );
        match page.metadata.continue_.filter(|token| !token.is_empty()) {
            Some(token) => params = params.continue_token(&token),
            None => return Ok(known),
        }
    }
}

fn is_orphan(object: &ZfsVolume, known: &HashSet<VolumeId>, now: Timestamp) -> bool {
    let by_hand = !object.spec.destroy;
    let unknown = object.name_any().parse().is_ok_and(|id: VolumeId| !known.contains(&id));
    let told_of = if object.metadata.deletion_timestamp.is_some() { by_hand } else { unknown };
    // A volume is made before its PersistentVolume.
    told_of && !object.spec.ephemeral && is_old(object, now)
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
    use zpod_kubernetes::crd::ZfsVolumeSpec;

    fn object(age: i64) -> ZfsVolume {
        let spec: ZfsVolumeSpec = serde_json::from_value(serde_json::json!({
            "volumeName": "pvc-1", "nodeName": "n", "capacity": "1Gi",
            "parameters": {"backing": "file", "provisioning": "thin", "headroom": "8x", "quota": "refquota"},
        }))
        .unwrap();
        let mut object = ZfsVolume::new(&VolumeId::from_name("pvc-1").to_string(), spec);
        let created = Timestamp::now().as_second() - age;
        object.metadata.creation_timestamp = Some(Time(Timestamp::from_second(created).unwrap()));
        object
    }

    #[test]
    fn only_an_old_volume_without_a_persistent_volume_is_an_orphan() {
        let (now, none) = (Timestamp::now(), HashSet::new());
        assert!(is_orphan(&object(3600), &none, now));
        assert!(!is_orphan(&object(60), &none, now), "its PersistentVolume may be on its way");
        assert!(!is_orphan(&object(3600), &HashSet::from([VolumeId::from_name("pvc-1")]), now));
        let mut renamed = object(3600);
        renamed.spec.volume_name = "pvc-2".into();
        assert!(
            !is_orphan(&renamed, &HashSet::from([VolumeId::from_name("pvc-1")]), now),
            "the handle counts, no name"
        );
        let mut leaving = object(3600);
        leaving.metadata.deletion_timestamp = leaving.metadata.creation_timestamp.clone();
        assert!(is_orphan(&leaving, &HashSet::from([VolumeId::from_name("pvc-1")]), now), "deleted by hand");
        leaving.spec.destroy = true;
        assert!(!is_orphan(&leaving, &none, now));
    }
}
