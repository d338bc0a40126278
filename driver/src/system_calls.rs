//! The system calls that zpod-node gives up.
//!
//! # Design
//! A privileged container runs without the runtime's seccomp profile, whatever its pod says (containerd and CRI-O), so the
//! filter is put on from inside. It names what is refused and lets the rest pass: zpod-node keeps `CAP_SYS_ADMIN`, which
//! opens much that it has no use for, and a list of all that a program in Rust, its runtime and dmsetup call would break
//! with the next version of a library. Refused is what looks into or changes other processes, the kernel itself, its keys,
//! its clock and the namespaces, what makes mounts by the newer calls (zpod uses mount(2)), and what has had more faults
//! than uses (io_uring, userfaultfd, bpf). They fail with `EPERM`. The filter passes on to what zpod-node runs.
//!
//! # Limitations
//! A namespace can be made by clone3(2), whose arguments a filter can't see.

use std::collections::BTreeMap;
use std::env::consts::ARCH;
use std::io;

use seccompiler::{BpfProgram, SeccompAction, SeccompFilter, TargetArch, apply_filter};

/// What is refused.
const REFUSED: &[i64] = &[
    // Other processes.
    libc::SYS_ptrace,
    libc::SYS_process_vm_readv,
    libc::SYS_process_vm_writev,
    libc::SYS_process_madvise,
    libc::SYS_pidfd_getfd,
    libc::SYS_kcmp,
    // Namespaces, and files outside of what is mounted here.
    libc::SYS_setns,
    libc::SYS_unshare,
    libc::SYS_pivot_root,
    libc::SYS_chroot,
    libc::SYS_open_by_handle_at,
    libc::SYS_open_tree,
    libc::SYS_move_mount,
    libc::SYS_fsopen,
    libc::SYS_fsconfig,
    libc::SYS_fsmount,
    libc::SYS_fspick,
    libc::SYS_mount_setattr,
    // The kernel.
    libc::SYS_init_module,
    libc::SYS_finit_module,
    libc::SYS_delete_module,
    libc::SYS_kexec_load,
    libc::SYS_kexec_file_load,
    libc::SYS_reboot,
    libc::SYS_bpf,
    libc::SYS_perf_event_open,
    libc::SYS_userfaultfd,
    libc::SYS_io_uring_setup,
    libc::SYS_io_uring_enter,
    libc::SYS_io_uring_register,
    libc::SYS_syslog,
    libc::SYS_acct,
    libc::SYS_swapon,
    libc::SYS_swapoff,
    libc::SYS_sethostname,
    libc::SYS_setdomainname,
    libc::SYS_fanotify_init,
    libc::SYS_personality,
    // Its keys.
    libc::SYS_add_key,
    libc::SYS_request_key,
    libc::SYS_keyctl,
    // Its clock.
    libc::SYS_settimeofday,
    libc::SYS_clock_settime,
    libc::SYS_clock_adjtime,
    libc::SYS_adjtimex,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_iopl,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_ioperm,
    #[cfg(target_arch = "x86_64")]
    libc::SYS_modify_ldt,
];

/// Refuses them to the calling thread and those it starts: to be called before there are any others. Needs `no_new_privs` or `CAP_SYS_ADMIN`.
///
/// # Errors
/// When the kernel has no seccomp filters, or refuses.
pub fn refuse_unneeded() -> io::Result<()> {
    apply_filter(&program().map_err(io::Error::other)?).map_err(io::Error::other)
}

fn program() -> Result<BpfProgram, seccompiler::BackendError> {
    let rules: BTreeMap<_, _> = REFUSED.iter().map(|call| (*call, Vec::new())).collect();
    let refuse = SeccompAction::Errno(rustix::io::Errno::PERM.raw_os_error().unsigned_abs());
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, refuse, TargetArch::try_from(ARCH)?)?;
    // Calls of another architecture (i386 on x86_64) end the process by what this begins with.
    let mut program = BpfProgram::try_from(filter)?;
    #[cfg(target_arch = "x86_64")]
    program.splice(0..0, refuse_x32());
    Ok(program)
}

/// On x86_64 the same calls have second numbers, beyond this one (`__X32_SYSCALL_BIT`), which no rule would name.
#[cfg(target_arch = "x86_64")]
fn refuse_x32() -> [seccompiler::sock_filter; 3] {
    let instruction = |code, jt, jf, k| seccompiler::sock_filter { code, jt, jf, k };
    [
        // BPF_LD | BPF_W | BPF_ABS: the number, which is what `struct seccomp_data` begins with.
        instruction(0x20, 0, 0, 0),
        // BPF_JMP | BPF_JGE | BPF_K
        instruction(0x35, 0, 1, 0x4000_0000),
        // BPF_RET | BPF_K: SECCOMP_RET_ERRNO with EPERM
        instruction(0x06, 0, 0, 0x0005_0001),
    ]
}
