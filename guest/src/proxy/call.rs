//! The calls that are not simply passed on.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use prost::Message as _;
use tokio::time::Instant;
use tonic::Code;
use zpod_proto::agent::volume_usage::Unit;
use zpod_proto::agent::{
    Device, RemoveContainerRequest, ResizeVolumeRequest, VolumeCondition, VolumeStatsRequest, VolumeStatsResponse,
    VolumeUsage,
};
use zpod_volume::{Bytes, DiskLayout, MountFlag, VolumeId};

use super::order::Turn;
use super::{Connection, Lost};
use crate::block;
use crate::error::VolumeError;
use crate::machine::{Machine, MountFlags, Usage};
use crate::place::Place;
use crate::request::{self, CreateContainer, Envelope, Method, Node, VolumeStorage};
use crate::ttrpc::{self, Header, Outcome};
use crate::volumes::Wanted;
use crate::volumes::status::{DETAIL_AGE, Snapshot};

/// How long volumes are worked on for a caller who does not say how long it waits. Kata's runtimes wait 30 and 60 s.
const NO_TIMEOUT: Duration = Duration::from_secs(60);

/// How long before its deadline a caller gets its answer: a tenth of its time, within these bounds. The agent needs a
/// part of it to make the container, and an error that comes too late says nothing.
const MARGIN: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(5));

/// How long volumes may be worked on for a caller.
fn budget(timeout: Option<Duration>) -> Duration {
    let timeout = timeout.unwrap_or(NO_TIMEOUT);
    timeout - (timeout / 10).clamp(MARGIN.0, MARGIN.1).min(timeout / 2)
}

impl<M: Machine> Connection<M> {
    /// Begins a call of ours. What needs no work of ours is passed on from here, so that it keeps its place.
    pub(super) async fn begin(self: &Arc<Self>, method: Method, header: Header, frame: Vec<u8>) -> io::Result<()> {
        let Ok(permit) = Arc::clone(&self.calls).try_acquire_owned() else {
            let text = format!("{} calls run already on this connection", super::CALLS);
            self.refuse(header.stream, Code::ResourceExhausted, text);
            return Ok(());
        };
        let received = Instant::now();
        let connection = Arc::clone(self);
        match method {
            Method::CreateContainer => {
                let request = match CreateContainer::decode(&frame) {
                    Ok(request) => request,
                    Err(error) => {
                        self.refuse(header.stream, Code::InvalidArgument, error.to_string());
                        return Ok(());
                    }
                };
                let timeout = Envelope::decode(&frame).ok().and_then(|envelope| envelope.timeout);
                let frame = request.rewritten.unwrap_or(frame);
                if request.volumes.is_empty() && request.devices.is_empty() {
                    return self.pass_up(header, &frame).await;
                }
                let call = Create {
                    turn: self.proxy.order.enter(&request.container),
                    container: request.container,
                    wanted: request.volumes.into_iter().map(wanted).collect(),
                    devices: request.devices,
                    received,
                    deadline: received + budget(timeout),
                };
                tokio::spawn(async move {
                    let _permit = permit;
                    connection.create(header, &frame, call).await;
                });
            }
            Method::RemoveContainer => {
                let Some(request) = message::<RemoveContainerRequest>(&frame) else {
                    return self.pass_up(header, &frame).await;
                };
                let turn = self.proxy.order.enter(&request.container_id);
                tokio::spawn(async move {
                    let _permit = permit;
                    connection.remove(header, &frame, &request.container_id, turn).await;
                });
            }
            Method::DestroySandbox => {
                tokio::spawn(async move {
                    let _permit = permit;
                    if let Ok((header, answer)) = connection.ask(header, &frame).await {
                        connection.proxy.volumes.release_all().await;
                        connection.reply(&header.frame(&answer)).await;
                    }
                });
            }
            Method::GetVolumeStats => {
                let path = message::<VolumeStatsRequest>(&frame).map(|request| request.volume_guest_path);
                let Some(id) = self.ours(path.as_deref()) else { return self.pass_up(header, &frame).await };
                tokio::spawn(async move {
                    let _permit = permit;
                    let result = connection.stats(id).await;
                    connection.respond(header.stream, result.map(|stats| stats.encode_to_vec())).await;
                });
            }
            Method::ResizeVolume => {
                let request = message::<ResizeVolumeRequest>(&frame).unwrap_or_default();
                let Some(id) = self.ours(Some(&request.volume_guest_path)) else {
                    return self.pass_up(header, &frame).await;
                };
                tokio::spawn(async move {
                    let _permit = permit;
                    let capacity = Bytes(request.size);
                    let grown = connection.proxy.volumes.grow(id, capacity, DiskLayout::partition_for(capacity)).await;
                    connection.respond(header.stream, grown.map(|_| Vec::new())).await;
                });
            }
        }
        Ok(())
    }

    fn ours(&self, path: Option<&str>) -> Option<VolumeId> {
        self.proxy.volumes.at(Path::new(path?))
    }

    async fn respond(self: &Arc<Self>, stream: u32, result: Result<Vec<u8>, VolumeError>) {
        match result {
            Ok(payload) => self.reply(&ttrpc::answer(stream, payload)).await,
            Err(error) => self.refuse(stream, error.code(), error.to_string()),
        }
    }

    async fn create(self: &Arc<Self>, header: Header, frame: &[u8], mut call: Create) {
        call.turn.come().await;
        let volumes = &self.proxy.volumes;
        let devices = match blocks(volumes.machine(), &call.devices, call.deadline).await {
            Ok(devices) => devices,
            Err(error) => return self.refuse(header.stream, error.code(), error.to_string()),
        };
        if devices.is_empty() && call.wanted.is_empty() {
            if let Ok((header, answer)) = self.ask(header, frame).await {
                self.reply(&header.frame(&answer)).await;
            }
            return;
        }
        call.wanted.extend(devices.iter().cloned());
        let added = match volumes.prepare(&call.container, &call.wanted, call.deadline).await {
            Ok(added) => added,
            Err(error) => return self.respond(header.stream, Err(error)).await,
        };
        let millis = call.received.elapsed().as_millis();
        tracing::info!(container = %call.container, "{} volumes ready after {millis} ms", call.wanted.len());
        let access = call.wanted.iter().any(|wanted| !wanted.spec.zfs_access.is_none());
        let rewritten = match self.handed_out(frame, &devices, access).await {
            Ok(rewritten) => rewritten,
            Err((code, text)) => {
                volumes.undo(added).await;
                return self.refuse(header.stream, code, text);
            }
        };
        match self.ask(header, rewritten.as_deref().unwrap_or(frame)).await {
            Ok((header, answer)) => {
                if ttrpc::outcome(&answer) != Outcome::Done {
                    volumes.undo(added).await;
                }
                self.reply(&header.frame(&answer)).await;
            }
            Err(Lost::NotSent) => volumes.undo(added).await,
            // The container may run: its volumes stay until it is removed.
            Err(Lost::NotAnswered) => {
                tracing::warn!(container = %call.container, "the connection ended before CreateContainer was answered");
            }
        }
    }

    /// The request with the numbers of the volumes' own block devices, and with ZFS itself where a volume gives access to it;
    /// `None` where there is nothing of both.
    async fn handed_out(
        &self,
        frame: &[u8],
        devices: &[Wanted],
        access: bool,
    ) -> Result<Option<Vec<u8>>, (Code, String)> {
        let malformed = |error: request::RequestError| (Code::InvalidArgument, error.to_string());
        let mut nodes = BTreeMap::new();
        for wanted in devices {
            let device = self.proxy.volumes.block_device(wanted.spec.id).await;
            let device = device.map_err(|error| (error.code(), error.to_string()))?;
            let node = Node { major: device.major, minor: device.minor, read_only: wanted.flags.read_only };
            nodes.insert(wanted.mount_point.to_string_lossy().into_owned(), node);
        }
        let with_devices = match nodes.is_empty() {
            true => None,
            false => Some(request::hand_out(frame, &nodes).map_err(malformed)?),
        };
        if !access {
            return Ok(with_devices);
        }
        let zfs = self.proxy.volumes.machine().container_zfs().await;
        let zfs = zfs.map_err(|fault| (Code::Internal, format!("zfsAccess: {fault}")))?;
        let frame = with_devices.as_deref().unwrap_or(frame);
        request::give_zfs(frame, zfs.device, &zfs.tools.to_string_lossy()).map(Some).map_err(malformed)
    }

    async fn remove(self: &Arc<Self>, header: Header, frame: &[u8], container: &str, mut turn: Turn) {
        turn.come().await;
        let Ok((header, answer)) = self.ask(header, frame).await else { return };
        match ttrpc::outcome(&answer) {
            Outcome::Done | Outcome::NotFound => self.proxy.volumes.release_container(container).await,
            Outcome::Failed => tracing::warn!(%container, "the agent failed to remove it: its volumes stay mounted"),
        }
        self.reply(&header.frame(&answer)).await;
    }

    async fn stats(&self, id: VolumeId) -> Result<VolumeStatsResponse, VolumeError> {
        let volumes = &self.proxy.volumes;
        let snapshot = volumes.status(DETAIL_AGE).await.into_iter().find(|snapshot| snapshot.id == id);
        let problem = snapshot.as_ref().and_then(Snapshot::problem);
        let usage = match &snapshot {
            Some(snapshot) => snapshot.usage,
            None => volumes.usage(id).await?,
        };
        Ok(VolumeStatsResponse {
            usage: usages(usage),
            volume_condition: Some(VolumeCondition {
                abnormal: problem.is_some(),
                message: problem.unwrap_or_else(|| "the pool is healthy".to_owned()),
            }),
        })
    }
}

/// A CreateContainer with volumes.
struct Create {
    container: String,
    wanted: Vec<Wanted>,
    /// Disks, some of which may be volumes of ours.
    devices: Vec<Device>,
    turn: Turn,
    received: Instant,
    deadline: Instant,
}

/// Those of a container's devices that are volumes of ours.
async fn blocks<M: Machine>(
    machine: &M,
    devices: &[Device],
    deadline: Instant,
) -> Result<Vec<Wanted>, block::BlockError> {
    let mut ours = Vec::new();
    for device in devices {
        if let Some(spec) = block::identify(machine, device, deadline).await? {
            let flags = MountFlags { read_only: spec.read_only, ..MountFlags::default() };
            let (mount_point, place) = (PathBuf::from(&device.container_path), Place::of_device(device));
            ours.push(Wanted { fs_group: None, mount_point, flags, spec, place });
        }
    }
    Ok(ours)
}

fn message<T: prost::Message + Default>(frame: &[u8]) -> Option<T> {
    T::decode(Envelope::decode(frame).ok()?.payload).ok()
}

fn usages(usage: Usage) -> Vec<VolumeUsage> {
    let entry = |total, used, available, unit: Unit| VolumeUsage { total, used, available, unit: unit.into() };
    vec![
        entry(usage.total_bytes, usage.used_bytes, usage.available_bytes, Unit::Bytes),
        entry(usage.total_inodes, usage.used_inodes, usage.available_inodes, Unit::Inodes),
    ]
}

fn wanted(storage: VolumeStorage) -> Wanted {
    let asked = |flag, name: &str| {
        storage.spec.mount_flags.contains(&flag) || storage.options.iter().any(|option| option == name)
    };
    // What a tenant may receive from a stream it may not run as another user, nor open as a device: those rights are not
    // among the delegated ones.
    let received = !storage.spec.zfs_access.is_none();
    let flags = MountFlags {
        read_only: storage.spec.read_only || storage.options.iter().any(|option| option == "ro"),
        noexec: asked(MountFlag::Noexec, "noexec"),
        nosuid: received || asked(MountFlag::Nosuid, "nosuid"),
        nodev: received || asked(MountFlag::Nodev, "nodev"),
        noatime: asked(MountFlag::Noatime, "noatime"),
    };
    let fs_group = storage.spec.fs_group.or(storage.fs_group);
    let mount_point = PathBuf::from(storage.mount_point);
    Wanted { fs_group, mount_point, flags, spec: storage.spec, place: storage.place }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_caller_gets_its_answer_before_its_deadline() {
        for (timeout, want) in [(Some(30), 27), (Some(60), 55), (Some(600), 595), (Some(4), 3), (None, 55)] {
            assert_eq!(budget(timeout.map(Duration::from_secs)), Duration::from_secs(want), "{timeout:?}");
        }
        assert_eq!(budget(Some(Duration::from_nanos(2))), Duration::from_nanos(1));
    }
}
