use tonic::{Code, Status};
use zpod_storage::backing::BackingError;
use zpod_storage::catalog::CatalogError;

use crate::guest::GuestError;
use crate::kata::{KataError, MapperError};
use crate::volumes::VolumeError;

/// The one place where an error becomes a gRPC status.
///
/// Who calls reads from the code whether the call may still be under way, or have left something: then it calls again, or
/// takes it back. A code that is **final** says that nothing was done and nothing is. kubelet then doesn't unpublish (1.37,
/// `isFinalError` in pkg/volume/csi/csi_client.go), csi-provisioner doesn't delete (6.3, `checkError`), csi-snapshotter
/// doesn't delete (8.6, `isCSIFinalError`), csi-resizer tries another size (2.2, `IsFinalError`). Not final are for all of
/// them CANCELLED, DEADLINE_EXCEEDED, UNAVAILABLE and ABORTED, and RESOURCE_EXHAUSTED for all but csi-provisioner, which
/// then looks for another node. So an error whose call may have left something has one of those. docs/errors.md has them
/// all, and a test sees to it.
pub fn to_status(error: &VolumeError) -> Status {
    let mut message = error.to_string();
    if let Some((end, _)) = message.char_indices().nth(LONGEST_MESSAGE) {
        message.truncate(end);
        message.push_str("...");
    }
    Status::new(code(error), message)
}

/// In characters. What errors quote is cut already: this is for what nobody has thought of. A message goes in a header of
/// HTTP/2, and each caller has a bound for those.
const LONGEST_MESSAGE: usize = 4096;

fn code(error: &VolumeError) -> Code {
    match error {
        VolumeError::Invalid { .. } | VolumeError::Parameter(_) => Code::InvalidArgument,
        VolumeError::OutOfRange { .. } => Code::OutOfRange,
        // CSI 1.12, ListVolumes: an invalid starting_token is ABORTED.
        VolumeError::Token(_) => Code::Aborted,
        VolumeError::NotFound { .. }
        | VolumeError::NotPublished { .. }
        | VolumeError::SnapshotNotFound { .. }
        | VolumeError::GroupNotFound { .. } => Code::NotFound,
        VolumeError::Exists { .. }
        | VolumeError::PublishedOtherwise { .. }
        | VolumeError::SnapshotExists { .. }
        | VolumeError::GroupExists { .. } => Code::AlreadyExists,
        // As the CSI driver of the specification's authors (csi-driver-host-path) has it.
        VolumeError::InGroup { .. } => Code::InvalidArgument,
        VolumeError::GroupMember { source, .. } => code(source),
        // CSI 1.12, CreateVolume: "unable to provision in accessible_topology".
        VolumeError::Topology { .. } | VolumeError::NoNode { .. } | VolumeError::SourceElsewhere { .. } => {
            Code::ResourceExhausted
        }
        // Of these, external-provisioner knows that the work goes on, and asks again for the same.
        VolumeError::NodeSilent { .. } => Code::DeadlineExceeded,
        // Kubelet and the sidecars try again later: others may have ended by then.
        VolumeError::BoundReached { .. } | VolumeError::NodeRefused { no_room: true, .. } => Code::ResourceExhausted,
        VolumeError::NodeRefused { no_room: false, .. } => Code::FailedPrecondition,
        // CSI 1.12: "operation pending for volume".
        VolumeError::NotReady { .. }
        | VolumeError::SnapshotNotReady { .. }
        | VolumeError::MarkLost { .. }
        | VolumeError::NodeAtWork { .. }
        | VolumeError::Copying { .. }
        | VolumeError::BeingCopied { .. } => Code::Aborted,
        VolumeError::OtherNode { .. }
        | VolumeError::Published { .. }
        | VolumeError::TargetTaken { .. }
        | VolumeError::BeyondHeadroom { .. }
        | VolumeError::NoCopyWhileRunning { .. }
        | VolumeError::NoMirrors { .. }
        | VolumeError::HalfLost { .. }
        | VolumeError::AccessForbidden { .. }
        | VolumeError::RollbackGiven { .. }
        | VolumeError::RollbackPodChanged { .. }
        | VolumeError::NoRollback { .. }
        | VolumeError::PodRefused { .. } => Code::FailedPrecondition,
        // Whatever it was: not final for kubelet, which then calls again or unpublishes.
        VolumeError::StillPublished { .. } => Code::Unavailable,
        VolumeError::GuestSilent { .. } | VolumeError::JustRestored { .. } | VolumeError::PodUnknown { .. } => {
            Code::Unavailable
        }
        VolumeError::Guest { source, .. } => guest(source),
        VolumeError::Backing { source, .. } => backing(source),
        VolumeError::Catalog(source) => catalog(source),
        VolumeError::Kata(source) => kata(source),
        VolumeError::CutShort(_) => Code::Unavailable,
    }
}

fn guest(error: &GuestError) -> Code {
    match error {
        GuestError::Unreachable { .. } | GuestError::Timeout { .. } => Code::Unavailable,
        GuestError::DiskTooSmall { .. } => Code::FailedPrecondition,
        // Such as a reservation for which the pool has no room, and a key that is not the volume's: until the spec or the
        // Secret is mended asking again is of no use.
        GuestError::Refused { call: "SetProperties" | "ProvideKey", .. } => Code::FailedPrecondition,
        GuestError::Refused { .. } => Code::Internal,
    }
}

fn backing(error: &BackingError) -> Code {
    match error {
        BackingError::NoRoom { .. } | BackingError::Restricted { .. } => Code::ResourceExhausted,
        BackingError::TooLarge { .. } => Code::OutOfRange,
        BackingError::InUse { .. } => Code::FailedPrecondition,
        // The directory may be mounted in a moment. Nothing is ever made in the device's place.
        BackingError::CannotShare { .. } => Code::FailedPrecondition,
        BackingError::Stopped => Code::Aborted,
        BackingError::HalfMade { source, .. } => backing(source),
        BackingError::Missing { .. } | BackingError::SnapshotMissing { .. } | BackingError::Gone { .. } => {
            Code::Unavailable
        }
        BackingError::Mismatch { .. } => Code::Internal,
        BackingError::Io { source, .. } => operating_system(source),
    }
}

fn catalog(error: &CatalogError) -> Code {
    match error {
        CatalogError::Conflict(_) => Code::Aborted,
        CatalogError::NotFound(_) => Code::NotFound,
        CatalogError::Damaged { .. } | CatalogError::Unreadable { .. } => Code::DataLoss,
        CatalogError::Locked(_) | CatalogError::Unavailable { .. } => Code::Unavailable,
        // CSI 1.12, ListVolumes: an invalid starting_token is ABORTED.
        CatalogError::Expired { .. } => Code::Aborted,
        CatalogError::Forbidden { .. } => Code::Internal,
        CatalogError::Io { source, .. } => operating_system(source),
    }
}

/// What the node lacks it may have later: room, a file system that can be written to, memory, places for open files. Asked
/// for again it can then be had, or by csi-provisioner on another node.
fn operating_system(error: &std::io::Error) -> Code {
    use std::io::ErrorKind::{OutOfMemory, QuotaExceeded, ReadOnlyFilesystem, StorageFull};
    let no_place = matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE));
    let lacks = matches!(error.kind(), StorageFull | QuotaExceeded | ReadOnlyFilesystem | OutOfMemory);
    if lacks || no_place { Code::ResourceExhausted } else { Code::Internal }
}

fn kata(error: &KataError) -> Code {
    match error {
        KataError::Target { .. } => Code::InvalidArgument,
        KataError::Mapper(MapperError::InUse(_)) => Code::FailedPrecondition,
        KataError::Mapper(MapperError::Io { source, .. }) | KataError::Io { source, .. } => operating_system(source),
        KataError::Occupied { .. } | KataError::Mapper(_) => Code::Internal,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io;
    use std::time::Duration;
    use zpod_storage::catalog::Volume;
    use zpod_volume::{Bytes, GroupId, SnapshotId, VolumeId, VolumeParameters};

    fn every_error() -> Vec<(VolumeError, Code)> {
        let id = VolumeId::from_name("pvc-1");
        let io = || io::Error::other("disk on fire");
        let lacks = io::Error::from_raw_os_error;
        let s = str::to_owned;
        let backing = |source| VolumeError::Backing { node: s("n1"), source };
        let guest = |source| VolumeError::Guest { id, source };
        let no_room = BackingError::NoRoom { location: s("/srv"), wanted: Bytes::gib(2), available: Bytes::gib(1) };
        let parameter = VolumeParameters::parse([("no", "x")]).unwrap_err();
        let (snapshot, group, progress) = (SnapshotId::from_name("x"), GroupId::from_name("x"), Default::default());
        let silent = VolumeError::GuestSilent { id, node: s("n1") };
        let timeout = GuestError::Timeout { sandbox: s("s"), call: "Grow", deadline: Duration::from_secs(1) };
        vec![
            (VolumeError::invalid("name", "empty"), Code::InvalidArgument),
            (VolumeError::Parameter(parameter), Code::InvalidArgument),
            (VolumeError::OutOfRange { reason: s("small") }, Code::OutOfRange),
            (VolumeError::BoundReached { reason: s("8 of 8") }, Code::ResourceExhausted),
            (VolumeError::Token(s("x")), Code::Aborted),
            (VolumeError::NotFound { id: s("x"), node: s("n1") }, Code::NotFound),
            (VolumeError::NotPublished { id, path: "/x".into(), node: s("n1") }, Code::NotFound),
            (VolumeError::Exists { name: s("x"), id, difference: s("size") }, Code::AlreadyExists),
            (VolumeError::Topology { key: "k", node: s("n1") }, Code::ResourceExhausted),
            (VolumeError::OtherNode { id, home: s("n2"), node: s("n1") }, Code::FailedPrecondition),
            (VolumeError::NotReady { id, state: "", remedy: "" }, Code::Aborted),
            (
                VolumeError::Published { id, holder: s("pod a/b"), target: "/x".into(), node: s("n1") },
                Code::FailedPrecondition,
            ),
            (VolumeError::PublishedOtherwise { id, target: "/x".into(), difference: "readonly" }, Code::AlreadyExists),
            (
                VolumeError::StillPublished { id, node: s("n1"), source: Box::new(backing(BackingError::Stopped)) },
                Code::Unavailable,
            ),
            (VolumeError::TargetTaken { target: "/x".into(), by: id }, Code::FailedPrecondition),
            (
                VolumeError::BeyondHeadroom { id, capacity: Bytes(1), largest: Bytes(1), node: s("n1") },
                Code::FailedPrecondition,
            ),
            (VolumeError::NoNode { name: s("x"), reason: s("r") }, Code::ResourceExhausted),
            (
                VolumeError::NodeSilent {
                    kind: "volume",
                    id: id.to_string(),
                    node: s("n1"),
                    what: "made",
                    waited: Duration::from_secs(1),
                },
                Code::DeadlineExceeded,
            ),
            (VolumeError::RollbackGiven { id, snapshot: s("x"), holder: s("pod a/b") }, Code::FailedPrecondition),
            (VolumeError::RollbackPodChanged { id }, Code::FailedPrecondition),
            (VolumeError::NoRollback { id }, Code::FailedPrecondition),
            (VolumeError::NodeRefused { reason: s("r"), no_room: true }, Code::ResourceExhausted),
            (VolumeError::NodeRefused { reason: s("r"), no_room: false }, Code::FailedPrecondition),
            (VolumeError::NodeAtWork { reason: s("r") }, Code::Aborted),
            (VolumeError::GuestSilent { id, node: s("n1") }, Code::Unavailable),
            (VolumeError::PodRefused { id, pod: s("a/b"), reason: s("x") }, Code::FailedPrecondition),
            (VolumeError::PodUnknown { id, pod: s("a/b"), reason: s("x") }, Code::Unavailable),
            (guest(GuestError::Unreachable { sandbox: s("s"), reason: s("r") }), Code::Unavailable),
            (guest(timeout), Code::Unavailable),
            (guest(GuestError::DiskTooSmall { sandbox: s("s"), message: s("m") }), Code::FailedPrecondition),
            (guest(GuestError::Refused { sandbox: s("s"), call: "Grow", message: s("m") }), Code::Internal),
            (
                guest(GuestError::Refused { sandbox: s("s"), call: "ProvideKey", message: s("m") }),
                Code::FailedPrecondition,
            ),
            (backing(no_room), Code::ResourceExhausted),
            (backing(BackingError::InUse { id, device: "/d".into(), detail: s("x") }), Code::FailedPrecondition),
            (backing(BackingError::Missing { id, device: "/d".into() }), Code::Unavailable),
            (backing(BackingError::CannotShare { location: s("/d") }), Code::FailedPrecondition),
            (backing(BackingError::Stopped), Code::Aborted),
            (backing(BackingError::Restricted { location: s("/d"), reason: s("full") }), Code::ResourceExhausted),
            (
                backing(BackingError::TooLarge { location: s("/d"), wanted: Bytes(2), largest: Bytes(1) }),
                Code::OutOfRange,
            ),
            (backing(BackingError::Gone { path: "/d".into(), reason: s("x") }), Code::Unavailable),
            (
                backing(BackingError::HalfMade {
                    id,
                    half: zpod_volume::Half::Second,
                    source: Box::new(BackingError::Stopped),
                }),
                Code::Aborted,
            ),
            (
                backing(BackingError::SnapshotMissing { id: SnapshotId::from_name("x"), file: "/d".into() }),
                Code::Unavailable,
            ),
            (
                backing(BackingError::Mismatch { id, device: "/d".into(), found: Bytes(1), wanted: Bytes(2) }),
                Code::Internal,
            ),
            (backing(BackingError::Io { what: "open", path: "/d".into(), source: io() }), Code::Internal),
            (CatalogError::conflict::<Volume>(id).into(), Code::Aborted),
            (CatalogError::not_found::<Volume>(id).into(), Code::NotFound),
            (CatalogError::Damaged { path: "/r".into(), reason: s("x") }.into(), Code::DataLoss),
            (CatalogError::Io { what: "open", path: "/r".into(), source: io() }.into(), Code::Internal),
            (
                CatalogError::Io { what: "write", path: "/r".into(), source: io::ErrorKind::StorageFull.into() }.into(),
                Code::ResourceExhausted,
            ),
            (
                CatalogError::Io { what: "write", path: "/r".into(), source: io::ErrorKind::ReadOnlyFilesystem.into() }
                    .into(),
                Code::ResourceExhausted,
            ),
            (CatalogError::Locked("/r".into()).into(), Code::Unavailable),
            (CatalogError::Unreadable { what: s("x"), reason: s("x") }.into(), Code::DataLoss),
            (CatalogError::Unavailable { what: "get", reason: s("x") }.into(), Code::Unavailable),
            (CatalogError::Expired { reason: s("x") }.into(), Code::Aborted),
            (CatalogError::Forbidden { what: "get", reason: s("x") }.into(), Code::Internal),
            (KataError::Target { path: "x".into(), reason: s("x") }.into(), Code::InvalidArgument),
            (KataError::Occupied { path: "/x".into(), reason: "x" }.into(), Code::Internal),
            (KataError::Io { what: "mount", path: "/x".into(), source: io() }.into(), Code::Internal),
            (KataError::Mapper(MapperError::InUse("/x".into())).into(), Code::FailedPrecondition),
            (KataError::Mapper(MapperError::NoTool).into(), Code::Internal),
            (
                KataError::Io { what: "mount", path: "/x".into(), source: lacks(libc::ENOSPC) }.into(),
                Code::ResourceExhausted,
            ),
            (
                KataError::Mapper(MapperError::Io { what: "open", path: "/x".into(), source: lacks(libc::EMFILE) })
                    .into(),
                Code::ResourceExhausted,
            ),
            (
                backing(BackingError::Io { what: "open", path: "/d".into(), source: lacks(libc::EROFS) }),
                Code::ResourceExhausted,
            ),
            (
                CatalogError::Io { what: "open", path: "/r".into(), source: lacks(libc::EDQUOT) }.into(),
                Code::ResourceExhausted,
            ),
            (VolumeError::NoMirrors { node: s("n"), reason: s("x") }, Code::FailedPrecondition),
            (VolumeError::HalfLost { id, half: zpod_volume::Half::First, node: s("n") }, Code::FailedPrecondition),
            (VolumeError::AccessForbidden { what: s("x") }, Code::FailedPrecondition),
            (VolumeError::CutShort(s("x")), Code::Unavailable),
            (VolumeError::SnapshotNotFound { id: s("x"), node: s("n1") }, Code::NotFound),
            (VolumeError::SnapshotExists { name: s("x"), id: snapshot, difference: s("d") }, Code::AlreadyExists),
            (VolumeError::SnapshotNotReady { id: snapshot, state: "", remedy: "" }, Code::Aborted),
            (VolumeError::InGroup { id: snapshot, group }, Code::InvalidArgument),
            (VolumeError::GroupNotFound { id: s("x") }, Code::NotFound),
            (VolumeError::GroupExists { name: s("x"), id: group, difference: s("d") }, Code::AlreadyExists),
            (VolumeError::GroupMember { name: s("x"), volume: id, source: Box::new(silent) }, Code::Unavailable),
            (
                VolumeError::SourceElsewhere { name: s("x"), source_name: s("y"), home: s("n2") },
                Code::ResourceExhausted,
            ),
            (VolumeError::NoCopyWhileRunning { id, holder: s("a"), node: s("n1") }, Code::FailedPrecondition),
            (VolumeError::JustRestored { id, node: s("n1") }, Code::Unavailable),
            (VolumeError::MarkLost { id: snapshot, volume: id, node: s("n1") }, Code::Aborted),
            (VolumeError::Copying { what: s("x"), from: s("y"), node: s("n1"), progress }, Code::Aborted),
            (VolumeError::BeingCopied { what: s("x"), target: s("y"), node: s("n1"), progress }, Code::Aborted),
        ]
    }

    /// The names of an enum's variants, and that of a value's: one that is not listed does not compile.
    macro_rules! variants {
        ($names:ident, $name_of:ident, $error:ident: $($variant:ident)*) => {
            const $names: &[&str] = &[$(stringify!($variant)),*];
            fn $name_of(error: &$error) -> &'static str {
                match error {
                    $($error::$variant { .. } => stringify!($variant),)*
                }
            }
        };
    }

    variants!(VOLUME, volume_error, VolumeError: Invalid Parameter OutOfRange Token NotFound NotPublished Exists Topology
        OtherNode NotReady Published PublishedOtherwise StillPublished TargetTaken BeyondHeadroom BoundReached GuestSilent NoNode NodeSilent
        NodeRefused NodeAtWork PodRefused PodUnknown SnapshotNotFound SnapshotExists SnapshotNotReady InGroup GroupNotFound
        GroupExists GroupMember SourceElsewhere NoCopyWhileRunning JustRestored MarkLost Copying BeingCopied NoMirrors
        HalfLost AccessForbidden RollbackGiven RollbackPodChanged NoRollback Guest Backing Catalog Kata CutShort);
    variants!(GUEST, guest_error, GuestError: Unreachable Timeout Refused DiskTooSmall);
    variants!(BACKING, backing_error, BackingError: NoRoom Restricted TooLarge Gone HalfMade InUse Missing Mismatch CannotShare SnapshotMissing
        Stopped Io);
    variants!(CATALOG, catalog_error, CatalogError: Conflict NotFound Damaged Io Unreadable Locked Unavailable Expired
        Forbidden);
    variants!(KATA, kata_error, KataError: Target Mapper Occupied Io);

    fn name(error: &VolumeError) -> String {
        let outer = volume_error(error);
        match error {
            VolumeError::Guest { source: GuestError::Refused { call, .. }, .. } => format!("Guest: Refused {call}"),
            VolumeError::Guest { source, .. } => format!("{outer}: {}", guest_error(source)),
            VolumeError::Backing { source, .. } => format!("{outer}: {}", backing_error(source)),
            VolumeError::Catalog(source) => format!("{outer}: {}", catalog_error(source)),
            VolumeError::Kata(source) => format!("{outer}: {}", kata_error(source)),
            VolumeError::NodeRefused { no_room: true, .. } => format!("{outer}, for want of room"),
            _ => outer.to_owned(),
        }
    }

    #[test]
    fn the_table_has_every_error_with_its_code_and_whether_that_is_final() {
        let word = |wanted: Code| {
            format!("{wanted:?}").chars().fold(String::new(), |mut word, letter| {
                if letter.is_uppercase() && !word.is_empty() {
                    word.push('_');
                }
                word.extend(letter.to_uppercase());
                word
            })
        };
        let mut rows: Vec<_> = every_error()
            .iter()
            .map(|(error, code)| {
                let (all, provisioner) = match code {
                    Code::Cancelled | Code::DeadlineExceeded | Code::Unavailable | Code::Aborted => ("no", "no"),
                    Code::ResourceExhausted => ("no", "on this node"),
                    _ => ("yes", "yes"),
                };
                format!("| {} | {} | {all} | {provisioner} |", name(error), word(*code))
            })
            .collect();
        rows.sort();
        rows.dedup();
        let seen = |kind: &str, names: &[&str]| {
            for one in names {
                let row = format!("| {kind}{one}");
                assert!(rows.iter().any(|have| have.starts_with(&row)), "{kind}{one} is not in the table");
            }
        };
        seen("", VOLUME);
        seen("Guest: ", GUEST);
        seen("Backing: ", BACKING);
        seen("Catalog: ", CATALOG);
        seen("Kata: ", KATA);
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/errors.md");
        let page = std::fs::read_to_string(path).unwrap();
        let table: Vec<_> = page.lines().skip_while(|line| !line.starts_with("|---")).skip(1).collect();
        assert_eq!(table, rows, "docs/errors.md should have:\n{}", rows.join("\n"));
    }

    #[test]
    fn what_a_person_can_do_is_said_where_something_is_not_as_it_should_be() {
        for (error, _) in every_error() {
            let want = match &error {
                VolumeError::NotPublished { .. } => "NodePublishVolume comes first",
                VolumeError::Backing { source: BackingError::Mismatch { .. }, .. } => "put back the file",
                VolumeError::Backing { source: BackingError::Io { .. }, .. } => "look at the file system there",
                VolumeError::Catalog(CatalogError::Damaged { .. } | CatalogError::Unreadable { .. }) => "from a backup",
                _ => continue,
            };
            assert!(error.to_string().contains(want), "{error}");
        }
    }

    #[test]
    fn each_error_has_the_code_the_specification_gives_it() {
        for (error, want) in every_error() {
            let status = to_status(&error);
            assert_eq!(status.code(), want, "{error}");
            assert!(!status.message().is_empty());
        }
    }
}
