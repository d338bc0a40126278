//! Block devices: zvols in the guest's own pool.

use std::fs::File;

use anyhow::Result;
use uuid::Uuid;
use zpod_e2e::shim::Device;
use zpod_e2e::workdir::Workdir;
use zpod_e2e::{Container, Sandbox};
use zpod_proto::guest::{GrowRequest, MarkRequest, UnmarkRequest};
use zpod_volume::{Bytes, Create, DiskLayout, Mark, VolumeSpec};

use crate::disk::{DEVICE, Disk, pod};

const SIZE: Bytes = Bytes::mib(256);
const BYTES: &str = "blockdev --getsize64 /dev/xvda";

async fn sum(pod: &mut Sandbox, container: &str) -> Result<String> {
    pod.sh(container, "dd if=/dev/xvda bs=1M count=24 2>/dev/null | sha256sum").await
}

#[tokio::test]
async fn a_block_device_keeps_what_was_written_and_is_shared_and_grows() -> Result<()> {
    let dir = Workdir::new()?;
    let mut volume = Disk::new(dir.path(), "pvc-block", SIZE)?;
    let mut first = pod(&dir).await?;
    // The init container is still there when the next one comes.
    first.run(volume.container("init")).await?;
    assert_eq!(first.sh("init", BYTES).await?, SIZE.0.to_string());
    first.sh("init", "e2e fill /dev/xvda 25165824").await?;
    let written = sum(&mut first, "init").await?;
    first.run(volume.container("app")).await?;
    println!("CreateContainer took {:?}", first.create_time);
    assert_eq!(sum(&mut first, "app").await?, written);
    first.remove("init").await?;
    assert_eq!(sum(&mut first, "app").await?, written);

    let told = first.volume_status().await?;
    println!("{told:?}");
    assert!(told.block && told.token == volume.spec.token.to_string(), "{told:?}");
    assert_eq!((told.total_bytes, told.total_inodes), (SIZE.0, 0));
    assert_eq!(told.total_bytes, told.used_bytes + told.available_bytes);

    let size = Bytes::mib(700);
    let partition_bytes = DiskLayout::partition_for(size).0;
    let volume_id = volume.spec.id.to_string();
    let request = GrowRequest { volume_id, capacity_bytes: size.0, partition_bytes };
    first.control().await?.grow(request).await?;
    assert_eq!(first.sh("app", BYTES).await?, size.0.to_string());
    assert_eq!(first.volume_status().await?.total_bytes, size.0);

    // A restart of the container unplugs the disk and plugs it again.
    first.remove("app").await?;
    first.run(volume.container("app")).await?;
    assert_eq!(sum(&mut first, "app").await?, written);
    // Killed, not stopped: what was flushed is there.
    first.sh("app", "dd if=/dev/zero of=/dev/xvda bs=1M count=1 seek=24 conv=fsync 2>/dev/null").await?;
    first.kill();

    volume.spec = VolumeSpec { token: Uuid::new_v4(), create: Create::Never, ..volume.spec };
    volume.publish()?;
    let mut second = pod(&dir).await?;
    second.run(volume.container("app")).await?;
    assert_eq!(sum(&mut second, "app").await?, written);
    // The spec is older than the growth: nothing shrinks.
    assert_eq!(second.sh("app", BYTES).await?, size.0.to_string());
    assert!(second.volume_status().await?.used_bytes > 24 << 20);
    second.remove("app").await?;

    // Published read-only: whatever the rules for devices say, nothing can be written.
    volume.spec.read_only = true;
    volume.publish()?;
    second.run(volume.container("reader")).await?;
    assert_eq!(sum(&mut second, "reader").await?, written);
    let write = second.sh("reader", "dd if=/dev/zero of=/dev/xvda bs=1M count=1 conv=notrunc,fsync").await;
    println!("a write to a read-only device: {:#}", write.expect_err("nothing may be written"));
    second.stop().await
}

#[tokio::test]
async fn a_block_device_can_be_filled_to_its_last_byte_and_written_over() -> Result<()> {
    let dir = Workdir::new()?;
    let volume = Disk::new(dir.path(), "pvc-full", SIZE)?;
    let mut pod = pod(&dir).await?;
    pod.run(volume.container("app")).await?;
    for _ in 0..2 {
        let all = "dd if=/dev/urandom of=/dev/xvda bs=1M count=256 conv=notrunc,fsync 2>/dev/null; echo $?";
        assert_eq!(pod.sh("app", all).await?, "0");
    }
    let told = pod.volume_status().await?;
    println!("{} bytes of the pool for {} of noise", told.pool_allocated_bytes, SIZE.0);
    assert_eq!((told.used_bytes, told.available_bytes), (SIZE.0, 0));
    pod.stop().await
}

#[tokio::test]
async fn a_copy_of_a_block_device_has_what_was_on_it_at_the_mark_also_beside_the_first() -> Result<()> {
    let dir = Workdir::new()?;
    let volume = Disk::new(dir.path(), "pvc-origin", SIZE)?;
    let mut pod = pod(&dir).await?;
    pod.run(volume.container("app")).await?;
    // Not flushed by the writer: marking it does.
    pod.sh("app", "e2e fill /dev/xvda 25165824").await?;
    let marked = sum(&mut pod, "app").await?;
    let mark: Mark = format!("zpod-mark-{}", Uuid::new_v4().simple()).parse()?;
    let volume_id = volume.spec.id.to_string();
    let request = MarkRequest { volume_id: volume_id.clone(), mark: mark.to_string() };
    pod.control().await?.mark(request).await?;
    pod.sh("app", "dd if=/dev/zero of=/dev/xvda bs=1M count=2 conv=fsync 2>/dev/null").await?;
    let copy = volume.copy(dir.path(), "pvc-copy", Some(mark.clone()))?;
    pod.control().await?.unmark(UnmarkRequest { volume_id, mark: mark.to_string() }).await?;
    pod.run(copy.container("copy")).await?;
    assert_eq!(sum(&mut pod, "copy").await?, marked);
    assert_ne!(sum(&mut pod, "app").await?, marked);
    pod.stop().await
}

#[tokio::test]
async fn a_device_of_ours_that_cant_be_brought_up_fails_and_a_strangers_passes_as_it_is() -> Result<()> {
    let dir = Workdir::new()?;
    let mut pod = pod(&dir).await?;
    let mut blank = Disk::new(dir.path(), "pvc-blank", SIZE)?;
    blank.spec.create = Create::Never;
    blank.publish()?;
    let error = format!("{:#}", pod.run(blank.container("blank")).await.expect_err("nothing may be made"));
    assert!(error.contains(&blank.spec.id.to_string()) && error.contains("blank"), "{error}");
    let bare = Disk::new(dir.path(), "pvc-bare", SIZE)?;
    bare.write(DiskLayout::SPEC_OFFSET, &[0; 512])?;
    let error = format!("{:#}", pod.run(bare.container("bare")).await.expect_err("it is the disk of a pool"));
    assert!(error.contains(DEVICE) && error.contains("pool"), "{error}");

    let stranger = dir.path().join("stranger");
    std::fs::write(&stranger, "a stranger's disk")?;
    File::options().write(true).open(&stranger)?.set_len(300 << 20)?;
    let container = Container { devices: vec![Device::new(&stranger, DEVICE)], ..Container::new("other", []) };
    pod.run(container).await?;
    assert_eq!(pod.sh("other", BYTES).await?, (300_u64 << 20).to_string());
    assert_eq!(pod.sh("other", "dd if=/dev/xvda bs=17 count=1 2>/dev/null").await?, "a stranger's disk");
    pod.stop().await
}
