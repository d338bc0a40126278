//! What zpod-node gives up when it starts.
//!
//! # Design
//! Kubernetes lets only a privileged container mount what others are to see (`mountPropagation: Bidirectional`), and a
//! privileged container has every capability. Two are kept:
//!
//! * `CAP_SYS_ADMIN`: mount(2) for the placeholder at a target path, quotactl(2) for the limit of an image on XFS, and
//!   `trusted.` attributes where the file system has no others.
//! * `CAP_SYS_RESOURCE`: to try at the start whether such a limit holds for one who has it, as a virtual machine monitor
//!   does (`zpod_storage`, projects).
//!
//! The system calls that these open and nobody here needs are refused by a filter ([`crate::system_calls`]).
//!
//! All else is done as the owner of what it is done to: a lease on an image, a partition table in it, files of Kata's
//! direct volumes, sockets of shims and virtual machines that run as root. What belongs to another user is out of reach
//! then, and that is meant: of what is on a node, zpod-node needs the backing directory, kubelet's directories for the
//! pods, and Kata's below /run.
//!
//! # Limitations
//! A virtual machine monitor that runs as another user (Kata's `rootless`) keeps its hybrid vsock socket to itself; its
//! guest is not heard. With vhost-vsock it is.

use std::io;

use rustix::io::Errno;
use rustix::thread::{
    CapabilitySet, CapabilitySets, capabilities, clear_ambient_capability_set, remove_capability_from_bounding_set,
    set_capabilities, set_no_new_privs,
};

/// What is kept.
pub const NEEDED: CapabilitySet = CapabilitySet::SYS_ADMIN.union(CapabilitySet::SYS_RESOURCE);

/// Gives up every capability but [`NEEDED`], in all sets, and the way to any other (`no_new_privs`). It holds for the
/// calling thread and those it starts: to be called before there are any others. What was not there before is not there
/// afterwards.
///
/// # Errors
/// When the kernel refuses, which it does not where there is anything to give up.
pub fn drop_unneeded() -> io::Result<()> {
    set_no_new_privs(true)?;
    let had = capabilities(None)?;
    if had.effective.contains(CapabilitySet::SETPCAP) {
        // Those without a name here too: a newer kernel has more.
        for bit in 0..u64::BITS {
            let one = CapabilitySet::from_bits_retain(1 << bit);
            if NEEDED.contains(one) {
                continue;
            }
            match remove_capability_from_bounding_set(one) {
                Ok(()) => {}
                // The last one has been seen.
                Err(Errno::INVAL) => break,
                Err(error) => return Err(error.into()),
            }
        }
    }
    match clear_ambient_capability_set() {
        // Before Linux 4.3 there was none.
        Ok(()) | Err(Errno::INVAL) => {}
        Err(error) => return Err(error.into()),
    }
    let kept = had.permitted.intersection(NEEDED);
    set_capabilities(None, CapabilitySets { effective: kept, permitted: kept, inheritable: CapabilitySet::empty() })?;
    Ok(())
}
