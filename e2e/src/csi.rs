//! What kubelet and the external-provisioner call.

use std::collections::HashMap;
use std::path::Path;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tokio::time::{Instant, sleep};
use tonic::transport::{Channel, Endpoint, Uri};
use tonic::{Code, Status};
use tower::service_fn;
use zpod_proto::csi::controller_client::ControllerClient;
use zpod_proto::csi::identity_client::IdentityClient;
use zpod_proto::csi::node_client::NodeClient;
use zpod_proto::csi::{self, volume_capability, volume_content_source};
use zpod_volume::Bytes;

use crate::PATIENCE;

/// kubelet gives up after two minutes.
const DEADLINE: Duration = Duration::from_secs(120);

/// The three CSI services on one socket.
#[derive(Debug, Clone)]
pub struct Csi {
    /// Identity.
    pub identity: IdentityClient<Channel>,
    /// Controller.
    pub controller: ControllerClient<Channel>,
    /// Node.
    pub node: NodeClient<Channel>,
}

/// The usage in bytes: total, used, available. Zeros where there is none.
pub fn bytes(stats: &csi::NodeGetVolumeStatsResponse) -> (i64, i64, i64) {
    let unit = csi::volume_usage::Unit::Bytes;
    let usage = stats.usage.iter().find(|usage| usage.unit() == unit);
    usage.map(|usage| (usage.total, usage.used, usage.available)).unwrap_or_default()
}

/// Whether a guest has said it: the host alone knows nothing of inodes.
pub fn from_guest(stats: &csi::NodeGetVolumeStatsResponse) -> bool {
    stats.usage.iter().any(|usage| usage.unit() == csi::volume_usage::Unit::Inodes)
}

/// Whether a guest has reported since the volume was published.
fn is_heard(stats: &csi::NodeGetVolumeStatsResponse) -> bool {
    let message = stats.volume_condition.as_ref().map_or("", |condition| &condition.message);
    !message.starts_with("no guest has reported")
}

/// How a volume is published.
#[derive(Debug, Clone, Default)]
pub struct Publish {
    /// Read-only.
    pub read_only: bool,
    /// The pod's fsGroup.
    pub fs_group: Option<u32>,
}

impl Csi {
    /// A client of the socket; it connects at the first call, and again after a restart.
    pub fn new(socket: &Path) -> Self {
        let socket = socket.to_owned();
        let connect = service_fn(move |_: Uri| {
            let socket = socket.clone();
            async move { Ok::<_, std::io::Error>(TokioIo::new(UnixStream::connect(socket).await?)) }
        });
        // The address is not used: the connector knows the socket.
        let channel = Endpoint::from_static("http://csi").timeout(DEADLINE).connect_with_connector_lazy(connect);
        Self {
            identity: IdentityClient::new(channel.clone()),
            controller: ControllerClient::new(channel.clone()),
            node: NodeClient::new(channel),
        }
    }

    /// CreateVolume with a StorageClass's parameters; gives the volume as it would go into the PV.
    ///
    /// # Errors
    /// What the driver answers.
    pub async fn create(
        &mut self,
        name: &str,
        size: Bytes,
        parameters: &[(&str, &str)],
    ) -> Result<csi::Volume, Status> {
        self.create_from(name, size, parameters, None).await
    }

    /// CreateVolume from a snapshot.
    ///
    /// # Errors
    /// What the driver answers.
    pub async fn restore(
        &mut self,
        name: &str,
        size: Bytes,
        parameters: &[(&str, &str)],
        snapshot: &csi::Snapshot,
    ) -> Result<csi::Volume, Status> {
        let snapshot_id = snapshot.snapshot_id.clone();
        let source = volume_content_source::Type::Snapshot(volume_content_source::SnapshotSource { snapshot_id });
        self.create_from(name, size, parameters, Some(csi::VolumeContentSource { r#type: Some(source) })).await
    }

    /// CreateVolume from another volume, repeated while the driver says that it is not done, as csi-provisioner does.
    ///
    /// # Errors
    /// What the driver answers, or that it goes on for too long.
    pub async fn clone_volume(
        &mut self,
        name: &str,
        size: Bytes,
        parameters: &[(&str, &str)],
        of: &csi::Volume,
    ) -> Result<csi::Volume, Status> {
        let end = Instant::now() + PATIENCE;
        loop {
            let volume_id = of.volume_id.clone();
            let source = volume_content_source::Type::Volume(volume_content_source::VolumeSource { volume_id });
            let source = csi::VolumeContentSource { r#type: Some(source) };
            match self.create_from(name, size, parameters, Some(source)).await {
                Err(error) if error.code() == Code::Aborted && Instant::now() < end => {
                    sleep(Duration::from_millis(200)).await;
                }
                done => return done,
            }
        }
    }

    async fn create_from(
        &mut self,
        name: &str,
        size: Bytes,
        parameters: &[(&str, &str)],
        source: Option<csi::VolumeContentSource>,
    ) -> Result<csi::Volume, Status> {
        let parameters: HashMap<_, _> =
            parameters.iter().map(|(key, value)| ((*key).into(), (*value).into())).collect();
        let request = csi::CreateVolumeRequest {
            name: name.into(),
            capacity_range: Some(range(size)),
            volume_capabilities: vec![capability(None)],
            parameters,
            volume_content_source: source,
            ..Default::default()
        };
        let answer = self.controller.create_volume(request).await?.into_inner();
        answer.volume.ok_or_else(|| Status::internal("CreateVolume gave no volume"))
    }

    /// DeleteVolume.
    ///
    /// # Errors
    /// What the driver answers.
    pub async fn delete(&mut self, volume: &csi::Volume) -> Result<(), Status> {
        let request = csi::DeleteVolumeRequest { volume_id: volume.volume_id.clone(), ..Default::default() };
        self.controller.delete_volume(request).await.map(|_| ())
    }

    /// CreateSnapshot, repeated until the copy is whole, as the external-snapshotter does.
    ///
    /// # Errors
    /// What the driver answers, or that it goes on for too long.
    pub async fn snapshot(&mut self, volume: &csi::Volume, name: &str) -> Result<csi::Snapshot, Status> {
        let end = Instant::now() + PATIENCE;
        loop {
            let request = csi::CreateSnapshotRequest {
                source_volume_id: volume.volume_id.clone(),
                name: name.into(),
                ..Default::default()
            };
            let made = self.controller.create_snapshot(request).await?.into_inner().snapshot;
            let made = made.ok_or_else(|| Status::internal("CreateSnapshot gave no snapshot"))?;
            if made.ready_to_use {
                return Ok(made);
            }
            if Instant::now() >= end {
                return Err(Status::deadline_exceeded("the snapshot is not ready"));
            }
            sleep(Duration::from_millis(200)).await;
        }
    }

    /// DeleteSnapshot.
    ///
    /// # Errors
    /// What the driver answers.
    pub async fn delete_snapshot(&mut self, snapshot: &csi::Snapshot) -> Result<(), Status> {
        let request = csi::DeleteSnapshotRequest { snapshot_id: snapshot.snapshot_id.clone(), ..Default::default() };
        self.controller.delete_snapshot(request).await.map(|_| ())
    }

    /// ControllerExpandVolume; gives the new size.
    ///
    /// # Errors
    /// What the driver answers.
    pub async fn controller_expand(
        &mut self,
        volume: &csi::Volume,
        size: Bytes,
    ) -> Result<csi::ControllerExpandVolumeResponse, Status> {
        let request = csi::ControllerExpandVolumeRequest {
            volume_id: volume.volume_id.clone(),
            capacity_range: Some(range(size)),
            volume_capability: Some(capability(None)),
            ..Default::default()
        };
        Ok(self.controller.controller_expand_volume(request).await?.into_inner())
    }

    /// NodePublishVolume.
    ///
    /// # Errors
    /// What the driver answers.
    pub async fn publish(&mut self, volume: &csi::Volume, target: &Path, how: &Publish) -> Result<(), Status> {
        let request = csi::NodePublishVolumeRequest {
            volume_id: volume.volume_id.clone(),
            target_path: text(target),
            volume_capability: Some(capability(how.fs_group)),
            readonly: how.read_only,
            volume_context: volume.volume_context.clone(),
            ..Default::default()
        };
        self.node.node_publish_volume(request).await.map(|_| ())
    }

    /// NodeUnpublishVolume.
    ///
    /// # Errors
    /// What the driver answers.
    pub async fn unpublish(&mut self, volume: &csi::Volume, target: &Path) -> Result<(), Status> {
        let request =
            csi::NodeUnpublishVolumeRequest { volume_id: volume.volume_id.clone(), target_path: text(target) };
        self.node.node_unpublish_volume(request).await.map(|_| ())
    }

    /// NodeGetVolumeStats.
    ///
    /// # Errors
    /// What the driver answers.
    pub async fn stats(
        &mut self,
        volume: &csi::Volume,
        target: &Path,
    ) -> Result<csi::NodeGetVolumeStatsResponse, Status> {
        let request = csi::NodeGetVolumeStatsRequest {
            volume_id: volume.volume_id.clone(),
            volume_path: text(target),
            ..Default::default()
        };
        Ok(self.node.node_get_volume_stats(request).await?.into_inner())
    }

    /// NodeGetVolumeStats, repeated until a guest has reported and it says what is wanted: guests report about once a second,
    /// and ZFS accounts for a write when its transaction group is on the disk. Before, it says what the node knows.
    ///
    /// # Errors
    /// When it doesn't say so in time; with what it said last.
    pub async fn stats_when(
        &mut self,
        volume: &csi::Volume,
        target: &Path,
        wanted: impl Fn(&csi::NodeGetVolumeStatsResponse) -> bool,
    ) -> anyhow::Result<csi::NodeGetVolumeStatsResponse> {
        let end = Instant::now() + PATIENCE;
        loop {
            let answer = self.stats(volume, target).await;
            match answer {
                Ok(stats) if is_heard(&stats) && wanted(&stats) => return Ok(stats),
                other if Instant::now() >= end => anyhow::bail!("after {PATIENCE:?} the stats are still {other:?}"),
                _ => sleep(Duration::from_millis(200)).await,
            }
        }
    }

    /// NodeExpandVolume; gives the size reached.
    ///
    /// # Errors
    /// What the driver answers.
    pub async fn node_expand(&mut self, volume: &csi::Volume, target: &Path, size: Bytes) -> Result<Bytes, Status> {
        let request = csi::NodeExpandVolumeRequest {
            volume_id: volume.volume_id.clone(),
            volume_path: text(target),
            capacity_range: Some(range(size)),
            volume_capability: Some(capability(None)),
            ..Default::default()
        };
        let answer = self.node.node_expand_volume(request).await?.into_inner();
        Ok(Bytes(u64::try_from(answer.capacity_bytes).unwrap_or_default()))
    }

    /// Probe.
    ///
    /// # Errors
    /// When nobody answers.
    pub async fn probe(&mut self) -> Result<bool, Status> {
        Ok(self.identity.probe(csi::ProbeRequest {}).await?.into_inner().ready.unwrap_or(true))
    }
}

fn text(path: &Path) -> String {
    path.display().to_string()
}

fn range(size: Bytes) -> csi::CapacityRange {
    csi::CapacityRange { required_bytes: i64::try_from(size.0).unwrap_or(i64::MAX), limit_bytes: 0 }
}

fn capability(fs_group: Option<u32>) -> csi::VolumeCapability {
    let mount = volume_capability::MountVolume {
        volume_mount_group: fs_group.map(|group| group.to_string()).unwrap_or_default(),
        ..Default::default()
    };
    let mode = volume_capability::access_mode::Mode::SingleNodeWriter;
    csi::VolumeCapability {
        access_mode: Some(volume_capability::AccessMode { mode: mode.into() }),
        access_type: Some(volume_capability::AccessType::Mount(mount)),
    }
}
