//! The shared libraries the ZFS tools need, and no more.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use crate::{
    Error, Result,
    chroot::{Chroot, LIB_DIR, LOADER},
};

/// What glibc opens at run time without naming it in the ELF header:
/// `pthread_cancel` and `pthread_exit` need the unwinder (glibc 2.36,
/// `nptl/../sysdeps/nptl/unwind-link.c`), and `zpool` uses threads. Without it
/// the tool aborts.
const OPENED_LATER: [&str; 1] = ["libgcc_s.so.1"];

/// The libraries of these tools and the loader, by the name they are looked up
/// under, with their paths relative to the chroot's root.
///
/// # Errors
/// [`Error::NoLibrary`] when one is missing in the chroot.
pub fn needed(chroot: &Chroot, tools: &[&str]) -> Result<BTreeMap<String, PathBuf>> {
    let place = |name: &str| (name.to_owned(), Path::new(LIB_DIR).join(name));
    let mut found: BTreeMap<String, PathBuf> = OPENED_LATER.iter().chain([&LOADER]).map(|name| place(name)).collect();
    for tool in tools {
        let listing = Chroot::run(chroot.loader().arg("--list").arg(chroot.root().join(tool)))?;
        for name in names(&String::from_utf8_lossy(&listing)) {
            found.extend([place(name)]);
        }
    }
    let missing = found.iter().find(|(_, path)| !chroot.root().join(path).is_file());
    match missing {
        None => Ok(found),
        Some((library, _)) => {
            Err(Error::NoLibrary { tool: tools.join(", "), library: library.clone(), root: chroot.root().to_owned() })
        }
    }
}

/// The names in the loader's listing, which is recursive:
/// `libzfs.so.6 => /root/usr/lib/.../libzfs.so.6 (0x7f...)`.
fn names(listing: &str) -> impl Iterator<Item = &str> {
    listing
        .lines()
        .filter_map(|line| line.split_whitespace().next())
        .filter_map(|name| name.rsplit('/').next())
        .filter(|name| !name.starts_with("linux-vdso"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_vdso_is_no_library_and_the_loader_goes_by_its_last_name() {
        let listing = "\tlinux-vdso.so.1 (0x1)\n\tlibzfs.so.6 => r/libzfs.so.6 (0x2)\n\t/lib64/ld-linux-x86-64.so.2 => r/ld (0x3)\n";
        assert_eq!(names(listing).collect::<Vec<_>>(), ["libzfs.so.6", "ld-linux-x86-64.so.2"]);
    }
}
