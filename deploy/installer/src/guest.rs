//! What the container image brings: our kernel and our overlay.

use std::fs::File;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use zpod_image::image::{KERNEL, MANIFEST, OVERLAY};
use zpod_image::initrd::starts_like_initramfs;
use zpod_image::manifest::{Manifest, Output};

use crate::digest;
use crate::error::{Error, Result};

/// "HdrS", where every x86 kernel image has it: Documentation/arch/x86/boot.rst.
const BOOT_MAGIC: (usize, &[u8]) = (0x202, b"HdrS");

/// A guest to install.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Guest {
    dir: PathBuf,
    /// The kernel.
    pub kernel: Output,
    /// The overlay.
    pub overlay: Output,
    /// What `uname -r` will say, if `manifest.json` came along.
    pub kernel_release: Option<String>,
}

impl Guest {
    /// Reads and checks it.
    ///
    /// # Errors
    /// [`Error::BadGuest`] if a part is missing or not what it should be.
    pub fn open(dir: &Path) -> Result<Self> {
        let manifest = manifest(dir)?;
        let describe = |name: &str, is_one: fn(&[u8]) -> bool| {
            let path = dir.join(name);
            let found = read(&path, is_one)?;
            let wanted = manifest.as_ref().and_then(|manifest| manifest.outputs.get(name));
            match wanted {
                Some(wanted) if *wanted != found => Err(bad(&path, "it is not the file that manifest.json describes")),
                _ => Ok(found),
            }
        };
        Ok(Self {
            dir: dir.to_owned(),
            kernel: describe(KERNEL, is_kernel)?,
            overlay: describe(OVERLAY, starts_like_initramfs)?,
            kernel_release: manifest.map(|manifest| manifest.kernel_release),
        })
    }

    /// The kernel, to copy.
    ///
    /// # Errors
    /// It is gone meanwhile.
    pub fn open_kernel(&self) -> Result<File> {
        self.open_part(KERNEL)
    }

    /// The overlay, to copy.
    ///
    /// # Errors
    /// It is gone meanwhile.
    pub fn open_overlay(&self) -> Result<File> {
        self.open_part(OVERLAY)
    }

    fn open_part(&self, name: &str) -> Result<File> {
        let path = self.dir.join(name);
        File::open(&path).map_err(Error::at("open", &path))
    }
}

fn read(path: &Path, is_one: fn(&[u8]) -> bool) -> Result<Output> {
    let file = File::open(path).map_err(|error| bad(path, &error.to_string()))?;
    let mut start = Vec::new();
    (&file).take(1024).read_to_end(&mut start).map_err(|error| bad(path, &error.to_string()))?;
    if !is_one(&start) {
        return Err(bad(path, "it is not what its name says, or cut short"));
    }
    digest::of(start.chain(file)).map_err(Error::at("read", path))
}

fn is_kernel(start: &[u8]) -> bool {
    let (at, magic) = BOOT_MAGIC;
    start.get(at..at + magic.len()) == Some(magic)
}

/// `zpod-image` writes it; the image has it or not.
fn manifest(dir: &Path) -> Result<Option<Manifest>> {
    let path = dir.join(MANIFEST);
    match std::fs::read(&path) {
        Ok(text) => serde_json::from_slice(&text).map(Some).map_err(|error| bad(&path, &error.to_string())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::at("read", &path)(error)),
    }
}

fn bad(path: &Path, reason: &str) -> Error {
    Error::BadGuest { path: path.to_owned(), reason: reason.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn kernel() -> Vec<u8> {
        let mut bytes = vec![0; 0x202];
        bytes.extend(b"HdrS and the rest");
        bytes
    }

    #[test]
    fn a_guest_is_a_kernel_and_an_overlay() {
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(Guest::open(dir.path()), Err(Error::BadGuest { path, .. }) if path.ends_with(KERNEL)));
        fs::write(dir.path().join(KERNEL), kernel()).unwrap();
        fs::write(dir.path().join(OVERLAY), "").unwrap();
        assert!(matches!(Guest::open(dir.path()), Err(Error::BadGuest { path, .. }) if path.ends_with(OVERLAY)));
        fs::write(dir.path().join(OVERLAY), "070701").unwrap();
        let guest = Guest::open(dir.path()).unwrap();
        assert_eq!((guest.kernel, guest.overlay), (Output::of(&kernel()), Output::of(b"070701")));
        fs::write(dir.path().join(KERNEL), "\x7fELF").unwrap();
        assert!(matches!(Guest::open(dir.path()), Err(Error::BadGuest { .. })));
    }

    #[test]
    fn a_guest_that_its_manifest_does_not_describe_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(KERNEL), kernel()).unwrap();
        fs::write(dir.path().join(OVERLAY), "070701").unwrap();
        let mut manifest = serde_json::json!({
            "kernel_release": "6.12.1-cloud-amd64", "components": {}, "uncompressed_bytes": 1, "compressed_bytes": 1,
            "modules": [], "packages": {},
            "outputs": {KERNEL: Output::of(&kernel()), OVERLAY: Output::of(b"070701")},
        });
        fs::write(dir.path().join(MANIFEST), manifest.to_string()).unwrap();
        assert_eq!(Guest::open(dir.path()).unwrap().kernel_release.as_deref(), Some("6.12.1-cloud-amd64"));
        manifest["outputs"][OVERLAY]["bytes"] = 7.into();
        fs::write(dir.path().join(MANIFEST), manifest.to_string()).unwrap();
        assert!(matches!(Guest::open(dir.path()), Err(Error::BadGuest { path, .. }) if path.ends_with(OVERLAY)));
    }
}
