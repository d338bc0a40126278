//! The stand-in for Kata's own initrd: an agent as `/init`, and a root file system for containers.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail};
use zpod_image::Archive;

use crate::inputs;

/// Where the containers' root file system is.
pub const ROOTFS: &str = "/e2e/rootfs";
/// The init of a guest that has our modules but not our proxy.
pub const BARE_INIT: &str = "/e2e/bare-init";

/// Directories that kata-agent and containers expect.
const DIRECTORIES: [&str; 12] =
    ["/dev", "/proc", "/sys", "/run", "/tmp", "/etc", "/var", "/root", "/mnt", "/sbin", "/bin", "/lib/modules"];

/// Writes the initrd.
///
/// # Errors
/// When a part of it is missing.
pub fn write(to: &Path) -> Result<()> {
    let mut archive = Archive::new();
    for dir in DIRECTORIES {
        archive.dir(dir, 0o755);
    }
    archive.char_device("/dev/console", 0o600, 5, 1);
    archive.file("/etc/hostname", *b"e2e\n", 0o644);

    let stand_in = inputs::stand_in()?;
    let agent = inputs::kata_agent()?.unwrap_or_else(|| stand_in.clone());
    add_program(&mut archive, "/init", "", &agent)?;
    if agent == stand_in {
        archive.symlink(BARE_INIT, "/init");
    } else {
        add_program(&mut archive, BARE_INIT, "", &stand_in)?;
    }

    for dir in DIRECTORIES {
        archive.dir(&format!("{ROOTFS}{dir}"), 0o755);
    }
    archive.file(&format!("{ROOTFS}/etc/passwd"), *b"root:x:0:0:root:/root:/bin/sh\n", 0o644);
    archive.file(&format!("{ROOTFS}/etc/group"), *b"root:x:0:\n", 0o644);
    let busybox = inputs::busybox()?;
    archive.file(&format!("{ROOTFS}/bin/busybox"), read(&busybox)?, 0o755);
    for applet in run(Command::new(&busybox).arg("--list"))?.lines().filter(|applet| *applet != "busybox") {
        archive.symlink(&format!("{ROOTFS}/bin/{applet}"), "busybox");
    }
    add_program(&mut archive, &format!("{ROOTFS}/bin/e2e"), ROOTFS, &inputs::container_tool()?)?;
    fs::write(to, archive.to_cpio()?).with_context(|| format!("write {}", to.display()))
}

/// A program without its symbols, and the libraries it asks for, at the paths its loader looks for them.
///
/// # Errors
/// When it or a library is missing.
pub fn add_program(archive: &mut Archive, path: &str, root: &str, program: &Path) -> Result<()> {
    archive.file(path, stripped(program)?, 0o755);
    for library in libraries(program)? {
        let inside = format!("{root}{}", library.display());
        archive.file(&inside, read(&library)?, 0o755);
    }
    Ok(())
}

fn stripped(program: &Path) -> Result<Vec<u8>> {
    let out = tempfile::NamedTempFile::new().context("make a temporary file")?;
    run(Command::new("strip").arg("-o").arg(out.path()).arg(program))?;
    read(out.path())
}

/// What ldd(1) names; nothing for a static program.
fn libraries(program: &Path) -> Result<Vec<PathBuf>> {
    let output = Command::new("ldd").arg(program).output().context("run ldd")?;
    let text = String::from_utf8_lossy(&output.stdout);
    if text.contains("not found") {
        bail!("{} lacks libraries on this machine:\n{text}", program.display());
    }
    let words = text.lines().filter_map(|line| line.split_whitespace().find(|word| word.starts_with('/')));
    Ok(words.map(PathBuf::from).collect())
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("read {}", path.display()))
}

fn run(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("run {:?}", command.get_program()))?;
    if !output.status.success() {
        bail!("{command:?}: {}: {}", output.status, String::from_utf8_lossy(&output.stderr));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
