//! One guest: QEMU, its vsock device, its disks.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use serde_json::json;
use tokio::net::UnixStream;
use tokio::time::{Instant, sleep};

use zpod_image::Archive;

use crate::accel::Accel;
use crate::inputs::Image;
use crate::process::Process;
use crate::qmp::Qmp;
use crate::slot::Slot;
use crate::workdir::Workdir;
use crate::{PATIENCE, base_initrd, console, inputs, postgresql, vsock};

mod faults;
mod template;

pub use faults::Fault;

/// Free PCIe root ports for disks, from this slot of the root bus on.
const FIRST_PORT: usize = 0x10;
const PORTS: usize = 9;
/// runtime-rs waits 10 s for DEVICE_DELETED (`DEVICE_DELETED_TIMEOUT`); guests in emulation may be slower.
const UNPLUG: Duration = Duration::from_secs(60);
const MEMORY_MIB: u32 = 512;
/// The id of the vsock device and of its socket; the port it is plugged into, and that one's slot.
const VSOCK: &str = "vsock";
const VSOCK_BUS: &str = "vsock-port";
const VSOCK_PORT: usize = FIRST_PORT + PORTS;

/// What the guest starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Boot {
    /// zpod-guest, which starts the agent: what a node is set up for.
    Zpod,
    /// The same from where another machine's kernel had come up and was about to start zpod-guest, as with Kata's VM
    /// templates. By hardware it boots as that other one did.
    FromTemplate,
    /// The same, with PostgreSQL for the containers.
    PostgreSql,
    /// The agent alone, with ZFS in the kernel but nothing of ours before it.
    Bare,
    /// An initramfs with nothing in it: the kernel comes up and gives up. For comparison.
    Empty,
}

impl Boot {
    fn command_line(self) -> String {
        let start = match self {
            Self::Zpod | Self::FromTemplate | Self::PostgreSql => {
                "rdinit=/zpod/init agent.server_addr=unix:///run/kata-agent.sock".to_owned()
            }
            Self::Bare => format!("rdinit={} agent.server_addr=vsock://-1:1024", base_initrd::BARE_INIT),
            Self::Empty => String::new(),
        };
        // cgroup_no_v1=all is how kata-agent learns to use cgroup v2.
        format!("console=ttyS0 panic=-1 {start} cgroup_no_v1=all")
    }

    /// What the console shows when it is worth while to dial.
    ///
    /// vhost-device-vsock 0.3.0 may answer nobody any more once a connection was asked for, and given up, before the
    /// guest's driver was there: seen in one boot of some sixty.
    fn ready_line(self) -> &'static str {
        match self {
            Self::Zpod | Self::FromTemplate | Self::PostgreSql => "zpod-guest: proxy ready",
            Self::Bare => "ZFS: Loaded module",
            Self::Empty => "Kernel panic",
        }
    }

    fn write_initrd(self, image: &Image, to: &Path) -> Result<()> {
        if self == Self::Empty {
            return fs::write(to, Archive::new().to_cpio()?).context("write an empty initrd");
        }
        let base = to.with_extension("base");
        base_initrd::write(&base)?;
        zpod_image::initrd::append(&base, &image.overlay, to)?;
        if self == Self::PostgreSql {
            fs::rename(to, &base).context("take the initrd as the base")?;
            zpod_image::initrd::append(&base, &postgresql::archive()?, to)?;
        }
        fs::remove_file(&base).context("remove the base initrd")
    }

    /// What it needs: its files are in memory.
    fn memory_mib(self) -> u32 {
        if self == Self::PostgreSql { 2 * MEMORY_MIB } else { MEMORY_MIB }
    }
}

/// How a disk is plugged in.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Plug {
    /// The guest may only read it.
    pub read_only: bool,
    /// What the guest discards is given back to the file below. QEMU's default takes discards and does nothing.
    pub discards: bool,
}

/// A running virtual machine. Dropping it kills it without mercy.
#[derive(Debug)]
pub struct Guest {
    // In the order in which they have to end.
    qmp: Qmp,
    qemu: Process,
    vsock_device: Process,
    disks: BTreeMap<usize, PathBuf>,
    /// Ports whose disks the guest has been asked to let go. They are not used again.
    leaving: BTreeSet<usize>,
    dir: Workdir,
    _slot: Slot,
    boot: Boot,
    reports_errors: bool,
    /// When QEMU was started.
    pub power_on: Instant,
}

impl Guest {
    /// Starts one; it is booting when this returns.
    ///
    /// # Errors
    /// When a part is missing or QEMU doesn't start.
    pub async fn boot(boot: Boot) -> Result<Self> {
        Self::boot_in(boot, &std::env::temp_dir()).await
    }

    /// The same, with its sockets and other files in a new directory in `parent`.
    ///
    /// # Errors
    /// When a part is missing or QEMU doesn't start.
    pub async fn boot_in(mut boot: Boot, parent: &Path) -> Result<Self> {
        if boot == Boot::FromTemplate {
            if Accel::detect().await? == Accel::Tcg {
                return Self::restore(parent).await;
            }
            boot = Boot::Zpod;
        }
        let image = inputs::guest_image()?;
        Self::start(boot, parent, &image.kernel, |to| boot.write_initrd(&image, to)).await
    }

    /// Starts one from a kernel and an initrd that are there already, as on a node.
    ///
    /// # Errors
    /// When QEMU doesn't start.
    pub async fn boot_installed(kernel: &Path, initrd: &Path) -> Result<Self> {
        let link = |to: &Path| std::os::unix::fs::symlink(initrd, to).context("link the initrd");
        Self::start(Boot::Zpod, &std::env::temp_dir(), kernel, link).await
    }

    async fn start(
        boot: Boot,
        parent: &Path,
        kernel: &Path,
        write_initrd: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<Self> {
        let slot = Slot::take().await?;
        let dir = Workdir::within(parent)?;
        let initrd = dir.path().join("initrd");
        write_initrd(&initrd)?;
        let vsock_device = start_vsock_device(dir.path())?;
        let mut arguments = machine(boot, dir.path()).await?;
        arguments.extend(boots(boot, kernel, &initrd));
        arguments.extend(vsock_backend(dir.path()));
        arguments.extend(["-device", "vhost-user-vsock-pci,chardev=vsock"].map(str::to_owned));
        let power_on = Instant::now();
        let (qemu, qmp) = launch(dir.path(), arguments).await?;
        Ok(Self::new(boot, dir, slot, (qemu, qmp), vsock_device, power_on))
    }

    /// Goes on where the template's machine was stopped: with new entropy, and with a vsock device of its own, which is
    /// plugged in.
    async fn restore(parent: &Path) -> Result<Self> {
        let slot = Slot::take().await?;
        let template = template::get().await?;
        let dir = Workdir::within(parent)?;
        fs::copy(template.join(template::CONSOLE), dir.path().join("console"))
            .context("copy the template's console")?;
        let vsock_device = start_vsock_device(dir.path())?;
        let mut arguments = machine(Boot::FromTemplate, dir.path()).await?;
        arguments.extend(vsock_backend(dir.path()));
        arguments.extend(["-incoming", "defer"].map(str::to_owned));
        let power_on = Instant::now();
        let (qemu, mut qmp) = launch(dir.path(), arguments).await?;
        template::load(&mut qmp, &template).await?;
        let device = json!({"driver": "vhost-user-vsock-pci", "id": VSOCK, "chardev": VSOCK, "bus": VSOCK_BUS});
        qmp.execute("device_add", device).await?;
        qmp.execute("cont", json!({})).await?;
        Ok(Self::new(Boot::FromTemplate, dir, slot, (qemu, qmp), vsock_device, power_on))
    }

    fn new(
        boot: Boot,
        dir: Workdir,
        slot: Slot,
        (qemu, qmp): (Process, Qmp),
        vsock_device: Process,
        power_on: Instant,
    ) -> Self {
        let (disks, leaving) = (BTreeMap::new(), BTreeSet::new());
        Self { qmp, qemu, vsock_device, disks, leaving, dir, _slot: slot, boot, reports_errors: false, power_on }
    }

    /// Whether its clock stood still while its template was kept.
    pub fn is_restored(&self) -> bool {
        self.boot == Boot::FromTemplate
    }

    /// The unix socket of its hybrid vsock.
    pub fn vsock(&self) -> PathBuf {
        self.dir.path().join("vsock")
    }

    /// Connects to one of its ports, waiting until somebody listens there.
    ///
    /// # Errors
    /// When nobody does within the deadline, or QEMU has ended.
    pub async fn connect(&mut self, port: u32, deadline: Duration) -> Result<UnixStream> {
        let end = Instant::now() + deadline;
        while !(self.console_has(self.boot.ready_line()) && self.has_vsock().await?) {
            self.qemu.must_run()?;
            if Instant::now() >= end {
                bail!("the guest didn't come up in {deadline:?}");
            }
            sleep(Duration::from_millis(20)).await;
        }
        loop {
            self.qemu.must_run()?;
            match vsock::connect(&self.vsock(), port, Duration::from_secs(5)).await {
                Ok(stream) => return Ok(stream),
                Err(error) if Instant::now() >= end => {
                    return Err(error.context(format!("nobody listens after {deadline:?}")));
                }
                Err(_) => sleep(Duration::from_millis(20)).await,
            }
        }
    }

    /// Whether the guest's driver has its vsock device. Before, nobody may dial: see [`Boot::ready_line`].
    async fn has_vsock(&mut self) -> Result<bool> {
        if self.boot != Boot::FromTemplate {
            return Ok(true);
        }
        let device = json!({"path": format!("/machine/peripheral/{VSOCK}/virtio-backend")});
        let status = self.qmp.execute("x-query-virtio-status", device).await?;
        Ok(status["status"].to_string().contains("DRIVER_OK"))
    }

    /// Disks that are plugged in from now on tell the guest of every error, as cloud-hypervisor does. By itself QEMU stops
    /// the virtual machine when the host's file system is full (`werror=enospc`).
    pub fn report_errors(&mut self) {
        self.reports_errors = true;
    }

    /// Plugs a disk in while the guest runs, as runtime-rs does with a direct volume; gives its PCI path.
    ///
    /// # Errors
    /// When there is no free port, or QEMU refuses.
    pub async fn plug(&mut self, device: &Path, how: Plug) -> Result<String> {
        let Some(port) = (0..PORTS).find(|port| !self.disks.contains_key(port) && !self.leaving.contains(port)) else {
            bail!("all {PORTS} ports of the guest have disks");
        };
        let (id, node) = (format!("disk{port}"), format!("node{port}"));
        let driver = if fs::metadata(device).with_context(|| format!("{}", device.display()))?.is_file() {
            "file"
        } else {
            "host_device"
        };
        // With a name of its own: something that fails can be put in between.
        let discard = if how.discards { "unmap" } else { "ignore" };
        let file = json!({
            "driver": driver, "node-name": format!("file{port}"), "filename": device, "read-only": how.read_only,
            "discard": discard,
        });
        let node_options = json!({
            "driver": "raw", "node-name": node, "read-only": how.read_only, "discard": discard, "file": file,
        });
        self.qmp.execute("blockdev-add", node_options).await?;
        let mut device_options = json!({
            "driver": "virtio-blk-pci", "id": id, "drive": node, "bus": format!("port{port}"), "addr": "00",
            "share-rw": true,
        });
        if self.reports_errors {
            device_options["werror"] = "report".into();
            device_options["rerror"] = "report".into();
        }
        if let Err(error) = self.qmp.execute("device_add", device_options).await {
            self.qmp.execute("blockdev-del", json!({"node-name": node})).await?;
            return Err(error);
        }
        self.disks.insert(port, device.to_owned());
        Ok(format!("{:02x}/00", FIRST_PORT + port))
    }

    /// Asks the guest to let go of the disk at a PCI path, and does not wait for it, as Kata does with cloud-hypervisor.
    ///
    /// # Errors
    /// When there is none, or QEMU refuses.
    pub async fn begin_unplug(&mut self, place: &str) -> Result<()> {
        let port = self.port_at(place)?;
        self.qmp.execute("device_del", json!({"id": format!("disk{port}")})).await?;
        self.disks.remove(&port);
        self.leaving.insert(port);
        Ok(())
    }

    fn port_at(&self, place: &str) -> Result<usize> {
        let port = self.disks.keys().find(|port| place == format!("{:02x}/00", FIRST_PORT + *port));
        port.copied().with_context(|| format!("no disk is plugged in at {place}"))
    }

    /// Unplugs the disk at a PCI path and waits until the guest has let go of it.
    ///
    /// # Errors
    /// When there is none, or the guest keeps it.
    pub async fn unplug(&mut self, place: &str) -> Result<()> {
        let port = self.port_at(place)?;
        let id = format!("disk{port}");
        self.qmp.execute("device_del", json!({"id": id})).await?;
        self.qmp.device_deleted(&id, UNPLUG).await?;
        self.qmp.execute("blockdev-del", json!({"node-name": format!("node{port}")})).await?;
        self.disks.remove(&port);
        Ok(())
    }

    fn port(&self, device: &Path) -> Result<usize> {
        let port = self.disks.iter().find(|(_, plugged)| *plugged == device).map(|(port, _)| *port);
        port.with_context(|| format!("{} is not plugged in", device.display()))
    }

    /// SIGKILL, as at the end of every Kata pod, and as in a crash of its host.
    pub fn kill(mut self) {
        self.qemu.kill();
    }

    /// Waits until its console shows a text.
    ///
    /// # Errors
    /// When it doesn't within the deadline.
    pub async fn shows(&self, text: &str, deadline: Duration) -> Result<()> {
        let end = Instant::now() + deadline;
        while !self.console_has(text) {
            if Instant::now() >= end {
                bail!("the console doesn't show {text:?}; it ends:\n{}", self.console_tail(30));
            }
            sleep(Duration::from_millis(20)).await;
        }
        Ok(())
    }

    /// Whether its console shows a text.
    pub fn console_has(&self, text: &str) -> bool {
        console::contains(&self.dir.path().join("console"), text)
    }

    /// The last lines of its console.
    pub fn console_tail(&self, lines: usize) -> String {
        console::tail(&self.dir.path().join("console"), lines)
    }

    /// Adds the end of the console to an error.
    pub fn explain(&self, error: anyhow::Error) -> anyhow::Error {
        let (console, vsock) = (self.console_tail(30), self.vsock_device.tail());
        error.context(format!("the guest's console ends:\n{console}\n--- end of console\nvsock device: {vsock}"))
    }

    /// The process id of the virtual machine.
    pub fn process(&self) -> u32 {
        self.qemu.id()
    }

    /// Resident memory of the virtual machine's process, in KiB.
    pub fn resident_kib(&self) -> Option<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.qemu.id())).ok()?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
        line.split_whitespace().next()?.parse().ok()
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("the guest's console ends:\n{}\n--- end of console", self.console_tail(60));
        }
    }
}

/// One in emulation: with two, a wake-up of an idle one was lost now and then (RCU stall, everything hangs), and two
/// guests run at once on small machines anyway. `ZPOD_E2E_CPUS` asks for another number.
fn processors(accel: Accel) -> String {
    std::env::var("ZPOD_E2E_CPUS").unwrap_or_else(|_| if accel == Accel::Kvm { "2" } else { "1" }.to_owned())
}

/// The processor. ZFS measures each of its vector routines when it is loaded, and AVX is slow in emulation: without it a
/// guest has ZFS after 2.1 s of processor time instead of 2.7 s.
fn processor(accel: Accel) -> &'static str {
    if accel == Accel::Kvm { "max" } else { "max,-avx,-avx2" }
}

/// What all machines have, and their files in a directory. A new identity each time: a kernel that goes on from a template
/// mixes it into its random numbers, so that no two guests draw the same.
async fn machine(boot: Boot, dir: &Path) -> Result<Vec<String>> {
    let (accel, memory) = (Accel::detect().await?, boot.memory_mib());
    let place = |name: &str| dir.join(name).display().to_string();
    let mut arguments: Vec<String> =
        ["-nodefaults", "-no-user-config", "-no-reboot", "-display", "none", "-machine", "q35,memory-backend=mem"]
            .map(str::to_owned)
            .to_vec();
    let mut add = |option: &str, value: String| arguments.extend([option.to_owned(), value]);
    add("-accel", accel.argument().into());
    add("-cpu", processor(accel).into());
    add("-smp", processors(accel));
    add("-m", memory.to_string());
    // vhost-user: the device process maps the guest's memory.
    add("-object", format!("memory-backend-memfd,id=mem,size={memory}M,share=on"));
    add("-device", "vmgenid,guid=auto".into());
    add("-chardev", format!("file,id=console,path={},append=on", place("console")));
    add("-serial", "chardev:console".into());
    add("-qmp", format!("unix:{},server=on,wait=off", place("qmp.sock")));
    for port in 0..PORTS {
        let slot = FIRST_PORT + port;
        add("-device", format!("pcie-root-port,id=port{port},chassis={},addr={slot:#x}", port + 1));
    }
    add("-device", format!("pcie-root-port,id={VSOCK_BUS},chassis={},addr={VSOCK_PORT:#x}", PORTS + 1));
    Ok(arguments)
}

/// What it starts.
fn boots(boot: Boot, kernel: &Path, initrd: &Path) -> [String; 6] {
    let path = |path: &Path| path.display().to_string();
    ["-kernel".into(), path(kernel), "-initrd".into(), path(initrd), "-append".into(), boot.command_line()]
}

fn vsock_backend(dir: &Path) -> [String; 2] {
    ["-chardev".into(), format!("socket,id={VSOCK},path={}", dir.join("vhost.sock").display())]
}

async fn launch(dir: &Path, arguments: Vec<String>) -> Result<(Process, Qmp)> {
    let qemu = Process::start(&inputs::qemu()?, arguments, &[], &dir.join("qemu.log"))?;
    let qmp = Qmp::connect(&dir.join("qmp.sock"), PATIENCE).await;
    let qmp = qmp.with_context(|| format!("QEMU: {}", qemu.tail()))?;
    Ok((qemu, qmp))
}

/// Starts the device and waits until it listens: QEMU connects to it once, at its start.
fn start_vsock_device(dir: &Path) -> Result<Process> {
    let (socket, uds) = (dir.join("vhost.sock"), dir.join("vsock"));
    let vm = format!("guest-cid=3,socket={},uds-path={}", socket.display(), uds.display());
    let mut process =
        Process::start(&inputs::vsock_device()?, ["--vm", &vm], &[("RUST_LOG", "warn")], &dir.join("vsock.log"))?;
    for _ in 0..500 {
        if socket.exists() {
            return Ok(process);
        }
        process.must_run()?;
        std::thread::sleep(Duration::from_millis(10));
    }
    bail!("vhost-device-vsock makes no socket: {}", process.tail())
}
