//! Volumes that grow, and zpod going away meanwhile.

use anyhow::{Context as _, Result};
use tokio::time::{Instant, timeout};
use tonic::Code;
use zpod_e2e::csi::{Publish, bytes, from_guest};
use zpod_e2e::shim::User;
use zpod_e2e::{Container, Mount, Node, PATIENCE, Runtime, Sandbox};
use zpod_volume::Bytes;

const CAPACITY: &str = "df -P -B1 /data | awk 'NR==2{print $2}'";

#[tokio::test]
async fn a_volume_grows_under_a_writer_and_after_a_restart_of_zpod_and_beyond_its_headroom_at_the_next_start()
-> Result<()> {
    let mut node = Node::start().await?;
    let volume = node.csi.create("pvc-growing", Bytes::mib(256), &[("headroom", "4x")]).await?;
    let target = node.target("one", "pv")?;
    node.csi.publish(&volume, &target, &Publish::default()).await?;
    let mut pod = Sandbox::start(&node, Runtime::Go).await?;
    pod.run(Container::new("app", [Mount::new(&target, "/data")])).await?;
    let writer = pod.spawn("app", User::ROOT, &["/bin/e2e", "append", "/data/records"]).await?;

    // Killed and started again while the pod runs.
    node.restart_zpod().await?;
    let total = |size: Bytes| move |stats: &_| bytes(stats).0 == i64::try_from(size.0).unwrap_or_default();
    let found_again = |stats: &_| total(Bytes::mib(256))(stats) && from_guest(stats);
    node.csi.stats_when(&volume, &target, found_again).await.context("after a restart of zpod")?;

    for size in [Bytes::mib(700), Bytes::gib(1)] {
        let answer = node.csi.controller_expand(&volume, size).await?;
        assert!(answer.node_expansion_required && answer.capacity_bytes == i64::try_from(size.0)?, "{answer:?}");
        let begin = Instant::now();
        assert_eq!(node.csi.node_expand(&volume, &target, size).await?, size);
        println!("grew to {size} in {:?}", begin.elapsed());
        assert_eq!(pod.sh("app", CAPACITY).await?, size.0.to_string());
        // Again: nothing to do.
        assert_eq!(node.csi.node_expand(&volume, &target, size).await?, size);
        node.csi.stats_when(&volume, &target, total(size)).await?;
    }

    // Beyond the headroom: recorded, but not while the pod runs.
    let size = Bytes::gib(2);
    node.csi.controller_expand(&volume, size).await?;
    let refused = node.csi.node_expand(&volume, &target, size).await.expect_err("there is no room on the disk");
    println!("beyond the headroom: {refused}");
    assert!(matches!(refused.code(), Code::FailedPrecondition | Code::OutOfRange), "{refused}");
    assert!(refused.message().contains(&volume.volume_id), "{refused}");
    assert_eq!(pod.sh("app", CAPACITY).await?, Bytes::gib(1).0.to_string());

    let mut printed = String::new();
    while printed.len() < 64 {
        let read = timeout(PATIENCE, writer.read()).await.context("the writer is stuck")?;
        printed.push_str(&String::from_utf8(read.context("the writer has ended")?)?);
    }
    let promised: u64 =
        printed.rsplit_once('\n').and_then(|(text, _)| text.lines().last()).context("no record")?.parse()?;
    pod.kill();
    node.csi.unpublish(&volume, &target).await?;

    let target = node.target("two", "pv")?;
    node.csi.publish(&volume, &target, &Publish::default()).await?;
    let mut pod = Sandbox::start(&node, Runtime::Rs).await?;
    pod.run(Container::new("app", [Mount::new(&target, "/data")])).await?;
    assert_eq!(pod.sh("app", CAPACITY).await?, size.0.to_string());
    let found: u64 = pod.sh("app", "e2e check /data/records").await?.parse()?;
    assert!(found > promised, "{promised} was promised, the first {found} are there");
    assert_eq!(node.csi.node_expand(&volume, &target, size).await?, size);
    pod.stop().await?;
    node.csi.unpublish(&volume, &target).await?;
    node.csi.delete(&volume).await?;
    node.must_be_empty()
}
