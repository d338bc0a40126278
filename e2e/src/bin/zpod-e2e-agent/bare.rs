//! The init of a guest whose initrd lacks zpod-guest: it loads the kernel modules, ZFS among them, and executes the
//! agent. That is the hardest case of "fails closed": everything is there but the proxy.

use std::ffi::CString;
use std::fs::{self, File};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result};
use nix::kmod::{ModuleInitFlags, finit_module};

const MODULES: &str = "/zpod/modules";

pub(crate) fn run() -> Result<()> {
    let order = fs::read_to_string(Path::new(MODULES).join("order")).context("read the list of modules")?;
    let parameters = CString::default();
    for line in order.lines() {
        let Some((_, file)) = line.split_once(' ') else { continue };
        let path = Path::new(MODULES).join(file);
        let module = File::open(&path).with_context(|| format!("open {}", path.display()))?;
        match finit_module(module, &parameters, ModuleInitFlags::empty()) {
            Ok(()) | Err(nix::Error::EEXIST) => {}
            // A driver whose hardware is absent: the boot goes on without it.
            Err(error) => eprintln!("bare-init: {}: {error}", path.display()),
        }
    }
    Err(Command::new("/init").exec()).context("execute /init")
}
