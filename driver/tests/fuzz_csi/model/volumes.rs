//! Volumes: made, deleted, grown, changed.

use tonic::Code;
use zpod_proto::csi;
use zpod_proto::csi::volume_capability::AccessType;
use zpod_proto::csi::volume_content_source::Type;
use zpod_volume::{DiskLayout, VolumeId, VolumeParameters};

use super::{Judged, Model, Sure, Volume, bytes, done, is_id, wanted};
use crate::call::{Answer, Reply};
use crate::disk::State;

const MIB: i64 = 1 << 20;
const GIB: i64 = 1 << 30;
/// What is offered may be less by the next call: virtual machines write.
const MARGIN: i64 = 64 * MIB;

/// What a volume is made from, as it is.
struct Origin {
    size: i64,
    block: bool,
    encrypted: bool,
    content: super::Content,
    initialized: Sure,
    /// Why it can't be copied now.
    reasons: Vec<Code>,
    /// Whether it may also be copied, for all that is known.
    perhaps: bool,
}

pub(super) fn parameters(request: &csi::CreateVolumeRequest) -> VolumeParameters {
    let pairs = request.parameters.iter().map(|(key, value)| (key.as_str(), value.as_str()));
    VolumeParameters::parse(pairs).unwrap()
}

pub(super) fn is_block(capability: &csi::VolumeCapability) -> bool {
    matches!(capability.access_type, Some(AccessType::Block(_)))
}

fn id_in(source: &csi::VolumeContentSource) -> &str {
    match &source.r#type {
        Some(Type::Snapshot(source)) => &source.snapshot_id,
        Some(Type::Volume(source)) => &source.volume_id,
        None => "",
    }
}

impl Model {
    pub(super) fn create_volume(
        &mut self,
        request: &csi::CreateVolumeRequest,
        answer: &Answer,
        offered: Option<i64>,
    ) -> Judged {
        let (parameters, block) = (parameters(request), is_block(&request.volume_capabilities[0]));
        let range = request.capacity_range.unwrap_or_default();
        if let Some((id, found)) = self.volumes.iter().find(|(_, volume)| volume.name == request.name) {
            let fits = (range.required_bytes == 0 || found.capacity >= range.required_bytes)
                && (range.limit_bytes == 0 || found.capacity <= range.limit_bytes);
            let same =
                (&found.parameters, found.block, &found.source) == (&parameters, block, &request.volume_content_source);
            if !fits || !same || found.ephemeral {
                let odd = request.volume_content_source.as_ref().is_some_and(|source| !is_id(id_in(source)));
                return self.refused(
                    answer,
                    if odd { &[Code::AlreadyExists, Code::NotFound] } else { &[Code::AlreadyExists] },
                );
            }
            let Some(Reply::CreateVolume(reply)) = done(answer, &[])? else { return Ok(()) };
            let volume = reply.volume.as_ref().ok_or("no volume in the answer")?;
            return same_as(volume, id, found.capacity);
        }
        let origin = match &request.volume_content_source {
            None => None,
            Some(source) => match self.origin(source, &request.name, &parameters) {
                Some(origin) => Some(origin),
                None => return self.refused(answer, &[Code::NotFound]),
            },
        };
        let mut reasons = Vec::new();
        let capacity = wanted(request.capacity_range.as_ref(), origin.as_ref().map_or(GIB, |origin| origin.size));
        if !(256 * MIB..=1 << 50).contains(&capacity) {
            reasons.push(Code::OutOfRange);
        }
        let mut perhaps = false;
        if let Some(origin) = &origin {
            if capacity < origin.size || range.limit_bytes > 0 && range.limit_bytes < origin.size {
                reasons.push(Code::OutOfRange);
            }
            if origin.block != block || origin.encrypted != parameters.encryption.is_some() {
                reasons.push(Code::InvalidArgument);
            }
            perhaps = reasons.is_empty() && origin.perhaps;
            reasons.extend(&origin.reasons);
        }
        if !reasons.is_empty() && (!perhaps || answer.is_err()) {
            // One that could be refused for lack of room first.
            reasons.push(Code::ResourceExhausted);
            return self.refused(answer, &reasons);
        }
        let Some(Reply::CreateVolume(reply)) = self.made(answer, self.too_large(capacity))? else {
            // A copy takes more than its own room: the blocks that it shares may be rewritten in what it was made from.
            let least = if origin.is_some() { capacity + 2 * GIB } else { capacity };
            self.no_room(least);
            return match offered {
                Some(offered) if origin.is_none() && capacity + MARGIN <= offered && self.refused.is_some() => {
                    Err(format!("no room, and GetCapacity has just offered {offered}"))
                }
                _ => Ok(()),
            };
        };
        let volume = reply.volume.as_ref().ok_or("no volume in the answer")?;
        let id = volume.volume_id.clone();
        same_as(volume, &id, capacity)?;
        if volume.content_source != request.volume_content_source {
            return Err(format!("made from {:?}", volume.content_source));
        }
        let made = Volume {
            name: request.name.clone(),
            capacity,
            parameters,
            given: request.parameters.clone(),
            block,
            source: request.volume_content_source.clone(),
            ephemeral: false,
            published: None,
            content: origin.as_ref().map_or([0; 4], |origin| origin.content),
            initialized: Sure::No,
            copied: origin.map(|origin| origin.initialized),
            blank: true,
            told: Sure::No,
            used: false,
            reports: false,
            heard: Sure::No,
        };
        match self.volumes.insert(id, made) {
            None => Ok(()),
            Some(other) => Err(format!("the id is that of volume {:?}", other.name)),
        }
    }

    /// What a volume is to be made from; nothing where that is not there.
    fn origin(&self, source: &csi::VolumeContentSource, name: &str, wanted: &VolumeParameters) -> Option<Origin> {
        match source.r#type.as_ref()? {
            Type::Snapshot(source) => {
                let snapshot = self.snapshots.get(&source.snapshot_id)?;
                let can = self.shares || snapshot.allow_copy || wanted.allow_copy;
                Some(Origin {
                    size: snapshot.size,
                    block: snapshot.block,
                    encrypted: snapshot.encrypted,
                    content: snapshot.content,
                    initialized: snapshot.initialized,
                    reasons: if can { vec![] } else { vec![Code::FailedPrecondition] },
                    perhaps: false,
                })
            }
            Type::Volume(source) => {
                let volume = self.volumes.get(&source.volume_id).filter(|volume| volume.name != name)?;
                let (reasons, perhaps) = self.copying(volume, wanted.allow_copy);
                Some(Origin {
                    size: volume.capacity,
                    block: volume.block,
                    encrypted: volume.parameters.encryption.is_some(),
                    content: volume.content,
                    initialized: volume.is_initialized(),
                    reasons,
                    perhaps,
                })
            }
        }
    }

    /// Why a volume can't be copied as it is now, and whether it perhaps can all the same.
    pub(super) fn copying(&self, volume: &Volume, allow_copy: bool) -> (Vec<Code>, bool) {
        if !self.shares && !allow_copy && !volume.parameters.allow_copy {
            return (vec![Code::FailedPrecondition], false);
        }
        match (&volume.published, volume.heard) {
            (None, _) if volume.used => (vec![Code::FailedPrecondition], false),
            (None, _) => (vec![], false),
            (Some(_), _) if !self.shares => (vec![Code::FailedPrecondition], false),
            (Some(_), Sure::Yes) => (vec![], false),
            (Some(_), heard) => (vec![Code::Unavailable], heard == Sure::Maybe),
        }
    }

    pub(super) fn delete_volume(&mut self, id: &str, answer: &Answer) -> Judged {
        match self.volumes.get(id) {
            Some(volume) if volume.published.is_some() || volume.used => {
                self.refused(answer, &[Code::FailedPrecondition])
            }
            _ => {
                if self.removed(answer)? {
                    self.volumes.remove(id);
                }
                Ok(())
            }
        }
    }

    /// Whether something was removed: that is only refused where the disk can't be written to.
    pub(super) fn removed(&self, answer: &Answer) -> Result<bool, String> {
        match answer {
            Err(status) if self.disk == State::ReadOnly && self.hindered(status) => Ok(false),
            answer => done(answer, &[]).map(|reply| reply.is_some()),
        }
    }

    pub(super) fn expand(&mut self, request: &csi::ControllerExpandVolumeRequest, answer: &Answer) -> Judged {
        let Some(volume) = self.volumes.get(&request.volume_id) else { return self.refused(answer, &[Code::NotFound]) };
        let range = request.capacity_range.unwrap_or_default();
        let (required, limit) = (range.required_bytes.max(volume.capacity), range.limit_bytes);
        if required > 1 << 50 || limit > 0 && limit < volume.capacity {
            return self.refused(answer, &[Code::OutOfRange]);
        }
        if required == volume.capacity {
            return match done(answer, &[])? {
                Some(Reply::Expand(reply)) if reply.capacity_bytes != required => {
                    Err(format!("it has {}, not {required}", reply.capacity_bytes))
                }
                _ => Ok(()),
            };
        }
        let Some(Reply::Expand(reply)) = self.made(answer, self.too_large(required))? else {
            // Whole metaslabs: a little more can take a lot more.
            let more =
                DiskLayout::partition_for(bytes(required)).0 - DiskLayout::partition_for(bytes(volume.capacity)).0;
            self.no_room(i64::try_from(more).unwrap() + MARGIN);
            return Ok(());
        };
        if reply.capacity_bytes != required {
            return Err(format!("it has {}, not {required}", reply.capacity_bytes));
        }
        self.volumes.get_mut(&request.volume_id).unwrap().capacity = required;
        Ok(())
    }

    pub(super) fn modify(&self, request: &csi::ControllerModifyVolumeRequest, answer: &Answer) -> Judged {
        let Some(volume) = self.volumes.get(&request.volume_id) else { return self.refused(answer, &[Code::NotFound]) };
        let of_files = |key: &String| matches!(key.as_str(), "atime" | "recordsize" | "quota");
        if volume.block && request.mutable_parameters.keys().any(of_files) {
            return self.refused(answer, &[Code::InvalidArgument]);
        }
        let silent = volume.published.is_some() && volume.heard != Sure::Yes && (volume.used || volume.block);
        if silent && volume.heard == Sure::No {
            return self.refused(answer, &[Code::Unavailable]);
        }
        self.made(answer, if silent { &[Code::Unavailable] } else { &[] }).map(drop)
    }

    pub(super) fn get(&self, id: &str, answer: &Answer) -> Judged {
        let Some(volume) = self.volumes.get(id) else { return self.refused(answer, &[Code::NotFound]) };
        let Some(Reply::Get(reply)) = done(answer, &[])? else { return Ok(()) };
        let found = reply.volume.as_ref().ok_or("no volume in the answer")?;
        if found.content_source != volume.source {
            return Err(format!("made from {:?}, not {:?}", found.content_source, volume.source));
        }
        same_as(found, id, volume.capacity)
    }

    /// A question that only depends on whether the volume exists.
    pub(super) fn exists(&self, id: &str, answer: &Answer) -> Judged {
        if self.volumes.contains_key(id) {
            done(answer, &[]).map(drop)
        } else {
            self.refused(answer, &[Code::NotFound])
        }
    }

    /// The id that a name has, or would have.
    pub(crate) fn id_of(&self, name: &str) -> String {
        let found = self.volumes.iter().find(|(_, volume)| volume.name == name);
        found.map_or_else(|| VolumeId::from_name(name).to_string(), |(id, _)| id.clone())
    }
}

impl Volume {
    /// Whether its contents were ever a pool that a guest has reported, be it before they were copied.
    pub(crate) fn is_initialized(&self) -> Sure {
        match (self.initialized, self.copied) {
            (Sure::Yes, _) | (_, Some(Sure::Yes)) => Sure::Yes,
            (Sure::No, None | Some(Sure::No)) => Sure::No,
            _ => Sure::Maybe,
        }
    }
}

fn same_as(found: &csi::Volume, id: &str, capacity: i64) -> Judged {
    if found.volume_id == id && found.capacity_bytes == capacity {
        return Ok(());
    }
    Err(format!("{} with {} bytes, not {id} with {capacity}", found.volume_id, found.capacity_bytes))
}
