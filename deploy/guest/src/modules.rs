//! Which kernel modules the guest loads, and in what order.

use std::{collections::BTreeMap, fmt, fs, path::Path};

use crate::{Error, Result, chroot::Chroot};

/// When the guest loads a module.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Group {
    /// Before the agent can be reached or can do its work.
    Boot,
    /// Beside that: no request needs it before the first volume.
    Zfs,
}

impl fmt::Display for Group {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Boot => "boot",
            Self::Zfs => "zfs",
        })
    }
}

/// What the guest needs, the transport to the agent first.
///
/// The rest of Kata's checklist (its kernel's config fragments) is built into
/// Debian's cloud kernel: virtio-pci, virtio-console, virtio-fs and FUSE, ext4,
/// packet sockets, ACPI hotplug, cgroups, seccomp. Modules that are built in
/// are skipped, so a name may stay here when a later kernel changes that.
pub const WANTED: [(Group, &str); 12] = [
    (Group::Boot, "vmw_vsock_virtio_transport"), // the shim reaches the agent by it
    (Group::Boot, "virtio_pci"),
    (Group::Boot, "virtio_mmio"), // Firecracker has no PCI
    (Group::Boot, "virtio_blk"),  // volumes, with block_device_driver = virtio-blk
    (Group::Boot, "virtio_scsi"), // volumes, with QEMU's default driver
    (Group::Boot, "sd_mod"),
    (Group::Boot, "virtio_net"), // CreateSandbox configures the pod's network
    (Group::Boot, "virtiofs"),   // the container's root file system
    (Group::Boot, "overlay"),    // and its writable layer
    (Group::Boot, "virtio_rng"), // Kata always plugs one
    (Group::Boot, "virtio_console"),
    (Group::Zfs, "zfs"),
];

/// A module to load.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Module {
    /// When to load it.
    pub group: Group,
    /// Its name, with underscores.
    pub name: String,
    /// Its file, relative to the kernel's module directory.
    pub path: String,
}

/// The modules and everything they depend on, in an order in which each finds
/// its dependencies loaded.
///
/// # Errors
/// [`Error::NoModule`] when one is neither a file nor built in.
pub fn load_order(modules: &Path, release: &str, wanted: &[(Group, &str)]) -> Result<Vec<Module>> {
    let read = |name: &str| {
        let path = modules.join(name);
        fs::read_to_string(&path).map_err(Error::io("read", path))
    };
    let builtin: Vec<String> = read("modules.builtin")?.lines().map(name_of).collect();
    let listing = read("modules.dep")?;
    let files: BTreeMap<String, (&str, &str)> = listing
        .lines()
        .filter_map(|line| line.split_once(':'))
        .map(|(path, needs)| (name_of(path), (path, needs)))
        .collect();

    let mut order: Vec<Module> = Vec::new();
    for (group, name) in wanted {
        let name = normal(name);
        let Some((path, needs)) = files.get(&name) else {
            if builtin.contains(&name) {
                continue;
            }
            return Err(Error::NoModule { module: name, release: release.to_owned() });
        };
        // depmod lists all dependencies, the one to load first last.
        for path in needs.split_whitespace().rev().chain([*path]) {
            let name = name_of(path);
            if !order.iter().any(|module| module.name == name) {
                order.push(Module { group: *group, name, path: path.to_owned() });
            }
        }
    }
    Ok(order)
}

/// The module as the guest loads it: decompressed, without the symbols that
/// linking doesn't need. Measured on zfs.ko in emulation: loading takes 2.9 s
/// instead of 6.6 s, since ftrace looks each of its 6,545 call sites up in the
/// symbol table, one by one (`find_kallsyms_symbol`). Type information for BPF
/// goes too (0.5 MiB of memory).
///
/// Stripping also drops the signature: the kernel notes that, and loads the
/// module unless it runs locked down.
///
/// # Errors
/// The chroot's `xz` or `strip` fails.
pub fn loadable(chroot: &Chroot, module: &Module, scratch: &Path) -> Result<Vec<u8>> {
    let source = chroot.modules().join(&module.path);
    let plain = scratch.join(format!("{}.ko", module.name));
    if module.path.ends_with(".xz") {
        let bytes = Chroot::run(chroot.tool("usr/bin/xz").args(["--decompress", "--stdout"]).arg(&source))?;
        fs::write(&plain, bytes).map_err(Error::io("write", &plain))?;
    } else {
        fs::copy(&source, &plain).map_err(Error::io("copy", &source))?;
    }
    let strip = ["--strip-unneeded", "--remove-section=.BTF", "--remove-section=.BTF.base"];
    Chroot::run(chroot.tool("usr/bin/strip").args(strip).arg(&plain))?;
    fs::read(&plain).map_err(Error::io("read", &plain))
}

/// The text of `/zpod/modules/order`: a line `GROUP FILE` per module.
#[must_use]
pub fn order_file(modules: &[Module]) -> String {
    modules.iter().map(|module| format!("{} {}.ko\n", module.group, module.name)).collect()
}

/// `kernel/drivers/char/hw_random/virtio-rng.ko.xz` is `virtio_rng`.
fn name_of(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    normal(file.split(".ko").next().unwrap_or(file))
}

fn normal(name: &str) -> String {
    name.replace('-', "_")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kernel() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        let dep = "kernel/net/transport.ko.xz: kernel/net/common.ko.xz kernel/net/vsock.ko.xz\n\
                   kernel/net/common.ko.xz: kernel/net/vsock.ko.xz\n\
                   kernel/net/vsock.ko.xz:\n\
                   kernel/virtio-rng.ko.xz:\n\
                   updates/dkms/zfs.ko: updates/dkms/spl.ko kernel/net/vsock.ko.xz\n\
                   updates/dkms/spl.ko:\n";
        fs::write(dir.path().join("modules.dep"), dep).unwrap();
        fs::write(dir.path().join("modules.builtin"), "kernel/fs/fuse/virtiofs.ko\n").unwrap();
        dir
    }

    fn order(wanted: &[(Group, &str)]) -> Result<String> {
        load_order(kernel().path(), "6.12", wanted).map(|modules| order_file(&modules))
    }

    #[test]
    fn dependencies_come_first_and_once_and_builtin_modules_not_at_all() {
        let wanted =
            [(Group::Boot, "transport"), (Group::Boot, "virtiofs"), (Group::Boot, "virtio_rng"), (Group::Zfs, "zfs")];
        assert_eq!(
            order(&wanted).unwrap(),
            "boot vsock.ko\nboot common.ko\nboot transport.ko\nboot virtio_rng.ko\nzfs spl.ko\nzfs zfs.ko\n"
        );
    }

    #[test]
    fn a_module_that_does_not_exist_is_named() {
        let error = order(&[(Group::Boot, "nonsense")]).unwrap_err().to_string();
        assert!(error.contains("nonsense") && error.contains("6.12"), "{error}");
    }
}
