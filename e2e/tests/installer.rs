//! What the installer puts on a node boots.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use zpod_e2e::agent::AgentClient;
use zpod_e2e::workdir::Workdir;
use zpod_e2e::{Guest, PATIENCE, base_initrd, inputs};
use zpod_installer::install::{Places, install};

/// Where Kata's shim finds the agent.
const AGENT_PORT: u32 = 1024;

#[tokio::test]
async fn a_guest_boots_from_the_kernel_and_the_initrd_that_the_installer_made_of_katas() -> Result<()> {
    let node = Workdir::new()?;
    let kata = node.path().join("opt/kata/share/kata-containers");
    fs::create_dir_all(&kata).context("make the node")?;
    base_initrd::write(&kata.join("kata-ubuntu-resolute.initrd"))?;
    // As Kata's initrd_builder.sh packs it; how long that gets is chance, so the padding matters.
    gzip(&kata.join("kata-ubuntu-resolute.initrd"))?;
    symlink("kata-ubuntu-resolute.initrd", kata.join("kata-containers-initrd.img")).context("link the initrd")?;

    let places = Places {
        host_root: node.path().to_owned(),
        guest_dir: inputs::guest_image()?.overlay.parent().context("an image lies in a directory")?.to_owned(),
        kata_dir: "/opt/kata".into(),
        install_dir: "/opt/zpod".into(),
        kata_initrd: None,
        settle: Duration::ZERO,
        lock_wait: Duration::ZERO,
    };
    install(&places)?;

    // The paths that Kata's drop-in names.
    let installed = node.path().join("opt/zpod/guest");
    let mut guest = Guest::boot_installed(&installed.join("vmlinuz"), &installed.join("initrd")).await?;
    // Our proxy, and behind it the agent that was in Kata's initrd.
    let answered = async {
        guest.shows("zpod-guest: proxy ready", PATIENCE).await?;
        let agent = AgentClient::new(guest.connect(AGENT_PORT, PATIENCE).await?);
        agent.check(PATIENCE).await.context("ask the agent")
    };
    answered.await.map_err(|error| guest.explain(error))
}

fn gzip(path: &Path) -> Result<()> {
    let packed = Command::new("gzip").args(["-9", "--stdout"]).arg(path).output().context("run gzip")?;
    ensure!(packed.status.success(), "gzip: {}", String::from_utf8_lossy(&packed.stderr));
    fs::write(path, packed.stdout).context("write the packed initrd")
}
