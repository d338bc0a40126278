//! An archive has to unpack to what went in, with a cpio that is not ours.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    fs,
    os::unix::fs::{PermissionsExt, symlink},
    path::Path,
    process::{Command, Stdio},
};

use zpod_image::{Archive, command};

#[test]
fn busybox_unpacks_what_was_packed() {
    // busybox-static is among what deploy/setup.sh installs.
    let busybox = command::find("busybox").unwrap();
    let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    fs::create_dir_all(from.path().join("zpod/bin")).unwrap();
    fs::write(from.path().join("zpod/bin/tool"), vec![7; 4097]).unwrap();
    fs::set_permissions(from.path().join("zpod/bin/tool"), fs::Permissions::from_mode(0o755)).unwrap();
    fs::write(from.path().join("empty"), "").unwrap();
    symlink("zpod/bin/tool", from.path().join("init")).unwrap();

    let packed = to.path().join("packed.cpio");
    let mut archive = Archive::new();
    archive.tree(from.path()).unwrap();
    fs::write(&packed, archive.to_cpio().unwrap()).unwrap();
    let unpacked = to.path().join("unpacked");
    fs::create_dir(&unpacked).unwrap();
    let status = Command::new(busybox)
        .args(["cpio", "-idm"])
        .current_dir(&unpacked)
        .stdin(fs::File::open(&packed).unwrap())
        .stderr(Stdio::null())
        .status()
        .unwrap();
    assert!(status.success());

    assert_eq!(fs::read(unpacked.join("zpod/bin/tool")).unwrap(), vec![7; 4097]);
    assert_eq!(fs::metadata(unpacked.join("zpod/bin/tool")).unwrap().permissions().mode() & 0o7777, 0o755);
    assert_eq!(fs::metadata(unpacked.join("empty")).unwrap().len(), 0);
    assert_eq!(fs::read_link(unpacked.join("init")).unwrap(), Path::new("zpod/bin/tool"));
}
