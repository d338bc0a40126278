//! Volumes that go back to a snapshot in their pool, at a start and once.

use anyhow::{Context as _, Result, ensure};
use tonic::Code;
use uuid::Uuid;
use zpod_e2e::workdir::Workdir;
use zpod_e2e::{Container, Sandbox};
use zpod_proto::guest::rolled_back::State;
use zpod_proto::guest::{
    CheckRollbackRequest, CheckRollbackResponse, ProvideKeyRequest, RolledBack, TakeSnapshotRequest,
};
use zpod_volume::{Bytes, Create, DiskLayout, Encryption, Rollback, VolumeId};

use crate::disk::{DEVICE, Disk, pod};
use crate::image::Image;

const SIZE: Bytes = Bytes::mib(256);

async fn take(pod: &Sandbox, id: VolumeId, snapshot: &str) -> Result<()> {
    let request = TakeSnapshotRequest { volume_id: id.to_string(), snapshot: snapshot.into() };
    pod.control().await?.take_snapshot(request).await?;
    Ok(())
}

async fn check(
    pod: &Sandbox,
    id: VolumeId,
    snapshot: &str,
    destroy_newer: bool,
) -> Result<CheckRollbackResponse, tonic::Status> {
    let request = CheckRollbackRequest { volume_id: id.to_string(), snapshot: snapshot.into(), destroy_newer };
    let mut control = pod.control().await.map_err(|error| tonic::Status::unavailable(error.to_string()))?;
    Ok(control.check_rollback(request).await?.into_inner())
}

fn to(snapshot: &str, destroy_newer: bool) -> Option<Rollback> {
    Some(Rollback { id: Uuid::new_v4(), snapshot: snapshot.into(), guid: 0, destroy_newer })
}

/// What the guest says came of a request.
async fn outcome(pod: &Sandbox, rollback: &Option<Rollback>) -> Result<RolledBack> {
    let told = pod.volume_status().await?.rolled_back.context("nothing is told of it")?;
    ensure!(rollback.as_ref().is_some_and(|rollback| rollback.id.to_string() == told.id), "{told:?}");
    println!("{told:?}");
    Ok(told)
}

/// The volume's next pod, in the same machine: its pool was exported, and nothing of it is known there.
async fn next(pod: &mut Sandbox, image: &mut Image, rollback: Option<Rollback>) -> Result<()> {
    pod.remove("app").await?;
    image.spec.rollback = rollback;
    image.publish_again()?;
    pod.run(Container::new("app", [image.mount("/data")])).await
}

#[tokio::test]
async fn a_file_system_goes_back_once_and_what_is_in_the_way_is_named_and_kept() -> Result<()> {
    let dir = Workdir::new()?;
    let mut image = Image::new(&dir, "pvc-back", SIZE)?;
    let (id, dataset) = (image.spec.id, image.spec.dataset());
    let mut first = pod(&dir).await?;
    first.run(Container::debug("tools")).await?;
    first.run(Container::new("app", [image.mount("/data")])).await?;
    for name in ["one", "two"] {
        first.sh("app", &format!("echo {name} > /data/file; sync")).await?;
        take(&first, id, name).await?;
    }
    first.sh("app", "echo three > /data/file; head -c 1000000 /dev/urandom > /data/blob; sync").await?;

    // What it would take, and nothing is done.
    let refused = check(&first, id, "one", false).await.err().context("there is a newer one")?;
    ensure!(refused.code() == Code::FailedPrecondition && refused.message().contains("destroyed: two"), "{refused}");
    let losses = check(&first, id, "one", true).await?;
    ensure!(losses.newer == ["two"] && losses.left_out == 0 && losses.written_bytes > 1_000_000, "{losses:?}");
    ensure!(check(&first, id, "two", false).await?.newer.is_empty());
    for (name, code) in [("none", Code::FailedPrecondition), ("one,two", Code::InvalidArgument)] {
        let error = check(&first, id, name, true).await.err().context(name)?;
        ensure!(error.code() == code, "{error}");
    }

    // Refused, the volume is as it was.
    let newer = to("one", false);
    next(&mut first, &mut image, newer.clone()).await?;
    ensure!(first.sh("app", "cat /data/file").await? == "three");
    let told = outcome(&first, &newer).await?;
    ensure!(told.state() == State::Refused && told.message.contains("destroyed: two"), "{told:?}");
    first.zfs_tool("tools", &format!("zfs clone -o canmount=noauto {dataset}@two {dataset}/copy")).await?;
    let cloned = to("one", true);
    next(&mut first, &mut image, cloned.clone()).await?;
    ensure!(first.sh("app", "cat /data/file").await? == "three");
    let told = outcome(&first, &cloned).await?;
    ensure!(told.state() == State::Refused && told.message.contains("a hold or a clone"), "{told:?}");
    first.zfs_tool("tools", &format!("zfs destroy {dataset}/copy")).await?;
    first.zfs_tool("tools", &format!("zfs bookmark {dataset}@two {dataset}#mark")).await?;
    first.zfs_tool("tools", &format!("zfs destroy {dataset}@two")).await?;
    let refused = check(&first, id, "one", false).await.err().context("there is a bookmark")?;
    ensure!(refused.message().contains("destroyed: #mark"), "{refused}");

    // Back, once, with a class that keeps space for it and says something else than before.
    image.spec.reservation = Some(SIZE);
    image.spec.dataset_properties = [("compression".into(), "gzip-3".into())].into();
    let back = to("one", true);
    next(&mut first, &mut image, back.clone()).await?;
    ensure!(first.sh("app", "cat /data/file; ls /data").await? == "one\nfile");
    ensure!(outcome(&first, &back).await?.state() == State::Done);
    let list = format!("zfs list -H -o name -t snapshot,bookmark -r {dataset}");
    ensure!(first.zfs_tool("tools", &list).await? == format!("{dataset}@one"));
    let kept = format!("zfs get -H -o value refreservation,compression {dataset}");
    ensure!(first.zfs_tool("tools", &kept).await? == "256M\ngzip-3");
    first.sh("app", "echo mine > /data/file; sync").await?;
    next(&mut first, &mut image, back.clone()).await?;
    ensure!(first.sh("app", "cat /data/file").await? == "mine");
    // Whoever did not hear what came of it hears it now.
    ensure!(outcome(&first, &back).await?.state() == State::Done);
    first.stop().await?;

    // A copy of its disk has the note, and goes back for its own requests only. Its machine has the volume too.
    let mut copy = image.copy(&dir, "pvc-copy", SIZE, None)?;
    let mut second = pod(&dir).await?;
    image.publish_again()?;
    second.run(Container::new("again", [image.mount("/data")])).await?;
    ensure!(second.sh("again", "cat /data/file").await? == "mine");
    second.remove("again").await?;
    second.run(Container::new("app", [copy.mount("/data")])).await?;
    ensure!(second.sh("app", "cat /data/file").await? == "mine");
    let back = to("one", false);
    next(&mut second, &mut copy, back.clone()).await?;
    ensure!(second.sh("app", "cat /data/file").await? == "one");
    second.stop().await
}

#[tokio::test]
async fn a_snapshot_of_a_full_volume_is_gone_back_to_and_one_taken_again_under_its_name_is_another() -> Result<()> {
    let dir = Workdir::new()?;
    let mut image = Image::new(&dir, "pvc-back-full", SIZE)?;
    let (id, dataset) = (image.spec.id, image.spec.dataset());
    let mut pod = pod(&dir).await?;
    pod.run(Container::debug("tools")).await?;
    pod.run(Container::new("app", [image.mount("/data")])).await?;
    pod.sh("app", "cat /dev/urandom > /data/blob 2>/dev/null; sync; test -s /data/blob").await?;
    take(&pod, id, "full").await?;
    let sizes = format!("zfs get -Hpo value referenced,refquota {dataset}");
    let full = pod.zfs_tool("tools", &sizes).await?;
    println!("full: {full}");
    pod.sh("app", "rm /data/blob; echo later > /data/file; sync").await?;
    take(&pod, id, "later").await?;
    // Its owner has lowered the bound since, far below what the snapshot refers to.
    pod.zfs_tool("tools", &format!("zfs set refquota=64M {dataset}")).await?;
    let guid = check(&pod, id, "full", true).await?.guid;
    let back = to("full", true).map(|back| Rollback { guid, ..back });
    next(&mut pod, &mut image, back.clone()).await?;
    ensure!(pod.sh("app", "ls /data").await? == "blob");
    ensure!(outcome(&pod, &back).await?.state() == State::Done);
    let sizes = pod.zfs_tool("tools", &sizes).await?;
    println!("back: {sizes}");
    let bytes = |text: &str| text.lines().filter_map(|line| line.parse().ok()).collect::<Vec<u64>>();
    let (was, is) = (bytes(&full), bytes(&sizes));
    ensure!(is[0] == was[0] && is[1] == SIZE.0.max(is[0]), "{was:?} {is:?}");

    // Another instant under the same name.
    pod.zfs_tool("tools", &format!("zfs destroy {dataset}@full")).await?;
    pod.sh("app", "rm /data/blob; echo mine > /data/file; sync").await?;
    take(&pod, id, "full").await?;
    pod.sh("app", "echo last > /data/file; sync").await?;
    ensure!(check(&pod, id, "full", true).await?.guid != guid);
    let other = to("full", true).map(|back| Rollback { guid, ..back });
    next(&mut pod, &mut image, other.clone()).await?;
    ensure!(pod.sh("app", "cat /data/file").await? == "last");
    let told = outcome(&pod, &other).await?;
    ensure!(told.state() == State::Refused && told.message.contains("taken under its name"), "{told:?}");
    pod.stop().await
}

#[tokio::test]
async fn a_block_device_goes_back_once_and_grows_at_the_same_start() -> Result<()> {
    let dir = Workdir::new()?;
    let mut disk = Disk::new(dir.path(), "pvc-back-block", SIZE)?;
    let id = disk.spec.id;
    let mut pod = pod(&dir).await?;
    pod.run(disk.container("app")).await?;
    let write =
        |byte: &str| format!("head -c 1048576 /dev/zero | tr '\\0' {byte} | dd of={DEVICE} bs=65536 2>/dev/null");
    let read = format!("dd if={DEVICE} bs=1 count=1 2>/dev/null");
    pod.sh("app", &write("a")).await?;
    take(&pod, id, "one").await?;
    pod.sh("app", &write("b")).await?;
    pod.remove("app").await?;

    let larger = Bytes::mib(300);
    let back = to("one", false);
    disk.spec.rollback = back.clone();
    (disk.spec.token, disk.spec.create) = (Uuid::new_v4(), Create::Never);
    (disk.spec.capacity, disk.spec.partition) = (larger, DiskLayout::partition_for(larger));
    disk.publish()?;
    pod.run(disk.container("app")).await?;
    ensure!(pod.sh("app", &read).await? == "a");
    ensure!(pod.sh("app", &format!("blockdev --getsize64 {DEVICE}")).await? == larger.0.to_string());
    ensure!(outcome(&pod, &back).await?.state() == State::Done);
    pod.sh("app", &write("c")).await?;
    pod.remove("app").await?;
    disk.spec.token = Uuid::new_v4();
    disk.publish()?;
    pod.run(disk.container("app")).await?;
    ensure!(pod.sh("app", &read).await? == "c");
    pod.stop().await
}

#[tokio::test]
async fn an_encrypted_volume_goes_back_once_its_key_is_there() -> Result<()> {
    let dir = Workdir::new()?;
    let mut image = Image::new(&dir, "pvc-back-secret", SIZE)?;
    image.spec.encryption = Some(Encryption::Aes256Gcm);
    image.publish()?;
    let mut pod = pod(&dir).await?;
    let provide = async |pod: &Sandbox, image: &Image| {
        let (volume_id, token) = (image.id(), image.spec.token.to_string());
        let key = ProvideKeyRequest { volume_id, token, key: vec![7; 32], previous_key: Vec::new() };
        pod.control().await?.provide_key(key).await?;
        anyhow::Ok(())
    };
    provide(&pod, &image).await?;
    pod.run(Container::new("app", [image.mount("/data")])).await?;
    pod.sh("app", "echo one > /data/file; sync").await?;
    take(&pod, image.spec.id, "one").await?;
    pod.sh("app", "echo two > /data/file; sync").await?;
    pod.remove("app").await?;
    let back = to("one", false);
    image.spec.rollback = back.clone();
    image.publish_again()?;
    provide(&pod, &image).await?;
    pod.run(Container::new("app", [image.mount("/data")])).await?;
    ensure!(pod.sh("app", "cat /data/file").await? == "one");
    ensure!(outcome(&pod, &back).await?.state() == State::Done);
    pod.stop().await
}
