use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::PathBuf;

use zpod_proto::csi::volume_content_source::Type as SourceType;
use zpod_proto::csi::{CapacityRange as WireRange, Topology, TopologyRequirement, VolumeContentSource};
use zpod_storage::catalog::{PodRef, Source};
use zpod_volume::{Bytes, VolumeAttributes, VolumeId};

use crate::guest::clean;
use crate::volumes::{CapacityRange, Context, TOPOLOGY_KEY, VolumeError};

/// CSI 1.12: "any string field defined in this spec ... maximum of 128 bytes" for names and ids.
const MAX_NAME: usize = 128;
/// What Kubernetes allows for names, and enough for anybody's labels.
const MAX_LABEL: usize = 253;
/// What external-provisioner adds with `--extra-create-metadata`.
const LABELS: [&str; 3] =
    ["csi.storage.k8s.io/pvc/name", "csi.storage.k8s.io/pvc/namespace", "csi.storage.k8s.io/pv/name"];

/// The name of a new volume.
pub(super) fn name(name: &str) -> Result<(), VolumeError> {
    let length = name.chars().count();
    if name.is_empty() {
        return Err(VolumeError::invalid("name", "is missing"));
    }
    if length > MAX_NAME {
        return Err(VolumeError::invalid("name", format!("has {length} characters, 1 to {MAX_NAME} are allowed")));
    }
    if name.chars().any(char::is_control) {
        return Err(VolumeError::invalid("name", "has control characters, which are not allowed"));
    }
    Ok(())
}

/// A field that must not be empty.
pub(super) fn required(field: &'static str, value: &str) -> Result<(), VolumeError> {
    if value.is_empty() { Err(VolumeError::invalid(field, "is missing")) } else { Ok(()) }
}

/// A path that must be there.
pub(super) fn path(field: &'static str, value: &str) -> Result<PathBuf, VolumeError> {
    required(field, value)?;
    if value.contains('\0') {
        return Err(VolumeError::invalid(field, "has a NUL character"));
    }
    Ok(value.into())
}

/// An id. One that is not in our form is of no volume of ours.
pub(super) fn volume_id(context: &Context, id: &str) -> Result<VolumeId, VolumeError> {
    required("volume_id", id)?;
    id.parse().map_err(|_| context.not_found(id))
}

/// How large a volume is to be. Zero stands for "not given".
pub(super) fn range(range: Option<&WireRange>) -> Result<CapacityRange, VolumeError> {
    let range = range.copied().unwrap_or_default();
    let bytes = |value: i64| match u64::try_from(value) {
        Ok(0) => Ok(None),
        Ok(bytes) => Ok(Some(Bytes(bytes))),
        Err(_) => Err(VolumeError::invalid("capacity_range", format!("{value} is negative"))),
    };
    let (required, limit) = (bytes(range.required_bytes)?, bytes(range.limit_bytes)?);
    if let (Some(required), Some(limit)) = (required, limit)
        && required > limit
    {
        let reason = format!("required_bytes ({required}) is more than limit_bytes ({limit})");
        return Err(VolumeError::invalid("capacity_range", reason));
    }
    Ok(CapacityRange { required, limit })
}

/// How many entries a page of a list has. Zero stands for "as many as there are", which a message has no room for.
pub(super) fn limit(max_entries: i32, most: usize) -> Result<usize, VolumeError> {
    match usize::try_from(max_entries) {
        Ok(0) => Ok(most),
        Ok(limit) => Ok(limit.min(most)),
        Err(_) => Err(VolumeError::invalid("max_entries", format!("{max_entries} is negative"))),
    }
}

/// What a VolumeAttributesClass says. Keys of Kubernetes' sidecars are passed over.
pub(super) fn attributes(mutable: &HashMap<String, String>) -> Result<VolumeAttributes, VolumeError> {
    let ours = mutable.iter().filter(|(key, _)| !key.starts_with("csi.storage.k8s.io/"));
    Ok(VolumeAttributes::parse(ours.map(|(key, value)| (key.as_str(), value.as_str())))?)
}

/// What a volume is to be made from.
pub(super) fn source(
    source: Option<&VolumeContentSource>,
    not_found: impl Fn(&str) -> VolumeError,
) -> Result<Option<Source>, VolumeError> {
    let Some(source) = source else { return Ok(None) };
    match &source.r#type {
        Some(SourceType::Snapshot(snapshot)) => {
            let id = &snapshot.snapshot_id;
            required("volume_content_source.snapshot.snapshot_id", id)?;
            id.parse().map(|id| Some(Source::Snapshot(id))).map_err(|_| super::snapshot::unknown(id))
        }
        Some(SourceType::Volume(volume)) => {
            let id = &volume.volume_id;
            required("volume_content_source.volume.volume_id", id)?;
            id.parse().map(|id| Some(Source::Volume(id))).map_err(|_| not_found(id))
        }
        None => Err(VolumeError::invalid("volume_content_source", "names neither a snapshot nor a volume")),
    }
}

/// The nodes that a requirement allows, the preferred ones first; `None` for any.
pub(super) fn nodes(requirement: Option<&TopologyRequirement>) -> Option<Vec<String>> {
    let requirement = requirement?;
    if requirement.requisite.is_empty() && requirement.preferred.is_empty() {
        return None;
    }
    let allowed: BTreeSet<_> = requirement.requisite.iter().filter_map(node_of).collect();
    let mut nodes: Vec<String> = Vec::new();
    for node in requirement.preferred.iter().chain(&requirement.requisite).filter_map(node_of) {
        // CSI 1.12, TopologyRequirement: what is preferred is among what is requisite, where there is any.
        if (requirement.requisite.is_empty() || allowed.contains(&node)) && !nodes.contains(&node) {
            nodes.push(node);
        }
    }
    Some(nodes)
}

/// The node that a topology names.
pub(super) fn node_of(topology: &Topology) -> Option<String> {
    topology.segments.get(TOPOLOGY_KEY).cloned()
}

/// The topology of a node.
pub(super) fn topology(node: &str) -> Topology {
    Topology { segments: HashMap::from([(TOPOLOGY_KEY.to_owned(), node.to_owned())]) }
}

/// What Kubernetes calls the volume.
pub(super) fn labels(parameters: &HashMap<String, String>) -> BTreeMap<String, String> {
    let given = LABELS.iter().filter_map(|key| Some(((*key).to_owned(), clean(parameters.get(*key)?, MAX_LABEL))));
    given.collect()
}

/// The pod a volume is published to, where the orchestrator tells (`podInfoOnMount`).
pub(super) fn pod(context: &HashMap<String, String>) -> Option<PodRef> {
    let part = |key: &str| context.get(key).map(|value| clean(value, MAX_LABEL)).unwrap_or_default();
    let pod = PodRef {
        namespace: part("csi.storage.k8s.io/pod.namespace"),
        name: part("csi.storage.k8s.io/pod.name"),
        uid: part("csi.storage.k8s.io/pod.uid"),
    };
    (!pod.name.is_empty()).then_some(pod)
}

/// A number as CSI carries it.
pub(super) fn int(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_1_to_128_characters_are_taken() {
        assert!(name(&"ä".repeat(128)).is_ok());
        for bad in ["", &"x".repeat(129), "a\nb"] {
            assert!(name(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn ranges_that_contradict_themselves_are_refused() {
        let wire = |required_bytes, limit_bytes| WireRange { required_bytes, limit_bytes };
        assert_eq!(range(None).unwrap(), CapacityRange::default());
        assert_eq!(range(Some(&wire(0, 0))).unwrap(), CapacityRange::default());
        assert_eq!(range(Some(&wire(5, 0))).unwrap().required, Some(Bytes(5)));
        for (required, limit) in [(-1, 0), (0, -1), (2, 1)] {
            assert!(range(Some(&wire(required, limit))).is_err(), "{required} {limit}");
        }
    }

    #[test]
    fn a_requirement_without_requisites_allows_any_node_and_one_for_others_none() {
        assert_eq!(nodes(None), None);
        assert_eq!(nodes(Some(&TopologyRequirement::default())), None);
        let zone = Topology { segments: HashMap::from([("zone".into(), "a".into())]) };
        let requirement = TopologyRequirement { requisite: vec![topology("n1"), zone], preferred: vec![] };
        assert_eq!(nodes(Some(&requirement)), Some(vec!["n1".to_owned()]));
        let requirement = TopologyRequirement {
            requisite: vec![topology("n1"), topology("n2"), topology("n3")],
            preferred: vec![topology("n3"), topology("n4"), topology("n1")],
        };
        assert_eq!(nodes(Some(&requirement)).unwrap(), ["n3", "n1", "n2"]);
    }

    #[test]
    fn the_pod_is_named_where_it_is_known() {
        let context = |pairs: &[(&str, &str)]| pairs.iter().map(|(k, v)| ((*k).into(), (*v).into())).collect();
        let both = [("csi.storage.k8s.io/pod.name", "db-0"), ("csi.storage.k8s.io/pod.namespace", "prod")];
        assert_eq!(pod(&context(&both)).unwrap().to_string(), "prod/db-0");
        assert_eq!(pod(&context(&both[..1])).unwrap().to_string(), "db-0");
        assert_eq!(pod(&context(&[])), None);
    }
}
