//! `make demo`: a ZFS volume inside a real guest kernel, from the CSI call to data that survives; and ZFS itself in two pods,
//! none of which sees the other's.

use std::path::Path;
use std::process::{Command, ExitCode};

use anyhow::{Context as _, Result, ensure};
use zpod_e2e::accel::Accel;
use zpod_e2e::csi::{Publish, bytes};
use zpod_e2e::screen::Screen;
use zpod_e2e::slot::Pair;
use zpod_e2e::{Boot, Container, Mount, Node, Runtime, Sandbox, inputs};
use zpod_proto::csi::{NodeGetVolumeStatsResponse, volume_usage::Unit};
use zpod_volume::{Bytes, PoolName, VolumeId};

const SIZE: Bytes = Bytes::gib(1);
const GROWN: Bytes = Bytes::gib(2);

// One thread: what it starts dies with it.
#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    let mut screen = Screen::new();
    let result = tokio::select! {
        result = demo(&mut screen) => result,
        // Dropping the demo ends its machines and removes its files.
        _ = tokio::signal::ctrl_c() => Err(anyhow::anyhow!("interrupted")),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            screen.fail(&error);
            ExitCode::FAILURE
        }
    }
}

async fn demo(screen: &mut Screen) -> Result<()> {
    inputs::guest_image()?;
    screen.headline("zpod: ZFS volumes whose pools live inside each pod's own guest kernel");

    screen.begin("zpod --standalone");
    let mut node = Node::start_with(&["--allow-zfs-access"]).await?;
    screen.done("controller and node answer on one CSI socket");
    let result = async {
        volume_survives(screen, &mut node).await?;
        zfs_in_two_pods(screen, &mut node).await
    };
    result.await.map_err(|error| error.context(format!("zpod's log ends:\n{}\n--- end of log", node.log_tail())))
}

async fn volume_survives(screen: &mut Screen, node: &mut Node) -> Result<()> {
    screen.begin("CreateVolume");
    let volume = node.csi.create("demo", SIZE, &[("compression", "zstd"), ("headroom", "8x")]).await?;
    let pool = PoolName::for_volume(volume.volume_id.parse::<VolumeId>()?);
    screen.done(&format!("{SIZE}, compression zstd, room to grow to 8 GiB"));
    screen.detail(&format!("volume {}", volume.volume_id));

    // The first pod, as Kata's runtime-rs runs it.
    let target = node.target("pod-1", "demo")?;
    screen.begin("NodePublishVolume");
    node.csi.publish(&volume, &target, &Publish::default()).await?;
    let disk = node.device(&target)?;
    screen.done("a raw disk and a Kata direct-volume entry; the host mounts no ZFS");

    screen.begin("Pod 1 boots");
    let accel = if Accel::detect().await? == Accel::Kvm { "with KVM" } else { "in pure emulation" };
    let mut pod = Sandbox::start_with(node, Runtime::Rs, Boot::Zpod).await?;
    screen.done(&format!("a Kata-style guest in QEMU, {accel}"));
    screen.begin("Its container starts");
    pod.run(Container::new("app", [Mount::new(&target, "/data")])).await?;
    let mount = pod.sh("app", "grep ' /data ' /proc/mounts").await?;
    ensure!(mount.split(' ').nth(2) == Some("zfs"), "/data is not ZFS: {mount}");
    screen.done("/data is ZFS, from a pool made in the guest:");
    screen.detail(&mount);

    screen.begin("Write a file");
    let write = "head -c 20000000 /dev/urandom > /data/file && sync /data/file && sha256sum /data/file";
    let sum = pod.sh("app", write).await?;
    screen.done("20 MB, fsynced");
    screen.detail(&sum);
    screen.begin("zpool status");
    pod.run(Container::debug("debug")).await?;
    let status = pod.zfs_tool("debug", &format!("zpool status {pool}")).await?;
    screen.done("asked in the guest: the host knows no such pool");
    screen.detail(&status);

    screen.begin("SIGKILL the virtual machine");
    pod.kill();
    node.csi.unpublish(&volume, &target).await?;
    node.must_be_unpublished(&target)?;
    screen.done("no export, no sync, no goodbye");

    // The second pod, as Kata's Go runtime runs it.
    let target = node.target("pod-2", "demo")?;
    screen.begin("Pod 2 boots");
    node.csi.publish(&volume, &target, &Publish::default()).await?;
    let mut pod = Sandbox::start_with(node, Runtime::Go, Boot::Zpod).await?;
    screen.done("another guest, the same volume");
    screen.begin("Its container starts");
    pod.run(Container::new("app", [Mount::new(&target, "/data")])).await?;
    let found = pod.sh("app", "sha256sum /data/file").await?;
    ensure!(found == sum, "the checksum was {sum} and is {found}");
    screen.done("the checksum is the same:");
    screen.detail(&found);

    screen.begin("Grow it while it is in use");
    let before = pod.sh("app", "df -h /data").await?;
    node.csi.controller_expand(&volume, GROWN).await?;
    let size = node.csi.node_expand(&volume, &target, GROWN).await?;
    ensure!(size == GROWN, "it grew to {size}");
    screen.done(&format!("{SIZE} to {GROWN}; nothing unmounted, the machine untouched"));
    screen.detail(&before);
    screen.detail(pod.sh("app", "df -h /data").await?.lines().last().unwrap_or_default());

    screen.begin("NodeGetVolumeStats");
    let total = i64::try_from(GROWN.0)?;
    let stats = node.csi.stats_when(&volume, &target, |stats| bytes(stats).0 == total).await?;
    screen.done("as kubelet sees it:");
    screen.detail(&describe(&stats)?);

    screen.begin("Stop, unpublish, delete");
    pod.stop().await?;
    node.csi.unpublish(&volume, &target).await?;
    node.must_be_unpublished(&target)?;
    node.csi.delete(&volume).await?;
    ensure!(!disk.exists(), "{} is left", disk.display());
    node.must_be_empty()?;
    screen.done("no disk, no mount, no entry is left");
    Ok(())
}

/// Two pods whose class asks for ZFS itself, at the same time on one node.
async fn zfs_in_two_pods(screen: &mut Screen, node: &mut Node) -> Result<()> {
    let _pair = Pair::take().await?;
    let (mut pods, mut pools) = (Vec::new(), Vec::new());
    for (name, runtime) in [("red", Runtime::Go), ("blue", Runtime::Rs)] {
        screen.begin(&format!("Pod {name} boots"));
        let volume = node.csi.create(name, SIZE, &[("zfsAccess", "volume")]).await?;
        let target = node.target(name, name)?;
        node.csi.publish(&volume, &target, &Publish::default()).await?;
        let mut pod = Sandbox::start_with(node, runtime, Boot::Zpod).await?;
        pod.run(Container::new("app", [Mount::new(&target, "/data")])).await?;
        screen.done("its class says zfsAccess: volume");
        pools.push(PoolName::for_volume(volume.volume_id.parse::<VolumeId>()?).to_string());
        pods.push((name, pod, volume, target));
    }
    for ((name, pod, ..), pool) in pods.iter_mut().zip(&pools) {
        screen.begin(&format!("zfs snapshot, zpool list in {name}"));
        pod.sh("app", &format!("echo mine > /data/file; /opt/zpod/bin/zfs snapshot {pool}/data@mine")).await?;
        let listed = pod
            .sh("app", "/opt/zpod/bin/zpool list -o name,size,health; /opt/zpod/bin/zfs list -t all -Hro name")
            .await?;
        ensure!(pools.iter().filter(|pool| listed.contains(*pool)).count() == 1, "{name} sees: {listed}");
        screen.done("in an ordinary container, with the guest's own tools: its pool, and no other");
        screen.detail(&listed);
    }
    screen.begin("zpool list on the host");
    let here = of_the_host()?;
    ensure!(pools.iter().all(|pool| !here.contains(pool)), "the host sees: {here}");
    screen.done("neither of them:");
    screen.detail(&here);

    screen.begin("Stop, unpublish, delete");
    for (_, pod, volume, target) in pods {
        pod.stop().await?;
        node.csi.unpublish(&volume, &target).await?;
        node.csi.delete(&volume).await?;
    }
    node.must_be_empty()?;
    screen.done("nothing is left");
    screen.finish("A volume that survived a killed machine, and ZFS in two pods that don't see each other:");
    Ok(())
}

fn of_the_host() -> Result<String> {
    if !Path::new("/dev/zfs").exists() {
        return Ok("none: this kernel has no ZFS".into());
    }
    let output = Command::new("zpool").arg("list").output().context("run zpool list")?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn describe(stats: &NodeGetVolumeStatsResponse) -> Result<String> {
    let of = |unit: Unit| stats.usage.iter().find(|usage| usage.unit() == unit);
    let (total, used, available) = bytes(stats);
    let inodes = of(Unit::Inodes).context("no usage in inodes")?;
    let condition = stats.volume_condition.as_ref().context("no condition")?;
    let mib = |bytes: i64| bytes >> 20;
    Ok(format!(
        "total {} MiB, used {} MiB, available {} MiB; {} of {} inodes used\ncondition: {}{}",
        mib(total),
        mib(used),
        mib(available),
        inodes.used,
        inodes.total,
        if condition.abnormal { "abnormal" } else { "normal" },
        if condition.message.is_empty() { String::new() } else { format!(", {:?}", condition.message) },
    ))
}
