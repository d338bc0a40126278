//! Snapshots and groups of them, as CSI words them.

use std::collections::HashMap;

use prost_types::Timestamp;
use zpod_proto::csi;
use zpod_proto::csi::list_snapshots_response::Entry;
use zpod_storage::catalog::{Snapshot, SnapshotPhase};
use zpod_volume::Excerpt;

use super::controller::MAX_PAGE;
use super::request::{self, int};
use crate::guest::clean;
use crate::volumes::{SnapshotRequest, Snapshots, VolumeError};

/// What Kubernetes' sidecars add to the parameters; not ours to judge.
const SIDECAR_PREFIX: &str = "csi.storage.k8s.io/";
/// The one parameter of a VolumeSnapshotClass or a VolumeGroupSnapshotClass.
const ALLOW_COPY: &str = "allowCopy";

/// Reads the parameters of a VolumeSnapshotClass: whether full copies are allowed.
pub(super) fn allow_copy(parameters: &HashMap<String, String>) -> Result<bool, VolumeError> {
    let mut allow = false;
    for (key, value) in parameters.iter().filter(|(key, _)| !key.starts_with(SIDECAR_PREFIX)) {
        allow = match (key.as_str(), value.as_str()) {
            (ALLOW_COPY, "true") => true,
            (ALLOW_COPY, "false") => false,
            (ALLOW_COPY, _) => {
                let reason = format!("{ALLOW_COPY}: {} is not allowed; allowed is: true, false", Excerpt(value));
                return Err(VolumeError::invalid("parameters", reason));
            }
            _ => {
                let reason = format!("{} is not known; allowed is: {ALLOW_COPY}", Excerpt(key));
                return Err(VolumeError::invalid("parameters", reason));
            }
        };
    }
    Ok(allow)
}

/// The error for an id that is not in our form, and so of no snapshot of ours.
pub(super) fn unknown(id: &str) -> VolumeError {
    VolumeError::SnapshotNotFound { id: clean(id, 128), node: "any (no snapshot has an id of this form)".into() }
}

pub(super) fn describe(snapshot: &Snapshot) -> csi::Snapshot {
    csi::Snapshot {
        size_bytes: snapshot.contents.as_ref().map_or(0, |contents| int(contents.capacity.0)),
        snapshot_id: snapshot.id.to_string(),
        source_volume_id: snapshot.volume.to_string(),
        creation_time: Some(taken(snapshot)),
        ready_to_use: snapshot.phase == SnapshotPhase::Ready,
        group_snapshot_id: snapshot.group.as_ref().map(|group| group.id.to_string()).unwrap_or_default(),
    }
}

/// When it was taken. Those without contents are not shown.
pub(super) fn taken(snapshot: &Snapshot) -> Timestamp {
    let seconds = snapshot.contents.as_ref().map_or(0, |contents| int(contents.taken));
    Timestamp { seconds, nanos: 0 }
}

pub(super) async fn create(
    snapshots: &dyn Snapshots,
    not_found: impl Fn(&str) -> VolumeError,
    request: csi::CreateSnapshotRequest,
) -> Result<csi::CreateSnapshotResponse, VolumeError> {
    request::name(&request.name)?;
    request::required("source_volume_id", &request.source_volume_id)?;
    let allow_copy = allow_copy(&request.parameters)?;
    let volume = request.source_volume_id.parse().map_err(|_| not_found(&request.source_volume_id))?;
    let snapshot = snapshots.create(SnapshotRequest { name: request.name, volume, allow_copy }).await?;
    Ok(csi::CreateSnapshotResponse { snapshot: Some(describe(&snapshot)) })
}

pub(super) async fn delete(snapshots: &dyn Snapshots, id: &str) -> Result<csi::DeleteSnapshotResponse, VolumeError> {
    request::required("snapshot_id", id)?;
    // CSI 1.12, DeleteSnapshot: what does not exist is deleted, and an id that is none of ours does not exist.
    if let Ok(id) = id.parse() {
        snapshots.delete(id).await?;
    }
    Ok(csi::DeleteSnapshotResponse {})
}

pub(super) async fn get(snapshots: &dyn Snapshots, id: &str) -> Result<csi::GetSnapshotResponse, VolumeError> {
    request::required("snapshot_id", id)?;
    let snapshot = snapshots.get(id.parse().map_err(|_| unknown(id))?).await?;
    Ok(csi::GetSnapshotResponse { snapshot: Some(describe(&snapshot)) })
}

pub(super) async fn list(
    snapshots: &dyn Snapshots,
    request: csi::ListSnapshotsRequest,
) -> Result<csi::ListSnapshotsResponse, VolumeError> {
    let limit = request::limit(request.max_entries, MAX_PAGE)?;
    let none = csi::ListSnapshotsResponse::default();
    let entry = |snapshot: &Snapshot| Entry { snapshot: Some(describe(snapshot)) };
    let of = match request.source_volume_id.as_str() {
        "" => None,
        id => match id.parse() {
            Ok(id) => Some(id),
            Err(_) => return Ok(none),
        },
    };
    if !request.snapshot_id.is_empty() {
        // CSI 1.12, ListSnapshots: an id that does not exist gives an empty list.
        let Ok(id) = request.snapshot_id.parse() else { return Ok(none) };
        return match snapshots.get(id).await {
            Ok(snapshot) if of.is_none_or(|of| of == snapshot.volume) => {
                Ok(csi::ListSnapshotsResponse { entries: vec![entry(&snapshot)], ..none })
            }
            Ok(_) | Err(VolumeError::SnapshotNotFound { .. }) => Ok(none),
            Err(error) => Err(error),
        };
    }
    let from = Some(request.starting_token).filter(|token| !token.is_empty());
    let page = snapshots.list(of, from, limit).await?;
    Ok(csi::ListSnapshotsResponse {
        entries: page.snapshots.iter().map(entry).collect(),
        next_token: page.next.unwrap_or_default(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_snapshot_class_allows_full_copies_or_says_nothing() {
        let parse = |pairs: &[(&str, &str)]| {
            allow_copy(&pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect())
        };
        assert!(!parse(&[]).unwrap());
        assert!(!parse(&[("csi.storage.k8s.io/volumesnapshot/name", "x")]).unwrap());
        assert!(parse(&[("allowCopy", "true")]).unwrap());
        for (pair, want) in
            [(("allowcopy", "true"), "\"allowcopy\" is not known"), (("allowCopy", "yes"), "true, false")]
        {
            let error = parse(&[pair]).unwrap_err().to_string();
            assert!(error.contains(want), "{error}");
        }
    }
}
