//! A machine that was stopped when its kernel had come up and was about to start zpod-guest. Guests go on from there, as with
//! Kata's VM templates: in emulation, a boot of the kernel takes most of what a boot takes.
//!
//! Everything of ours runs in each guest anew, from its first instruction on: of what is shared nothing is under test. It
//! is made once and kept in the cache, by what it is made of.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};
use std::{io, thread};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use serde_json::json;
use tokio::time::{Instant, sleep};
use zpod_image::Error;
use zpod_image::cache::{self, Cache, Outcome};

use super::{Boot, boots, launch, machine};
use crate::qmp::Qmp;
use crate::workdir::Workdir;
use crate::{PATIENCE, console, inputs};

/// What it has shown on its console.
pub(super) const CONSOLE: &str = "console";
const STATE: &str = "state";
const KIND: &str = "guest-template";
/// The kernel says this last.
const ABOUT_TO_START: &str = "Run /zpod/init as init process";
/// zpod-guest says this first of all.
const STARTED: &str = "zpod-guest: ";
/// Templates that nobody has used for so long are removed when a new one is made.
const UNUSED: Duration = Duration::from_secs(2 * 3600);

/// The directory of the template for the guest image and the programs that are there now.
pub(super) async fn get() -> Result<PathBuf> {
    let cache = Cache::from_env()?;
    let key = key_of_inputs().await?;
    // Made by a thread with a runtime of its own: the cache calls what is not async.
    let made = cache.entry(KIND, &key, |dir| {
        let made = thread::scope(|scope| scope.spawn(|| make_alone(dir)).join());
        let made = made.unwrap_or_else(|_| Err(anyhow!("it panicked")));
        made.map_err(|error| Error::io("make a template for guests in", dir)(io::Error::other(format!("{error:#}"))))
    })?;
    let place = made.path().to_owned();
    File::open(&place).and_then(|dir| dir.set_modified(SystemTime::now())).context("mark the template as used")?;
    if matches!(made, Outcome::Created(_)) {
        remove_unused(cache.dir());
    }
    Ok(place)
}

/// Its inputs: each file by size and time, since that is quick, and the machine.
async fn key_of_inputs() -> Result<String> {
    let image = inputs::guest_image()?;
    let mut files =
        vec![image.kernel, image.overlay, inputs::stand_in()?, inputs::container_tool()?, inputs::busybox()?];
    files.extend(inputs::kata_agent()?);
    files.push(inputs::qemu()?);
    let mut parts = machine(Boot::FromTemplate, Path::new("/")).await?;
    parts.push(Boot::FromTemplate.command_line());
    for file in files {
        let data = fs::metadata(&file).with_context(|| format!("{}", file.display()))?;
        parts.push(format!("{} {} {} {}", file.display(), data.size(), data.mtime(), data.mtime_nsec()));
    }
    Ok(cache::key(parts.iter().map(String::as_str)))
}

fn make_alone(dir: &Path) -> Result<()> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(make(dir))
}

/// Tries again when the machine was stopped too late: whoever looks at the console may be late on a busy machine.
async fn make(dir: &Path) -> Result<()> {
    for _ in 0..5 {
        // Short: QEMU's socket is in it.
        let aside = Workdir::new()?;
        if boot(aside.path(), &dir.join(STATE)).await? {
            fs::copy(aside.path().join(CONSOLE), dir.join(CONSOLE)).context("keep the console")?;
            return Ok(());
        }
    }
    bail!("the machine always went on to zpod-guest before it could be stopped")
}

/// Boots a machine up to zpod-guest and saves its state; whether it was stopped in time.
async fn boot(aside: &Path, state: &Path) -> Result<bool> {
    let (image, initrd, console) = (inputs::guest_image()?, aside.join("initrd"), aside.join(CONSOLE));
    Boot::FromTemplate.write_initrd(&image, &initrd)?;
    let mut arguments = machine(Boot::FromTemplate, aside).await?;
    arguments.extend(boots(Boot::FromTemplate, &image.kernel, &initrd));
    let (mut qemu, mut qmp) = launch(aside, arguments).await?;
    let end = Instant::now() + PATIENCE;
    while !console::contains(&console, ABOUT_TO_START) {
        qemu.must_run()?;
        ensure!(Instant::now() < end, "the kernel doesn't come up; its console ends:\n{}", console::tail(&console, 30));
        sleep(Duration::from_millis(5)).await;
    }
    qmp.execute("stop", json!({})).await?;
    if console::contains(&console, STARTED) {
        return Ok(false);
    }
    qmp.execute("migrate", json!({"uri": format!("file:{}", state.display())})).await?;
    migrated(&mut qmp).await?;
    Ok(true)
}

/// Reads the state into a machine that waits for it. It does not run yet.
pub(super) async fn load(qmp: &mut Qmp, template: &Path) -> Result<()> {
    let uri = format!("file:{}", template.join(STATE).display());
    qmp.execute("migrate-incoming", json!({"uri": uri})).await?;
    migrated(qmp).await
}

async fn migrated(qmp: &mut Qmp) -> Result<()> {
    let end = Instant::now() + PATIENCE;
    loop {
        let now = qmp.execute("query-migrate", json!({})).await?;
        match now["status"].as_str() {
            Some("completed") => return Ok(()),
            Some("failed" | "cancelled") => bail!("the template's state: {now}"),
            _ => ensure!(Instant::now() < end, "the template's state takes too long: {now}"),
        }
        sleep(Duration::from_millis(5)).await;
    }
}

/// Removes those that nobody has used for long. What can't be removed stays for the next time.
fn remove_unused(cache: &Path) {
    for entry in fs::read_dir(cache).into_iter().flatten().flatten() {
        let is_one = entry.file_name().to_str().is_some_and(|name| name.starts_with(&format!("{KIND}-")));
        let used = entry.metadata().and_then(|data| data.modified());
        let is_old = used.is_ok_and(|used| used.elapsed().is_ok_and(|age| age > UNUSED));
        if is_one && is_old {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}
