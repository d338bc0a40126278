//! Loop devices, as the kernel tells of them.

use std::fs;
use std::path::{Path, PathBuf};

/// The loop devices that have this image.
pub(crate) fn loops(image: &Path) -> Vec<PathBuf> {
    let all = fs::read_dir("/sys/block").unwrap().flatten();
    let ours = all.filter(|entry| {
        let backing = fs::read_to_string(entry.path().join("loop/backing_file")).unwrap_or_default();
        Path::new(backing.trim_end()) == image
    });
    ours.map(|entry| Path::new("/dev").join(entry.file_name())).collect()
}

/// What the kernel says of one.
pub(crate) fn attribute(device: &Path, name: &str) -> String {
    let sys = Path::new("/sys/block").join(device.file_name().unwrap());
    fs::read_to_string(sys.join(name)).unwrap().trim().to_owned()
}
