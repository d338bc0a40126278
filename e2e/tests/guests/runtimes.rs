//! What Kata's runtimes do with disks, their faults included.

use anyhow::{Result, bail, ensure};
use zpod_e2e::csi::Publish;
use zpod_e2e::node::allocated;
use zpod_e2e::{Container, Mount, Node, Runtime, Sandbox, Vmm};
use zpod_volume::Bytes;

const SIZE: Bytes = Bytes::mib(256);

async fn refused(pod: &mut Sandbox, container: Container, why: &str) -> Result<()> {
    let Err(error) = pod.run(container).await else { bail!("it must not start") };
    let error = format!("{error:#}");
    println!("{error}");
    ensure!(error.contains(why), "{why:?} is not in {error}");
    Ok(())
}

#[tokio::test]
async fn a_disk_that_is_plugged_in_read_only_shows_what_was_exported_and_nothing_less() -> Result<()> {
    let mut node = Node::start().await?;
    let volume = node.csi.create("pvc-readers", SIZE, &[]).await?;
    let target = node.target("pod", "pv")?;
    let app = |id: &str, read_only| Container::new(id, [Mount { read_only, ..Mount::new(&target, "/data") }]);
    node.csi.publish(&volume, &target, &Publish::default()).await?;

    let mut pod = Sandbox::start(&node, Runtime::Rs).await?;
    refused(&mut pod, app("early", true), "its pool has not been made yet").await?;
    pod.run(app("writer", false)).await?;
    pod.sh("writer", "echo one > /data/file").await?;
    pod.remove("writer").await?;
    pod.run(app("reader", true)).await?;
    assert_eq!(pod.sh("reader", "cat /data/file; grep -o ' /data zfs ro' /proc/mounts").await?, "one\n /data zfs ro");
    assert!(pod.sh("reader", "echo x > /data/x").await.is_err());
    node.csi.stats_when(&volume, &target, |stats| !stats.usage.is_empty()).await?;
    refused(&mut pod, app("writer", false), "a container wants to write").await?;
    pod.run(app("another", true)).await?;
    assert_eq!(pod.sh("another", "cat /data/file").await?, "one");
    // Both are gone, and the next disk can be written to. What is fsynced last is in the log only.
    pod.remove("reader").await?;
    pod.remove("another").await?;
    pod.run(app("writer", false)).await?;
    pod.sh("writer", "dd if=/dev/zero of=/data/two bs=4k count=1 conv=fsync 2>/dev/null").await?;
    pod.kill();

    node.csi.unpublish(&volume, &target).await?;
    node.csi.publish(&volume, &target, &Publish { read_only: true, ..Publish::default() }).await?;
    let mut pod = Sandbox::start(&node, Runtime::Rs).await?;
    refused(&mut pod, app("reader", true), "without the last fsynced writes").await?;
    node.csi.unpublish(&volume, &target).await?;
    node.csi.publish(&volume, &target, &Publish::default()).await?;
    pod.run(app("writer", false)).await?;
    pod.remove("writer").await?;
    node.csi.unpublish(&volume, &target).await?;
    node.csi.publish(&volume, &target, &Publish { read_only: true, ..Publish::default() }).await?;
    pod.run(app("reader", true)).await?;
    assert_eq!(pod.sh("reader", "cat /data/file; stat -c %s /data/two").await?, "one\n4096");
    pod.stop().await?;
    node.csi.unpublish(&volume, &target).await?;
    node.csi.delete(&volume).await?;
    node.must_be_empty()
}

#[tokio::test]
async fn a_disk_that_runtime_rs_forgot_is_no_copy_and_one_that_is_leaving_is_not_waited_out() -> Result<()> {
    let mut node = Node::start().await?;
    let volume = node.csi.create("pvc-forgotten", SIZE, &[]).await?;
    let target = node.target("pod", "pv")?;
    node.csi.publish(&volume, &target, &Publish::default()).await?;
    let app = |id: &str| Container::new(id, [Mount::new(&target, "/data")]);
    let mut pod = Sandbox::start(&node, Runtime::Rs).await?;
    pod.run(Container::debug("bystander")).await?;
    let disks = "busybox ls /sys/block | busybox grep -c ^vd";
    pod.run(app("one")).await?;
    pod.run(app("two")).await?;
    pod.sh("one", "echo first > /data/one").await?;
    // One of the two starts again: its disk is plugged in a second time, beside the one that is in use.
    pod.remove("one").await?;
    pod.run(app("one")).await?;
    assert_eq!(pod.sh("bystander", disks).await?, "2");
    pod.sh("one", "echo second > /data/one; sync").await?;
    assert_eq!(pod.sh("two", "cat /data/one").await?, "second");
    // Both end, and the first disk stays for ever. Whoever starts next has another one.
    pod.remove("one").await?;
    pod.remove("two").await?;
    assert_eq!(pod.sh("bystander", disks).await?, "1");
    pod.run(app("one")).await?;
    assert_eq!(pod.sh("bystander", disks).await?, "2");
    assert_eq!(pod.sh("one", "cat /data/one; echo third > /data/one").await?, "second");

    // With cloud-hypervisor nobody waits until the guest has let go of a disk.
    pod.play(Vmm::CloudHypervisor { locks: false });
    for _ in 0..3 {
        pod.remove("one").await?;
        pod.run(app("one")).await?;
        assert_eq!(pod.sh("one", "cat /data/one").await?, "third");
    }
    // Since version 46 it refuses the second disk before the guest hears of it: Kata's fault, for which there is no help.
    pod.run(app("two")).await?;
    pod.remove("one").await?;
    pod.play(Vmm::CloudHypervisor { locks: true });
    refused(&mut pod, app("one"), "is locked").await?;
    assert_eq!(pod.sh("two", "cat /data/one").await?, "third");
    pod.kill();
    node.csi.unpublish(&volume, &target).await?;
    node.csi.delete(&volume).await?;
    node.must_be_empty()
}

#[tokio::test]
async fn freed_space_comes_back_to_the_node_with_the_runtime_in_go_and_not_with_runtime_rs() -> Result<()> {
    const LARGE: u64 = 64 << 20;
    let mut node = Node::start().await?;
    for (runtime, comes_back) in [(Runtime::Go, true), (Runtime::Rs, false)] {
        let volume = node.csi.create("pvc-freed", SIZE, &[("autotrim", "off")]).await?;
        let target = node.target("pod", "pv")?;
        node.csi.publish(&volume, &target, &Publish::default()).await?;
        let image = node.device(&target)?;
        let mut pod = Sandbox::start(&node, runtime).await?;
        pod.run(Container::debug("tools")).await?;
        pod.run(Container::new("app", [Mount::new(&target, "/data")])).await?;
        let pool = pod.zfs_tool("tools", "zpool list -H -o name").await?;
        pod.sh("app", &format!("head -c {LARGE} /dev/urandom > /data/large && sync")).await?;
        let full = allocated(&image)?;
        pod.sh("app", "rm /data/large && sync").await?;
        // What was freed can be used, and so discarded, some transaction groups later.
        for _ in 0..4 {
            pod.zfs_tool("tools", &format!("zpool sync {pool}")).await?;
        }
        pod.zfs_tool("tools", &format!("zpool trim -w {pool}")).await?;
        let after = allocated(&image)?;
        println!("{runtime:?}: {full} bytes with the file, {after} after it was removed");
        ensure!(full > LARGE, "{runtime:?}: the image takes {full} bytes");
        ensure!((after < full - LARGE / 2) == comes_back, "{runtime:?}: {after} of {full} bytes are left");
        pod.stop().await?;
        node.csi.unpublish(&volume, &target).await?;
        node.csi.delete(&volume).await?;
    }
    node.must_be_empty()
}
