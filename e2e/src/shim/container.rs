//! The OCI spec that containerd would write for a container, as the shim sends it.

use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;

use zpod_proto::agent;

use crate::base_initrd::ROOTFS;

/// A volume's mount in a container.
#[derive(Debug, Clone)]
pub struct Mount {
    /// CSI target path on the host.
    pub target: PathBuf,
    /// Where it is in the container.
    pub destination: String,
    /// `readOnly` of the volume mount.
    pub read_only: bool,
}

impl Mount {
    /// A writable mount.
    pub fn new(target: impl Into<PathBuf>, destination: &str) -> Self {
        Self { target: target.into(), destination: destination.to_owned(), read_only: false }
    }
}

/// A block device of a container.
#[derive(Debug, Clone)]
pub struct Device {
    /// The block device on the host, or a file for one.
    pub path: PathBuf,
    /// Its path in the container.
    pub destination: String,
    /// Whether the container may only read it.
    pub read_only: bool,
}

impl Device {
    /// A writable device.
    pub fn new(path: impl Into<PathBuf>, destination: &str) -> Self {
        Self { path: path.into(), destination: destination.to_owned(), read_only: false }
    }

    /// Its numbers on the host. Kubelet makes a loop device of what is none.
    fn numbers(&self) -> (i64, i64) {
        let device = std::fs::metadata(&self.path).map_or(0, |metadata| metadata.rdev());
        match device {
            0 => (7, 200 + i64::from(self.destination.bytes().last().unwrap_or_default())),
            device => (nix::sys::stat::major(device) as i64, nix::sys::stat::minor(device) as i64),
        }
    }

    /// What containerd writes into the spec.
    fn in_spec(&self) -> (agent::LinuxDevice, agent::LinuxDeviceCgroup) {
        let (major, minor) = self.numbers();
        let kind = || "b".to_owned();
        let access = if self.read_only { "rm" } else { "rwm" }.to_owned();
        let device = agent::LinuxDevice {
            path: self.destination.clone(),
            r#type: kind(),
            major,
            minor,
            file_mode: 0o660,
            ..Default::default()
        };
        (device, agent::LinuxDeviceCgroup { allow: true, r#type: kind(), major, minor, access })
    }
}

/// A container to be.
#[derive(Debug, Clone)]
pub struct Container {
    /// Its id.
    pub id: String,
    /// Volumes, in the order of the OCI spec.
    pub mounts: Vec<Mount>,
    /// Block devices.
    pub devices: Vec<Device>,
    /// Mounts of the guest's own directories: source and destination.
    pub guest_mounts: Vec<(String, String)>,
    /// Mounts of memory, at these paths.
    pub tmpfs: Vec<String>,
    /// What it runs, if not sleep(1) as root.
    pub process: Option<agent::Process>,
    /// Whether its root is read-only.
    pub read_only_root: bool,
    /// Capabilities beside containerd's defaults, such as `CAP_SYS_ADMIN`.
    pub capabilities: Vec<&'static str>,
}

impl Container {
    /// A container that sleeps, with these volumes.
    pub fn new(id: &str, mounts: impl IntoIterator<Item = Mount>) -> Self {
        let mounts = mounts.into_iter().collect();
        let (id, devices) = (id.to_owned(), Vec::new());
        let (guest_mounts, tmpfs, capabilities) = (Vec::new(), Vec::new(), Vec::new());
        Self { id, mounts, devices, guest_mounts, tmpfs, process: None, read_only_root: false, capabilities }
    }

    /// One that can see the guest's pools: its devices, its processes and zpod's tools are bound in.
    pub fn debug(id: &str) -> Self {
        let guest_mounts = [("/zpod", "/zpod"), ("/dev", "/dev"), ("/proc", "/guest/proc")]
            .map(|(source, destination)| (source.to_owned(), destination.to_owned()));
        Self { guest_mounts: guest_mounts.to_vec(), ..Self::new(id, []) }
    }

    pub(super) fn capabilities(&self) -> agent::LinuxCapabilities {
        // zpool(8) asks the kernel through /dev/zfs as an administrator; the namespaces of the guest's init can be
        // entered only by who may trace it; dmesg(1) reads its kernel's log.
        const MORE: &[&str] = &["CAP_SYS_ADMIN", "CAP_SYS_PTRACE", "CAP_SYS_TIME", "CAP_SYSLOG"];
        let extra = if self.guest_mounts.is_empty() { &[] } else { MORE };
        let all: Vec<String> =
            CAPABILITIES.iter().chain(extra).chain(&self.capabilities).map(|&name| name.to_owned()).collect();
        agent::LinuxCapabilities {
            bounding: all.clone(),
            effective: all.clone(),
            inheritable: Vec::new(),
            permitted: all,
            ambient: Vec::new(),
        }
    }

    /// The spec, with the volumes' mounts as the runtime made them.
    pub(super) fn spec(&self, hostname: &str, volumes: Vec<agent::Mount>) -> agent::Spec {
        let mut mounts = vec![mount("/proc", "proc", "proc", &["nosuid", "noexec", "nodev"])];
        if !self.guest_mounts.iter().any(|(_, destination)| destination == "/dev") {
            mounts.push(mount("/dev", "tmpfs", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]));
        }
        mounts.push(mount("/sys", "sysfs", "sysfs", &["nosuid", "noexec", "nodev", "ro"]));
        let guest = self.guest_mounts.iter();
        mounts.extend(guest.map(|(source, destination)| mount(destination, "bind", source, &["rbind", "rprivate"])));
        mounts.extend(volumes);
        mounts.extend(self.tmpfs.iter().map(|path| mount(path, "tmpfs", "tmpfs", &["nosuid", "nodev", "size=16m"])));
        let sleep = || process(&["/bin/sleep", "1000000"], User::ROOT, self.capabilities());
        let namespaces =
            ["mount", "ipc", "uts"].map(|kind| agent::LinuxNamespace { r#type: kind.into(), ..Default::default() });
        let (devices, allowed): (Vec<_>, Vec<_>) = self.devices.iter().map(Device::in_spec).unzip();
        agent::Spec {
            version: "1.1.0".into(),
            process: Some(self.process.clone().unwrap_or_else(sleep)),
            root: Some(agent::Root { path: ROOTFS.into(), readonly: self.read_only_root }),
            hostname: hostname.into(),
            mounts,
            annotations: [("io.kubernetes.cri.container-type".to_owned(), "container".to_owned())].into(),
            linux: Some(agent::Linux {
                cgroups_path: format!("/e2e/{}", self.id),
                namespaces: namespaces.to_vec(),
                devices,
                resources: (!allowed.is_empty()).then_some(agent::LinuxResources { devices: allowed }),
                ..Default::default()
            }),
        }
    }
}

/// containerd's defaults.
const CAPABILITIES: [&str; 14] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FSETID",
    "CAP_FOWNER",
    "CAP_MKNOD",
    "CAP_NET_RAW",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETFCAP",
    "CAP_SETPCAP",
    "CAP_NET_BIND_SERVICE",
    "CAP_SYS_CHROOT",
    "CAP_KILL",
    "CAP_AUDIT_WRITE",
];

/// Who a process runs as.
#[derive(Debug, Clone, Copy)]
pub struct User {
    /// User and primary group.
    pub uid: u32,
    /// One more group, such as the pod's fsGroup.
    pub group: Option<u32>,
}

impl User {
    /// root.
    pub const ROOT: Self = Self { uid: 0, group: None };
}

pub(super) fn process(args: &[&str], user: User, capabilities: agent::LinuxCapabilities) -> agent::Process {
    agent::Process {
        user: Some(agent::User { uid: user.uid, gid: user.uid, additional_gids: user.group.into_iter().collect() }),
        args: args.iter().map(|&arg| arg.to_owned()).collect(),
        env: vec!["PATH=/bin:/sbin".into(), "HOME=/root".into()],
        cwd: "/".into(),
        capabilities: Some(capabilities),
        ..Default::default()
    }
}

fn mount(destination: &str, kind: &str, source: &str, options: &[&str]) -> agent::Mount {
    agent::Mount {
        destination: destination.into(),
        source: source.into(),
        r#type: kind.into(),
        options: options.iter().map(|&option| option.into()).collect(),
    }
}
