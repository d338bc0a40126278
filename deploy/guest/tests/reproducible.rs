//! The same inputs have to give the same bytes, whatever the file system says.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    fs::{self, FileTimes},
    os::unix::fs::{PermissionsExt, symlink},
    path::Path,
    time::{Duration, SystemTime},
};

use zpod_image::Archive;

/// A small root, its files made in the given order and with the given age.
fn root(dir: &Path, names: &[&str], age: Duration) {
    fs::create_dir_all(dir.join("zpod/modules")).unwrap();
    symlink("bin", dir.join("sbin")).unwrap();
    for name in names {
        let path = dir.join("zpod/modules").join(name);
        fs::write(&path, name.repeat(1000)).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
        let times = FileTimes::new().set_modified(SystemTime::now() - age);
        fs::File::options().write(true).open(&path).unwrap().set_times(times).unwrap();
    }
}

fn pack(dir: &Path) -> Vec<u8> {
    let mut archive = Archive::new();
    archive.tree(dir).unwrap();
    archive.to_zstd().unwrap()
}

#[test]
fn two_roots_with_equal_contents_make_equal_archives() {
    let (one, two) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    root(one.path(), &["spl.ko", "zfs.ko", "order"], Duration::ZERO);
    root(two.path(), &["order", "zfs.ko", "spl.ko"], Duration::from_secs(1_000_000));
    assert_eq!(pack(one.path()), pack(two.path()));
}

#[test]
fn a_changed_file_changes_the_archive() {
    let dir = tempfile::tempdir().unwrap();
    root(dir.path(), &["zfs.ko"], Duration::ZERO);
    let before = pack(dir.path());
    fs::write(dir.path().join("zpod/modules/zfs.ko"), "other").unwrap();
    assert_ne!(before, pack(dir.path()));
}
