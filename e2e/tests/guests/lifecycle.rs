//! What a volume is for: data that outlives pods.

use std::time::Duration;

use anyhow::{Context as _, Result};
use tokio::time::{Instant, sleep, timeout};
use tonic::Code;
use zpod_e2e::csi::{Publish, bytes};
use zpod_e2e::shim::User;
use zpod_e2e::{Container, Mount, Node, PATIENCE, Runtime, Sandbox};
use zpod_volume::Bytes;

const SIZE: Bytes = Bytes::mib(512);

#[tokio::test]
async fn a_fresh_volume_is_zfs_and_shared_by_two_containers_and_the_next_pod_has_its_data() -> Result<()> {
    let mut node = Node::start().await?;
    let volume = node.csi.create("pvc-shared", SIZE, &[("compression", "zstd")]).await?;
    assert_eq!(volume.capacity_bytes, i64::try_from(SIZE.0)?);

    // The first pod runs under runtime-rs, the second under the Go runtime: each shares in its own way.
    for (pod_name, runtime) in [("one", Runtime::Rs), ("two", Runtime::Go)] {
        let target = node.target(pod_name, "pv")?;
        node.csi.publish(&volume, &target, &Publish::default()).await?;
        let mut pod = Sandbox::start(&node, runtime).await?;
        println!("{runtime:?}: booted in {:?}", pod.boot_time);
        let begin = Instant::now();
        pod.run(Container::new("first", [Mount::new(&target, "/data")])).await?;
        println!("{runtime:?}: the container ran {:?} later", begin.elapsed());
        let mounted = pod.sh("first", "grep ' /data ' /proc/mounts").await?;
        assert!(mounted.split(' ').nth(2) == Some("zfs"), "{mounted}");
        assert_eq!(pod.sh("first", "df -P -B1 /data | awk 'NR==2{print $2}'").await?, SIZE.0.to_string());

        pod.run(Container::new("second", [Mount::new(&target, "/elsewhere")])).await?;
        if runtime == Runtime::Rs {
            pod.sh("first", "echo from a > /data/file && head -c 3000000 /dev/urandom > /data/blob").await?;
            pod.sh("first", "sha256sum < /data/blob > /data/sum").await?;
        }
        assert_eq!(pod.sh("second", "cat /elsewhere/file").await?, "from a");
        assert_eq!(pod.sh("second", "sha256sum < /elsewhere/blob").await?, pod.sh("first", "cat /data/sum").await?);

        // One of the two may go: the volume stays for the other.
        pod.remove("first").await?;
        assert_eq!(pod.sh("second", "echo more > /elsewhere/more; cat /elsewhere/more").await?, "more");

        let stats = node.csi.stats_when(&volume, &target, |stats| bytes(stats).1 > 2_900_000).await?;
        let (total, _, available) = bytes(&stats);
        assert!(total == i64::try_from(SIZE.0)? && available < total, "{stats:?}");
        assert!(stats.usage.iter().any(|usage| usage.unit == 2 && usage.total > 0), "{stats:?}");
        assert!(stats.volume_condition.is_some_and(|condition| !condition.abnormal));

        pod.stop().await?;
        node.csi.unpublish(&volume, &target).await?;
        node.must_be_unpublished(&target)?;
    }
    node.csi.delete(&volume).await?;
    node.must_be_empty()
}

#[tokio::test]
async fn a_hard_kill_loses_no_fsynced_write_and_nobody_else_gets_the_volume_before_the_kill() -> Result<()> {
    let mut node = Node::start().await?;
    let volume = node.csi.create("pvc-killed", SIZE, &[]).await?;
    let (first, second) = (node.target("one", "pv")?, node.target("two", "pv")?);
    node.csi.publish(&volume, &first, &Publish::default()).await?;
    // The same publication again is no second one.
    node.csi.publish(&volume, &first, &Publish::default()).await?;

    let mut pod = Sandbox::start(&node, Runtime::Rs).await?;
    pod.run(Container::new("writer", [Mount::new(&first, "/data")])).await?;
    let refused = node.csi.publish(&volume, &second, &Publish::default()).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");
    assert!(refused.message().contains(&volume.volume_id), "{refused}");
    node.must_be_unpublished(&second)?;

    let writer = pod.spawn("writer", User::ROOT, &["/bin/e2e", "append", "/data/records"]).await?;
    let mut printed = Vec::new();
    let end = Instant::now() + Duration::from_secs(10);
    while Instant::now() < end {
        let read = timeout(PATIENCE, writer.read()).await.context("the writer is stuck")?;
        printed.extend(read.context("the writer has ended")?);
    }
    // Kubelet may have lost track of the pod: without a publication, but with a machine that has the disk open.
    node.csi.unpublish(&volume, &first).await?;
    let refused = node.csi.publish(&volume, &second, &Publish::default()).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition, "{refused}");
    pod.kill();

    let text = String::from_utf8(printed)?;
    let complete = text.rsplit_once('\n').map_or("", |(complete, _)| complete);
    let promised: u64 = complete.lines().last().context("nothing was written")?.parse()?;
    println!("{} records were promised", promised + 1);

    let end = Instant::now() + Duration::from_secs(10);
    while let Err(error) = node.csi.publish(&volume, &second, &Publish::default()).await {
        assert!(Instant::now() < end, "{error}");
        sleep(Duration::from_millis(100)).await;
    }
    let mut pod = Sandbox::start(&node, Runtime::Go).await?;
    pod.run(Container::new("reader", [Mount::new(&second, "/data")])).await?;
    let found: u64 = pod.sh("reader", "e2e check /data/records").await?.parse()?;
    println!("{found} records were found");
    assert!(found > promised, "{promised} was promised, the first {found} are there");
    pod.stop().await?;
    node.csi.unpublish(&volume, &second).await?;
    node.csi.delete(&volume).await?;
    node.must_be_empty()
}
