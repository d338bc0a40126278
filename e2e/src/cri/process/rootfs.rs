//! A container's root: the image's files, unchanged, below a layer of memory; the mounts; then a pivot.

use std::fs::{self, File, Permissions};
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Component, Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::unistd::{chdir, fchdir, pivot_root};
use serde::{Deserialize, Serialize};

use super::mounts::{Mount, Propagation};

/// What a root is made of.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Root {
    /// An empty directory of the container's own.
    pub(super) dir: PathBuf,
    pub(super) image: PathBuf,
    pub(super) libraries: bool,
    pub(super) read_only: bool,
    pub(super) privileged: bool,
    /// Whether the container has a PID namespace that is not the node's.
    pub(super) own_processes: bool,
    /// Small files: path and text.
    pub(super) files: Vec<(String, String)>,
    pub(super) mounts: Vec<Mount>,
    pub(super) masked: Vec<PathBuf>,
    pub(super) unwritable: Vec<PathBuf>,
}

const LIBRARIES: [&str; 4] = ["/usr/lib", "/usr/lib64", "/lib", "/lib64"];
const DEVICES: [&str; 6] = ["null", "zero", "full", "random", "urandom", "tty"];
/// As many as the kernel follows.
const MOST_LINKS: usize = 40;

/// Makes the root and makes it `/`. The mount namespace is the caller's own; its mounts are still peers of the node's.
pub(super) fn enter(spec: &Root) -> Result<()> {
    let root = compose(spec).context("compose the root")?;
    for mount in &spec.mounts {
        bind(&root, mount)
            .with_context(|| format!("mount {} at {}", mount.source.display(), mount.target.display()))?;
    }
    if spec.read_only {
        remount_read_only(&root, MsFlags::empty()).context("make the root read-only")?;
    }
    let node = File::open("/").context("open the node's root")?;
    chdir(&root)?;
    // Both in one place: the old root lies on top of the new one.
    pivot_root(".", ".").context("pivot into the root")?;
    // From here on "." is the old root alone: seen from the new one, both would change.
    fchdir(&node).context("go to the node's root")?;
    // A slave first: unmounting a peer would unmount the node's own mounts too.
    change(Path::new("."), MsFlags::MS_SLAVE | MsFlags::MS_REC).context("let go of the node's mounts")?;
    umount2(".", MntFlags::MNT_DETACH).context("leave the node's root")?;
    chdir("/")?;
    if !spec.privileged {
        hide(spec)?;
    }
    Ok(())
}

fn compose(spec: &Root) -> Result<PathBuf> {
    let new = |kind: &str, target: &Path, flags: MsFlags, data: &str| {
        fs::create_dir_all(target)?;
        mount(Some(kind), target, Some(kind), flags, Some(data)).with_context(|| format!("{}", target.display()))
    };
    let quiet = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    new("tmpfs", &spec.dir, quiet, "mode=755")?;
    change(&spec.dir, MsFlags::MS_PRIVATE)?;
    let [upper, work, root] = ["upper", "work", "root"].map(|name| spec.dir.join(name));
    for dir in [&upper, &work, &root] {
        fs::create_dir(dir)?;
    }
    let [lower, upper, work] = [&spec.image, &upper, &work].map(|path| path.display());
    new("overlay", &root, MsFlags::empty(), &format!("lowerdir={lower},upperdir={upper},workdir={work}"))?;
    if spec.libraries {
        for library in LIBRARIES {
            bind_library(&root, Path::new(library)).with_context(|| format!("bind {library}"))?;
        }
    }
    if spec.own_processes {
        new("proc", &root.join("proc"), quiet | MsFlags::MS_NOEXEC, "")?;
    } else {
        bind_tree(Path::new("/proc"), &root.join("proc"))?;
    }
    let sys = if spec.privileged { quiet } else { quiet | MsFlags::MS_RDONLY };
    new("sysfs", &root.join("sys"), sys | MsFlags::MS_NOEXEC, "")?;
    let dev = root.join("dev");
    if spec.privileged {
        bind_tree(Path::new("/dev"), &dev)?;
    } else {
        new("tmpfs", &dev, MsFlags::MS_NOSUID | MsFlags::MS_STRICTATIME, "mode=755,size=65536k")?;
        for name in DEVICES {
            let node = dev.join(name);
            File::create(&node)?;
            mount(Some(&Path::new("/dev").join(name)), &node, None::<&str>, MsFlags::MS_BIND, None::<&str>)?;
        }
        new(
            "devpts",
            &dev.join("pts"),
            MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC,
            "newinstance,ptmxmode=0666,mode=0620",
        )?;
        for (name, target) in [("ptmx", "pts/ptmx"), ("fd", "/proc/self/fd"), ("stdin", "/proc/self/fd/0")] {
            symlink(target, dev.join(name))?;
        }
        for (name, target) in [("stdout", "/proc/self/fd/1"), ("stderr", "/proc/self/fd/2")] {
            symlink(target, dev.join(name))?;
        }
        new("tmpfs", &dev.join("shm"), quiet | MsFlags::MS_NOEXEC, "mode=1777,size=65536k")?;
    }
    for (path, text) in &spec.files {
        let path = inside(&root, Path::new(path))?;
        if let Some(dir) = path.parent() {
            fs::create_dir_all(dir)?;
        }
        fs::write(&path, text)?;
        fs::set_permissions(&path, Permissions::from_mode(0o644))?;
    }
    Ok(root)
}

/// As the machine has it: Debian's `/lib` is a link to `usr/lib`.
fn bind_library(root: &Path, library: &Path) -> Result<()> {
    let target = root.join(library.strip_prefix("/")?);
    let Ok(kind) = fs::symlink_metadata(library) else { return Ok(()) };
    if kind.is_symlink() {
        if fs::symlink_metadata(&target).is_err() {
            symlink(fs::read_link(library)?, &target)?;
        }
        return Ok(());
    }
    fs::create_dir_all(&target)?;
    bind_tree(library, &target)?;
    remount_read_only(&target, MsFlags::empty())
}

fn bind_tree(source: &Path, target: &Path) -> Result<()> {
    fs::create_dir_all(target)?;
    mount(Some(source), target, None::<&str>, MsFlags::MS_BIND | MsFlags::MS_REC, None::<&str>)?;
    change(target, MsFlags::MS_PRIVATE | MsFlags::MS_REC)
}

fn bind(root: &Path, spec: &Mount) -> Result<()> {
    let kind = match fs::metadata(&spec.source) {
        Ok(kind) => kind,
        // containerd makes the directory that a hostPath without a type asks for.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            fs::create_dir_all(&spec.source).context("create the source")?;
            fs::metadata(&spec.source)?
        }
        Err(error) => return Err(error).context("look at the source"),
    };
    let target = inside(root, &spec.target)?;
    if kind.is_dir() {
        fs::create_dir_all(&target).context("create the mount point")?;
    } else if !target.exists() {
        if let Some(dir) = target.parent() {
            fs::create_dir_all(dir).context("create the mount point's directory")?;
        }
        File::create(&target).context("create the mount point")?;
    }
    mount(Some(&spec.source), &target, None::<&str>, MsFlags::MS_BIND | MsFlags::MS_REC, None::<&str>)?;
    if spec.read_only {
        remount_read_only(&target, MsFlags::empty()).context("make it read-only")?;
    }
    let propagation = match spec.propagation {
        Propagation::Private => MsFlags::MS_PRIVATE,
        Propagation::HostToContainer => MsFlags::MS_SLAVE,
        Propagation::Bidirectional => MsFlags::MS_SHARED,
    };
    change(&target, propagation | MsFlags::MS_REC)
}

fn change(target: &Path, flags: MsFlags) -> Result<()> {
    mount(None::<&str>, target, None::<&str>, flags, None::<&str>).with_context(|| format!("{}", target.display()))
}

fn remount_read_only(target: &Path, others: MsFlags) -> Result<()> {
    change(target, others | MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY)
}

/// What kubelet asks to mask is there or not, depending on the kernel.
fn hide(spec: &Root) -> Result<()> {
    for path in spec.masked.iter().filter(|path| path.exists()) {
        let masked = if path.is_dir() {
            mount(Some("tmpfs"), path, Some("tmpfs"), MsFlags::MS_RDONLY, Some("size=0k"))
        } else {
            mount(Some("/dev/null"), path, None::<&str>, MsFlags::MS_BIND, None::<&str>)
        };
        masked.with_context(|| format!("mask {}", path.display()))?;
    }
    for path in spec.unwritable.iter().filter(|path| path.exists()) {
        mount(Some(path), path, None::<&str>, MsFlags::MS_BIND | MsFlags::MS_REC, None::<&str>)?;
        let kept = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
        remount_read_only(path, kept).with_context(|| format!("make {} read-only", path.display()))?;
    }
    Ok(())
}

/// Where a container's path lies before the pivot: its links are followed within the root, so that none leads out.
fn inside(root: &Path, path: &Path) -> Result<PathBuf> {
    let mut place = PathBuf::new();
    let mut rest: Vec<_> = path.components().rev().map(|part| part.as_os_str().to_owned()).collect();
    let mut links = 0;
    while let Some(part) = rest.pop() {
        match Path::new(&part).components().next() {
            Some(Component::RootDir) => place.clear(),
            Some(Component::ParentDir) => drop(place.pop()),
            Some(Component::Normal(name)) => {
                let next = root.join(&place).join(name);
                if let Ok(target) = fs::read_link(&next) {
                    links += 1;
                    if links > MOST_LINKS {
                        bail!("{}: too many links", path.display());
                    }
                    rest.extend(target.components().rev().map(|part| part.as_os_str().to_owned()));
                } else {
                    place.push(name);
                }
            }
            _ => {}
        }
    }
    Ok(root.join(place))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_in_an_image_lead_nowhere_outside_it() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        fs::create_dir_all(root.join("run/secrets")).unwrap();
        fs::create_dir_all(root.join("var")).unwrap();
        symlink("/run", root.join("var/run")).unwrap();
        symlink("../../../../etc", root.join("up")).unwrap();
        symlink("around", root.join("around")).unwrap();
        for (path, expected) in [
            ("/var/run/secrets/token", "run/secrets/token"),
            ("/up/hosts", "etc/hosts"),
            ("/new/place", "new/place"),
            ("/", ""),
        ] {
            assert_eq!(inside(root, Path::new(path)).unwrap(), root.join(expected), "{path}");
        }
        assert!(inside(root, Path::new("/around/x")).is_err());
    }
}
