//! Snapshots that containers go into: `.zfs/snapshot` in a mount namespace of their own.

use std::collections::HashMap;

use anyhow::{Result, ensure};
use tokio::time::timeout;
use uuid::Uuid;
use zpod_e2e::shim::User;
use zpod_e2e::workdir::Workdir;
use zpod_e2e::{Boot, Container, Guest, PATIENCE, Runtime, Sandbox};
use zpod_proto::guest::SetPropertiesRequest;
use zpod_volume::Bytes;

use crate::image::Image;

const SIZE: Bytes = Bytes::mib(256);
const POOLS: &str = "busybox ls /proc/spl/kstat/zfs | busybox grep ^zpod- || true";
const GROUP: u32 = 2000;

async fn pod(dir: &Workdir, runtime: Runtime) -> Result<Sandbox> {
    let (run, volumes) = (dir.subdirectory("kata")?, dir.subdirectory("direct-volumes")?);
    let id = Uuid::new_v4().simple().to_string();
    let mut pod = Sandbox::start_in(&run, volumes, id, "e2e", runtime, Guest::boot(Boot::FromTemplate).await?).await?;
    pod.run(Container::debug("tools")).await?;
    Ok(pod)
}

async fn snapshot(pod: &mut Sandbox, image: &Image, name: &str) -> Result<()> {
    pod.zfs_tool("tools", &format!("zfs snapshot {}@{name}", image.spec.dataset())).await.map(drop)
}

/// What a container that has the volume at `place` sees of a file in a snapshot.
async fn old(pod: &mut Sandbox, container: &str, place: &str, snapshot: &str) -> Result<String> {
    pod.sh(container, &format!("cat {place}/.zfs/snapshot/{snapshot}/file")).await
}

async fn browse(runtime: Runtime) -> Result<()> {
    let dir = Workdir::new()?;
    let mut image = Image::new(&dir, "pvc-browsed", SIZE)?;
    let mut pod = pod(&dir, runtime).await?;
    let one = |image: &Image| Container::new("one", [image.mount("/data")]);
    let two = |image: &Image| Container::new("two", [image.mount("/elsewhere")]);
    pod.run(one(&image)).await?;
    pod.sh("one", "echo first > /data/file; sync").await?;
    snapshot(&mut pod, &image, "s1").await?;
    pod.sh("one", "echo second > /data/file; sync").await?;

    // Hidden, but there. A file is copied back, and nothing can be written there.
    assert_eq!(pod.sh("one", "ls -A /data").await?, "file");
    assert_eq!(old(&mut pod, "one", "/data", "s1").await?, "first");
    assert_eq!(pod.sh("one", "cp /data/.zfs/snapshot/s1/file /data/back; cat /data/back").await?, "first");
    let written = pod.sh("one", "echo x > /data/.zfs/snapshot/s1/file").await;
    assert!(written.is_err_and(|error| format!("{error:#}").contains("Read-only file system")));
    let mounted = pod.sh("one", "grep @s1 /proc/mounts").await?;
    println!("{runtime:?}: {mounted}");
    assert!(mounted.contains("/data/.zfs/snapshot/s1 zfs ro,nosuid,nodev"), "{mounted}");

    // A container that comes later sees what is mounted, and what is mounted for it is seen by the first one.
    pod.run(two(&image)).await?;
    assert_eq!(old(&mut pod, "two", "/elsewhere", "s1").await?, "first");
    snapshot(&mut pod, &image, "s2").await?;
    assert_eq!(old(&mut pod, "two", "/elsewhere", "s2").await?, "second");
    assert_eq!(old(&mut pod, "one", "/data", "s2").await?, "second");

    // Somebody stays in a snapshot while the other container starts again: nothing is taken away from under it.
    let stay = "mkfifo /tmp/go; cd /elsewhere/.zfs/snapshot/s1 && echo here && cat /tmp/go > /dev/null && cat file";
    let holder = pod.spawn("two", User::ROOT, &["/bin/sh", "-c", stay]).await?;
    let said = String::from_utf8_lossy(&holder.read().await.unwrap_or_default()).into_owned();
    ensure!(said.starts_with("here"), "{said:?}");
    pod.remove("one").await?;
    assert_eq!(old(&mut pod, "two", "/elsewhere", "s2").await?, "second");
    pod.run(one(&image)).await?;
    for snapshot in ["s1", "s2"] {
        let want = if snapshot == "s1" { "first" } else { "second" };
        assert_eq!(old(&mut pod, "one", "/data", snapshot).await?, want);
        assert_eq!(old(&mut pod, "two", "/elsewhere", snapshot).await?, want);
    }
    pod.sh("two", "echo > /tmp/go").await?;
    let output = timeout(PATIENCE, holder.finish()).await??.ok()?;
    assert_eq!(output, "first", "what it has gone into is there still");

    // A snapshot that is mounted can be destroyed, and is gone for all.
    pod.zfs_tool("tools", &format!("zfs destroy {}@s2", image.spec.dataset())).await?;
    for (container, place) in [("one", "/data"), ("two", "/elsewhere")] {
        assert_eq!(pod.sh(container, &format!("ls {place}/.zfs/snapshot")).await?, "s1");
    }

    // Visible, and given to a group all the same: what is in snapshots is left alone.
    let snapdir: HashMap<_, _> = [("snapdir".to_owned(), "visible".to_owned())].into();
    let request = SetPropertiesRequest { volume_id: image.id(), dataset_properties: snapdir, ..Default::default() };
    pod.control().await?.set_properties(request).await?;
    assert_eq!(pod.sh("two", "ls -A /elsewhere").await?, ".zfs\nback\nfile");
    assert_eq!(old(&mut pod, "one", "/data", "s1").await?, "first");
    pod.remove("one").await?;
    pod.remove("two").await?;
    assert_eq!(pod.sh("tools", POOLS).await?, "", "the pool is still imported");
    image.spec.fs_group = Some(GROUP);
    image.publish_again()?;
    pod.run(one(&image)).await?;
    assert_eq!(pod.sh("one", "stat -c %g /data/file /data/back").await?, format!("{GROUP}\n{GROUP}"));
    assert_eq!(pod.sh("one", "stat -c %g /data/.zfs/snapshot/s1/file; ls -A /data").await?, "0\n.zfs\nback\nfile");
    assert_eq!(old(&mut pod, "one", "/data", "s1").await?, "first");

    // Mounted still, it keeps nobody from exporting the pool.
    pod.remove("one").await?;
    assert_eq!(pod.sh("tools", POOLS).await?, "", "the pool is still imported");
    assert!(!pod.guest().console_has("lazily"), "something had to be unmounted lazily");
    pod.stop().await
}

#[tokio::test]
async fn containers_go_into_snapshots_and_copy_files_back_while_others_start_again_with_runtime_rs() -> Result<()> {
    browse(Runtime::Rs).await
}

#[tokio::test]
async fn containers_go_into_snapshots_and_copy_files_back_while_others_start_again_with_go() -> Result<()> {
    browse(Runtime::Go).await
}
