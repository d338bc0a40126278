//! One pod and everything Kubernetes lets it do with volumes.

use anyhow::{Context as _, Result};
use zpod_e2e::csi::{Publish, bytes};
use zpod_e2e::shim::User;
use zpod_e2e::{Container, Mount, Node, Runtime, Sandbox, node};
use zpod_proto::csi::{NodeGetVolumeStatsResponse, Volume};
use zpod_volume::{Bytes, DiskLayout};

const SIZE: Bytes = Bytes::mib(256);
const GROUP: u32 = 2000;

async fn volumes(node: &mut Node, count: usize, how: &Publish) -> Result<Vec<(Volume, std::path::PathBuf)>> {
    let mut made = Vec::new();
    for number in 0..count {
        let volume = node.csi.create(&format!("pvc-{number}"), SIZE, &[]).await?;
        let target = node.target("pod", &format!("pv-{number}"))?;
        node.csi.publish(&volume, &target, how).await?;
        made.push((volume, target));
    }
    Ok(made)
}

async fn delete(node: &mut Node, volumes: &[(Volume, std::path::PathBuf)]) -> Result<()> {
    for (volume, target) in volumes {
        node.csi.unpublish(volume, target).await?;
        node.csi.delete(volume).await?;
    }
    node.must_be_empty()
}

#[tokio::test]
async fn a_pod_has_eight_volumes_one_inside_another_and_its_container_can_start_again() -> Result<()> {
    let mut node = Node::start().await?;
    let volumes = volumes(&mut node, 8, &Publish::default()).await?;
    let mut pod = Sandbox::start(&node, Runtime::Rs).await?;
    // The second volume lies inside the first one, and so does some memory.
    let container = || {
        let path = |number| if number == 1 { "/v0/sub".to_owned() } else { format!("/v{number}") };
        let mounts = volumes.iter().enumerate().map(|(number, (_, target))| Mount::new(target, &path(number)));
        Container { tmpfs: vec!["/v0/memory".to_owned()], ..Container::new("app", mounts) }
    };
    pod.run(container()).await?;
    assert_eq!(pod.sh("app", "grep -c ' zfs ' /proc/mounts").await?, "8");
    assert_eq!(pod.sh("app", "awk '$3==\"zfs\"{print $1}' /proc/mounts | sort -u | wc -l").await?, "8");
    pod.sh("app", "for v in /v0 /v0/sub /v2 /v3 /v4 /v5 /v6 /v7; do echo $v > $v/name; done; echo x > /v0/memory/x")
        .await?;

    // Removed, all its disks unplugged, and started again in the same machine.
    pod.remove("app").await?;
    pod.run(container()).await?;
    let names = pod.sh("app", "cat /v0/name /v0/sub/name /v[2-7]/name; ls /v0/memory /v0").await?;
    assert_eq!(
        names.split_whitespace().collect::<Vec<_>>(),
        ["/v0", "/v0/sub", "/v2", "/v3", "/v4", "/v5", "/v6", "/v7", "/v0:", "memory", "name", "sub", "/v0/memory:"],
        "{names}"
    );
    for (volume, target) in &volumes {
        let healthy = |stats: &NodeGetVolumeStatsResponse| {
            bytes(stats).1 > 0 && stats.volume_condition.as_ref().is_some_and(|condition| !condition.abnormal)
        };
        node.csi.stats_when(volume, target, healthy).await?;
    }
    println!("the machine takes {} MiB", pod.guest().resident_kib().context("no such process")? / 1024);
    pod.stop().await?;
    delete(&mut node, &volumes).await
}

#[tokio::test]
async fn a_volume_belongs_to_its_group_and_holds_its_capacity_and_can_be_published_read_only() -> Result<()> {
    let mut node = Node::start().await?;
    let volumes = volumes(&mut node, 1, &Publish { fs_group: Some(GROUP), ..Publish::default() }).await?;
    let (volume, target) = volumes.first().context("no volume")?;
    let disk = node.device(target)?;
    let mut pod = Sandbox::start(&node, Runtime::Go).await?;
    let container = |read_only| Container::new("app", [Mount { read_only, ..Mount::new(target, "/data") }]);
    pod.run(container(false)).await?;

    let member = User { uid: 1000, group: Some(GROUP) };
    let stranger = User { uid: 1001, group: None };
    assert_eq!(pod.sh_as("app", member, "echo mine > /data/file; stat -c %g /data/file").await?, GROUP.to_string());
    assert_eq!(pod.sh("app", "stat -c %g:%A /data").await?, format!("{GROUP}:drwxrwsr-x"));
    assert!(pod.sh_as("app", stranger, "echo theirs > /data/other").await.is_err());

    // df says what the PVC says, and nearly all of it can be used: block pointers take the rest.
    let total: u64 = pod.sh("app", "df -P -B1 /data | awk 'NR==2{print $2}'").await?.parse()?;
    assert_eq!(total, SIZE.0);
    let written: u64 = pod.sh("app", &format!("e2e fill /data/full {}", SIZE.0 * 2)).await?.parse()?;
    println!("{written} of {} bytes could be written", SIZE.0);
    assert!(written <= SIZE.0 && written > SIZE.0 / 100 * 98, "{written}");
    let allocated = node::allocated(&disk)?;
    let most = DiskLayout::disk_for(DiskLayout::partition_for(SIZE)).0;
    assert!(allocated <= most, "{allocated} bytes of host disk for a partition of {most}");
    node.csi.stats_when(volume, target, |stats| bytes(stats).2 < 4 << 20).await?;
    // A full volume can be emptied.
    pod.sh("app", "rm /data/full && sync && echo still > /data/more").await?;
    pod.remove("app").await?;

    node.csi.unpublish(volume, target).await?;
    node.csi.publish(volume, target, &Publish { read_only: true, fs_group: Some(GROUP) }).await?;
    pod.run(container(true)).await?;
    assert_eq!(pod.sh("app", "cat /data/file /data/more").await?, "mine\nstill");
    let error = format!("{:#}", pod.sh("app", "echo x > /data/x").await.expect_err("it must be read-only"));
    assert!(error.contains("Read-only file system"), "{error}");
    pod.stop().await?;
    delete(&mut node, &volumes).await
}
