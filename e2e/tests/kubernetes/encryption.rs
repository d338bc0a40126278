//! Encrypted volumes, whose keys come from Secrets of their tenants.

use anyhow::{Result, ensure};
use zpod_e2e::cluster::Cluster;
use zpod_e2e::secrets::must_not_be_found;

use super::claims;

const MANIFEST: &str = include_str!("../../manifests/encrypted.yaml");
const KEY: &str = "correct horse battery staple 7f3a";

/// The pod waits for its key with an event that says so, and the key is nowhere but in its Secret.
pub(crate) async fn an_encrypted_volume_opens_with_its_tenants_secret_only(cluster: &Cluster) -> Result<()> {
    cluster.install_chart().await?;
    cluster.apply(MANIFEST).await?;
    cluster
        .wait("an event that says which Secret is missing", async || {
            let events = cluster.events_of("tenant", "secret").await;
            ensure!(events.contains("FailedMount") && events.contains("key"), "the events are: {events}");
            Ok(())
        })
        .await?;
    let secret = format!("--from-literal=encryptionKey={KEY}");
    cluster.kubectl(&["create", "secret", "generic", "key", "-n", "tenant", &secret]).await?;
    cluster.wait_for_pod("tenant", "secret", "Running").await?;
    let log = claims::wait_for_log(cluster, "tenant", "secret", "treasure").await?;
    ensure!(log.contains(" zfs "), "/data is not ZFS: {log}");
    is_nowhere(cluster).await?;

    // The next guest needs it again.
    cluster.kubectl(&["delete", "pod", "secret", "-n", "tenant", "--wait"]).await?;
    cluster.apply(MANIFEST).await?;
    cluster.wait_for_pod("tenant", "secret", "Running").await?;
    claims::wait_for_log(cluster, "tenant", "secret", "treasure").await?;
    is_nowhere(cluster).await?;
    cluster.delete(MANIFEST).await?;
    cluster.wait_for_no_volumes().await
}

/// Neither in an object but the Secret, nor in a file of the cluster but etcd's, nor in what any process was started with.
async fn is_nowhere(cluster: &Cluster) -> Result<()> {
    let kinds = "zfsvolumes,zfssnapshots,zfsnodes,pv,pvc,pods,events,configmaps,volumeattachments";
    let objects = cluster.kubectl(&["get", kinds, "-A", "-o", "yaml"]).await?;
    ensure!(!objects.contains(KEY), "an object has the key");
    must_not_be_found(&[KEY.as_bytes()], &[&cluster.dir().join("logs"), &cluster.dir().join("n")])
}
