use zpod_kubernetes::crd::{ZfsSnapshot, ZfsVolume};

use super::{SnapshotView, VolumeView};
use crate::text::{size, when};

/// A line, and what hangs on it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Node {
    pub(crate) line: String,
    pub(crate) below: Vec<Node>,
}

impl Node {
    fn leaf(line: impl Into<String>) -> Self {
        Self { line: line.into(), below: Vec::new() }
    }
}

/// What hangs on each of the shown volumes, of all volumes and snapshots there are.
pub(crate) fn tree_of(shown: &[ZfsVolume], all: &[ZfsVolume], snapshots: &[ZfsSnapshot]) -> Vec<Node> {
    let mut views: Vec<_> = shown.iter().map(|object| VolumeView::new(object, snapshots)).collect();
    views.sort_by_cached_key(|view| (view.namespace.clone(), view.name().to_owned()));
    views.iter().map(|view| claim(view, all, snapshots)).collect()
}

fn claim(view: &VolumeView, all: &[ZfsVolume], snapshots: &[ZfsSnapshot]) -> Node {
    let volume = volume(view, all, snapshots);
    if view.claim.is_empty() {
        return volume;
    }
    let pod = if view.pod.is_empty() { "no pod".to_owned() } else { format!("pod {}", view.pod) };
    let line = format!("claim {}/{} ({}, {pod})", view.namespace, view.claim, size(view.capacity_bytes));
    Node { line, below: vec![volume] }
}

fn volume(view: &VolumeView, all: &[ZfsVolume], snapshots: &[ZfsSnapshot]) -> Node {
    let mut below = Vec::new();
    if let Some(source) = &view.source {
        let from = match (&source.snapshot, &source.volume) {
            (Some(snapshot), _) => format!("from snapshot {snapshot}"),
            (None, Some(id)) => format!("from {}", known_as(id, all)),
            (None, None) => "from something unknown".into(),
        };
        below.push(Node::leaf(from));
    }
    if !view.dataset.is_empty() {
        let used = view.used_bytes.map_or_else(|| "use unknown".to_owned(), |used| format!("{} used", size(used)));
        let ratio = if view.compress_ratio.is_empty() { String::new() } else { format!(", {}", view.compress_ratio) };
        below.push(Node::leaf(format!("dataset {} ({used}{ratio})", view.dataset)));
    }
    let mut of_it: Vec<_> = snapshots.iter().filter(|s| s.spec.volume == view.volume).map(SnapshotView::new).collect();
    of_it.sort_by_cached_key(|s| (s.creation_time.as_ref().map(|time| time.0), s.snapshot.clone()));
    below.extend(of_it.iter().map(|s| snapshot(s, all)));
    let clones = made_from(all, |source| source.volume.as_deref() == Some(&view.volume));
    below.extend(clones.into_iter().map(|name| Node::leaf(format!("cloned as {name}"))));
    let line = format!("volume {} (node {}, {})", view.volume, view.node, view.state());
    Node { line, below }
}

fn snapshot(view: &SnapshotView, all: &[ZfsVolume]) -> Node {
    let taken = view.creation_time.as_ref().map_or_else(String::new, |time| format!(", {}", when(time)));
    let restored = made_from(all, |source| source.snapshot.as_deref() == Some(&view.snapshot));
    let below = restored.into_iter().map(|name| Node::leaf(format!("restored as {name}"))).collect();
    Node { line: format!("snapshot {} ({}{taken})", view.snapshot, view.state()), below }
}

fn made_from(all: &[ZfsVolume], is: impl Fn(&zpod_kubernetes::crd::SourceRef) -> bool) -> Vec<String> {
    let made = all.iter().filter(|volume| volume.spec.source.as_ref().is_some_and(&is));
    let mut names: Vec<_> = made.map(|volume| called(&VolumeView::new(volume, &[]))).collect();
    names.sort();
    names
}

fn known_as(id: &str, all: &[ZfsVolume]) -> String {
    let known = all.iter().find(|volume| volume.metadata.name.as_deref() == Some(id));
    known.map_or_else(|| format!("volume {id}, which is gone"), |volume| called(&VolumeView::new(volume, &[])))
}

fn called(view: &VolumeView) -> String {
    if view.claim.is_empty() {
        format!("volume {}", view.volume)
    } else {
        format!("claim {}/{}", view.namespace, view.claim)
    }
}

#[cfg(test)]
mod tests {
    use super::super::volume::tests::{object, online};
    use super::*;
    use crate::text::draw;
    use serde_json::json;

    #[test]
    fn a_tree_has_claim_volume_dataset_snapshots_and_what_was_made_of_them() {
        let source = object("v1", "data", online("1Gi"));
        let mut clone = object("v2", "copy", json!({"phase": "Ready"}));
        clone.spec.source = serde_json::from_value(json!({"volume": "v1"})).unwrap();
        let mut restored = object("v3", "", json!(null));
        restored.spec.claim = None;
        restored.spec.source = serde_json::from_value(json!({"snapshot": "s1"})).unwrap();
        let snapshot = serde_json::from_value(json!({
            "apiVersion": "zpod.storage/v1alpha1", "kind": "ZfsSnapshot", "metadata": {"name": "s1"},
            "spec": {"snapshotName": "snapshot-1", "volume": "v1", "nodeName": "n1"},
            "status": {"phase": "Ready", "readyToUse": true, "creationTime": "2026-11-23T20:00:00Z"},
        }))
        .unwrap();
        let all = [source.clone(), clone.clone(), restored.clone()];
        let tree = draw(&tree_of(&[restored, clone, source], &all, &[snapshot]));
        let want = "\
volume v3 (node n1, Pending)
└─ from snapshot s1
claim prod/copy (10Gi, no pod)
└─ volume v2 (node n1, Ready)
   └─ from claim prod/data
claim prod/data (10Gi, pod db-0)
└─ volume v1 (node n1, Online)
   ├─ dataset zpod-0123456789ab/data (1Gi used, 1.43x)
   ├─ snapshot s1 (Ready, 2026-11-23T20:00:00Z)
   │  └─ restored as volume v3
   └─ cloned as claim prod/copy
";
        assert_eq!(tree, want, "\n{tree}");
    }
}
