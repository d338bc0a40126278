use std::io::ErrorKind;
use std::path::Path;

use rustix::fs::{Mode, OFlags};
use zpod_admin::Check;

pub(super) fn checks() -> Vec<Check> {
    vec![
        device(
            "kvm",
            "/dev/kvm",
            "guests run on the processor's own virtualization",
            "guests start in pure emulation at best, some ten times slower: turn virtualization on in the firmware, or in the \
             hypervisor this node runs on (nested), and load kvm_intel or kvm_amd",
        ),
        device(
            "vsock",
            "/dev/vhost-vsock",
            "guests of QEMU can be reached",
            "QEMU's guests can't be reached: load vhost_vsock; Cloud Hypervisor's and Dragonball's need no device",
        ),
    ]
}

/// Whether a device can be opened for use. Nothing is asked of it.
fn device(name: &str, path: &str, good: &str, remedy: &str) -> Check {
    match rustix::fs::open(Path::new(path), OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()) {
        Ok(_) => Check::ok(name, format!("{path} works: {good}")),
        Err(error) if error.kind() == ErrorKind::PermissionDenied => Check::warn(
            name,
            format!("{path} is there, and not for this process"),
            "the runtime may still have it: see its log",
        ),
        Err(error) => Check::warn(name, format!("{path}: {error}"), remedy),
    }
}
