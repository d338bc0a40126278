//! What pods are given: publications, statistics, growth on the node.

use std::path::{Path, PathBuf};

use tonic::Code;
use zpod_proto::csi;
use zpod_proto::csi::volume_capability::AccessType;
use zpod_proto::csi::volume_capability::access_mode::Mode;
use zpod_volume::{VolumeId, VolumeParameters};

use super::volumes::is_block;
use super::{Judged, Model, Published, Sure, Volume, done};
use crate::call::{Answer, Reply};

const EPHEMERAL: &str = "csi.storage.k8s.io/ephemeral";
/// What an inline volume has where its pod does not say.
const GIB: i64 = 1 << 30;

/// A path by its one name: two names can lead to one directory.
pub(crate) fn resolved(path: &str) -> PathBuf {
    let path = Path::new(path);
    let parent = path.parent().and_then(|parent| parent.canonicalize().ok());
    parent.map_or_else(|| path.to_owned(), |parent| parent.join(path.file_name().unwrap_or_default()))
}

/// The id of a volume as kubelet names it.
pub(crate) fn id_of_handle(handle: &str) -> String {
    if handle.starts_with("csi-") { VolumeId::from_name(handle).to_string() } else { handle.to_owned() }
}

fn wanted(request: &csi::NodePublishVolumeRequest) -> Published {
    let capability = request.volume_capability.clone().unwrap_or_default();
    let reads_only = capability.access_mode.is_some_and(|mode| mode.mode() == Mode::SingleNodeReaderOnly);
    let (mut flags, group) = match &capability.access_type {
        Some(AccessType::Mount(mount)) => (mount.mount_flags.clone(), mount.volume_mount_group.clone()),
        _ => Default::default(),
    };
    let read_only = request.readonly || reads_only || flags.iter().any(|flag| flag == "ro");
    flags.retain(|flag| flag != "ro" && flag != "rw");
    flags.sort();
    Published { target: resolved(&request.target_path), read_only, group, flags }
}

impl Model {
    pub(super) fn publish(&mut self, request: &csi::NodePublishVolumeRequest, answer: &Answer) -> Judged {
        let (id, wanted) = (id_of_handle(&request.volume_id), wanted(request));
        let inline = request.volume_context.contains_key(EPHEMERAL);
        let taken = |(other, volume): (&String, &Volume)| {
            *other != id && volume.published.as_ref().is_some_and(|published| published.target == wanted.target)
        };
        let taken = self.volumes.iter().any(taken);
        let block = request.volume_capability.as_ref().is_some_and(is_block);
        let Some(volume) = self.volumes.get_mut(&id) else {
            if !inline {
                return self.refused(answer, &[Code::NotFound]);
            }
            if taken {
                return self.refused(answer, &[Code::FailedPrecondition, Code::ResourceExhausted]);
            }
            return self.publish_inline(request, wanted, answer);
        };
        let mut reasons = Vec::new();
        if volume.block != block || volume.parameters.encryption.is_some() == request.secrets.is_empty() {
            // It stands where it is published: no final error may hide that.
            let stands = volume.published.as_ref().is_some_and(|published| published.target == wanted.target);
            reasons.push(if stands { Code::Unavailable } else { Code::InvalidArgument });
        }
        match &volume.published {
            Some(published) if published.target != wanted.target => reasons.push(Code::FailedPrecondition),
            Some(published) if *published != wanted => reasons.push(Code::AlreadyExists),
            Some(_) => {}
            // What is there of an inline volume whose pod is gone may be of another size.
            None if taken || volume.used => reasons.extend([Code::FailedPrecondition, Code::AlreadyExists]),
            None => {}
        }
        if !reasons.is_empty() {
            return self.refused(answer, &reasons);
        }
        if volume.published.is_none() && answer.is_ok() {
            (volume.published, volume.heard) = (Some(wanted), Sure::No);
            (volume.blank, volume.told) = (volume.content == [0; 4], volume.is_initialized());
        }
        self.made(answer, &[]).map(drop)
    }

    fn publish_inline(
        &mut self,
        request: &csi::NodePublishVolumeRequest,
        wanted: Published,
        answer: &Answer,
    ) -> Judged {
        let context = &request.volume_context;
        let capacity = context
            .get("size")
            .map_or(GIB, |size| i64::try_from(size.parse::<zpod_volume::Bytes>().unwrap().0).unwrap());
        if self.made(answer, &[Code::ResourceExhausted])?.is_none() {
            self.no_room(capacity);
            return Ok(());
        }
        let pairs = context.iter().filter(|(key, _)| *key != "size").map(|(key, value)| (key.as_str(), value.as_str()));
        let volume = Volume {
            name: request.volume_id.clone(),
            capacity,
            parameters: VolumeParameters::parse(pairs).unwrap(),
            given: Default::default(),
            block: false,
            source: None,
            ephemeral: true,
            published: Some(wanted),
            content: [0; 4],
            initialized: Sure::No,
            copied: None,
            blank: true,
            told: Sure::No,
            used: false,
            reports: false,
            heard: Sure::No,
        };
        self.volumes.insert(id_of_handle(&request.volume_id), volume);
        Ok(())
    }

    /// Whether a volume is published where this call wants it.
    pub(crate) fn stands(&self, request: &csi::NodePublishVolumeRequest) -> bool {
        let published =
            self.volumes.get(&id_of_handle(&request.volume_id)).and_then(|volume| volume.published.as_ref());
        published.is_some_and(|published| published.target == resolved(&request.target_path))
    }

    pub(super) fn unpublish(&mut self, request: &csi::NodeUnpublishVolumeRequest, answer: &Answer) -> Judged {
        let (id, target) = (id_of_handle(&request.volume_id), resolved(&request.target_path));
        let owned = self.volumes.iter().any(|(other, volume)| {
            *other != id && volume.published.as_ref().is_some_and(|published| published.target == target)
        });
        let here = |published: &Published| published.target == target;
        // An inline volume that has no path any more ends by any: nobody else comes for it.
        let meant = |volume: &&Volume| volume.published.as_ref().map_or(volume.ephemeral || !owned, here);
        let meant = self.volumes.get(&id).filter(meant);
        let Some(volume) = meant.cloned() else { return done(answer, &[]).map(drop) };
        if volume.ephemeral && volume.used {
            // Its end has to wait, but its pod has it no more.
            self.withdraw(&id);
            return self.refused(answer, &[Code::FailedPrecondition]);
        }
        if self.removed(answer)? {
            self.withdraw(&id);
            if volume.ephemeral {
                self.volumes.remove(&id);
            }
        }
        Ok(())
    }

    fn withdraw(&mut self, id: &str) {
        if let Some(volume) = self.volumes.get_mut(id) {
            (volume.published, volume.heard, volume.reports) = (None, Sure::No, false);
        }
    }

    pub(super) fn stats(&self, request: &csi::NodeGetVolumeStatsRequest, answer: &Answer) -> Judged {
        let (id, target) = (id_of_handle(&request.volume_id), resolved(&request.volume_path));
        let here = |volume: &&Volume| volume.published.as_ref().is_some_and(|published| published.target == target);
        if self.volumes.get(&id).filter(here).is_none() {
            return self.refused(answer, &[Code::NotFound]);
        }
        let Some(Reply::Stats(reply)) = done(answer, &[])? else { return Ok(()) };
        let sound = |usage: &csi::VolumeUsage| usage.total >= 0 && usage.used >= 0 && usage.available >= 0;
        if reply.usage.is_empty() || !reply.usage.iter().all(sound) || reply.volume_condition.is_none() {
            return Err(format!("{reply:?}"));
        }
        Ok(())
    }

    pub(super) fn node_expand(&self, request: &csi::NodeExpandVolumeRequest, answer: &Answer) -> Judged {
        let Some(volume) = self.volumes.get(&request.volume_id) else { return self.refused(answer, &[Code::NotFound]) };
        let mut reasons = Vec::new();
        // One that has just ended may count as a guest that runs.
        let ended = volume.heard == Sure::Maybe;
        if volume.used || ended {
            // The disk that a guest has seen can't become larger; and where nobody has published it, it is in use.
            reasons.push(Code::FailedPrecondition);
        }
        if volume.heard != Sure::Yes && (volume.used || volume.block || ended) {
            // It is waited for longer than this caller waits.
            reasons.extend([Code::DeadlineExceeded, Code::Unavailable]);
        }
        match self.made(answer, &reasons)? {
            Some(Reply::NodeExpand(reply)) if reply.capacity_bytes != volume.capacity => {
                Err(format!("it has {}, not {}", reply.capacity_bytes, volume.capacity))
            }
            _ => Ok(()),
        }
    }
}
