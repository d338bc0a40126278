//! Where the things under test are. What is missing is an error that names the command which makes it: a test that
//! skips itself proves nothing.

use std::env;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use zpod_image::cache::Cache;

/// Kernel and overlay of the guest image.
#[derive(Debug, Clone)]
pub struct Image {
    /// The kernel.
    pub kernel: PathBuf,
    /// The initramfs overlay with zpod-guest.
    pub overlay: PathBuf,
}

/// The guest image: `ZPOD_GUEST_IMAGE_DIR`, or where `make image` or `zpod-image` put it.
///
/// # Errors
/// When it is not there.
pub fn guest_image() -> Result<Image> {
    let dir = match env::var_os("ZPOD_GUEST_IMAGE_DIR") {
        Some(dir) => PathBuf::from(dir),
        None => made_here().map_or_else(|| Cache::from_env().map(|cache| cache.guest_image()), Ok)?,
    };
    let make = "make it with `make image`, or point ZPOD_GUEST_IMAGE_DIR at one";
    Ok(Image { kernel: file(dir.join("vmlinuz"), make)?, overlay: file(dir.join("overlay.cpio.zst"), make)? })
}

/// What `make image` made: `guest-image` in the target directory that the running program lies in.
fn made_here() -> Option<PathBuf> {
    let own = env::current_exe().ok()?;
    own.ancestors().map(|dir| dir.join("guest-image")).find(|dir| dir.join("vmlinuz").is_file())
}

/// The `zpod` binary: `ZPOD_BIN`, or the one this build made.
///
/// # Errors
/// When it is not there.
pub fn zpod() -> Result<PathBuf> {
    binary("ZPOD_BIN", "zpod", "make it with `cargo build -p zpod-driver --bin zpod`, or set ZPOD_BIN")
}

/// The plugin of kubectl: `ZPOD_KUBECTL`, or the one this build made.
///
/// # Errors
/// When it is not there.
pub fn kubectl_zpod() -> Result<PathBuf> {
    binary("ZPOD_KUBECTL", "kubectl-zpod", "make it with `cargo build -p zpod-kubectl`, or set ZPOD_KUBECTL")
}

/// The agent stand-in.
///
/// # Errors
/// When it is not there.
pub fn stand_in() -> Result<PathBuf> {
    let make = "make it with `cargo build -p zpod-e2e --bins`, or set ZPOD_E2E_STAND_IN";
    binary("ZPOD_E2E_STAND_IN", "zpod-e2e-agent", make)
}

/// The tool that runs in containers.
///
/// # Errors
/// When it is not there.
pub fn container_tool() -> Result<PathBuf> {
    binary("ZPOD_E2E_TOOL", "zpod-e2e-tool", "make it with `cargo build -p zpod-e2e --bins`, or set ZPOD_E2E_TOOL")
}

/// A real kata-agent, if one was named.
///
/// # Errors
/// When one was named that is not there.
pub fn kata_agent() -> Result<Option<PathBuf>> {
    let named = env::var_os("ZPOD_E2E_KATA_AGENT").filter(|path| !path.is_empty());
    named.map(|path| file(path.into(), "unset ZPOD_E2E_KATA_AGENT to use the stand-in")).transpose()
}

/// The statically linked busybox of the containers.
///
/// # Errors
/// When it is not there.
pub fn busybox() -> Result<PathBuf> {
    let make = "install it with `apt-get install busybox-static`";
    ["/usr/bin/busybox", "/bin/busybox"]
        .iter()
        .map(PathBuf::from)
        .find(|path| path.is_file())
        .with_context(|| format!("busybox is missing; {make}"))
}

/// QEMU.
///
/// # Errors
/// When it is not there.
pub fn qemu() -> Result<PathBuf> {
    program("qemu-system-x86_64", "install it with `apt-get install qemu-system-x86`")
}

/// The vhost-user device that gives QEMU a hybrid vsock.
///
/// # Errors
/// When it is not there.
pub fn vsock_device() -> Result<PathBuf> {
    let cached = Cache::from_env()?.dir().join("bin/vhost-device-vsock");
    if cached.is_file() {
        return Ok(cached);
    }
    program("vhost-device-vsock", "install it with `deploy/setup.sh`")
}

/// A program of the test cluster: a part of Kubernetes, a CSI sidecar, Helm.
///
/// # Errors
/// When it is not there.
pub fn kubernetes(name: &str) -> Result<PathBuf> {
    file(Cache::from_env()?.dir().join("bin").join(name), "build it with `deploy/setup.sh kubernetes`")
}

/// The directory of the snapshot API's CRDs.
///
/// # Errors
/// When it is not there.
pub fn snapshot_crds() -> Result<PathBuf> {
    // bin/csi-snapshotter is a link into the place of one version.
    let program = kubernetes("csi-snapshotter")?.canonicalize().context("find csi-snapshotter")?;
    let crds = program.parent().and_then(Path::parent).map(|place| place.join("crds")).filter(|dir| dir.is_dir());
    crds.with_context(|| format!("no CRDs with {}; build it with `deploy/setup.sh kubernetes`", program.display()))
}

/// The program that is a node of the test cluster.
///
/// # Errors
/// When it is not there.
pub fn node_program() -> Result<PathBuf> {
    binary("ZPOD_E2E_NODE", "zpod-e2e-node", "make it with `cargo build -p zpod-e2e --bins`, or set ZPOD_E2E_NODE")
}

/// The stand-in of CSI sidecars.
///
/// # Errors
/// When it is not there.
pub fn sidecar() -> Result<PathBuf> {
    let make = "make it with `cargo build -p zpod-e2e --bins`, or set ZPOD_E2E_SIDECAR";
    binary("ZPOD_E2E_SIDECAR", "zpod-e2e-sidecar", make)
}

/// A program of the PATH.
///
/// # Errors
/// When it is not there; the message says `make`.
pub fn program(name: &str, make: &str) -> Result<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .map(|dir| dir.join(name))
        .find(|path| path.is_file())
        .with_context(|| format!("{name} is missing; {make}"))
}

/// A binary of this workspace lies beside the running one, or beside the directory of the running test.
fn binary(variable: &str, name: &str, make: &str) -> Result<PathBuf> {
    if let Some(path) = env::var_os(variable) {
        return file(path.into(), make);
    }
    let own = env::current_exe().context("find the running program")?;
    own.ancestors()
        .skip(1)
        .take(2)
        .map(|dir| dir.join(name))
        .find(|path| path.is_file())
        .with_context(|| format!("{name} is missing beside {}; {make}", own.display()))
}

fn file(path: PathBuf, make: &str) -> Result<PathBuf> {
    if !path.is_file() {
        bail!("{} is missing; {make}", path.display());
    }
    Ok(path)
}
