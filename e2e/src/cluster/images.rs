//! What the nodes run in the place of images: directories, and a file for each that says what it is called.

use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result};
use serde_json::json;

use crate::inputs;

/// In each image, so that a mount has a place and a user a name, as in a distroless one.
const DIRECTORIES: [&str; 8] = ["dev", "etc", "proc", "run", "sys", "tmp", "var", "bin"];
const PASSWD: &str = "root:x:0:0:root:/root:/sbin/nologin\nnonroot:x:65532:65532:nonroot:/home/nonroot:/sbin/nologin\n";
const GROUP: &str = "root:x:0:\nnonroot:x:65532:\n";
/// CSI sidecars that are built from their own sources.
const SIDECARS: [&str; 4] = ["csi-provisioner", "csi-resizer", "csi-snapshotter", "snapshot-controller"];
/// Sidecars that have a stand-in: its command, and the image's name.
const STAND_INS: [(&str, &str); 2] =
    [("node-driver-registrar", "csi-node-driver-registrar"), ("livenessprobe", "livenessprobe")];

/// Writes every image into a directory. Programs of zpod that this build has not made are left out: a pod that asks for
/// one is told so by its event.
///
/// # Errors
/// When a part that must be there is missing.
pub fn write(dir: &Path) -> Result<()> {
    busybox(dir)?;
    for name in SIDECARS {
        let image = Image::new(dir, name)?;
        image.file(name, &inputs::kubernetes(name)?)?;
        image.finish(&[name], &[&format!("/{name}")], false)?;
    }
    let stand_in = inputs::sidecar()?;
    for (command, name) in STAND_INS {
        let image = Image::new(dir, name)?;
        image.file("zpod-e2e-sidecar", &stand_in)?;
        image.finish(&[name], &["/zpod-e2e-sidecar", command], true)?;
    }
    zpod(dir)
}

fn busybox(dir: &Path) -> Result<()> {
    let image = Image::new(dir, "busybox")?;
    let busybox = inputs::busybox()?;
    image.file("bin/busybox", &busybox)?;
    let list = Command::new(&busybox).arg("--list").output().context("run busybox")?;
    for applet in String::from_utf8_lossy(&list.stdout).lines().filter(|applet| *applet != "busybox") {
        symlink("busybox", image.root.join("bin").join(applet)).with_context(|| format!("link {applet}"))?;
    }
    image.finish(&["busybox"], &[], false)?;
    // What `kubectl zpod` runs a transfer's pod with.
    let image = Image::new(dir, "pause")?;
    image.file("bin/busybox", &busybox)?;
    image.finish(&["pause"], &["/bin/busybox", "sleep", "1000000"], false)
}

/// zpod's own two images, as their Dockerfiles lay them out.
fn zpod(dir: &Path) -> Result<()> {
    let beside = |name: &str| inputs::zpod().map(|zpod| zpod.with_file_name(name)).ok().filter(|path| path.is_file());
    if let (Some(controller), Some(node)) = (beside("zpod-controller"), beside("zpod-node")) {
        let image = Image::new(dir, "zpod")?;
        image.file("zpod-controller", &controller)?;
        image.file("zpod-node", &node)?;
        image.finish(&["zpod"], &[], true)?;
    }
    if let (Some(installer), Ok(guest)) = (beside("zpod-installer"), inputs::guest_image()) {
        let image = Image::new(dir, "zpod-guest")?;
        image.file("zpod-installer", &installer)?;
        image.file("guest/vmlinuz", &guest.kernel)?;
        image.file("guest/overlay.cpio.zst", &guest.overlay)?;
        image.finish(&["zpod-guest"], &[], true)?;
    }
    Ok(())
}

/// One image in the making.
struct Image {
    root: PathBuf,
    description: PathBuf,
}

impl Image {
    fn new(dir: &Path, name: &str) -> Result<Self> {
        let root = dir.join(name);
        for name in DIRECTORIES {
            create(&root.join(name))?;
        }
        fs::set_permissions(root.join("tmp"), fs::Permissions::from_mode(0o1777)).context("open tmp to all")?;
        fs::write(root.join("etc/passwd"), PASSWD).context("write passwd")?;
        fs::write(root.join("etc/group"), GROUP).context("write group")?;
        Ok(Self { description: dir.join(format!("{name}.json")), root })
    }

    fn file(&self, to: &str, from: &Path) -> Result<()> {
        let to = self.root.join(to);
        to.parent().map_or(Ok(()), create)?;
        fs::copy(from, &to).with_context(|| format!("copy {} to {}", from.display(), to.display()))?;
        Ok(())
    }

    /// `libraries`: it runs with the machine's own, for it is linked to them.
    fn finish(self, references: &[&str], entrypoint: &[&str], libraries: bool) -> Result<()> {
        let description = json!({
            "references": references,
            "rootfs": self.root,
            "entrypoint": entrypoint,
            "libraries": libraries,
        });
        let text = serde_json::to_vec_pretty(&description).context("describe the image")?;
        fs::write(&self.description, text).with_context(|| format!("write {}", self.description.display()))
    }
}

fn create(dir: &Path) -> Result<()> {
    fs::create_dir_all(dir).with_context(|| format!("create {}", dir.display()))
}
