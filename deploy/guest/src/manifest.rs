//! `manifest.json`: what is in an image, how big it is, and how to check it.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::{cache, overlay::Overlay};

/// Describes one guest image; written beside it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// The kernel's release, as `uname -r` says it.
    pub kernel_release: String,
    /// Size and hash of each file of the image, by its name.
    pub outputs: BTreeMap<String, Output>,
    /// What the overlay holds, in uncompressed bytes, by component.
    pub components: BTreeMap<String, u64>,
    /// All components together, uncompressed: the guest memory they take.
    pub uncompressed_bytes: u64,
    /// What is downloaded and unpacked at boot: all outputs, compressed.
    pub compressed_bytes: u64,
    /// The modules, "GROUP NAME", in load order.
    pub modules: Vec<String>,
    /// The Debian packages and versions the image was made from.
    pub packages: BTreeMap<String, String>,
}

/// One file of an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Output {
    /// Its size in bytes.
    pub bytes: u64,
    /// Its SHA-256, in hexadecimal.
    pub sha256: String,
}

impl Output {
    /// Describes a file with these contents.
    #[must_use]
    pub fn of(bytes: &[u8]) -> Self {
        Self { bytes: bytes.len() as u64, sha256: cache::sha256(bytes) }
    }
}

impl Manifest {
    /// Describes an overlay and the files made of it.
    #[must_use]
    pub fn new(kernel_release: &str, overlay: &Overlay, outputs: BTreeMap<String, Output>) -> Self {
        let mut components = BTreeMap::new();
        for (path, bytes) in overlay.archive.sizes() {
            *components.entry(component(path).to_owned()).or_insert(0) += bytes;
        }
        Self {
            kernel_release: kernel_release.to_owned(),
            compressed_bytes: outputs.values().map(|output| output.bytes).sum(),
            outputs,
            components,
            uncompressed_bytes: overlay.archive.content_bytes(),
            modules: overlay.modules.iter().map(|module| format!("{} {}", module.group, module.name)).collect(),
            packages: overlay.packages.clone(),
        }
    }
}

fn component(path: &str) -> &'static str {
    let group = path.strip_prefix("zpod/").unwrap_or(path);
    match group.split('/').next().unwrap_or(group) {
        "init" => "init",
        "bin" => "tools",
        "lib" => "libraries",
        "modules" => "modules",
        _ => "texts",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_path_counts_for_its_component() {
        let paths = ["zpod/init", "zpod/bin/zfs", "zpod/lib/libc.so.6", "zpod/modules/zfs.ko", "zpod/versions.json"];
        assert_eq!(paths.map(component), ["init", "tools", "libraries", "modules", "texts"]);
    }
}
