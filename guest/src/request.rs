//! The requests that are not simply passed on: telling them from the rest, and taking out what is ours.
//!
//! # Design
//! What is not well-formed in a frame of ours never reaches the agent. Where a field that may stand once stands twice,
//! two parsers could read two things: such a request is refused too.

use std::collections::BTreeSet;
use std::time::Duration;

use prost::Message as _;
use zpod_proto::agent::{self, Device, Storage};
use zpod_volume::{DecodeSpecError, OPTION_PREFIX, VolumeSpec};

use crate::place::Place;
use crate::wire::{self, Edit, Value, WireError};

mod access;
mod devices;

pub use access::give_zfs;
pub use devices::{Node, hand_out};

/// The type by which our volumes are known among a request's storages.
const FSTYPE: &str = "zfs";

/// A method that is not simply passed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Method {
    /// Makes a container: our volumes are mounted first.
    CreateContainer,
    /// Removes one: its volumes are released before the answer is passed on.
    RemoveContainer,
    /// Ends the sandbox: releases what is left.
    DestroySandbox,
    /// Usage of a volume.
    GetVolumeStats,
    /// Growth of a volume.
    ResizeVolume,
}

impl Method {
    fn named(name: &[u8]) -> Option<Self> {
        Some(match name {
            b"CreateContainer" => Self::CreateContainer,
            b"RemoveContainer" => Self::RemoveContainer,
            b"DestroySandbox" => Self::DestroySandbox,
            b"GetVolumeStats" => Self::GetVolumeStats,
            b"ResizeVolume" => Self::ResizeVolume,
            _ => return None,
        })
    }
}

/// What the beginning of a request frame says about whose it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Peek {
    /// Ours.
    Ours(Method),
    /// The agent's.
    Theirs,
    /// More bytes are needed.
    Undecided,
    /// No request: it is refused. The agent's parser may be one that reads more out of it than this one.
    Malformed,
}

/// Whose a whole request frame's payload is: one of our methods, or `None` where it is the agent's.
///
/// It is read to its end, and what is not well-formed is refused, whosever it is. Parsers of protobuf take the last of two
/// fields, and skip what they don't know, groups too: a request that is the agent's by what stands first in it could be
/// a CreateContainer to the agent.
///
/// # Errors
/// When it is no message, or service or method stand in it twice.
pub fn whose(frame: &[u8]) -> Result<Option<Method>, RequestError> {
    let (mut service, mut method) = (None, None);
    for field in wire::fields(frame) {
        let field = field?;
        let (name, seen) = match field.number {
            1 => ("service", &mut service),
            2 => ("method", &mut method),
            _ => continue,
        };
        if let Some(bytes) = field.bytes(frame)
            && seen.replace(bytes).is_some()
        {
            return Err(RequestError::Twice(name));
        }
    }
    Ok(method.filter(|_| service == Some(agent::SERVICE.as_bytes())).and_then(Method::named))
}

/// Looks at the first bytes of a request frame's payload that is too long to be held. Only such a frame is decided on
/// before its end: the agent refuses it for its length, whatever stands there.
pub fn peek(prefix: &[u8]) -> Peek {
    let (mut ours, mut method) = (None, None);
    for field in wire::fields(prefix) {
        match field {
            Ok(field) => match (field.number, field.bytes(prefix)) {
                (1, Some(service)) => ours = Some(service == agent::SERVICE.as_bytes()),
                (2, Some(name)) => method = Some(Method::named(name)),
                _ => {}
            },
            Err(WireError::Truncated) => break,
            Err(WireError::Malformed) => return Peek::Malformed,
        }
        match (ours, method) {
            (Some(false), _) | (_, Some(None)) => return Peek::Theirs,
            (Some(true), Some(Some(method))) => return Peek::Ours(method),
            _ => {}
        }
    }
    Peek::Undecided
}

/// A request that is refused before the agent sees it.
#[derive(Debug, thiserror::Error)]
pub enum RequestError {
    /// Not a message.
    #[error("the request is malformed: {0}")]
    Wire(#[from] WireError),
    /// Not a message of that kind.
    #[error("the request is malformed: {0}")]
    Decode(#[from] prost::DecodeError),
    /// A field that may stand once stands twice.
    #[error("the request is malformed: field {0} stands in it twice")]
    Twice(&'static str),
    /// A storage of our type that is not ours.
    #[error(
        "the storage for {0:?} has fstype zfs and no zpod= option: volumes of this type come from the zpod node plugin \
         only"
    )]
    NoSpec(String),
    /// A storage with more than one specification.
    #[error("the storage for {0:?} has more than one zpod= option")]
    ManySpecs(String),
    /// A specification that is none.
    #[error("the storage for {mount_point:?}: {source}")]
    Spec {
        /// Where it was to be mounted.
        mount_point: String,
        /// What is wrong with it.
        source: DecodeSpecError,
    },
    /// A block device where a file system was to be mounted.
    #[error("the storage for {0:?} is a volume of block devices (volumeMode: Block) and can't be mounted")]
    BlockMounted(String),
    /// A device that the OCI spec does not have, or has twice, or not as a block device.
    #[error("the device {0:?} is not once among the OCI spec's block devices")]
    NoDevice(String),
    /// A container that is to have ZFS's device and can have none.
    #[error("the request has no OCI spec with a part for Linux, which /dev/zfs would go into")]
    NoLinux,
}

/// The envelope of a request.
#[derive(Debug, Clone)]
pub struct Envelope<'a> {
    /// The message within.
    pub payload: &'a [u8],
    /// How long the caller waits; `None` where it does not say.
    pub timeout: Option<Duration>,
}

impl<'a> Envelope<'a> {
    /// Reads the payload of a request frame.
    ///
    /// # Errors
    /// When it is not well-formed.
    pub fn decode(frame: &'a [u8]) -> Result<Self, RequestError> {
        let (mut payload, mut timeout, mut service, mut method) = (None, None, false, false);
        for field in wire::fields(frame) {
            let field = field?;
            match (field.number, &field.value) {
                (1, Value::Bytes(_)) => once(&mut service, "service")?,
                (2, Value::Bytes(_)) => once(&mut method, "method")?,
                (3, _) if payload.is_some() => return Err(RequestError::Twice("payload")),
                (3, Value::Bytes(range)) => payload = frame.get(range.clone()),
                (4, Value::Varint(nanos)) => timeout = Some(*nanos),
                _ => {}
            }
        }
        // An int64: negative ones, like zero, are no timeout.
        let timeout = timeout.filter(|nanos| (1..=i64::MAX as u64).contains(nanos)).map(Duration::from_nanos);
        Ok(Self { payload: payload.unwrap_or_default(), timeout })
    }
}

fn once(seen: &mut bool, name: &'static str) -> Result<(), RequestError> {
    if std::mem::replace(seen, true) { Err(RequestError::Twice(name)) } else { Ok(()) }
}

/// A storage of ours, taken out of a request.
#[derive(Debug, Clone, PartialEq)]
pub struct VolumeStorage {
    /// What the node says about the volume.
    pub spec: VolumeSpec,
    /// Where it goes.
    pub mount_point: String,
    /// Mount options as the shim sent them, without the specification.
    pub options: Vec<String>,
    /// The group that the shim asks for.
    pub fs_group: Option<u32>,
    /// Where its disk is, where the shim says it in a way that is known.
    pub place: Option<Place>,
}

/// What a CreateContainer request says about us.
#[derive(Debug, Clone, PartialEq)]
pub struct CreateContainer {
    /// The container.
    pub container: String,
    /// Our volumes.
    pub volumes: Vec<VolumeStorage>,
    /// Disks that the container is to have as devices: ours may be among them, which only the disks tell.
    pub devices: Vec<Device>,
    /// The payload of the frame to send on, without them; `None` where nothing has to be changed.
    pub rewritten: Option<Vec<u8>>,
}

impl CreateContainer {
    /// Reads the payload of a CreateContainer frame and takes out what is ours.
    ///
    /// # Errors
    /// When it is not well-formed, or has a storage of our type that is not ours.
    pub fn decode(frame: &[u8]) -> Result<Self, RequestError> {
        Envelope::decode(frame)?;
        let mut request = Self { container: String::new(), volumes: Vec::new(), devices: Vec::new(), rewritten: None };
        let mut named = false;
        request.rewritten = wire::rewrite(frame, |field| match (field.number, field.bytes(frame)) {
            (3, Some(message)) => request.take_from(message, &mut named),
            _ => Ok(Edit::Keep),
        })?;
        Ok(request)
    }

    fn take_from(&mut self, message: &[u8], named: &mut bool) -> Result<Edit, RequestError> {
        let volumes = mount_points(message)?;
        let edited = wire::rewrite(message, |field| match (field.number, field.bytes(message)) {
            (1, Some(id)) => {
                once(named, "container_id")?;
                self.container = text(id)?;
                Ok(Edit::Keep)
            }
            (4, Some(device)) => {
                self.add_device(device)?;
                Ok(Edit::Keep)
            }
            (5, Some(storage)) => match volume_storage(storage)? {
                Some(volume) => {
                    self.volumes.push(volume);
                    Ok(Edit::Drop)
                }
                None => Ok(Edit::Keep),
            },
            (6, Some(oci)) => Ok::<_, RequestError>(replaced(with_our_mounts(oci, &volumes)?)),
            _ => Ok(Edit::Keep),
        })?;
        Ok(replaced(edited))
    }

    fn add_device(&mut self, bytes: &[u8]) -> Result<(), RequestError> {
        let Some(device) = devices::disk(bytes)? else { return Ok(()) };
        if self.devices.iter().any(|other| other.container_path == device.container_path) {
            return Err(RequestError::NoDevice(device.container_path));
        }
        self.devices.push(device);
        Ok(())
    }
}

fn replaced(edited: Option<Vec<u8>>) -> Edit {
    edited.map_or(Edit::Keep, Edit::Replace)
}

fn text(bytes: &[u8]) -> Result<String, RequestError> {
    String::from_utf8(bytes.to_vec()).map_err(|_| RequestError::Wire(WireError::Malformed))
}

/// An OCI spec whose mounts don't carry our option: runtime-rs copies it there, and mount(2) would be given it. The mounts
/// of our volumes are no private ones but slaves, so that a container sees the snapshots that are mounted in them.
fn with_our_mounts(oci: &[u8], volumes: &BTreeSet<String>) -> Result<Option<Vec<u8>>, WireError> {
    wire::rewrite(oci, |field| match (field.number, field.bytes(oci)) {
        (5, Some(mount)) => {
            let ours = is_of(mount, volumes)?;
            let edited = wire::rewrite(mount, |field| match (field.number, field.bytes(mount)) {
                (4, Some(option)) if option.starts_with(OPTION_PREFIX.as_bytes()) => Ok(Edit::Drop),
                (4, Some(b"private")) if ours => Ok(Edit::Replace(b"slave".to_vec())),
                (4, Some(b"rprivate")) if ours => Ok(Edit::Replace(b"rslave".to_vec())),
                _ => Ok::<_, WireError>(Edit::Keep),
            })?;
            Ok(replaced(edited))
        }
        _ => Ok(Edit::Keep),
    })
}

/// Whether a mount of an OCI spec is that of a volume.
fn is_of(mount: &[u8], volumes: &BTreeSet<String>) -> Result<bool, WireError> {
    let fields: Vec<_> = wire::fields(mount).collect::<Result<_, _>>()?;
    // The agent takes the last one, as parsers of protobuf do.
    let source = fields.iter().rfind(|field| field.number == 2).and_then(|field| field.bytes(mount));
    Ok(source.and_then(|source| str::from_utf8(source).ok()).is_some_and(|source| volumes.contains(source)))
}

/// Where the volumes of a request are to be mounted, wherever in it they stand.
fn mount_points(message: &[u8]) -> Result<BTreeSet<String>, RequestError> {
    let mut points = BTreeSet::new();
    for field in wire::fields(message) {
        let field = field?;
        if let (5, Some(storage)) = (field.number, field.bytes(message)) {
            let storage = Storage::decode(storage)?;
            points.extend((storage.fstype == FSTYPE).then_some(storage.mount_point));
        }
    }
    Ok(points)
}

fn volume_storage(bytes: &[u8]) -> Result<Option<VolumeStorage>, RequestError> {
    let storage = Storage::decode(bytes)?;
    if storage.fstype != FSTYPE {
        return Ok(None);
    }
    let mount_point = storage.mount_point;
    let (specs, options): (Vec<_>, Vec<_>) =
        storage.options.into_iter().partition(|option| option.starts_with(OPTION_PREFIX));
    let value = match specs.as_slice() {
        [] => return Err(RequestError::NoSpec(mount_point)),
        [spec] => spec.strip_prefix(OPTION_PREFIX).unwrap_or_default(),
        _ => return Err(RequestError::ManySpecs(mount_point)),
    };
    match VolumeSpec::decode(value) {
        Ok(spec) if !spec.mode.is_filesystem() => Err(RequestError::BlockMounted(mount_point)),
        Ok(spec) => Ok(Some(VolumeStorage {
            spec,
            mount_point,
            options,
            place: Place::of_storage(&storage.driver, &storage.source),
            fs_group: storage.fs_group.map(|group| group.group_id),
        })),
        Err(source) => Err(RequestError::Spec { mount_point, source }),
    }
}

#[cfg(test)]
mod tests;
