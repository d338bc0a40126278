//! Snapshots that a guest takes by itself. The clock of the guest is set by the test: hours pass in seconds.

use std::collections::BTreeSet;

use anyhow::{Result, ensure};
use tokio::time::{Duration, Instant, sleep};
use tonic::Code;
use zpod_e2e::workdir::Workdir;
use zpod_e2e::{Container, PATIENCE, Sandbox};
use zpod_proto::guest::{SetPropertiesRequest, SnapshotsPaused};
use zpod_volume::{Bytes, VolumeMode};

use crate::disk::{DEVICE, Disk, pod};
use crate::image::Image;

const SIZE: Bytes = Bytes::mib(256);

/// A Monday.
async fn set_clock(pod: &mut Sandbox, time: &str) -> Result<()> {
    pod.sh("tools", &format!("busybox date -u -s '2026-11-30 {time}'")).await.map(drop)
}

/// The snapshots of a dataset.
async fn snapshots(pod: &mut Sandbox, dataset: &str) -> Result<Vec<String>> {
    let list = format!("zfs list -H -o name -t snapshot -d 1 {dataset}");
    let all = pod.zfs_tool("tools", &list).await?;
    let name = |line: &str| line.split('@').next_back().unwrap_or_default().trim_start_matches("zpod-auto-").to_owned();
    Ok(all.lines().map(name).collect())
}

/// The kind and the hour of each.
fn hours(names: &[String]) -> BTreeSet<String> {
    let hour = |name: &String| match name.split_once("-20261130T") {
        Some((kind, time)) => format!("{kind} {}", &time[..2]),
        None => name.clone(),
    };
    names.iter().map(hour).collect()
}

/// Waits until there are these, by kind and hour, and no others.
async fn wait_for(pod: &mut Sandbox, dataset: &str, want: &[&str]) -> Result<Vec<String>> {
    let end = Instant::now() + PATIENCE;
    let want: BTreeSet<_> = want.iter().map(|&name| name.to_owned()).collect();
    loop {
        let names = snapshots(pod, dataset).await?;
        if hours(&names) == want {
            return Ok(names);
        }
        ensure!(Instant::now() < end, "there are {names:?} and not {want:?}");
        sleep(Duration::from_millis(200)).await;
    }
}

async fn wait_until_paused(pod: &Sandbox, want: SnapshotsPaused) -> Result<()> {
    let end = Instant::now() + PATIENCE;
    loop {
        let now = pod.volume_status().await?.snapshots_paused();
        if now == want {
            return Ok(());
        }
        ensure!(Instant::now() < end, "{now:?} and not {want:?}");
        sleep(Duration::from_millis(200)).await;
    }
}

fn schedule(id: &str, schedule: &str) -> SetPropertiesRequest {
    let snapshot_schedule = Some(schedule.to_owned());
    SetPropertiesRequest { volume_id: id.to_owned(), snapshot_schedule, ..SetPropertiesRequest::default() }
}

#[tokio::test]
async fn a_guest_takes_snapshots_by_its_schedule_and_removes_the_oldest_but_for_what_is_held() -> Result<()> {
    let dir = Workdir::new()?;
    let mut image = Image::new(&dir, "pvc-scheduled", SIZE)?;
    image.spec.snapshot_schedule = Some("hourly=2 daily=7".parse()?);
    image.publish()?;
    let dataset = image.spec.dataset();
    let mut pod = pod(&dir).await?;
    pod.run(Container::debug("tools")).await?;
    set_clock(&mut pod, "12:00:07").await?;
    let app = |image: &Image| Container::new("app", [image.mount("/data")]);
    pod.run(app(&image)).await?;
    pod.sh("app", "echo first > /data/file; head -c 2000000 /dev/urandom > /data/blob; sync").await?;
    let first = wait_for(&mut pod, &dataset, &["hourly 12", "daily 12"]).await?;
    println!("at start: {first:?}");
    let held = first.iter().find(|name| name.starts_with("hourly")).cloned().unwrap_or_default();
    pod.zfs_tool("tools", &format!("zfs hold keep {dataset}@zpod-auto-{held}")).await?;
    for (hour, want) in [
        ("13", &["hourly 12", "daily 12", "hourly 13"][..]),
        ("14", &["hourly 12", "daily 12", "hourly 13", "hourly 14"]),
        ("15", &["hourly 12", "daily 12", "hourly 14", "hourly 15"]),
    ] {
        set_clock(&mut pod, &format!("{hour}:00:00")).await?;
        wait_for(&mut pod, &dataset, want).await?;
    }

    // Within the hour another container takes no second one, whatever else is due.
    pod.remove("app").await?;
    image.spec.snapshot_schedule = Some("hourly=2 daily=7 weekly=1".parse()?);
    image.publish()?;
    set_clock(&mut pod, "15:30:00").await?;
    pod.run(app(&image)).await?;
    let mut want = vec!["hourly 12", "daily 12", "hourly 14", "hourly 15", "weekly 15"];
    wait_for(&mut pod, &dataset, &want).await?;

    // Turned off, nothing is taken or removed. That a turn has passed, the next schedule's snapshot shows.
    let mut control = pod.control().await?;
    for bad in ["hourly=0", "yearly=1", "daily=1 daily=2", "hourly=1001"] {
        let refused = control.set_properties(schedule(&image.id(), bad)).await.expect_err(bad);
        assert_eq!(refused.code(), Code::InvalidArgument, "{refused}");
    }
    control.set_properties(schedule(&image.id(), "none")).await?;
    set_clock(&mut pod, "20:00:00").await?;
    control.set_properties(schedule(&image.id(), "monthly=1")).await?;
    want.push("monthly 20");
    wait_for(&mut pod, &dataset, &want).await?;

    // Files that fill the volume are no reason to give up a snapshot; none is taken until there is room.
    control.set_properties(schedule(&image.id(), "hourly=9")).await?;
    want.push("hourly 20");
    wait_for(&mut pod, &dataset, &want).await?;
    wait_until_paused(&pod, SnapshotsPaused::Not).await?;
    pod.sh("app", &format!("e2e fill /data/more {}; sync", SIZE.0 / 100 * 93)).await?;
    wait_until_paused(&pod, SnapshotsPaused::NoRoom).await?;
    set_clock(&mut pod, "21:00:00").await?;
    pod.sh("app", "rm /data/more; sync").await?;
    wait_until_paused(&pod, SnapshotsPaused::Not).await?;
    want.push("hourly 21");
    wait_for(&mut pod, &dataset, &want).await?;

    // Where snapshots keep the room from the application, those go that can.
    let fill = |percent: u64| format!("e2e fill /data/more {}; sync", SIZE.0 / 100 * percent);
    pod.sh("app", &fill(60)).await?;
    set_clock(&mut pod, "22:00:00").await?;
    want.push("hourly 22");
    wait_for(&mut pod, &dataset, &want).await?;
    pod.sh("app", "rm /data/more; sync").await?;
    set_clock(&mut pod, "23:00:00").await?;
    want.push("hourly 23");
    wait_for(&mut pod, &dataset, &want).await?;
    pod.sh("app", &fill(80)).await?;
    let gone = ["hourly 14", "hourly 15", "hourly 20", "hourly 21", "hourly 22"];
    want.retain(|name| !gone.contains(name));
    let names = wait_for(&mut pod, &dataset, &want).await?;
    println!("with little room: {names:?}");
    assert!(names.contains(&held), "what is held stays");
    assert_eq!(pod.sh("app", "cat /data/file").await?, "first");
    pod.sh("app", "rm /data/more; sync").await?;
    wait_until_paused(&pod, SnapshotsPaused::Not).await?;

    // What only snapshots hold is told apart from what the volume itself holds.
    pod.sh("app", "rm /data/blob; sync").await?;
    let end = Instant::now() + PATIENCE;
    loop {
        let told = pod.volume_status().await?;
        if told.snapshot_bytes >= 2_000_000 && told.dataset_bytes < 2_000_000 {
            assert!(told.dataset_bytes > 0 && told.children_bytes == 0, "{told:?}");
            break;
        }
        ensure!(Instant::now() < end, "{told:?}");
        sleep(Duration::from_millis(200)).await;
    }
    pod.stop().await
}

#[tokio::test]
async fn a_block_device_has_a_schedule_too_and_what_was_written_before_is_in_its_snapshot() -> Result<()> {
    let dir = Workdir::new()?;
    let mut disk = Disk::new(dir.path(), "pvc-scheduled-block", SIZE)?;
    disk.spec.snapshot_schedule = Some("hourly=2".parse()?);
    disk.publish()?;
    assert_eq!(disk.spec.mode, VolumeMode::Block);
    let dataset = disk.spec.dataset();
    let mut pod = pod(&dir).await?;
    pod.run(Container::debug("tools")).await?;
    set_clock(&mut pod, "12:00:07").await?;
    pod.run(disk.container("app")).await?;
    wait_for(&mut pod, &dataset, &["hourly 12"]).await?;
    pod.sh("app", &format!("dd if=/dev/urandom of={DEVICE} bs=65536 count=16")).await?;
    set_clock(&mut pod, "13:00:00").await?;
    let names = wait_for(&mut pod, &dataset, &["hourly 12", "hourly 13"]).await?;
    let referenced = |name: &str| format!("zfs get -H -p -o value referenced {dataset}@zpod-auto-{name}");
    let (before, after) =
        (pod.zfs_tool("tools", &referenced(&names[0])).await?, pod.zfs_tool("tools", &referenced(&names[1])).await?);
    assert!(after.parse::<u64>()? >= before.parse::<u64>()? + (1 << 20), "{before} and then {after}");
    pod.stop().await
}
