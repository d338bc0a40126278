//! Pools that a tenant has exported, destroyed, renamed, spread over devices or wiped, as who has ZFS in a container with
//! CAP_SYS_ADMIN can: what the next start says, that it changes nothing, and the way back that docs/pod-zfs.md tells of.

use anyhow::{Context as _, Result, bail, ensure};
use zpod_e2e::qemu::Plug;
use zpod_e2e::workdir::Workdir;
use zpod_e2e::{Container, Sandbox};
use zpod_volume::{Bytes, PoolName};

use crate::disk::pod;
use crate::image::Image;

const SIZE: Bytes = Bytes::mib(256);

/// Does something to a disk in a virtual machine that has it as any other disk: `$P` is the pool's name, `$V` the partition.
async fn tamper(pod: &mut Sandbox, image: &Image, commands: &[&str]) -> Result<()> {
    let place = pod.guest_mut().plug(&image.file, Plug { read_only: false, discards: false }).await?;
    let partition = "for i in 1 2 3 4 5 6 7 8 9 10; do p=$(busybox ls /sys/class/block | busybox grep '^vd.*1$') && break; \
                     busybox sleep 1; done; echo $p";
    let partition = format!("/dev/{}", pod.sh("tools", partition).await?);
    for command in commands {
        let command = command.replace("$P", image.spec.pool.as_str()).replace("$V", &partition);
        let done = match command.starts_with("zfs ") || command.starts_with("zpool ") {
            true => pod.zfs_tool("tools", &command).await,
            false => pod.sh("tools", &command).await,
        };
        done.with_context(|| command.clone())?;
    }
    pod.guest_mut().unplug(&place).await
}

/// Starts its container, which has to have what was written at first, and ends it.
async fn starts(pod: &mut Sandbox, image: &Image) -> Result<()> {
    pod.run(Container::new("app", [image.mount("/data")])).await?;
    assert_eq!(pod.sh("app", "cat /data/file").await?, "precious");
    pod.remove("app").await
}

/// Starts its container, which has to be refused with these words.
async fn refused(pod: &mut Sandbox, image: &Image, words: &[&str]) -> Result<()> {
    let Err(refused) = pod.run(Container::new("app", [image.mount("/data")])).await else { bail!("it must not start") };
    let error = format!("{refused:#}");
    println!("{error}\n");
    let always = [image.id(), "snapshot or a backup".into()];
    for word in words.iter().map(|word| (*word).to_owned()).chain(always) {
        ensure!(error.contains(&word), "{word:?} is not in: {error}");
    }
    ensure!(!error.contains(char::is_control), "{error:?}");
    let pools = pod.sh("tools", "busybox ls /proc/spl/kstat/zfs | busybox grep -c ^zpod- || true").await?;
    ensure!(pools == "0", "something is imported");
    Ok(())
}

#[tokio::test]
async fn a_pool_that_its_tenant_took_away_is_refused_with_what_became_of_it_and_can_be_brought_back() -> Result<()> {
    let dir = Workdir::new()?;
    let image = Image::new(&dir, "pvc-lost", SIZE)?;
    let pool: &PoolName = &image.spec.pool;
    let mut pod = pod(&dir).await?;
    pod.run(Container::debug("tools")).await?;
    pod.run(Container::new("app", [image.mount("/data")])).await?;
    pod.sh("app", "echo precious > /data/file; sync").await?;

    pod.remove("app").await?;

    // Exported by somebody else: it is whole, and its own. So is one that a killed machine has left.
    tamper(&mut pod, &image, &["zpool import -f -N -d $V $P", "zpool export $P"]).await?;
    starts(&mut pod, &image).await?;

    tamper(&mut pod, &image, &["zpool import -f -N -d $V $P", "zpool destroy $P"]).await?;
    let destroyed = ["somebody has destroyed it", pool.as_str(), "nothing is made over it", "zpool import -D"];
    refused(&mut pod, &image, &destroyed).await?;
    let copy = image.copy(&dir, "pvc-copy-of-lost", SIZE, None)?;
    refused(&mut pod, &copy, &destroyed).await?;
    tamper(&mut pod, &image, &["zpool import -D -f -N -d $V $P", "zpool export $P"]).await?;
    starts(&mut pod, &image).await?;

    tamper(&mut pod, &image, &["zpool import -f -N -d $V $P other", "zpool export other"]).await?;
    refused(&mut pod, &image, &["is pool other (GUID ", "renamed", "nothing is made over it"]).await?;
    tamper(&mut pod, &image, &["zpool import -f -N -d $V other $P", "zpool export $P"]).await?;
    starts(&mut pod, &image).await?;

    let add = ["busybox truncate -s 64M /zpod/more", "zpool import -f -N -d $V $P", "zpool add -f $P /zpod/more"];
    let rename = |from: &str, to: &str| format!("zfs rename $P/{from} $P/{to}");
    let (away, back) = (rename("data", "elsewhere"), rename("elsewhere", "data"));
    tamper(&mut pod, &image, &["zpool import -f -N -d $V $P", &away, "zpool export $P"]).await?;
    refused(&mut pod, &image, &["has no dataset", "nothing was made in its place"]).await?;
    tamper(&mut pod, &image, &["zpool import -f -N -d $V $P", &back, "zpool export $P"]).await?;
    starts(&mut pod, &image).await?;

    // In another virtual machine that one is not there.
    tamper(&mut pod, &image, &[&add[..], &["zpool export $P", "busybox rm /zpod/more"]].concat()).await?;
    refused(&mut pod, &image, &["lie on 2 devices", "nothing is made over it"]).await?;

    tamper(&mut pod, &image, &["zpool create -f -O mountpoint=none mine $V", "zpool export mine"]).await?;
    refused(&mut pod, &image, &["is pool mine (GUID ", "made another one in its place"]).await?;

    tamper(&mut pod, &image, &["zpool labelclear -f $V"]).await?;
    refused(&mut pod, &image, &["no label", "zpool labelclear", "nothing is made over it"]).await?;
    pod.stop().await
}
