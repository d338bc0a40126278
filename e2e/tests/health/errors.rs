//! Disks that fail reads and writes.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use tokio::time::{Instant, timeout};
use zpod_e2e::csi::Publish;
use zpod_e2e::qemu::Fault;
use zpod_e2e::shim::User;
use zpod_e2e::{Container, Mount, Node, PATIENCE, Runtime, Sandbox};
use zpod_volume::Bytes;

use crate::condition;
use crate::image::{RECORD, copies, write};

const SIZE: Bytes = Bytes::mib(256);
const RECORDS: u64 = 8;

#[tokio::test]
async fn a_disk_that_fails_writes_suspends_the_pool_which_resumes_by_itself_when_the_disk_works() -> Result<()> {
    let mut node = Node::start().await?;
    let volume = node.csi.create("pvc-writes", SIZE, &[]).await?;
    let target = node.target("pod", "pv")?;
    node.csi.publish(&volume, &target, &Publish::default()).await?;
    let mut pod = Sandbox::start(&node, Runtime::Rs).await?;
    pod.run(Container::new("app", [Mount::new(&target, "/data")])).await?;
    let sum = write(&mut pod, "/data/file", RECORDS).await?;
    let disk = node.device(&target)?;
    node.csi.stats_when(&volume, &target, |stats| !condition(stats).message.is_empty()).await?;

    pod.guest_mut().break_disk(&disk, Fault::Writes).await?;
    let script = "head -c 1000000 /dev/urandom > /data/during; sync; sha256sum < /data/during; echo written";
    let writer = pod.spawn("app", User::ROOT, &["/bin/sh", "-c", script]).await?;
    let begin = Instant::now();
    let told = node.csi.stats_when(&volume, &target, |stats| condition(stats).abnormal).await;
    let told = condition(&told.with_context(|| node.log_tail())?);
    println!("{:?} after the first error: {}", begin.elapsed(), told.message);
    assert!(told.message.contains("SUSPENDED") || told.message.contains("suspended"), "{told:?}");
    // Asked again while it is tried again in vain, it stays so.
    tokio::time::sleep(Duration::from_secs(15)).await;
    let told = condition(&node.csi.stats(&volume, &target).await?);
    assert!(told.abnormal, "{told:?}");

    pod.guest_mut().mend_disk(&disk).await?;
    let begin = Instant::now();
    loop {
        let said = condition(&node.csi.stats(&volume, &target).await?);
        if !said.abnormal {
            println!("{:?} after the disk worked again: {}", begin.elapsed(), said.message);
            break;
        }
        ensure!(begin.elapsed() < PATIENCE, "still {said:?}\n{}", pod.guest().console_tail(40));
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    // Who had to wait goes on, in the same container; nothing was lost.
    let output = timeout(PATIENCE, writer.finish()).await.context("the writer hangs")??;
    println!("the writer: {output:?}");
    assert_eq!(pod.sh("app", "sha256sum < /data/file").await?, sum);
    assert_eq!(pod.sh("app", "echo after > /data/after && sync && cat /data/after").await?, "after");
    pod.guest().shows("and is resumed", PATIENCE).await?;
    pod.stop().await?;
    node.csi.unpublish(&volume, &target).await?;
    node.csi.delete(&volume).await?;
    node.must_be_empty()
}

#[tokio::test]
async fn a_disk_that_fails_some_reads_gives_eio_there_and_the_volume_turns_abnormal() -> Result<()> {
    let mut node = Node::start().await?;
    let volume = node.csi.create("pvc-reads", SIZE, &[("primarycache", "metadata")]).await?;
    let target = node.target("pod", "pv")?;
    node.csi.publish(&volume, &target, &Publish::default()).await?;
    let mut pod = Sandbox::start(&node, Runtime::Go).await?;
    pod.run(Container::new("app", [Mount::new(&target, "/data")])).await?;
    let sum = write(&mut pod, "/data/file", RECORDS).await?;
    let disk = node.device(&target)?;
    let copies = copies(&mut pod, "/data/file", &disk, RECORDS, 1).await?;
    let bad = copies[2][0] + RECORD / 2;

    pod.guest_mut().break_disk(&disk, Fault::ReadsAt(bad)).await?;
    let error = format!("{:#}", pod.sh("app", "sha256sum < /data/file").await.expect_err("the disk doesn't fail"));
    assert!(error.contains("nput/output error") || error.contains("I/O error"), "{error}");
    assert_eq!(pod.sh("app", "echo still > /data/other && sync && cat /data/other").await?, "still");
    let stats = node.csi.stats_when(&volume, &target, |stats| condition(stats).abnormal).await?;
    println!("{}", condition(&stats).message);

    // The disk remembers what it could not read: the file is whole.
    pod.guest_mut().mend_disk(&disk).await?;
    assert_eq!(pod.sh("app", "sha256sum < /data/file").await?, sum);
    pod.stop().await?;
    node.csi.unpublish(&volume, &target).await?;
    node.csi.delete(&volume).await?;
    node.must_be_empty()
}

#[tokio::test]
async fn a_disk_that_fails_altogether_is_told_and_the_pod_can_be_ended() -> Result<()> {
    let mut node = Node::start().await?;
    let volume = node.csi.create("pvc-all", SIZE, &[]).await?;
    let target = node.target("one", "pv")?;
    node.csi.publish(&volume, &target, &Publish::default()).await?;
    let mut pod = Sandbox::start(&node, Runtime::Rs).await?;
    pod.run(Container::new("app", [Mount::new(&target, "/data")])).await?;
    let sum = write(&mut pod, "/data/file", RECORDS).await?;
    let disk = node.device(&target)?;
    node.csi.stats_when(&volume, &target, |stats| !condition(stats).message.is_empty()).await?;
    pod.guest_mut().break_disk(&disk, Fault::All).await?;
    let _writer = pod.spawn("app", User::ROOT, &["/bin/sh", "-c", "echo lost > /data/lost; sync"]).await?;
    let stats = node.csi.stats_when(&volume, &target, |stats| condition(stats).abnormal).await?;
    println!("{}", condition(&stats).message);

    // Kubelet would end it by its deadline: the virtual machine is killed. The disk is exchanged for one that works.
    pod.kill();
    node.csi.unpublish(&volume, &target).await?;
    let target = node.target("two", "pv")?;
    node.csi.publish(&volume, &target, &Publish::default()).await?;
    let mut pod = Sandbox::start(&node, Runtime::Go).await?;
    pod.run(Container::new("app", [Mount::new(&target, "/data")])).await?;
    assert_eq!(pod.sh("app", "sha256sum < /data/file").await?, sum);
    pod.stop().await?;
    node.csi.unpublish(&volume, &target).await?;
    node.csi.delete(&volume).await?;
    node.must_be_empty()
}
