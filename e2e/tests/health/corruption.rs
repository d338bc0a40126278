//! Bytes that are not what was written.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use tokio::time::{Instant, sleep};
use zpod_e2e::csi::Publish;
use zpod_e2e::{Container, Mount, Node, PATIENCE, Runtime, Sandbox};
use zpod_volume::Bytes;

use crate::condition;
use crate::image::{copies, damage, write};

const SIZE: Bytes = Bytes::mib(256);
const RECORDS: u64 = 8;
/// Nothing is kept in memory: each read of a file goes to the disk.
const UNCACHED: (&str, &str) = ("primarycache", "metadata");

/// What the metrics count of errors of a kind, of the one volume there is.
fn error_count(metrics: &str, kind: &str) -> Option<f64> {
    let kind = format!("type=\"{kind}\"");
    let line = metrics.lines().find(|line| line.starts_with("zpod_volume_errors_total{") && line.contains(&kind))?;
    line.rsplit(' ').next()?.parse().ok()
}

#[tokio::test]
async fn with_two_copies_a_scheduled_scrub_heals_what_was_damaged_and_the_volume_tells_of_it() -> Result<()> {
    let mut node = Node::start().await?;
    let parameters = [("copies", "2"), ("scrubInterval", "1m"), UNCACHED];
    let volume = node.csi.create("pvc-two-copies", SIZE, &parameters).await?;
    let target = node.target("pod", "pv")?;
    node.csi.publish(&volume, &target, &Publish::default()).await?;
    let mut pod = Sandbox::start(&node, Runtime::Rs).await?;
    pod.run(Container::debug("tools")).await?;
    pod.run(Container::new("app", [Mount::new(&target, "/data")])).await?;
    let sum = write(&mut pod, "/data/file", RECORDS).await?;
    let disk = node.device(&target)?;
    let copies = copies(&mut pod, "/data/file", &disk, RECORDS, 2).await?;
    let healthy = node.csi.stats_when(&volume, &target, |stats| !condition(stats).message.is_empty()).await?;
    assert!(!condition(&healthy).abnormal, "{healthy:?}");

    // One copy of each, the first ones and the second ones in turns. Nobody reads them.
    for (record, copies) in copies.iter().enumerate() {
        damage(&disk, copies[record % 2])?;
    }
    let begin = Instant::now();
    let mended = loop {
        let said = condition(&node.csi.stats(&volume, &target).await?);
        assert!(!said.abnormal, "{said:?}");
        if said.message.contains("checksum errors") {
            break said.message;
        }
        ensure!(begin.elapsed() < PATIENCE, "nothing was found after {PATIENCE:?}: {said:?}\n{}", node.log_tail());
        sleep(Duration::from_secs(1)).await;
    };
    println!("after {:?}: {mended}", begin.elapsed());
    let status = pod.zfs_tool("tools", "zpool status -v").await?;
    println!("{status}");
    assert!(status.contains("scrub repaired 1M in") && status.contains("with 0 errors"), "{status}");
    assert!(status.contains("errors: No known data errors"), "{status}");
    assert_eq!(pod.sh("app", "sha256sum < /data/file").await?, sum);

    // Healed: the other copies can go now.
    for (record, copies) in copies.iter().enumerate() {
        damage(&disk, copies[(record + 1) % 2])?;
    }
    assert_eq!(pod.sh("app", "sha256sum < /data/file").await?, sum, "what the scrub wrote is not what was there");
    pod.stop().await?;
    node.csi.unpublish(&volume, &target).await?;
    node.csi.delete(&volume).await?;
    node.must_be_empty()
}

#[tokio::test]
async fn without_a_second_copy_a_damaged_file_gives_eio_and_the_volume_turns_abnormal() -> Result<()> {
    let mut node = Node::start().await?;
    let volume = node.csi.create("pvc-one-copy", SIZE, &[UNCACHED]).await?;
    let target = node.target("pod", "pv")?;
    node.csi.publish(&volume, &target, &Publish::default()).await?;
    let mut pod = Sandbox::start(&node, Runtime::Go).await?;
    pod.run(Container::debug("tools")).await?;
    pod.run(Container::new("app", [Mount::new(&target, "/data")])).await?;
    let kept = write(&mut pod, "/data/kept", RECORDS).await?;
    write(&mut pod, "/data/file", RECORDS).await?;
    let disk = node.device(&target)?;
    let copies = copies(&mut pod, "/data/file", &disk, RECORDS, 1).await?;
    damage(&disk, copies[3][0])?;

    let error = pod.sh("app", "sha256sum < /data/file").await.expect_err("damaged bytes were handed out");
    let error = format!("{error:#}");
    assert!(error.contains("Input/output error") || error.contains("I/O error"), "{error}");
    let read = "dd if=/data/file of=/dev/null bs=128k skip=4 2>/dev/null && echo rest";
    assert_eq!(pod.sh("app", read).await?, "rest", "the records beside it are whole");
    assert_eq!(pod.sh("app", "sha256sum < /data/kept").await?, kept);
    let stats = node.csi.stats_when(&volume, &target, |stats| condition(stats).abnormal).await?;
    let said = condition(&stats).message;
    println!("{said}");
    assert!(said.contains("permanent errors"), "{said}");
    // The metrics follow the guest's stream of reports, whose details are half a minute old at most.
    let end = Instant::now() + PATIENCE;
    while error_count(&node.metrics().await?, "data") != Some(1.0) {
        ensure!(Instant::now() < end, "{}", node.metrics().await?);
        sleep(Duration::from_secs(1)).await;
    }
    let metrics = node.metrics().await?;
    println!("{} checksum errors by the metric", error_count(&metrics, "checksum").unwrap_or_default());
    assert!(error_count(&metrics, "checksum") > Some(0.0), "{metrics}");
    let status = pod.zfs_tool("tools", "zpool status -v").await?;
    println!("{status}");
    assert!(status.contains("/file"), "{status}");

    // It stays so until the file is gone and a scrub has seen that. Then it is well by itself.
    let pool = pod.zfs_tool("tools", "zpool list -H -o name").await?;
    // zpod has it scrubbed once by itself: how much is damaged?
    let scrubbed = Instant::now();
    while !pod.zfs_tool("tools", "zpool status").await?.contains("with 1 errors") {
        ensure!(scrubbed.elapsed() < PATIENCE, "the damaged pool is not scrubbed\n{}", node.log_tail());
        sleep(Duration::from_secs(1)).await;
    }
    pod.sh("app", "rm /data/file && sync").await?;
    pod.zfs_tool("tools", &format!("zpool scrub -w {}", pool.trim())).await?;
    let well = |stats: &_| !condition(stats).abnormal;
    let well = node.csi.stats_when(&volume, &target, well).await.context("after the damaged file was removed")?;
    println!("{}", condition(&well).message);
    pod.stop().await?;
    node.csi.unpublish(&volume, &target).await?;
    node.csi.delete(&volume).await?;
    node.must_be_empty()
}
