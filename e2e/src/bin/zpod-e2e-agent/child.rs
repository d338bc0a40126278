//! What runs between the agent and a container's program: namespaces, mounts, identity, then `exec`.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufRead as _, Write as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::stat::{Mode, SFlag, makedev, mknod, umask};
use nix::unistd::{Gid, Uid, chdir, chown, chroot, setgroups, setresgid, setresuid};
use rustix::io::Errno;
use rustix::thread::{CapabilitySet, CapabilitySets, remove_capability_from_bounding_set, set_capabilities};
use serde::{Deserialize, Serialize};
use zpod_proto::agent;

use crate::mounts::parse_options;

/// A mount of the OCI spec.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Mount {
    destination: String,
    source: String,
    kind: String,
    options: Vec<String>,
}

impl From<agent::Mount> for Mount {
    fn from(mount: agent::Mount) -> Self {
        Self { destination: mount.destination, source: mount.source, kind: mount.r#type, options: mount.options }
    }
}

/// A device of the OCI spec.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Device {
    path: String,
    kind: String,
    major: i64,
    minor: i64,
    mode: u32,
    uid: u32,
    gid: u32,
}

impl From<agent::LinuxDevice> for Device {
    fn from(device: agent::LinuxDevice) -> Self {
        let agent::LinuxDevice { path, r#type: kind, major, minor, file_mode: mode, uid, gid } = device;
        Self { path, kind, major, minor, mode, uid, gid }
    }
}

/// The process of the OCI spec.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Program {
    args: Vec<String>,
    env: Vec<String>,
    cwd: String,
    uid: u32,
    gid: u32,
    groups: Vec<u32>,
    /// By name: `CAP_CHOWN`. Absent, it keeps what the agent has.
    capabilities: Option<Capabilities>,
}

/// Of the process of the OCI spec.
#[derive(Debug, Serialize, Deserialize)]
struct Capabilities {
    bounding: Vec<String>,
    permitted: Vec<String>,
}

impl From<agent::Process> for Program {
    fn from(process: agent::Process) -> Self {
        let user = process.user.unwrap_or_default();
        Self {
            args: process.args,
            env: process.env,
            cwd: process.cwd,
            uid: user.uid,
            gid: user.gid,
            groups: user.additional_gids,
            capabilities: process
                .capabilities
                .map(|given| Capabilities { bounding: given.bounding, permitted: given.permitted }),
        }
    }
}

/// What a container is made of.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct ContainerSpec {
    pub(crate) cgroup: PathBuf,
    pub(crate) rootfs: PathBuf,
    pub(crate) read_only_root: bool,
    pub(crate) mounts: Vec<Mount>,
    pub(crate) devices: Vec<Device>,
    pub(crate) program: Program,
}

/// What another process of a container is made of.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct ExecSpec {
    pub(crate) cgroup: PathBuf,
    /// The container's first process.
    pub(crate) pid: u32,
    pub(crate) program: Program,
}

/// Makes the container, says `ready` or what went wrong in one line on standard output, waits for a line on standard
/// input (StartContainer) and becomes the program.
pub(crate) fn container(spec: &str) -> Result<()> {
    let spec: ContainerSpec = serde_json::from_str(spec)?;
    match enter_new(&spec) {
        Ok(()) => println!("ready"),
        Err(error) => {
            println!("{}", format!("{error:#}").replace('\n', " "));
            std::process::exit(1);
        }
    }
    std::io::stdout().flush()?;
    let mut go = String::new();
    if std::io::stdin().lock().read_line(&mut go)? == 0 {
        bail!("the agent is gone");
    }
    become_program(&spec.program)
}

/// Joins a container and becomes the program.
pub(crate) fn exec(spec: &str) -> Result<()> {
    let spec: ExecSpec = serde_json::from_str(spec)?;
    let result = join(&spec);
    match &result {
        Ok(()) => println!("ready"),
        Err(error) => println!("{}", format!("{error:#}").replace('\n', " ")),
    }
    result?;
    std::io::stdout().flush()?;
    become_program(&spec.program)
}

fn join_cgroup(cgroup: &Path) -> Result<()> {
    fs::write(cgroup.join("cgroup.procs"), "0").with_context(|| format!("join {}", cgroup.display()))
}

fn join(spec: &ExecSpec) -> Result<()> {
    join_cgroup(&spec.cgroup)?;
    let namespace = File::open(format!("/proc/{}/ns/mnt", spec.pid)).context("open the container's mount namespace")?;
    setns(namespace, CloneFlags::CLONE_NEWNS).context("join the container's mount namespace")
}

fn enter_new(spec: &ContainerSpec) -> Result<()> {
    join_cgroup(&spec.cgroup)?;
    unshare(CloneFlags::CLONE_NEWNS).context("unshare the mount namespace")?;
    // rustjail: "/" becomes a slave, so that nothing goes back to the agent's namespace.
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_SLAVE | MsFlags::MS_REC, None::<&str>).context("/ rslave")?;
    for mount in &spec.mounts {
        mount_into(&spec.rootfs, mount).with_context(|| format!("mount {}", mount.destination))?;
    }
    // rustjail's `create_devices`: their modes are those of the spec.
    let mask = umask(Mode::empty());
    for device in &spec.devices {
        make_device(&spec.rootfs, device).with_context(|| format!("Creating container device {}", device.path))?;
    }
    umask(mask);
    if spec.read_only_root {
        let flags = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY;
        mount(None::<&str>, &spec.rootfs, None::<&str>, flags, None::<&str>).context("make the root read-only")?;
    }
    // The root of an initramfs can't be pivoted (rustjail's `no_pivot_root`).
    chdir(&spec.rootfs)?;
    mount(Some(&spec.rootfs), "/", None::<&str>, MsFlags::MS_MOVE, None::<&str>).context("move the root")?;
    chroot(".")?;
    chdir("/").context("enter the root")
}

fn mount_into(rootfs: &Path, spec: &Mount) -> Result<()> {
    let target = rootfs.join(spec.destination.trim_start_matches('/'));
    let (flags, propagation, data) = parse_options(&spec.options);
    let source = Path::new(&spec.source);
    if spec.kind != "bind" {
        fs::create_dir_all(&target)?;
        mount(Some(source), &target, Some(spec.kind.as_str()), flags, Some(data.as_str()))?;
        return if spec.destination == "/dev" { bind_devices(&target) } else { Ok(()) };
    }
    let kind = fs::metadata(source).with_context(|| format!("source {}", spec.source))?;
    if kind.is_dir() {
        fs::create_dir_all(&target)?;
    } else {
        File::options().append(true).create(true).open(&target)?;
    }
    let bind = MsFlags::MS_BIND | (flags & MsFlags::MS_REC);
    mount(Some(source), &target, None::<&str>, bind, None::<&str>)?;
    let others = flags - MsFlags::MS_REC - MsFlags::MS_BIND;
    if !others.is_empty() {
        let remount = others | MsFlags::MS_BIND | MsFlags::MS_REMOUNT;
        mount(None::<&str>, &target, None::<&str>, remount, None::<&str>).context("set the mount's flags")?;
    }
    if !propagation.is_empty() {
        mount(None::<&str>, &target, None::<&str>, propagation, None::<&str>).context("set propagation")?;
    }
    Ok(())
}

/// rustjail's `mknod_dev`.
fn make_device(rootfs: &Path, device: &Device) -> Result<()> {
    let target = rootfs.join(device.path.trim_start_matches('/'));
    if let Some(parent) = target.parent() {
        fs::create_dir_all(parent)?;
    }
    let kind = match device.kind.as_str() {
        "b" => SFlag::S_IFBLK,
        "c" => SFlag::S_IFCHR,
        other => bail!("invalid spec: device type {other:?}"),
    };
    let numbers = makedev(u64::try_from(device.major)?, u64::try_from(device.minor)?);
    mknod(&target, kind, Mode::from_bits_truncate(device.mode), numbers)?;
    chown(&target, Some(Uid::from_raw(device.uid)), Some(Gid::from_raw(device.gid)))?;
    Ok(())
}

/// The devices of the OCI runtime spec that shells and tools need.
fn bind_devices(dev: &Path) -> Result<()> {
    for name in ["null", "zero", "full", "random", "urandom", "tty"] {
        let node = dev.join(name);
        File::create(&node)?;
        mount(Some(&Path::new("/dev").join(name)), &node, None::<&str>, MsFlags::MS_BIND, None::<&str>)?;
    }
    Ok(())
}

fn become_program(program: &Program) -> Result<()> {
    let groups: Vec<_> = program.groups.iter().copied().map(Gid::from_raw).collect();
    let (uid, gid) = (Uid::from_raw(program.uid), Gid::from_raw(program.gid));
    if let Some(capabilities) = &program.capabilities {
        bound(&set_of(&capabilities.bounding)?).context("bound the capabilities")?;
    }
    setgroups(&groups).context("set groups")?;
    setresgid(gid, gid, gid).context("set group")?;
    setresuid(uid, uid, uid).context("set user")?;
    // Whoever is not root has lost all by now.
    if let Some(capabilities) = program.capabilities.as_ref().filter(|_| program.uid == 0) {
        let kept = set_of(&capabilities.permitted)?;
        let sets = CapabilitySets { effective: kept, permitted: kept, inheritable: CapabilitySet::empty() };
        set_capabilities(None, sets).context("set the capabilities")?;
    }
    let Some((name, args)) = program.args.split_first() else { bail!("no program") };
    let env: BTreeMap<_, _> = program.env.iter().filter_map(|pair| pair.split_once('=')).collect();
    let cwd = if program.cwd.is_empty() { "/" } else { &program.cwd };
    let error = Command::new(name).args(args).env_clear().envs(env).current_dir(cwd).exec();
    Err(error).with_context(|| format!("execute {name}"))
}

/// Capabilities by their names.
fn set_of(names: &[String]) -> Result<CapabilitySet> {
    let parse = |name: &String| {
        let known = name.strip_prefix("CAP_").and_then(CapabilitySet::from_name);
        known.with_context(|| format!("{name:?} is no capability"))
    };
    names.iter().map(parse).collect()
}

/// Nothing that is executed from here on gets any other: rustjail's `drop_privileges` does so first.
fn bound(kept: &CapabilitySet) -> Result<()> {
    for bit in 0..u64::BITS {
        let one = CapabilitySet::from_bits_retain(1 << bit);
        if kept.contains(one) {
            continue;
        }
        match remove_capability_from_bounding_set(one) {
            Ok(()) => {}
            // The last one has been seen.
            Err(Errno::INVAL) => break,
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}
