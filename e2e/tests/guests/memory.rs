//! ZFS's cache (ARC) and the memory of a pod.

use anyhow::Result;
use zpod_e2e::csi::Publish;
use zpod_e2e::{Container, Mount, Node, Runtime, Sandbox};
use zpod_volume::Bytes;

async fn arc(pod: &mut Sandbox, what: &str) -> Result<u64> {
    Ok(pod.sh("app", &format!("awk '$1 == \"{what}\" {{ print $3 }}' /proc/spl/kstat/zfs/arcstats")).await?.parse()?)
}

async fn memory(pod: &mut Sandbox, what: &str) -> Result<u64> {
    let kib = pod.sh("app", &format!("awk '$1 == \"{what}:\" {{ print $2 }}' /proc/meminfo")).await?;
    Ok(kib.parse::<u64>()? << 10)
}

/// What an application needs, the cache gives back: nobody is killed.
#[tokio::test]
async fn the_cache_keeps_to_a_quarter_of_the_memory_and_gives_it_back_to_an_application_that_needs_it() -> Result<()> {
    let mut node = Node::start().await?;
    let volume = node.csi.create("pvc-memory", Bytes::gib(1), &[("compression", "off")]).await?;
    let target = node.target("one", "pv")?;
    node.csi.publish(&volume, &target, &Publish::default()).await?;
    let mut pod = Sandbox::start(&node, Runtime::Go).await?;
    pod.run(Container::new("app", [Mount::new(&target, "/data")])).await?;
    let (total, most) = (memory(&mut pod, "MemTotal").await?, arc(&mut pod, "c_max").await?);
    pod.sh("app", &format!("e2e write /data/file {}; cat /data/file > /dev/null", (most >> 20) * 2)).await?;
    let (full, available) = (arc(&mut pod, "size").await?, memory(&mut pod, "MemAvailable").await?);
    println!(
        "memory {} MiB, cache {} of at most {} MiB, {} MiB available",
        total >> 20,
        full >> 20,
        most >> 20,
        available >> 20
    );
    assert!(most <= total / 4 && full > most / 2, "{full} of {most}, {total}");

    // tail(1) keeps a line whole, and this is one.
    let needed = available + full / 4;
    let line = pod.sh("app", &format!("head -c {needed} /dev/zero | tail -n 1 | wc -c")).await?;
    let after = arc(&mut pod, "size").await?;
    println!("an application took {} MiB; cache then {} MiB", needed >> 20, after >> 20);
    assert_eq!(line, needed.to_string());
    let killed = pod.sh("app", "awk '$1 == \"oom_kill\" { print $2 }' /proc/vmstat").await?;
    assert_eq!(killed, "0");
    pod.stop().await?;
    node.csi.unpublish(&volume, &target).await?;
    node.csi.delete(&volume).await?;
    node.must_be_empty()
}
