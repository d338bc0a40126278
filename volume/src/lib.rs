//! What host and guest agree on about a volume. Pure: no gRPC, no Kubernetes, no processes, no I/O.
//!
//! * [`VolumeId`], [`PoolName`], [`Bytes`]: typed ids and sizes.
//! * [`VolumeParameters`]: what a StorageClass may say, parsed at the edge.
//! * [`VolumeAttributes`]: what a VolumeAttributesClass may change later.
//! * [`SnapshotSchedule`]: which snapshots the guest takes by itself.
//! * [`Rollback`]: which one its next guest goes back to.
//! * [`DiskLayout`] and [`gpt`]: what the virtual disk looks like.
//! * [`Half`] and [`Mirror`]: a virtual disk of two halves.
//! * [`VolumeSpec`]: what the node tells the guest about one volume, in the `zpod=` mount option, or in a [`note`] on the
//!   disk of a block device.

mod attributes;
mod bytes;
mod excerpt;
mod id;
mod layout;
mod mirror;
mod parameters;
mod property;
mod rollback;
mod schedule;
mod spec;
mod token;

pub mod gpt;
pub mod note;

pub use attributes::VolumeAttributes;
pub use bytes::{Bytes, ParseBytesError};
pub use excerpt::Excerpt;
pub use id::{GroupId, Mark, ParseNameError, PoolName, SnapshotId, VolumeId};
pub use layout::{DiskLayout, Headroom, ParseHeadroomError, SECTOR};
pub use mirror::{Half, Mirror};
pub use parameters::{
    Backing, Encryption, ParameterError, Provisioning, QuotaMode, ScrubInterval, Vdevs, VolumeParameters, ZfsAccess,
};
pub use property::{Property, PropertyKind};
pub use rollback::Rollback;
pub use schedule::{ParseScheduleError, SnapshotKind, SnapshotSchedule};
pub use spec::{Create, DecodeSpecError, MountFlag, OPTION_PREFIX, Origin, Version, VolumeMode, VolumeSpec};
pub use token::{ParseTokenError, TokenDigest};
