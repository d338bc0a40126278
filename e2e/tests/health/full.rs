//! A node whose file system is full, because others than zpod write to it.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use tokio::time::{Instant, sleep, timeout};
use zpod_e2e::csi::Publish;
use zpod_e2e::shim::{Running, User};
use zpod_e2e::{Container, Mount, Node, PATIENCE, Runtime, Sandbox, inputs};
use zpod_proto::csi::Volume;
use zpod_volume::Bytes;

use crate::condition;
use crate::image::write;

const SIZE: Bytes = Bytes::mib(256);
const XFS_MIB: u64 = 800;
const RECORDS: u64 = 8;
/// More than fits into the room that its pool has taken already.
const MORE: u64 = 24_000_000;
const QUIET: Duration = Duration::from_secs(30);

/// A node whose backing directory is a small file system of its own.
async fn node() -> Result<Node> {
    let mut node = Node::idle()?;
    let disk = node.dir().join("xfs");
    File::create(&disk)?.set_len(XFS_MIB << 20)?;
    run(&inputs::program("mkfs.xfs", "install xfsprogs")?, &["-q", &disk.display().to_string()])?;
    let mount = inputs::program("mount", "install mount")?;
    run(&mount, &["-o", "loop", &disk.display().to_string(), &node.backing_dir().display().to_string()])?;
    node.restart_zpod().await?;
    Ok(node)
}

fn run(program: &Path, arguments: &[&str]) -> Result<()> {
    let output = Command::new(program).args(arguments).output()?;
    if !output.status.success() {
        bail!("{}: {}", program.display(), String::from_utf8_lossy(&output.stderr));
    }
    Ok(())
}

/// Takes all the room there is.
fn hog(node: &Node) -> Result<std::path::PathBuf> {
    let path = node.backing_dir().join(".somebody-elses");
    let mut file = File::create(&path)?;
    let piece = vec![7; 1 << 16];
    while std::io::Write::write_all(&mut file, &piece).is_ok() {}
    // What is left are blocks smaller than a piece.
    while std::io::Write::write_all(&mut file, &piece[..512]).is_ok() {}
    file.sync_all().ok();
    Ok(path)
}

/// Waits until nothing has been written to the volumes for half a minute.
async fn settled(node: &Node) -> Result<()> {
    let blocks = || -> Result<u64> {
        let files = fs::read_dir(node.backing_dir())?;
        files.map(|file| Ok(file?.metadata()?.blocks())).sum()
    };
    let begin = Instant::now();
    let (mut last, mut since) = (blocks()?, Instant::now());
    while since.elapsed() < QUIET && begin.elapsed() < PATIENCE {
        sleep(Duration::from_secs(1)).await;
        let now = blocks()?;
        if now != last {
            (last, since) = (now, Instant::now());
        }
    }
    Ok(())
}

struct World {
    node: Node,
    pod: Sandbox,
    volume: Volume,
    target: std::path::PathBuf,
    sum: String,
}

impl World {
    async fn start(reports_errors: bool) -> Result<Self> {
        let mut node = node().await?;
        let volume = node.csi.create("pvc-full", SIZE, &[]).await?;
        let target = node.target("pod", "pv")?;
        node.csi.publish(&volume, &target, &Publish::default()).await?;
        let mut pod = Sandbox::start(&node, Runtime::Rs).await?;
        if reports_errors {
            pod.guest_mut().report_errors();
        }
        pod.run(Container::new("app", [Mount::new(&target, "/data")])).await?;
        let sum = write(&mut pod, "/data/file", RECORDS).await?;
        node.csi.stats_when(&volume, &target, |stats| !condition(stats).message.is_empty()).await?;
        Ok(Self { node, pod, volume, target, sum })
    }

    /// Writes more than there is room for.
    async fn writer(&mut self) -> Result<Running> {
        let script = format!("head -c {MORE} /dev/urandom > /data/more; sync; echo done");
        self.pod.spawn("app", User::ROOT, &["/bin/sh", "-c", &script]).await
    }

    async fn said(&mut self) -> Result<zpod_proto::csi::VolumeCondition> {
        Ok(condition(&self.node.csi.stats(&self.volume, &self.target).await?))
    }

    async fn end(mut self) -> Result<()> {
        assert_eq!(self.pod.sh("app", "sha256sum < /data/file").await?, self.sum);
        assert_eq!(self.pod.sh("app", "echo after > /data/after && sync && cat /data/after").await?, "after");
        self.pod.stop().await?;
        self.node.csi.unpublish(&self.volume, &self.target).await?;
        self.node.csi.delete(&self.volume).await?;
        Ok(())
    }
}

#[tokio::test]
async fn where_the_vmm_tells_the_guest_the_volume_turns_abnormal_and_is_well_by_itself_once_there_is_room() -> Result<()>
{
    let mut world = World::start(true).await?;
    let hog = hog(&world.node)?;
    let writer = world.writer().await?;
    let begin = Instant::now();
    loop {
        let said = world.said().await?;
        if said.abnormal {
            println!("{:?} after the file system was full: {}", begin.elapsed(), said.message);
            break;
        }
        ensure!(begin.elapsed() < PATIENCE, "nothing is told: {said:?}\n{}", world.pod.guest().console_tail(30));
        sleep(Duration::from_millis(500)).await;
    }
    assert_eq!(world.pod.guest_mut().state().await?, "running");

    fs::remove_file(hog)?;
    let begin = Instant::now();
    loop {
        let said = world.said().await?;
        if !said.abnormal {
            println!("{:?} after there was room: {}", begin.elapsed(), said.message);
            break;
        }
        ensure!(begin.elapsed() < PATIENCE, "still {said:?}\n{}", world.pod.guest().console_tail(30));
        sleep(Duration::from_millis(500)).await;
    }
    let output = timeout(PATIENCE, writer.finish()).await.context("the writer hangs")??;
    println!("the writer: {output:?}");
    world.end().await
}

#[tokio::test]
async fn where_qemu_stops_the_virtual_machine_its_silence_is_told_and_all_is_written_once_it_may_go_on() -> Result<()> {
    let mut world = World::start(false).await?;
    let hog = hog(&world.node)?;
    let _writer = world.writer().await?;
    let begin = Instant::now();
    while world.pod.guest_mut().state().await? != "io-error" {
        ensure!(begin.elapsed() < PATIENCE, "QEMU doesn't stop: {}", world.pod.guest().console_tail(30));
        sleep(Duration::from_millis(500)).await;
    }
    println!("stopped after {:?}", begin.elapsed());
    let said = world.said().await?;
    println!("at once: {said:?}");
    assert!(said.message.contains("did not answer"), "{said:?}");
    let begin = Instant::now();
    loop {
        let said = world.said().await?;
        if said.abnormal {
            println!("after {:?}: {said:?}", begin.elapsed());
            assert!(
                said.message.contains("can't be heard") && said.message.contains("file system is full"),
                "{said:?}"
            );
            break;
        }
        ensure!(begin.elapsed() < PATIENCE, "still {said:?}");
        sleep(Duration::from_secs(2)).await;
    }

    fs::remove_file(hog)?;
    // XFS frees a removed file's blocks later on: where there is no room yet, the machine is stopped again.
    for _ in 0..3 {
        world.pod.guest_mut().go_on().await?;
        sleep(Duration::from_secs(3)).await;
    }
    assert_eq!(world.pod.guest_mut().state().await?, "running");
    // The tests' vsock device does not outlive a stopped machine: the next pod tells what was written.
    settled(&world.node).await?;
    let World { mut node, pod, volume, target, sum } = world;
    pod.kill();
    node.csi.unpublish(&volume, &target).await?;
    let target = node.target("next", "pv")?;
    node.csi.publish(&volume, &target, &Publish::default()).await?;
    let mut pod = Sandbox::start(&node, Runtime::Go).await?;
    pod.run(Container::new("app", [Mount::new(&target, "/data")])).await?;
    assert_eq!(pod.sh("app", "wc -c < /data/more").await?, MORE.to_string());
    World { node, pod, volume, target, sum }.end().await
}
