//! A volume that somebody else in the guest holds on to.

use anyhow::{Result, ensure};
use tokio::time::timeout;
use zpod_e2e::csi::Publish;
use zpod_e2e::shim::{Running, User};
use zpod_e2e::{Container, Mount, Node, PATIENCE, Runtime, Sandbox};
use zpod_volume::Bytes;

const SIZE: Bytes = Bytes::mib(256);
const POOLS: &str = "busybox ls /proc/spl/kstat/zfs | busybox grep ^zpod- || true";
const SIGKILL: u32 = 9;

/// Stays in the volume's directory, in the mount namespace that the agent mounts it in, and belongs to a container that
/// doesn't have the volume.
const HOLD: &str = "b=/e2e/rootfs/bin/busybox;
    cd $($b grep -o '/run/kata[^ ]*passthrough[^ ]*' /proc/self/mountinfo) && echo holding $PWD && exec $b sleep 100000";

/// Gives the process once it holds the mount.
async fn hold(pod: &mut Sandbox) -> Result<Running> {
    // A real agent gives containers a PID namespace of their own: its process is the guest's first, not theirs.
    let agent = "--mount=/guest/proc/1/ns/mnt";
    let enter = ["/bin/busybox", "nsenter", agent, "--", "/e2e/rootfs/bin/busybox", "sh", "-c", HOLD];
    let holder = pod.spawn("bystander", User::ROOT, &enter).await?;
    let said = String::from_utf8_lossy(&holder.read().await.unwrap_or_default()).into_owned();
    ensure!(said.starts_with("holding /run/kata-containers/"), "the holder says {said:?}");
    Ok(holder)
}

#[tokio::test]
async fn a_volume_that_another_process_holds_is_unplugged_and_resumes_when_it_is_plugged_again() -> Result<()> {
    let mut node = Node::start().await?;
    let volume = node.csi.create("pvc-busy", SIZE, &[]).await?;
    let target = node.target("pod", "pv")?;
    node.csi.publish(&volume, &target, &Publish::default()).await?;
    let mut pod = Sandbox::start(&node, Runtime::Rs).await?;
    let app = || Container::new("app", [Mount::new(&target, "/data")]);
    pod.run(Container::debug("bystander")).await?;
    pod.run(app()).await?;
    pod.sh("app", "echo precious > /data/file; sync").await?;
    let pool = pod.sh("bystander", POOLS).await?;
    let state = format!("busybox cat /proc/spl/kstat/zfs/{pool}/state");
    assert_eq!(pod.sh("bystander", &state).await?, "ONLINE");

    // RemoveContainer is answered, however long the process stays, and the disk can be unplugged: both have deadlines
    // in `remove`. What can't be exported stays, without its disk.
    let holder = hold(&mut pod).await?;
    pod.remove("app").await?;
    assert_eq!(pod.sh("bystander", POOLS).await?, pool);
    assert_eq!(pod.sh("bystander", "busybox ls /sys/block | busybox grep ^vd || true").await?, "");

    pod.run(app()).await?;
    let disk = pod.sh("bystander", "busybox ls /sys/block | busybox grep ^vd").await?;
    println!("the disk is {disk} now");
    assert_eq!(pod.sh("bystander", &state).await?, "ONLINE");
    assert_eq!(pod.sh("app", "cat /data/file; echo more > /data/more; sync; cat /data/more").await?, "precious\nmore");

    // With the holder gone, nothing is left in the kernel, and the next start is one like any other.
    holder.signal(SIGKILL).await?;
    timeout(PATIENCE, holder.finish()).await??;
    pod.remove("app").await?;
    assert_eq!(pod.sh("bystander", POOLS).await?, "", "the pool is still imported");
    pod.run(app()).await?;
    assert_eq!(pod.sh("app", "cat /data/file /data/more").await?, "precious\nmore");
    pod.stop().await?;
    node.csi.unpublish(&volume, &target).await?;
    node.csi.delete(&volume).await?;
    node.must_be_empty()
}
