//! What kubelet asks for a pod's inline volume: NodePublishVolume and nothing before it.

use std::collections::HashMap;

use zpod_volume::{Bytes, Headroom, VolumeId, VolumeParameters};

use super::request;
use crate::volumes::{EphemeralVolume, NodeVolumes, VolumeError};

/// Kubelet says so of an inline volume (CSIDriver `podInfoOnMount`).
const EPHEMERAL: &str = "csi.storage.k8s.io/ephemeral";
/// Kubelet's handle of one: this and a SHA-256 in hexadecimal digits (`makeVolumeHandle` in its csi plugin).
const HANDLE: &str = "csi-";
const SIZE: &str = "size";
const HEADROOM: &str = "headroom";
const FIELD: &str = "volume_context";

/// What is wanted, where the volume is an inline one.
pub(super) fn wanted(handle: &str, context: &HashMap<String, String>) -> Result<Option<EphemeralVolume>, VolumeError> {
    if context.get(EPHEMERAL).is_none_or(|value| value != "true") {
        return Ok(None);
    }
    if !is_handle(handle) {
        let reason = format!("is not what kubelet calls an inline volume: {HANDLE} and 64 hexadecimal digits");
        return Err(VolumeError::invalid("volume_id", reason));
    }
    if context.contains_key(HEADROOM) {
        let reason = format!("{HEADROOM}: an inline volume does not grow; leave it out");
        return Err(VolumeError::invalid(FIELD, reason));
    }
    let size = context.get(SIZE).map(|size| size.parse::<Bytes>()).transpose();
    let size = size.map_err(|error| VolumeError::invalid(FIELD, format!("{SIZE}: {error}")))?;
    let rest = context.iter().filter(|(key, _)| *key != SIZE);
    let parameters = VolumeParameters::parse(rest.map(|(key, value)| (key.as_str(), value.as_str())))?;
    let parameters = VolumeParameters { headroom: Headroom::NONE, ..parameters };
    Ok(Some(EphemeralVolume { handle: handle.to_owned(), size, parameters }))
}

/// The id of a volume as kubelet names it: ours, or that of its inline volume. Only the first call for one says which.
pub(super) fn volume_id(volumes: &NodeVolumes, id: &str) -> Result<VolumeId, VolumeError> {
    if is_handle(id) { Ok(volumes.inline_id(id)) } else { request::volume_id(volumes.context(), id) }
}

fn is_handle(id: &str) -> bool {
    let digit = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
    id.strip_prefix(HANDLE).is_some_and(|digits| digits.len() == 64 && digits.bytes().all(digit))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn handle() -> String {
        format!("csi-{}", "0f".repeat(32))
    }

    fn read(handle: &str, pairs: &[(&str, &str)]) -> Result<Option<EphemeralVolume>, String> {
        let pairs = pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned()));
        let context = pairs.chain([("csi.storage.k8s.io/pod.name".to_owned(), "p".to_owned())]).collect();
        wanted(handle, &context).map_err(|error| error.to_string())
    }

    #[test]
    fn only_what_kubelet_calls_ephemeral_is() {
        assert_eq!(read(&handle(), &[]), Ok(None));
        assert_eq!(read(&handle(), &[(EPHEMERAL, "false"), ("size", "odd")]), Ok(None));
        let volume = read(&handle(), &[(EPHEMERAL, "true")]).unwrap().unwrap();
        assert_eq!((volume.size, volume.parameters.headroom), (None, Headroom::NONE));
    }

    #[test]
    fn its_attributes_are_a_size_and_what_a_storage_class_may_say() {
        let pairs = [(EPHEMERAL, "true"), ("size", "2Gi"), ("compression", "zstd"), ("provisioning", "thick")];
        let volume = read(&handle(), &pairs).unwrap().unwrap();
        assert_eq!(volume.size, Some(Bytes::gib(2)));
        assert_eq!(volume.parameters.properties["compression"], "zstd");
        for (pair, why) in [
            (("size", "much"), "is not a size"),
            (("sise", "1Gi"), "\"sise\" is not known"),
            (("headroom", "8x"), "does not grow"),
        ] {
            let error = read(&handle(), &[(EPHEMERAL, "true"), pair]).unwrap_err();
            assert!(error.contains(why), "{error}");
        }
    }

    #[test]
    fn a_handle_is_kubelets_and_nothing_else() {
        for id in ["", "csi-", "pvc-1", &format!("csi-{}", "0F".repeat(32)), &format!("csi-{}", "0".repeat(65))] {
            assert!(read(id, &[(EPHEMERAL, "true")]).unwrap_err().contains("64 hexadecimal digits"), "{id}");
        }
    }
}
