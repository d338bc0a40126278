//! Keeping what is in memory out of files: keys of encrypted volumes above all.

use std::io;

use rustix::mm::{MlockAllFlags, mlockall};
use rustix::process::{DumpableBehavior, Resource, Rlimit, getrlimit, set_dumpable_behavior, setrlimit};
use rustix::thread::{CapabilitySet, capabilities};

/// Sees to it that nothing of this process's memory gets into a file: no core dump is made of it or of what it runs, only
/// one with `CAP_SYS_PTRACE` looks into it, and it is not swapped out where the operating system allows that.
///
/// All of it is locked, as it is touched (`MCL_ONFAULT`), and not the keys alone: what gRPC and TLS read a key into is
/// theirs. That needs `CAP_IPC_LOCK` or a `RLIMIT_MEMLOCK` without bound (which one with `CAP_SYS_RESOURCE` gives itself),
/// for beyond a bound mmap(2) would fail.
///
/// Gives whether it is locked.
///
/// # Errors
/// When the kernel refuses what it refuses nobody.
pub fn keep_private() -> io::Result<bool> {
    set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) })?;
    let unbounded = Rlimit { current: None, maximum: None };
    let may_lock = capabilities(None)?.effective.contains(CapabilitySet::IPC_LOCK)
        || getrlimit(Resource::Memlock) == unbounded
        || setrlimit(Resource::Memlock, unbounded).is_ok();
    let all = MlockAllFlags::CURRENT | MlockAllFlags::FUTURE | MlockAllFlags::ONFAULT;
    Ok(may_lock && mlockall(all).is_ok())
}
