//! The whole image: kernel, overlay, manifest.

use std::{
    collections::BTreeMap,
    env, fs,
    path::{Path, PathBuf},
};

use crate::{
    Error, Result, atomic,
    cache::{self, Cache, Outcome},
    chroot::Chroot,
    debian::Versions,
    guest_binary,
    manifest::{Manifest, Output},
    overlay,
};

/// The kernel's file name in an image.
pub const KERNEL: &str = "vmlinuz";
/// The overlay's file name in an image.
pub const OVERLAY: &str = "overlay.cpio.zst";
/// The manifest's file name in an image; written last, so that it describes
/// files that are there.
pub const MANIFEST: &str = "manifest.json";

/// What to build.
#[derive(Debug, Clone, Default)]
pub struct Request {
    /// A static binary for `/zpod/init`; built from the workspace when absent.
    pub guest_binary: Option<PathBuf>,
    /// The workspace to build it from.
    pub workspace: PathBuf,
    /// Kernel modules to load at boot beside the usual ones.
    pub extra_modules: Vec<String>,
}

/// A finished image.
#[derive(Debug, Clone)]
pub struct Image {
    /// The directory with the three files.
    pub dir: PathBuf,
    /// Their description.
    pub manifest: Manifest,
}

/// Builds an image in the cache and returns it; what is cached is not built.
///
/// # Errors
/// A package, tool, module or the guest binary can't be had; the message says
/// what to do.
pub fn build(cache: &Cache, request: &Request) -> Result<Image> {
    let guest = match &request.guest_binary {
        Some(path) => path.clone(),
        None => guest_binary::build(&request.workspace)?,
    };
    let guest = guest_binary::read(&guest)?;
    let (chroot, _) = Chroot::for_versions(cache, &Versions::resolve()?)?;

    // This program's own bytes are an input: a change in any step shows there.
    let own = env::current_exe().map_err(Error::io("find", "this program"))?;
    let own = cache::sha256(&fs::read(&own).map_err(Error::io("read", &own))?);
    let (root, binary) = (chroot.root().to_string_lossy().into_owned(), cache::sha256(&guest));
    let inputs = [own.as_str(), &root, &binary].into_iter().chain(request.extra_modules.iter().map(String::as_str));
    let key = cache::key(inputs);
    let outcome = cache.entry("image", &key, |dir| fill(dir, &chroot, guest, &request.extra_modules))?;
    if let Outcome::Created(place) = &outcome {
        forget_others(cache, place);
    }
    open(outcome.path())
}

/// Opens a finished image.
///
/// # Errors
/// It has no readable manifest.
pub fn open(dir: &Path) -> Result<Image> {
    let path = dir.join(MANIFEST);
    let text = fs::read(&path).map_err(Error::io("read", &path))?;
    let manifest = serde_json::from_slice(&text).map_err(|error| Error::io("parse", &path)(error.into()))?;
    Ok(Image { dir: dir.to_owned(), manifest })
}

impl Image {
    /// Copies the image to `to`, each file atomically; files that are there
    /// already are left alone.
    ///
    /// # Errors
    /// `to` can't be written.
    pub fn install(&self, to: &Path) -> Result<Self> {
        fs::create_dir_all(to).map_err(Error::io("create", to))?;
        for name in [KERNEL, OVERLAY, MANIFEST] {
            let (source, target) = (self.dir.join(name), to.join(name));
            let bytes = fs::read(&source).map_err(Error::io("read", &source))?;
            if fs::read(&target).ok().as_ref() != Some(&bytes) {
                atomic::write(&target, &bytes)?;
            }
        }
        Ok(Self { dir: to.to_owned(), manifest: self.manifest.clone() })
    }

    /// The kernel.
    #[must_use]
    pub fn kernel(&self) -> PathBuf {
        self.dir.join(KERNEL)
    }

    /// The overlay.
    #[must_use]
    pub fn overlay(&self) -> PathBuf {
        self.dir.join(OVERLAY)
    }
}

fn fill(dir: &Path, chroot: &Chroot, guest: Vec<u8>, extra: &[String]) -> Result<()> {
    let scratch = dir.join("scratch");
    fs::create_dir(&scratch).map_err(Error::io("create", &scratch))?;
    let overlay = overlay::assemble(chroot, guest, extra, &scratch)?;
    fs::remove_dir_all(&scratch).map_err(Error::io("remove", &scratch))?;

    let kernel = fs::read(chroot.vmlinuz()).map_err(Error::io("read", chroot.vmlinuz()))?;
    let archive = overlay.archive.to_zstd()?;
    let mut outputs = BTreeMap::new();
    for (name, bytes) in [(KERNEL, &kernel), (OVERLAY, &archive)] {
        outputs.insert(name.to_owned(), Output::of(bytes));
        atomic::write(&dir.join(name), bytes)?;
    }
    let manifest = Manifest::new(chroot.release(), &overlay, outputs);
    let text = serde_json::to_vec_pretty(&manifest).map_err(|error| Error::io("write", MANIFEST)(error.into()))?;
    atomic::write(&dir.join(MANIFEST), &text)
}

/// Keeps the cache small: an image is 8 seconds' work, a developer makes many.
/// Best effort, for the new one is whole whether or not old ones go.
fn forget_others(cache: &Cache, keep: &Path) {
    const KEPT: usize = 8;
    let Ok(entries) = fs::read_dir(cache.dir()) else { return };
    let is_image = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        name.starts_with("image-") && !name.ends_with(".partial")
    };
    let mut images: Vec<_> = entries
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| is_image(path) && path != keep)
        .filter_map(|path| Some((fs::metadata(&path).ok()?.modified().ok()?, path)))
        .collect();
    images.sort();
    for (_, path) in images.iter().rev().skip(KEPT) {
        let _ = fs::remove_dir_all(path);
    }
}
