//! What is done next: by chance, with an eye on what there is.

#[path = "plan/requests.rs"]
mod requests;

use std::path::PathBuf;
use std::time::Duration;

use fastrand::Rng;
use tonic::Code;
use zpod_proto::csi::*;

use crate::call::Call;
use crate::disk::{Kind, State};
use crate::model::{Model, Volume};
use requests::map;

/// One thing to do.
#[derive(Debug)]
pub(crate) enum Step {
    Call(Call),
    /// A call with something wrong in it, and the code for that.
    Damaged(Call, Code),
    AtOnce(Vec<Call>),
    /// zpod is killed so long after the call is sent.
    Killed(Call, Duration),
    Kill {
        crash_at: Option<u64>,
    },
    Terminate,
    /// A virtual machine starts with a published volume.
    Start {
        id: String,
        reports: bool,
    },
    Hear(String),
    Silence(String),
    Stop(String),
    Write {
        id: String,
        place: usize,
    },
    Befall(State),
}

pub(crate) struct Plan<'a> {
    pub(crate) model: &'a Model,
    pub(crate) random: &'a mut Rng,
    pub(crate) kind: Kind,
    pub(crate) pods: PathBuf,
}

impl Plan<'_> {
    pub(crate) fn next(&mut self) -> Step {
        let removes = |call: &Call| {
            matches!(call, Call::Unpublish(_) | Call::DeleteVolume(_) | Call::DeleteSnapshot(_) | Call::DeleteGroup(_))
        };
        // A removal that can't be written down is half done until it is repeated.
        match self.any() {
            Step::Call(call) | Step::Killed(call, _) if self.model.disk == State::ReadOnly && removes(&call) => {
                Step::Call(Call::Probe(ProbeRequest {}))
            }
            Step::AtOnce(calls) if self.model.disk == State::ReadOnly && calls.iter().any(removes) => {
                Step::Call(Call::Probe(ProbeRequest {}))
            }
            step => step,
        }
    }

    fn any(&mut self) -> Step {
        match self.random.u8(0..100) {
            0..=57 => Step::Call(self.call()),
            58..=61 => self.damaged(),
            62..=69 => self.at_once(),
            70..=73 => Step::Killed(self.change(), Duration::from_micros(self.random.u64(0..12_000))),
            74 => Step::Kill { crash_at: None },
            75..=77 => Step::Kill { crash_at: Some(self.random.u64(1..60)) },
            78 => Step::Terminate,
            79..=96 => self.machine(),
            _ => self.disk(),
        }
    }

    fn chance(&mut self, of: u8) -> bool {
        self.random.u8(0..of) == 0
    }

    fn one<'t, T>(&mut self, of: &'t [T]) -> &'t T {
        &of[self.random.usize(0..of.len())]
    }

    /// A call of any kind.
    pub(crate) fn call(&mut self) -> Call {
        match self.random.u8(0..100) {
            0..=79 => self.change(),
            80..=84 => Call::Get(ControllerGetVolumeRequest { volume_id: self.volume() }),
            85..=88 => {
                let (volume_id, volume_path) = self.published();
                Call::Stats(NodeGetVolumeStatsRequest { volume_id, volume_path, ..Default::default() })
            }
            89..=90 => Call::GetSnapshot(GetSnapshotRequest { snapshot_id: self.snapshot(), ..Default::default() }),
            91 => {
                Call::GetGroup(GetVolumeGroupSnapshotRequest { group_snapshot_id: self.group(), ..Default::default() })
            }
            92..=93 => Call::Stage(NodeStageVolumeRequest {
                volume_id: self.volume(),
                staging_target_path: "/staging".into(),
                volume_capability: Some(self.capability(false)),
                ..Default::default()
            }),
            94 => Call::Unstage(NodeUnstageVolumeRequest {
                volume_id: self.volume(),
                staging_target_path: "/staging".into(),
            }),
            95 => Call::Validate(ValidateVolumeCapabilitiesRequest {
                volume_id: self.volume(),
                volume_capabilities: vec![self.capability(false)],
                ..Default::default()
            }),
            96..=97 => Call::Probe(ProbeRequest {}),
            98 => Call::NodeInfo(NodeGetInfoRequest {}),
            _ => Call::PluginInfo(GetPluginInfoRequest {}),
        }
    }

    /// A call that may change something.
    pub(crate) fn change(&mut self) -> Call {
        match self.random.u8(0..100) {
            0..=19 => self.create(),
            20..=27 => Call::DeleteVolume(DeleteVolumeRequest { volume_id: self.volume(), ..Default::default() }),
            28..=36 => self.expand(),
            37..=42 => self.modify(),
            43..=59 => self.publish(),
            60..=69 => {
                let (volume_id, target_path) = self.published();
                Call::Unpublish(NodeUnpublishVolumeRequest { volume_id, target_path })
            }
            70..=74 => self.publish_inline(),
            75..=85 => self.create_snapshot(),
            86..=90 => {
                Call::DeleteSnapshot(DeleteSnapshotRequest { snapshot_id: self.snapshot(), ..Default::default() })
            }
            91..=94 => self.create_group(),
            95..=96 => Call::DeleteGroup(DeleteVolumeGroupSnapshotRequest {
                group_snapshot_id: self.group(),
                ..Default::default()
            }),
            _ => Call::NodeExpand(NodeExpandVolumeRequest {
                volume_id: self.volume(),
                volume_path: "/anywhere".into(),
                ..Default::default()
            }),
        }
    }

    /// Two or three at once, mostly of one volume.
    fn at_once(&mut self) -> Step {
        let makes_copies = |call: &Call| {
            matches!(call, Call::CreateSnapshot(_) | Call::CreateGroup(_))
                || matches!(call, Call::CreateVolume(request) if request.volume_content_source.is_some())
        };
        let first = self.change();
        let mut calls = vec![first.clone()];
        for _ in 0..self.random.u8(1..3) {
            let other = if self.chance(3) { first.clone() } else { self.change() };
            calls.push(other);
        }
        // Full copies go on by themselves; which of two calls began one can't be told.
        // And kubelet makes one call at a time for the inline volume of a pod, whose end is two steps.
        let ephemeral = |id: &String| self.model.volumes.get(id).is_some_and(|volume| volume.ephemeral);
        let inline = |call: &Call| match call {
            Call::Publish(NodePublishVolumeRequest { volume_id, .. })
            | Call::Unpublish(NodeUnpublishVolumeRequest { volume_id, .. }) => {
                volume_id.starts_with("csi-") || ephemeral(volume_id)
            }
            _ => false,
        };
        calls.retain(|call| *call == first || !inline(call));
        // What deletes a volume that another call makes may come before it or behind it, and both answers are the same.
        let of_none = |call: &Call| matches!(call, Call::DeleteVolume(request) if !self.model.volumes.contains_key(&request.volume_id));
        calls.retain(|call| !of_none(call));
        calls.retain(|call| (self.model.shares || !makes_copies(call)) && !matches!(call, Call::NodeExpand(_)));
        if calls.len() < 2 { Step::Call(self.call()) } else { Step::AtOnce(calls) }
    }

    fn machine(&mut self) -> Step {
        let some = |wanted: &dyn Fn(&Volume) -> bool| {
            let found = self.model.volumes.iter().filter(|(_, volume)| wanted(volume));
            found.map(|(id, _)| id.clone()).collect::<Vec<_>>()
        };
        let idle = some(&|volume| volume.published.is_some() && !volume.used);
        let used = some(&|volume| volume.used);
        let reports = some(&|volume| volume.reports);
        match self.random.u8(0..10) {
            0..=2 if !idle.is_empty() && self.model.disk != State::ReadOnly => {
                Step::Start { id: self.one(&idle).clone(), reports: !self.chance(4) }
            }
            3..=6 if !used.is_empty() && self.model.disk == State::Free => {
                Step::Write { id: self.one(&used).clone(), place: self.random.usize(0..4) }
            }
            7 if !reports.is_empty() && self.model.disk == State::Free => Step::Hear(self.one(&reports).clone()),
            8 if !reports.is_empty() => Step::Silence(self.one(&reports).clone()),
            7..=9 if !used.is_empty() => Step::Stop(self.one(&used).clone()),
            _ => Step::Call(self.call()),
        }
    }

    fn disk(&mut self) -> Step {
        if self.model.disk != State::Free {
            return Step::Befall(State::Free);
        }
        // A file that is open for writing keeps a file system from becoming read-only: a loop device has it so.
        let open = |volume: &Volume| volume.used || (volume.block && volume.published.is_some());
        let writable = self.model.volumes.values().any(open);
        Step::Befall(match self.random.u8(0..5) {
            0 if self.kind == Kind::Ext4 => State::NoInodes,
            1 if !writable => State::ReadOnly,
            2 => State::NoRun,
            _ => State::Full,
        })
    }

    /// Something that is wrong whatever there is.
    fn damaged(&mut self) -> Step {
        let capability = self.capability(false);
        let create = CreateVolumeRequest {
            name: self.name(),
            volume_capabilities: vec![capability.clone()],
            ..Default::default()
        };
        let range = |required_bytes, limit_bytes| Some(CapacityRange { required_bytes, limit_bytes });
        let create = match self.random.u8(0..12) {
            0 => CreateVolumeRequest { name: "x".repeat(129), ..create },
            1 => CreateVolumeRequest { name: String::new(), ..create },
            2 => CreateVolumeRequest { name: "a\0b".into(), ..create },
            3 => CreateVolumeRequest { volume_capabilities: vec![], ..create },
            4 => CreateVolumeRequest { capacity_range: range(-1, 0), ..create },
            5 => CreateVolumeRequest { capacity_range: range(i64::MAX, 1), ..create },
            6 => CreateVolumeRequest { parameters: map(&[("headroom", "1001x")]), ..create },
            7 => CreateVolumeRequest { mutable_parameters: map(&[("ashift", "12")]), ..create },
            8 => CreateVolumeRequest { volume_content_source: Some(VolumeContentSource::default()), ..create },
            9 => {
                let target_path = self.pods.join("..").join("x").to_str().unwrap_or_default().to_owned();
                let publish = NodePublishVolumeRequest {
                    volume_id: self.model.id_of("pvc-5"),
                    target_path,
                    volume_capability: Some(capability),
                    ..Default::default()
                };
                return Step::Damaged(Call::Publish(publish), Code::InvalidArgument);
            }
            10 => {
                let list = ListVolumesRequest { max_entries: 3, starting_token: "no token".into() };
                return Step::Damaged(Call::ListVolumes(list), Code::Aborted);
            }
            _ => {
                let list = ListSnapshotsRequest { max_entries: -1, ..Default::default() };
                return Step::Damaged(Call::ListSnapshots(list), Code::InvalidArgument);
            }
        };
        Step::Damaged(Call::CreateVolume(create), Code::InvalidArgument)
    }
}
