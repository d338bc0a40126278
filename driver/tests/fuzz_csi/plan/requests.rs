//! Requests, of things that are there and of some that are not.

use std::collections::HashMap;
use std::path::PathBuf;

use zpod_proto::csi::volume_capability::access_mode::Mode;
use zpod_proto::csi::volume_capability::{AccessMode, AccessType, BlockVolume, MountVolume};
use zpod_proto::csi::volume_content_source::{SnapshotSource, Type, VolumeSource};
use zpod_proto::csi::*;

use super::Plan;
use crate::call::Call;
use crate::model::Model;

const MIB: i64 = 1 << 20;
const SEGMENT: &str = "csi.storage.k8s.io/";
/// The one key of all that is encrypted.
const KEY: &str = "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff";
const CLASSES: [&[(&str, &str)]; 7] = [
    &[],
    &[("provisioning", "thick")],
    &[("allowCopy", "true")],
    &[("headroom", "1x"), ("allowCopy", "true")],
    &[("headroom", "1000x"), ("scrubInterval", "1m")],
    &[("encryption", "aes-256-gcm"), ("allowCopy", "true")],
    &[
        ("compression", "zstd"),
        ("volblocksize", "8K"),
        ("quota", "none"),
        ("csi.storage.k8s.io/pvc/name", "a\u{202e}b"),
    ],
];
const CHANGES: [(&str, &str); 6] = [
    ("compression", "off"),
    ("recordsize", "16K"),
    ("atime", "on"),
    ("quota", "quota"),
    ("reservation", "100Mi"),
    ("sync", "always"),
];

pub(super) fn map(pairs: &[(&str, &str)]) -> HashMap<String, String> {
    pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
}

impl Plan<'_> {
    /// Names that come again, and of every form that is allowed.
    pub(super) fn name(&mut self) -> String {
        match self.random.u8(0..9) {
            0 => "x".repeat(128),
            1 => "\u{1f40b}".repeat(128),
            2 => "../../etc/passwd".into(),
            3 => "a b\u{202e}c\u{61c}/%s;$(x)".into(),
            n => format!("pvc-{n}"),
        }
    }

    /// The id of a volume, seldom of none.
    pub(super) fn volume(&mut self) -> String {
        let ids = self.model.volumes.keys().collect::<Vec<_>>();
        match self.random.u8(0..20) {
            0 => "no id at all/..".into(),
            1 => "3ADDCB02-4C3D-8797-93A0-17E4B2D2BB49".into(),
            2 => {
                let name = self.name();
                self.model.id_of(&name)
            }
            _ if ids.is_empty() => "3addcb02-4c3d-8797-93a0-17e4b2d2bb49".into(),
            _ => (*self.one(&ids)).clone(),
        }
    }

    pub(super) fn snapshot(&mut self) -> String {
        let ids = self.model.snapshots.keys().collect::<Vec<_>>();
        match self.random.u8(0..12) {
            0 => "\u{7f}".into(),
            _ if ids.is_empty() => self.model.snapshot_id_of("none"),
            _ => (*self.one(&ids)).clone(),
        }
    }

    pub(super) fn group(&mut self) -> String {
        let name = self.name();
        if self.chance(8) { "none".into() } else { Model::group_id_of(&name) }
    }

    fn target(&mut self) -> String {
        let target = self.pods.join(format!("pod-{}", self.random.u8(0..6)));
        self.by_some_name(target)
    }

    /// Kubelet's directory may be reached by two names.
    fn by_some_name(&mut self, target: PathBuf) -> String {
        let other = self.pods.with_file_name("pods-by-another-name").join(target.file_name().unwrap_or_default());
        let target = if self.chance(4) { other } else { target };
        target.to_str().unwrap().to_owned()
    }

    /// A volume as kubelet names it and where it is published, seldom another path.
    pub(super) fn published(&mut self) -> (String, String) {
        let all = self.model.volumes.iter().filter_map(|(id, volume)| {
            let name = if volume.ephemeral { &volume.name } else { id };
            Some((name.clone(), volume.published.as_ref()?.target.clone()))
        });
        let all = all.collect::<Vec<_>>();
        if all.is_empty() || self.chance(8) {
            return (self.volume(), self.target());
        }
        let (name, target) = self.one(&all).clone();
        (name, self.by_some_name(target))
    }

    pub(super) fn capability(&mut self, block: bool) -> VolumeCapability {
        let modes = [Mode::SingleNodeWriter, Mode::SingleNodeSingleWriter, Mode::SingleNodeMultiWriter];
        let access_type = if block {
            AccessType::Block(BlockVolume {})
        } else {
            let flags = [&[][..], &[], &["noatime", "nosuid"], &["ro"]];
            let mount_flags = self.one(&flags).iter().map(|flag| (*flag).to_owned()).collect();
            let volume_mount_group = if self.chance(4) { "2000" } else { "" };
            AccessType::Mount(MountVolume {
                mount_flags,
                volume_mount_group: volume_mount_group.into(),
                ..Default::default()
            })
        };
        let mode = if self.chance(9) { Mode::SingleNodeReaderOnly } else { *self.one(&modes) };
        VolumeCapability { access_type: Some(access_type), access_mode: Some(AccessMode { mode: mode.into() }) }
    }

    fn size(&mut self) -> i64 {
        let offered = self.model.offered.unwrap_or_default();
        let size = match self.random.u8(0..24) {
            0 => 0,
            1 => *self.one(&[1, 256 * MIB - 1, (1 << 50) + 1, i64::MAX]),
            2 => offered,
            3 => offered + self.random.i64(-64..64) * MIB,
            4 => *self.one(&[1 << 40, 2 << 40, 1 << 50, 15 << 40]),
            5..=9 => self.random.i64(256..2048) * MIB + self.random.i64(0..8) * 128 * 1024,
            _ => 256 * MIB,
        };
        size.max(0)
    }

    fn range(&mut self) -> Option<CapacityRange> {
        let required_bytes = self.size();
        let limit_bytes = match self.random.u8(0..6) {
            0 => required_bytes,
            1 if required_bytes < i64::MAX / 2 => required_bytes + self.random.i64(0..1024) * MIB,
            2 if required_bytes == 0 => self.size(),
            _ => 0,
        };
        (!self.chance(12)).then_some(CapacityRange { required_bytes, limit_bytes })
    }

    pub(super) fn create(&mut self) -> Call {
        let (name, block) = (self.name(), self.chance(3));
        // As often as not the very call that made it.
        if let Some(known) = self.model.volumes.values().find(|volume| volume.name == name && !volume.ephemeral)
            && self.random.bool()
        {
            return Call::CreateVolume(CreateVolumeRequest {
                name,
                capacity_range: Some(CapacityRange { required_bytes: known.capacity, limit_bytes: 0 }),
                volume_capabilities: vec![self.capability(known.block)],
                parameters: known.given.clone(),
                volume_content_source: known.source.clone(),
                ..Default::default()
            });
        }
        let source = match self.random.u8(0..9) {
            0 | 1 => Some(Type::Snapshot(SnapshotSource { snapshot_id: self.snapshot() })),
            2 => Some(Type::Volume(VolumeSource { volume_id: self.volume() })),
            _ => None,
        };
        let like = source.as_ref().and_then(|source| match source {
            Type::Snapshot(source) => self.model.snapshots.get(&source.snapshot_id).map(|s| (s.block, s.encrypted)),
            Type::Volume(source) => {
                let volume = self.model.volumes.get(&source.volume_id)?;
                Some((volume.block, volume.parameters.encryption.is_some()))
            }
        });
        // Seldom unlike what it is made from.
        let like = if self.chance(8) { None } else { like };
        let class = match like {
            Some((_, true)) => CLASSES[5],
            Some((_, false)) => *self.one(&CLASSES[..5]),
            None => *self.one(&CLASSES),
        };
        Call::CreateVolume(CreateVolumeRequest {
            name,
            capacity_range: if like.is_some() && self.random.bool() { None } else { self.range() },
            volume_capabilities: vec![self.capability(like.map_or(block, |(block, _)| block))],
            parameters: map(class),
            volume_content_source: source.map(|source| VolumeContentSource { r#type: Some(source) }),
            ..Default::default()
        })
    }

    pub(super) fn expand(&mut self) -> Call {
        let volume_id = self.volume();
        let capacity = self.model.volumes.get(&volume_id).map_or(0, |volume| volume.capacity);
        let more = self.random.i64(0..512) * MIB;
        let required_bytes = if self.chance(4) { self.size() } else { capacity + more };
        let limit_bytes = if self.chance(8) { required_bytes } else { 0 };
        let capacity_range = Some(CapacityRange { required_bytes, limit_bytes });
        Call::Expand(ControllerExpandVolumeRequest { volume_id, capacity_range, ..Default::default() })
    }

    pub(super) fn modify(&mut self) -> Call {
        let change = *self.one(&CHANGES);
        Call::Modify(ControllerModifyVolumeRequest {
            volume_id: self.volume(),
            mutable_parameters: map(&[change]),
            ..Default::default()
        })
    }

    pub(super) fn publish(&mut self) -> Call {
        let idle = self.model.volumes.iter().filter(|(_, volume)| volume.published.is_none() && !volume.used);
        let idle = idle.map(|(id, _)| id.clone()).collect::<Vec<_>>();
        let volume_id = if idle.is_empty() || self.chance(4) { self.volume() } else { self.one(&idle).clone() };
        let volume = self.model.volumes.get(&volume_id);
        let block = volume.is_some_and(|volume| volume.block);
        let encrypted = volume.is_some_and(|volume| volume.parameters.encryption.is_some());
        let (wrong_mode, wrong_key) = (self.chance(16), self.chance(16));
        Call::Publish(NodePublishVolumeRequest {
            volume_id,
            target_path: self.target(),
            staging_target_path: "/staging".into(),
            volume_capability: Some(self.capability(block != wrong_mode)),
            readonly: self.chance(8),
            secrets: if encrypted != wrong_key { map(&[("encryptionKey", KEY)]) } else { HashMap::new() },
            volume_context: self.pod(),
            ..Default::default()
        })
    }

    fn pod(&mut self) -> HashMap<String, String> {
        let pod = format!("pod-{}\u{1b}", self.random.u8(0..9));
        HashMap::from(
            [("pod.name", &*pod), ("pod.namespace", "n")].map(|(key, value)| (format!("{SEGMENT}{key}"), value.into())),
        )
    }

    pub(super) fn publish_inline(&mut self) -> Call {
        let mut volume_context = self.pod();
        volume_context.insert(format!("{SEGMENT}ephemeral"), "true".into());
        if self.random.bool() {
            volume_context.insert("size".into(), (*self.one(&["256Mi", "700Mi", "16Gi"])).into());
        }
        let (volume_id, target_path) = (format!("csi-{:064x}", self.random.u8(0..3)), self.target());
        let found = self.model.volumes.get(&self.model.id_of(&volume_id));
        if found.is_some_and(|volume| volume.published.is_none()) {
            // Its pod is gone, and its machine not yet: kubelet comes back for that, and not for another pod.
            return Call::Unpublish(NodeUnpublishVolumeRequest { volume_id, target_path });
        }
        Call::Publish(NodePublishVolumeRequest {
            volume_id,
            target_path,
            volume_capability: Some(self.capability(false)),
            volume_context,
            ..Default::default()
        })
    }

    pub(super) fn create_snapshot(&mut self) -> Call {
        Call::CreateSnapshot(CreateSnapshotRequest {
            name: self.name(),
            source_volume_id: self.volume(),
            parameters: if self.random.bool() { map(&[("allowCopy", "true")]) } else { HashMap::new() },
            ..Default::default()
        })
    }

    pub(super) fn create_group(&mut self) -> Call {
        let mut source_volume_ids = (0..self.random.usize(1..4)).map(|_| self.volume()).collect::<Vec<_>>();
        source_volume_ids.sort();
        source_volume_ids.dedup();
        Call::CreateGroup(CreateVolumeGroupSnapshotRequest {
            name: self.name(),
            source_volume_ids,
            parameters: if self.random.bool() { map(&[("allowCopy", "true")]) } else { HashMap::new() },
            ..Default::default()
        })
    }
}
