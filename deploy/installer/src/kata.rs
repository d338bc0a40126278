//! Finds the Kata initrd of the node, the one that goes with its shims.
//!
//! # Design
//! Looked at in this order, and the first that is there is taken:
//!
//! 1. what `--kata-initrd` names;
//! 2. what the base configurations of kata-deploy name (`initrd =` of `configuration-qemu*.toml` and so on below
//!    `<kata-dir>/share/defaults/kata-containers`): our runtime is a copy of one of them plus our drop-in, so this is
//!    what it would boot without us. Drop-ins of stock runtimes (`runtimes/<shim>/config.d`) don't apply to it;
//! 3. `<kata-dir>/share/kata-containers/kata-containers-initrd.img`, a link to `kata-<os>-<version>.initrd`
//!    (`build_initrd` in tools/packaging/guest-image/build_image.sh). As of 4.1.0 the shims on x86_64 boot an image and
//!    name no initrd, but kata-deploy brings this with them (shim-components.json);
//! 4. where nothing of kata-deploy's is in `<kata-dir>`, the configurations and the places of distributions' packages.
//!    Otherwise not: while kata-deploy replaces its files, another Kata's initrd must not be taken for its own.
//!
//! Our own initrd never counts, although our drop-in names it.

mod config;

use std::fs::File;
use std::io::{self, Read as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::inspect::elf_architecture;
use crate::root::HostRoot;

/// Base configurations below `<kata-dir>/share/defaults/kata-containers` that our runtime may be a copy of.
const BASE_CONFIGS: [&str; 5] = [
    "configuration-qemu.toml",
    "configuration-clh.toml",
    "runtime-rs/configuration-qemu-runtime-rs.toml",
    "runtime-rs/configuration-clh-runtime-rs.toml",
    // The same until 3.26.
    "runtime-rs/configuration-cloud-hypervisor.toml",
];
/// Where the shims look by themselves (DEFAULT_RUNTIME_CONFIGURATIONS in kata-types, SYSCONFIG in the Makefiles).
const PACKAGED_CONFIGS: [&str; 4] = [
    "/etc/kata-containers/runtime-rs/configuration.toml",
    "/etc/kata-containers/configuration.toml",
    "/usr/share/defaults/kata-containers/runtime-rs/configuration.toml",
    "/usr/share/defaults/kata-containers/configuration.toml",
];
/// Where packages and Kata's Developer-Guide.md put it; the last is Fedora's.
const PACKAGED_INITRDS: [&str; 2] =
    ["/usr/share/kata-containers/kata-containers-initrd.img", "/var/cache/kata-containers/kata-containers-initrd.img"];
const INITRD: &str = "share/kata-containers/kata-containers-initrd.img";
const IMAGE: &str = "share/kata-containers/kata-containers.img";
const SHIMS: [&str; 2] = ["runtime-rs/bin/containerd-shim-kata-v2", "bin/containerd-shim-kata-v2"];
/// A VERSION file older than the initrd by more than this is of an earlier Kata: since 3.32 kata-deploy writes none,
/// and leaves one that is there.
const SAME_INSTALLATION: Duration = Duration::from_secs(3600);
/// No configuration file of Kata is larger by far.
const LARGEST_TEXT: u64 = 1 << 20;

/// Where to look.
#[derive(Debug, Clone)]
pub struct Search<'a> {
    /// Kata's directory on the node.
    pub kata_dir: &'a Path,
    /// Our directory on the node: nothing in it is Kata's.
    pub install_dir: &'a Path,
    /// The initrd, if somebody says which.
    pub initrd: Option<&'a Path>,
}

/// The Kata initrd of a node, open.
#[derive(Debug)]
pub struct KataInitrd {
    /// To read.
    pub file: File,
    /// Where it was found, and which file that is now.
    pub identity: Identity,
    /// What the VERSION file says, if it is of this installation.
    pub version: Option<String>,
}

/// Enough to tell whether a file is still the same, without reading it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// The path it was found by.
    pub path: PathBuf,
    /// The file that this path leads to.
    pub real_path: PathBuf,
    /// Its inode.
    pub inode: u64,
    /// Its size.
    pub bytes: u64,
    /// When it was written to: seconds and nanoseconds since 1970.
    pub modified: (i64, i64),
    /// When anything of it changed, its content, owner or name.
    pub changed: (i64, i64),
}

impl Identity {
    fn of(root: &HostRoot, path: &Path, file: &File) -> io::Result<Self> {
        let status = file.metadata()?;
        Ok(Self {
            path: path.to_owned(),
            real_path: root.real_path(file).unwrap_or_else(|| path.to_owned()),
            inode: status.ino(),
            bytes: status.len(),
            modified: (status.mtime(), status.mtime_nsec()),
            changed: (status.ctime(), status.ctime_nsec()),
        })
    }
}

impl Search<'_> {
    /// Finds it.
    ///
    /// # Errors
    /// There is none, or it is for another architecture.
    pub fn find(&self, root: &HostRoot) -> Result<KataInitrd> {
        let mut looked_at = Vec::new();
        let found = self.candidates(root, &mut looked_at)?;
        let Some((file, identity)) = found else {
            let images = [self.kata_dir.join(IMAGE), Path::new("/usr").join(IMAGE)];
            return Err(match images.into_iter().find(|image| root.file(image).is_ok()) {
                Some(image) => Error::OnlyImage { image, looked_at },
                None => Error::NoKata { looked_at },
            });
        };
        self.check_shims(root)?;
        let version = self.version_file(root, &identity);
        Ok(KataInitrd { file, identity, version })
    }

    fn candidates(&self, root: &HostRoot, looked_at: &mut Vec<String>) -> Result<Option<(File, Identity)>> {
        if let Some(path) = self.initrd {
            return self.open(root, path, "--kata-initrd", looked_at);
        }
        let deployed = BASE_CONFIGS.map(|name| self.kata_dir.join("share/defaults/kata-containers").join(name));
        let packaged = PACKAGED_CONFIGS.map(PathBuf::from);
        let stages: [(&[PathBuf], Vec<PathBuf>); 2] =
            [(&deployed, vec![self.kata_dir.join(INITRD)]), (&packaged, PACKAGED_INITRDS.map(PathBuf::from).to_vec())];
        let deployed_here = root.dir(&self.kata_dir.join("share")).is_ok();
        for (configs, places) in stages.into_iter().take(if deployed_here { 1 } else { 2 }) {
            for config in configs {
                let Some(named) = named_by(root, config, looked_at) else { continue };
                let by = format!("named by {}", config.display());
                if let Some(found) = self.open(root, &named, &by, looked_at)? {
                    return Ok(Some(found));
                }
            }
            for place in places {
                if let Some(found) = self.open(root, &place, "", looked_at)? {
                    return Ok(Some(found));
                }
            }
        }
        Ok(None)
    }

    fn open(
        &self,
        root: &HostRoot,
        path: &Path,
        why: &str,
        looked_at: &mut Vec<String>,
    ) -> Result<Option<(File, Identity)>> {
        let why = if why.is_empty() { String::new() } else { format!(" ({why})") };
        let mut note = |what: &str| looked_at.push(format!("{}{why}{what}", path.display()));
        let file = match root.file(path) {
            Ok(file) => file,
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
                note("");
                return Ok(None);
            }
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => {
                note(": not a regular file");
                return Ok(None);
            }
            Err(error) => return Err(Error::at("open", path)(error)),
        };
        let identity = Identity::of(root, path, &file).map_err(Error::at("stat", path))?;
        if identity.real_path.starts_with(self.install_dir) {
            note(": that is zpod's own");
            return Ok(None);
        }
        Ok(Some((file, identity)))
    }

    /// Kata's shims say for which machine Kata is.
    fn check_shims(&self, root: &HostRoot) -> Result<()> {
        for shim in SHIMS.map(|name| self.kata_dir.join(name)) {
            let mut start = [0; 20];
            let read = root.file(&shim).and_then(|mut file| file.read_exact(&mut start));
            if let (Ok(()), Some(found)) = (read, elf_architecture(&start)) {
                check_architecture(&shim, found)?;
            }
        }
        Ok(())
    }

    fn version_file(&self, root: &HostRoot, initrd: &Identity) -> Option<String> {
        let file = root.file(&self.kata_dir.join("VERSION")).ok()?;
        let age = initrd.modified.0.saturating_sub(file.metadata().ok()?.mtime());
        let mut text = String::new();
        file.take(256).read_to_string(&mut text).ok()?;
        (age <= i64::try_from(SAME_INSTALLATION.as_secs()).ok()?).then(|| text.trim().to_owned())
    }
}

impl KataInitrd {
    /// Whether the path it was found by still leads to this very file.
    pub fn is_unchanged(&self, root: &HostRoot) -> bool {
        let now = root.file(&self.identity.path).and_then(|file| Identity::of(root, &self.identity.path, &file));
        now.is_ok_and(|now| now == self.identity)
    }
}

/// The architecture of our kernel: Debian's for x86-64, so far.
pub(crate) const ARCHITECTURE: &str = "x86_64";

pub(crate) fn check_architecture(path: &Path, found: &str) -> Result<()> {
    if found == ARCHITECTURE {
        return Ok(());
    }
    Err(Error::Architecture { path: path.to_owned(), found: found.to_owned(), wanted: ARCHITECTURE })
}

fn named_by(root: &HostRoot, path: &Path, looked_at: &mut Vec<String>) -> Option<PathBuf> {
    let mut text = String::new();
    root.file(path).ok()?.take(LARGEST_TEXT).read_to_string(&mut text).ok()?;
    match config::initrd(&text) {
        Ok(named) => named,
        Err(error) => {
            looked_at.push(format!("what {} names (it can't be read: {error})", path.display()));
            None
        }
    }
}

#[cfg(test)]
mod tests;
