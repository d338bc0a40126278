use std::path::PathBuf;
use std::time::Duration;

use zpod_storage::backing::BackingError;
use zpod_storage::catalog::CatalogError;
use zpod_volume::{Bytes, Excerpt, GroupId, Half, ParameterError, SnapshotId, VolumeId};

use super::copies::Progress;
use crate::guest::GuestError;
use crate::kata::KataError;

/// Why something could not be done with a volume. Each says which volume, where, why, and what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum VolumeError {
    /// A request that can't be understood, whatever state things are in.
    #[error("{field}: {reason}")]
    Invalid {
        /// The field of the request.
        field: &'static str,
        /// What is wrong, and what is allowed.
        reason: String,
    },
    /// A StorageClass parameter that is refused.
    #[error(transparent)]
    Parameter(#[from] ParameterError),
    /// A size that can't be had.
    #[error("capacity_range: {reason}")]
    OutOfRange {
        /// What is wrong, and what is allowed.
        reason: String,
    },
    /// A place in a list that can't be understood.
    #[error(
        "starting_token {} did not come from an earlier page of this list; begin again with an empty one",
        Excerpt(_0)
    )]
    Token(String),
    /// No such volume.
    #[error("volume {} does not exist on node {node}", Excerpt(id))]
    NotFound {
        /// The id as it was given.
        id: String,
        /// Where it was looked for.
        node: String,
    },
    /// The volume is not at that path.
    #[error(
        "volume {id} is not published at {path} on node {node}: its pod has ended, or NodePublishVolume comes first"
    )]
    NotPublished {
        /// The volume.
        id: VolumeId,
        /// The path as it was given.
        path: PathBuf,
        /// The node.
        node: String,
    },
    /// There is another volume of that name.
    #[error(
        "a volume named {name:?} exists already ({id}) and differs: {difference}; use another name, or delete it first"
    )]
    Exists {
        /// The name.
        name: String,
        /// Its id.
        id: VolumeId,
        /// What differs.
        difference: String,
    },
    /// Nobody here can make it where it is wanted.
    #[error(
        "accessibility_requirements: none of the topologies asked for is node {node} ({key}={node}), the only one here"
    )]
    Topology {
        /// The topology key.
        key: &'static str,
        /// The node there is.
        node: String,
    },
    /// The volume is on another node.
    #[error("volume {id} is kept on node {home}, not on {node}; its pod must run there")]
    OtherNode {
        /// The volume.
        id: VolumeId,
        /// Where it is kept.
        home: String,
        /// Where it was asked for.
        node: String,
    },
    /// Somebody else is at work on it.
    #[error("volume {id} is {state}; {remedy}")]
    NotReady {
        /// The volume.
        id: VolumeId,
        /// What state it is in.
        state: &'static str,
        /// What to do.
        remedy: &'static str,
    },
    /// It is published, and there can be one publication only.
    #[error(
        "volume {id} is published to {holder} at {target} on node {node}; a pool lives in one kernel, so one pod at a time \
         can have it (ReadWriteOnce means one pod here): delete that pod first, or use a volume of its own for this one"
    )]
    Published {
        /// The volume.
        id: VolumeId,
        /// The pod.
        holder: String,
        /// Where.
        target: PathBuf,
        /// The node.
        node: String,
    },
    /// It is published at this path, in another way.
    #[error("volume {id} is published at {target} already, with other arguments ({difference}); unpublish it first")]
    PublishedOtherwise {
        /// The volume.
        id: VolumeId,
        /// Where.
        target: PathBuf,
        /// What differs.
        difference: &'static str,
    },
    /// The call failed, and the publication stands, or it is not known that it does not.
    #[error(
        "volume {id} is, or may be, published on node {node} though this call failed: it is repeated, or unpublished, when \
         what was in its way is gone: {source}"
    )]
    StillPublished {
        /// The volume.
        id: VolumeId,
        /// The node.
        node: String,
        /// What was in its way.
        source: Box<VolumeError>,
    },
    /// Another volume is at this path.
    #[error("target_path {target} has volume {by} published already; one path can have one volume")]
    TargetTaken {
        /// Where.
        target: PathBuf,
        /// The other volume.
        by: VolumeId,
    },
    /// The disk that the running guest sees is too small.
    #[error(
        "volume {id} is {capacity} now, but the disk its running guest sees on node {node} ends at {largest}: Kata can't \
         resize an attached disk, so the volume grows when its pod starts next; restart the pod, and give the StorageClass \
         more headroom to grow without"
    )]
    BeyondHeadroom {
        /// The volume.
        id: VolumeId,
        /// What it is to hold.
        capacity: Bytes,
        /// What the disk can hold.
        largest: Bytes,
        /// The node.
        node: String,
    },
    /// A virtual machine has the volume, and nobody answers from it.
    #[error(
        "volume {id} is in use by a virtual machine on node {node} whose guest does not answer on the control channel yet; \
         try again, and look at the pod if this goes on"
    )]
    GuestSilent {
        /// The volume.
        id: VolumeId,
        /// The node.
        node: String,
    },
    /// No node has what is asked for.
    #[error("no node can have volume {name:?}: {reason}")]
    NoNode {
        /// The volume's name.
        name: String,
        /// Which nodes were looked at, and what each lacks.
        reason: String,
    },
    /// The node has not carried out what its volume's object asks for.
    #[error(
        "{kind} {id} is not {what} after {waited:?}: node {node} has not answered; see whether zpod-node runs there \
         (kubectl get pods -A --field-selector spec.nodeName={node}) and what `kubectl describe zfs{kind} {id}` says; it \
         goes on by itself when the node is back"
    )]
    NodeSilent {
        /// `volume` or `snapshot`.
        kind: &'static str,
        /// Its id.
        id: String,
        /// Its node.
        node: String,
        /// What was to be done.
        what: &'static str,
        /// How long that was waited for.
        waited: Duration,
    },
    /// The node says why it can't do what was asked for.
    #[error("{reason}")]
    NodeRefused {
        /// The node's words, which name the volume and the node.
        reason: String,
        /// Whether room is what it lacks.
        no_room: bool,
    },
    /// It is not done yet; the node says how far it is or what is in its way, and goes on.
    #[error("{reason}")]
    NodeAtWork {
        /// The node's words, which name the volume and the node.
        reason: String,
    },
    /// The pod can't use it as its specification is.
    #[error("volume {id}: pod {pod} can't use it: {reason}")]
    PodRefused {
        /// The volume.
        id: VolumeId,
        /// The pod.
        pod: String,
        /// What is wrong, and what to write instead.
        reason: String,
    },
    /// Whether the pod can use it is not known now.
    #[error("volume {id}: pod {pod} can't be looked up: {reason}")]
    PodUnknown {
        /// The volume.
        id: VolumeId,
        /// The pod.
        pod: String,
        /// Why, and what to do.
        reason: String,
    },
    /// A tenant has had its part of the node.
    #[error("{reason}")]
    BoundReached {
        /// Who has what, where, what is allowed, and what to do.
        reason: String,
    },
    /// No such snapshot.
    #[error("snapshot {} does not exist on node {node}", Excerpt(id))]
    SnapshotNotFound {
        /// The id as it was given.
        id: String,
        /// Where it was looked for.
        node: String,
    },
    /// There is another snapshot of that name.
    #[error(
        "a snapshot named {name:?} exists already ({id}) and differs: {difference}; use another name, or delete it first"
    )]
    SnapshotExists {
        /// The name.
        name: String,
        /// Its id.
        id: SnapshotId,
        /// What differs.
        difference: String,
    },
    /// The snapshot can't be used as it is.
    #[error("snapshot {id} is {state}; {remedy}")]
    SnapshotNotReady {
        /// The snapshot.
        id: SnapshotId,
        /// What state it is in.
        state: &'static str,
        /// What to do.
        remedy: &'static str,
    },
    /// It goes with its group.
    #[error("snapshot_id: snapshot {id} was taken with group snapshot {group}, and is deleted with that")]
    InGroup {
        /// The snapshot.
        id: SnapshotId,
        /// Its group.
        group: GroupId,
    },
    /// No such group.
    #[error("group snapshot {} does not exist", Excerpt(id))]
    GroupNotFound {
        /// The id as it was given.
        id: String,
    },
    /// There is another group of that name.
    #[error(
        "a group snapshot named {name:?} exists already ({id}) and differs: {difference}; use another name, or delete it \
         first"
    )]
    GroupExists {
        /// The name.
        name: String,
        /// Its id.
        id: GroupId,
        /// What differs.
        difference: String,
    },
    /// One member of a group could not be had; so there is none.
    #[error(
        "group snapshot {name:?}: none of its snapshots is kept, since one of volume {volume} can't be had: {source}"
    )]
    GroupMember {
        /// The group's name.
        name: String,
        /// The volume whose snapshot failed.
        volume: VolumeId,
        /// Why.
        source: Box<VolumeError>,
    },
    /// What a volume is to be made from is on another node.
    #[error(
        "volume {name:?} can't be made from {source_name}: that is kept on node {home}, and blocks are shared on one node only; \
         let the pod run there, or move the data with `kubectl zpod send` and `receive`"
    )]
    SourceElsewhere {
        /// The name of the volume that is wanted.
        name: String,
        /// What it was to be made from.
        source_name: String,
        /// Where that is.
        home: String,
    },
    /// A full copy would take its time, and somebody is writing.
    #[error(
        "volume {id} is published to {holder} on node {node}, and the file system there can't share blocks: a full copy \
         would mix what was written earlier with what was written later; end that pod first, or put the backing directory \
         on XFS or btrfs"
    )]
    NoCopyWhileRunning {
        /// The volume.
        id: VolumeId,
        /// The pod.
        holder: String,
        /// The node.
        node: String,
    },
    /// Its guest is at making the contents of another volume its own.
    #[error(
        "volume {id} was just restored, and its guest on node {node} has not reported it yet; try again in a moment, and \
         look at the pod if this goes on"
    )]
    JustRestored {
        /// The volume.
        id: VolumeId,
        /// The node.
        node: String,
    },
    /// The instant was marked, but by a guest that is gone, or somebody has destroyed the mark.
    #[error(
        "snapshot {id} of volume {volume}: the instant was marked, but the mark was gone before the copy was whole: the pod or \
         zpod-node has restarted since on node {node}, or somebody in the pod has destroyed the volume's ZFS snapshots; \
         nothing was kept; take it again"
    )]
    MarkLost {
        /// The snapshot.
        id: SnapshotId,
        /// The volume.
        volume: VolumeId,
        /// The node.
        node: String,
    },
    /// It is being made by a full copy.
    #[error(
        "{what}: a full copy of {from} is being made on node {node}, {progress} is done; asked again, it tells more"
    )]
    Copying {
        /// What is made.
        what: String,
        /// From what.
        from: String,
        /// The node.
        node: String,
        /// How far it is.
        progress: Progress,
    },
    /// A full copy is being made of it.
    #[error(
        "{what} is being copied in full into {target} on node {node}, and has to stay as it is until then: {progress} is \
         done; try again when it is"
    )]
    BeingCopied {
        /// What is read.
        what: String,
        /// What is made.
        target: String,
        /// The node.
        node: String,
        /// How far it is.
        progress: Progress,
    },
    /// There can be no mirrors here.
    #[error("node {node} can have no volumes with two devices (parameter vdevs: mirror-2): {reason}")]
    NoMirrors {
        /// The node.
        node: String,
        /// Why, and what to do.
        reason: String,
    },
    /// The half of a mirror that has everything is lost.
    #[error(
        "volume {id}: the {half} of its mirror is lost on node {node}, and the other one lacks some of what was written: \
         nothing was published, since the volume would go back in time; bring the lost disk back"
    )]
    HalfLost {
        /// The volume.
        id: VolumeId,
        /// The half that has everything.
        half: Half,
        /// The node.
        node: String,
    },
    /// Its StorageClass asks for ZFS itself in the containers, and that is not allowed here.
    #[error(
        "{what}: parameter zfsAccess: \"volume\" is forbidden here; allowed is: none; who operates the cluster allows it with \
         the chart's value zfsAccess.allowed (--allow-zfs-access of zpod-controller, zpod-node and zpod)"
    )]
    AccessForbidden {
        /// The volume, and the node where that is known.
        what: String,
    },
    /// The guest did not do what it was asked.
    #[error("volume {id}: {source}")]
    Guest {
        /// The volume.
        id: VolumeId,
        /// What happened.
        source: GuestError,
    },
    /// A guest has been told to go back to a snapshot, and has not said what came of it.
    #[error(
        "volume {id} goes back to snapshot {snapshot} with the start of {holder}, which was told so already: wait until its \
         guest says what came of it, or scale its owner to 0, then take it back (kubectl zpod rollback --cancel)"
    )]
    RollbackGiven {
        /// The volume.
        id: VolumeId,
        /// The snapshot.
        snapshot: String,
        /// The pod.
        holder: String,
    },
    /// Another pod has the volume than when a rollback was said yes to.
    #[error(
        "volume {id} is not to go back: the pod that has it changed meanwhile, and what the new one wrote would be lost too; look          again and ask again"
    )]
    RollbackPodChanged {
        /// The volume.
        id: VolumeId,
    },
    /// No rollback is asked for.
    #[error("volume {id} is not to go back to any snapshot: there is nothing to take back")]
    NoRollback {
        /// The volume.
        id: VolumeId,
    },
    /// The device provider refused or failed.
    #[error("node {node}: {source}")]
    Backing {
        /// The node.
        node: String,
        /// What happened.
        source: BackingError,
    },
    /// The catalog refused or failed.
    #[error(transparent)]
    Catalog(#[from] CatalogError),
    /// The target path or the direct volume failed.
    #[error(transparent)]
    Kata(#[from] KataError),
    /// The task that did the work ended early: a defect of zpod, or its end.
    #[error("the work was cut short ({0}); it is safe to try again")]
    CutShort(String),
}

impl VolumeError {
    /// Whether there is no room for what was asked for: nothing was made.
    pub fn is_no_room(&self) -> bool {
        match self {
            Self::Backing { source, .. } => source.is_no_room(),
            error => matches!(error, Self::NodeRefused { no_room: true, .. } | Self::BoundReached { .. }),
        }
    }

    /// Whether asking again, as things are, can't help: nothing was made, and nothing is being made.
    pub fn is_refusal(&self) -> bool {
        match self {
            Self::Invalid { .. }
            | Self::Parameter(_)
            | Self::OutOfRange { .. }
            | Self::NotFound { .. }
            | Self::SnapshotNotFound { .. }
            | Self::SourceElsewhere { .. }
            | Self::NoCopyWhileRunning { .. }
            | Self::MarkLost { .. }
            | Self::NoMirrors { .. }
            | Self::AccessForbidden { .. }
            | Self::Backing { source: BackingError::CannotShare { .. } | BackingError::TooLarge { .. }, .. } => true,
            Self::GroupMember { source, .. } => source.is_refusal(),
            error => error.is_no_room(),
        }
    }

    /// Whether it is being made, so that asking again is all there is to do.
    pub fn is_under_way(&self) -> bool {
        matches!(self, Self::Copying { .. })
    }

    /// An [`VolumeError::Invalid`].
    pub fn invalid(field: &'static str, reason: impl Into<String>) -> Self {
        Self::Invalid { field, reason: reason.into() }
    }
}
