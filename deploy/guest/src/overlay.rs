//! What lies under `/zpod` in the guest.
//!
//! ```text
//! /zpod/init                       zpod-guest, static
//! /zpod/bin/{zpool,zfs}            run as: /zpod/lib/ld-linux-x86-64.so.2
//! /zpod/lib/                         --library-path /zpod/lib /zpod/bin/zpool ...
//! /zpod/modules/order              a line "GROUP FILE" per module, in load order
//! /zpod/modules/*.ko
//! /zpod/modules/kernel-release     what `uname -r` has to say
//! /zpod/share/doc/PACKAGE          its copyright file
//! /zpod/versions.json
//! ```

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
};

use serde_json::json;

use crate::{
    Archive, Error, Result,
    chroot::Chroot,
    libraries,
    modules::{self, Module},
};

/// The programs, relative to the chroot, and their names in the guest.
const TOOLS: [(&str, &str); 2] = [("usr/sbin/zpool", "zpool"), ("usr/sbin/zfs", "zfs")];
/// Texts that Debian's copyright files point to, in /usr/share/common-licenses.
const LICENSES: [&str; 4] = ["Apache-2.0", "GPL-2", "GPL-3", "LGPL-2.1"];

/// An overlay in the making, and what went into it.
#[derive(Debug)]
pub struct Overlay {
    /// The archive.
    pub archive: Archive,
    /// The modules in load order.
    pub modules: Vec<Module>,
    /// The packages whose files are in the overlay or are the kernel, with versions.
    pub packages: BTreeMap<String, String>,
}

/// Puts the overlay together from a build chroot and a guest binary;
/// `scratch` is an empty directory to work in.
///
/// # Errors
/// The chroot lacks something that belongs into the overlay.
pub fn assemble(chroot: &Chroot, guest: Vec<u8>, extra: &[String], scratch: &Path) -> Result<Overlay> {
    let mut archive = Archive::new();
    archive.file("zpod/init", guest, 0o755);

    let mut sources = BTreeSet::new();
    for (source, name) in TOOLS {
        archive.file(&format!("zpod/bin/{name}"), read(chroot, source)?, 0o755);
        sources.insert(source.to_owned());
    }
    for (name, path) in libraries::needed(chroot, &TOOLS.map(|(source, _)| source))? {
        let path = path.to_string_lossy();
        archive.file(&format!("zpod/lib/{name}"), read(chroot, &path)?, 0o755);
        sources.insert(path.into_owned());
    }

    let wanted: Vec<_> =
        modules::WANTED.iter().copied().chain(extra.iter().map(|name| (modules::Group::Boot, name.as_str()))).collect();
    let modules = modules::load_order(&chroot.modules(), chroot.release(), &wanted)?;
    for module in &modules {
        let bytes = modules::loadable(chroot, module, scratch)?;
        archive.file(&format!("zpod/modules/{}.ko", module.name), bytes, 0o644);
    }
    archive.file("zpod/modules/order", modules::order_file(&modules), 0o644);
    archive.file("zpod/modules/kernel-release", format!("{}\n", chroot.release()), 0o644);

    let packages = origins(chroot, &sources)?;
    for package in packages.keys() {
        let copyright = read(chroot, &format!("usr/share/doc/{package}/copyright"))?;
        archive.file(&format!("zpod/share/doc/{package}"), copyright, 0o644);
    }
    for name in LICENSES {
        let text = read(chroot, &format!("usr/share/common-licenses/{name}"))?;
        archive.file(&format!("zpod/share/doc/common-licenses/{name}"), text, 0o644);
    }
    let versions = json!({ "kernel_release": chroot.release(), "packages": packages });
    archive.file("zpod/versions.json", format!("{versions:#}\n"), 0o644);
    Ok(Overlay { archive, modules, packages })
}

fn read(chroot: &Chroot, path: &str) -> Result<Vec<u8>> {
    let path = chroot.root().join(path);
    fs::read(&path).map_err(Error::io("read", path))
}

/// The packages the files come from, the kernel's and the modules' included.
fn origins(chroot: &Chroot, sources: &BTreeSet<String>) -> Result<BTreeMap<String, String>> {
    let bad = |reason: String| Error::BadChroot { root: chroot.root().to_owned(), reason };
    let mut names = BTreeSet::from([format!("linux-image-{}", chroot.release()), "zfs-dkms".to_owned()]);
    for source in sources {
        // Package lists name the file a library's link leads to, or the link.
        let owner = chroot.owner(source)?.ok_or_else(|| bad(format!("no package owns /{source}")))?;
        names.insert(owner);
    }
    let installed = chroot.packages()?;
    names
        .into_iter()
        .map(|name| {
            let version = installed.get(&name).cloned().ok_or_else(|| bad(format!("{name} is not installed")))?;
            Ok((name, version))
        })
        .collect()
}
