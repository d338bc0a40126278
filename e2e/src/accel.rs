//! KVM where it works, emulation where it doesn't.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::Result;
use tokio::time::{Instant, sleep};
use zpod_image::cache::Cache;

use crate::process::Process;
use crate::workdir::Workdir;
use crate::{console, inputs};

/// A kernel without a root panics within a second or two where KVM works.
const PROBE: Duration = Duration::from_secs(10);

/// How QEMU runs the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accel {
    /// By hardware.
    Kvm,
    /// In pure emulation.
    Tcg,
}

impl Accel {
    /// QEMU's `-accel` value.
    pub fn argument(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg,thread=multi",
        }
    }

    /// `ZPOD_E2E_ACCEL`, or what a probe of this boot of the machine found. That a `/dev/kvm` exists says little: in
    /// nested machines it may fail, or hang at the first instruction of a stock kernel.
    ///
    /// # Errors
    /// When there is nothing to probe with.
    pub async fn detect() -> Result<Self> {
        match std::env::var("ZPOD_E2E_ACCEL").as_deref() {
            Ok("kvm") => return Ok(Self::Kvm),
            Ok("tcg") => return Ok(Self::Tcg),
            _ => {}
        }
        if !Path::new("/dev/kvm").exists() {
            return Ok(Self::Tcg);
        }
        let cache = Cache::from_env()?;
        let note = cache.dir().join("e2e-accel");
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
        let lock = cache.lock("e2e-accel");
        if let Some(word) = fs::read_to_string(&note).unwrap_or_default().strip_prefix(&boot) {
            return Ok(if word == "kvm" { Self::Kvm } else { Self::Tcg });
        }
        let found = if probe().await? { Self::Kvm } else { Self::Tcg };
        fs::write(&note, format!("{boot}{}", if found == Self::Kvm { "kvm" } else { "tcg" }))?;
        drop(lock);
        Ok(found)
    }
}

/// Boots the kernel with no root: it must come as far as its panic.
async fn probe() -> Result<bool> {
    let dir = Workdir::new()?;
    let (console, log) = (dir.path().join("console"), dir.path().join("log"));
    let kernel = inputs::guest_image()?.kernel;
    let arguments = [
        "-nodefaults -no-user-config -display none -no-reboot -machine q35,accel=kvm -cpu max -m 256 -append".into(),
        "console=ttyS0 panic=-1".to_owned(),
        format!("-serial file:{} -kernel", console.display()),
        kernel.display().to_string(),
    ];
    let split = |text: &String| text.split(' ').map(str::to_owned).collect::<Vec<_>>();
    let [first, cmdline, second, kernel] = arguments;
    let arguments = [split(&first), vec![cmdline], split(&second), vec![kernel]].concat();
    let mut qemu = Process::start(&inputs::qemu()?, arguments, &[], &log)?;
    let deadline = Instant::now() + PROBE;
    while Instant::now() < deadline {
        if qemu.ended()?.is_some() {
            return Ok(console::contains(&console, "Kernel panic"));
        }
        sleep(Duration::from_millis(50)).await;
    }
    Ok(false)
}
