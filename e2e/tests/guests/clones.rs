//! Volumes that are made from copies of others: of one in use, in the same guest and in another.

use anyhow::{Context as _, Result};
use tokio::time::timeout;
use zpod_e2e::shim::User;
use zpod_e2e::workdir::Workdir;
use zpod_e2e::{Container, PATIENCE, Sandbox};
use zpod_proto::guest::{MarkRequest, StatusRequest, UnmarkRequest};
use zpod_volume::{Bytes, DiskLayout, Mark, PoolName, QuotaMode, SnapshotId};

use crate::disk::pod;
use crate::image::Image;

const SIZE: Bytes = Bytes::mib(256);
const LARGER: Bytes = Bytes::mib(600);

async fn guid(pod: &mut Sandbox, pool: &PoolName) -> Result<String> {
    pod.zfs_tool("tools", &format!("zpool get -H -p -o value guid {pool}")).await
}

async fn value(pod: &mut Sandbox, image: &Image, key: &str) -> Result<String> {
    pod.zfs_tool("tools", &format!("zfs get -H -p -o value {key} {}", image.spec.dataset())).await
}

/// A clone of a larger size and another class.
fn clone(dir: &Workdir, of: &Image, name: &str, mark: &Mark) -> Result<Image> {
    let mut image = of.copy(dir, name, LARGER, Some(mark.clone()))?;
    image.spec.quota = QuotaMode::Quota;
    image.spec.pool_properties = [("autotrim".into(), "off".into())].into();
    image.spec.dataset_properties =
        [("compression".into(), "zstd-3".into()), ("recordsize".into(), "16K".into()), ("atime".into(), "on".into())]
            .into();
    image.publish()?;
    Ok(image)
}

/// It shows the marked instant, nothing older and nothing newer, under its own name and with its own size.
async fn check(pod: &mut Sandbox, container: &str, at: &str, image: &Image, promised: u64) -> Result<()> {
    assert_eq!(pod.sh(container, &format!("cat {at}/file; ls {at}/later {at}/gone 2>/dev/null || true")).await?, {
        format!("old\n{at}/gone")
    });
    assert_eq!(pod.sh(container, &format!("cd {at} && sha256sum -c sum")).await?, "blob: OK");
    let records: u64 = pod.sh(container, &format!("e2e check {at}/records")).await?.parse()?;
    println!("{records} records are in it, {promised} were promised before the instant");
    assert!(records > promised, "{records}, {promised}");
    let mounted = pod.sh(container, &format!("grep ' {at} ' /proc/mounts")).await?;
    assert!(mounted.starts_with(&format!("{} {at} zfs", image.spec.dataset())), "{mounted}");
    assert_eq!(pod.sh(container, &format!("df -P -B1 {at} | awk 'NR==2{{print $2}}'")).await?, LARGER.0.to_string());
    for (key, want) in [
        ("compression", "zstd-3"),
        ("recordsize", "16384"),
        ("atime", "on"),
        ("quota", &LARGER.0.to_string()),
        ("refquota", "0"),
    ] {
        assert_eq!(value(pod, image, key).await?, want, "{key}");
    }
    let pool = &image.spec.pool;
    // It is on its own disk: the origin's has the same labels, and a path that leads to it.
    let device = pod.zfs_tool("tools", &format!("zpool status -P {pool}")).await?;
    assert!(device.contains(&image.id()), "{device}");
    let size: u64 = pod.zfs_tool("tools", &format!("zpool get -H -p -o value size {pool}")).await?.parse()?;
    assert!(size > LARGER.0 && size < DiskLayout::partition_for(LARGER).0, "{size}");
    assert_eq!(pod.zfs_tool("tools", &format!("zpool get -H -o value autotrim {pool}")).await?, "off");
    assert_eq!(pod.zfs_tool("tools", &format!("zfs list -H -t snapshot -o name -r {pool}")).await?, "");
    assert_eq!(pod.zfs_tool("tools", &format!("zpool get -H -o value checkpoint {pool}")).await?, "-");
    let datasets = pod.zfs_tool("tools", &format!("zfs list -H -o name -r {pool}")).await?;
    assert_eq!(datasets.lines().count(), 2, "{datasets}");
    Ok(())
}

#[tokio::test]
async fn clones_of_a_volume_in_use_show_the_marked_instant_beside_it_and_in_another_guest() -> Result<()> {
    let dir = Workdir::new()?;
    let origin = Image::new(&dir, "pvc-origin", SIZE)?;
    let mut first = pod(&dir).await?;
    first.run(Container::debug("tools")).await?;
    first.run(Container::new("app", [origin.mount("/data")])).await?;
    first
        .sh("app", "cd /data; echo old > file; touch gone; head -c 3000000 /dev/urandom > blob; sha256sum blob > sum")
        .await?;
    let writer = first.spawn("app", User::ROOT, &["/bin/e2e", "append", "/data/records"]).await?;
    let mut printed = String::new();
    while printed.len() < 64 {
        let read = timeout(PATIENCE, writer.read()).await.context("the writer is stuck")?;
        printed.push_str(&String::from_utf8(read.context("the writer has ended")?)?);
    }
    let promised = printed.rsplit_once('\n').and_then(|(text, _)| text.lines().last()).context("no record")?.parse()?;

    // Twice: the second one stays at the first one's instant. The writer goes on, and what is later must not be seen.
    let mark = Mark::for_snapshot(SnapshotId::from_name("s"));
    let mut control = first.control().await?;
    let request = || MarkRequest { volume_id: origin.id(), mark: mark.to_string() };
    let begin = std::time::Instant::now();
    control.mark(request()).await?;
    println!("marked in {:?}", begin.elapsed());
    first.sh("app", "cd /data; echo new > file; touch later; rm gone; rm blob; sync").await?;
    control.mark(request()).await?;
    // What the origin's owner does between the mark and the copy is not in the way of the instant, nor what is kept for a
    // way back.
    let (dataset, pool) = (origin.spec.dataset(), &origin.spec.pool);
    for command in [
        format!("zfs snapshot {dataset}@later"),
        format!("zfs hold keep {dataset}@later"),
        format!("zfs clone {dataset}@later {dataset}/clone"),
        format!("zfs snapshot {dataset}@last"),
        format!("zfs hold -- -r {dataset}@last"),
        format!("zpool checkpoint {pool}"),
        format!("zpool sync {pool}"),
    ] {
        first.zfs_tool("tools", &command).await?;
    }
    let beside = clone(&dir, &origin, "pvc-beside", &mark)?;
    let (mut elsewhere, mut twin) =
        (clone(&dir, &origin, "pvc-elsewhere", &mark)?, clone(&dir, &origin, "pvc-origin", &mark)?);
    for command in [
        format!("zpool checkpoint -d -w {pool}"),
        format!("zfs release keep {dataset}@later"),
        format!("zfs release -- -r {dataset}@last"),
        format!("zfs destroy {dataset}/clone"),
        format!("zfs destroy {dataset}@later%last"),
    ] {
        first.zfs_tool("tools", &command).await?;
    }
    let told = control.status(StatusRequest {}).await?.into_inner().volumes.remove(0);
    assert!(told.snapshot_bytes > 2_000_000, "{told:?}");
    for _ in 0..2 {
        control.unmark(UnmarkRequest { volume_id: origin.id(), mark: mark.to_string() }).await?;
    }
    assert_eq!(value(&mut first, &origin, "usedbysnapshots").await?, "0");
    let unmarked = clone(&dir, &origin, "pvc-unmarked", &mark)?;

    // The origin is in use in this guest, with the GUID that the clone has too.
    let (at_first, others) = (guid(&mut first, &origin.spec.pool).await?, &beside.spec.pool);
    first.run(Container::new("clone", [beside.mount("/clone")])).await?;
    println!("CreateContainer with a clone took {:?}", first.create_time);
    check(&mut first, "clone", "/clone", &beside, promised).await?;
    let beside_guid = guid(&mut first, others).await?;
    assert_ne!(beside_guid, at_first);
    assert_ne!(beside_guid, guid(&mut first, &origin.spec.pool).await?);
    assert_eq!(first.sh("app", "cat /data/file; ls /data/later").await?, "new\n/data/later");

    let refused = first.run(Container::new("unmarked", [unmarked.mount("/clone")])).await;
    let error = format!("{:#}", refused.expect_err("there is no mark in it"));
    println!("without its mark: {error}");
    for part in [unmarked.id(), origin.id(), mark.to_string()] {
        assert!(error.contains(&part), "{part} is not in: {error}");
    }
    first.kill();

    // Two clones of one disk in one container, in a guest that never saw their origin, whose name has come back with one.
    let mut second = pod(&dir).await?;
    second.run(Container::debug("tools")).await?;
    second.run(Container::new("app", [elsewhere.mount("/a"), twin.mount("/b")])).await?;
    println!("CreateContainer with two clones took {:?}", second.create_time);
    check(&mut second, "app", "/a", &elsewhere, promised).await?;
    check(&mut second, "app", "/b", &twin, promised).await?;
    let guids = (guid(&mut second, &elsewhere.spec.pool).await?, guid(&mut second, &twin.spec.pool).await?);
    assert!(guids.0 != guids.1 && guids.0 != at_first && guids.1 != at_first, "{guids:?} {at_first}");
    second.sh("app", "echo mine > /a/file; sync").await?;
    // Both as the node would publish them before and after it has heard of them. Neither is rolled back again.
    second.remove("app").await?;
    twin.publish_again()?;
    second.run(Container::new("app", [elsewhere.mount("/a"), twin.mount("/b")])).await?;
    assert_eq!(second.sh("app", "cat /a/file /b/file").await?, "mine\nold");
    elsewhere.publish_again()?;
    second.stop().await
}
