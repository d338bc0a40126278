//! What a tenant with ZFS in its containers makes of its volume, and what becomes of that at the next start and in copies.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use tokio::time::sleep;
use zpod_e2e::csi::Publish;
use zpod_e2e::shim::User;
use zpod_e2e::{Container, Node, PATIENCE, Runtime, Sandbox};
use zpod_proto::csi::Volume;
use zpod_volume::{Bytes, Mark, PoolName, SnapshotId, VolumeId};

use crate::access::{ADMIN, ALLOW, ASKING, GROUP, Published, SIZE, admin, end, ok, publish};

/// What a tenant does to its properties, and what some of them are after the next start.
struct Settings {
    commands: &'static [&'static str],
    then: &'static [(&'static str, &'static str)],
}

const SETTINGS: [Settings; 4] = [
    Settings {
        commands: &[
            "zfs set reservation=512K refreservation=256K $D",
            "zfs set quota=1M refquota=1M $D",
            "zfs set compression=off recordsize=16K snapdir=visible exec=off $D",
            "zfs set filesystem_limit=0 snapshot_limit=0 $D",
            "zfs set quota=120M $P",
        ],
        then: &[
            ("quota", "0"),
            ("refquota", "268435456"),
            ("refreservation", "0"),
            ("reservation", "524288"),
            ("compression", "lz4"),
            ("recordsize", "16384"),
            ("snapdir", "visible"),
            ("exec", "off"),
        ],
    },
    Settings { commands: &["zfs set quota=none $P", "zfs set readonly=on $P"], then: &[("readonly", "off")] },
    Settings { commands: &["zfs set readonly=on $D"], then: &[("readonly", "off")] },
    Settings {
        commands: &["zfs set canmount=off mountpoint=/ $D", "zfs set canmount=on mountpoint=/zpod $P"],
        then: &[("canmount", "off"), ("mountpoint", "/")],
    },
];

#[tokio::test]
async fn a_volume_starts_whatever_properties_its_tenant_has_set() -> Result<()> {
    let mut node = Node::start_with(&[ALLOW]).await?;
    let class = [ASKING[0], ("compression", "lz4")];
    let volume = publish(&mut node, "pvc-odd", &class).await?;
    let mut pod = Sandbox::start(&node, Runtime::Go).await?;
    pod.run(admin(vec![volume.mount("/data")])).await?;
    ok(&mut pod, ADMIN, "echo 0 > /data/count").await?;
    for Settings { commands, then } in SETTINGS {
        for command in commands {
            ok(&mut pod, ADMIN, &volume.named(command)).await?;
        }
        pod.remove("admin").await?;
        pod.run(admin(vec![volume.mount("/data")])).await.with_context(|| format!("after {commands:?}"))?;
        for (key, want) in then {
            let value = ok(&mut pod, ADMIN, &volume.named(&format!("zfs get -Hpo value {key} $D"))).await?;
            assert_eq!(&value, want, "{key} after {commands:?}");
        }
        let count = "n=$(cat /data/count) && echo $((n + 1)) > /data/count && sync && cat /data/count";
        println!("{}", ok(&mut pod, ADMIN, count).await?);
    }
    // Growth raises what the tenant has lowered.
    ok(&mut pod, ADMIN, &volume.named("zfs set refquota=64M $D")).await?;
    let grown = Bytes::mib(320);
    node.csi.controller_expand(&volume.volume, grown).await?;
    assert_eq!(node.csi.node_expand(&volume.volume, &volume.target, grown).await?, grown);
    assert_eq!(ok(&mut pod, ADMIN, "df -P -B1 /data | awk 'NR==2{print $2}'").await?, grown.0.to_string());
    pod.stop().await?;
    end(&mut node, &[volume]).await
}

/// What a tenant makes in its pool. The last names are like that of a mark of zpod's, and of its form.
const MADE: [&str; 9] = [
    "zfs create -u $D/one && zfs create -u $D/one/two && mount -t zfs $D/one /mnt && echo one > /mnt/file && umount /mnt",
    "echo mine > /data/file && zfs snapshot -r $D@mine && echo later > /data/later",
    "zfs hold keep $D@mine && zfs bookmark $D@mine $D#mark",
    "zfs clone -o canmount=noauto $D@mine $D/thin",
    "zfs set tenant:note='my own' $D && zfs set tenant:note=child quota=50M $D/one",
    "zfs allow -u 1234 snapshot,mount $D/one && zfs allow -g 5678 send $D",
    "zfs snapshot $D@zpod-mark-mine",
    "zfs snapshot $D@zpod-mark-0123456789ABCDEF0123456789ABCDEF",
    "zfs snapshot $D@zpod-mark-0123456789abcdef0123456789abcdef",
];

/// All of it, as the tools tell of it, without the pool's name.
const TOLD: &str = "zfs list -Hro name,quota -t all $D | grep -v '@zpod-mark-[0-9a-f]\\{32\\}'; zfs holds -H $D@mine | cut -f 1,2; \
                    zfs get -Hro name,value -t filesystem tenant:note $D; zfs allow $D/one";

async fn told(pod: &mut Sandbox, volume: &Published) -> Result<String> {
    Ok(ok(pod, ADMIN, &volume.named(TOLD)).await?.replace(volume.pool.as_str(), "POOL"))
}

async fn publish_again(node: &mut Node, pod: &str, volume: Volume) -> Result<Published> {
    let target = node.target(pod, &volume.volume_id)?;
    node.csi.publish(&volume, &target, &Publish { fs_group: Some(GROUP), ..Publish::default() }).await?;
    let pool = PoolName::for_volume(volume.volume_id.parse::<VolumeId>()?);
    Ok(Published { volume, target, pool })
}

#[tokio::test]
async fn what_a_tenant_has_made_in_its_pool_is_in_what_is_restored_and_cloned_and_its_names_are_its_own() -> Result<()>
{
    let mut node = Node::start_on_xfs_with(&[ALLOW]).await?;
    let volume = publish(&mut node, "pvc-rich", &ASKING).await?;
    let mut pod = Sandbox::start(&node, Runtime::Go).await?;
    pod.run(admin(vec![volume.mount("/data")])).await?;
    for command in MADE {
        ok(&mut pod, ADMIN, &volume.named(command)).await?;
    }
    let made = told(&mut pod, &volume).await?;
    println!("{made}");
    for part in ["POOL/data/thin", "POOL/data#mark", "keep", "my own", "1234) mount,snapshot", "5678) send"] {
        ensure!(made.contains(part), "{part} is not in {made}");
    }

    // A snapshot of the tenant's that has the very name of a mark, and is held, is in the way of that one snapshot only.
    let mark = Mark::for_snapshot(SnapshotId::from_name("collides"));
    ok(&mut pod, ADMIN, &volume.named(&format!("zfs snapshot $D@{mark} && zfs hold keep $D@{mark}"))).await?;
    let refused = node.csi.snapshot(&volume.volume, "collides").await.expect_err("the mark can't be taken");
    println!("{refused}");
    ensure!(
        refused.message().contains(&volume.volume.volume_id) && refused.message().contains("being held"),
        "{refused}"
    );
    let snapshot = node.csi.snapshot(&volume.volume, "does-not").await?;
    ok(&mut pod, ADMIN, &volume.named(&format!("zfs release keep $D@{mark}"))).await?;
    let collided = node.csi.snapshot(&volume.volume, "collides").await?;
    let clone = node.csi.clone_volume("pvc-clone", SIZE, &ASKING, &volume.volume).await?;
    pod.stop().await?;
    node.csi.unpublish(&volume.volume, &volume.target).await?;

    let restored = node.csi.restore("pvc-restored", SIZE, &ASKING, &snapshot).await?;
    let mut all = Vec::new();
    for volume in [volume.volume.clone(), restored, clone] {
        all.push(publish_again(&mut node, "two", volume).await?);
    }
    let mut pod = Sandbox::start(&node, Runtime::Rs).await?;
    let places = ["/data", "/restored", "/clone"];
    pod.run(admin(all.iter().zip(places).map(|(volume, at)| volume.mount(at)).collect())).await?;
    for (volume, at) in all.iter().zip(places) {
        assert_eq!(told(&mut pod, volume).await?, made, "{at}");
        let read = format!("cat {at}/file {at}/later {at}/one/file; ls -d {at}/one/two");
        assert_eq!(ok(&mut pod, ADMIN, &read).await?, format!("mine\nlater\none\n{at}/one/two"));
        // What has the form of a mark is zpod's, and goes, but for what is held: that was released in the origin, and after
        // the first copy was made.
        let marks = volume.named("zfs list -Hro name -t snapshot $D | grep -c '@zpod-mark-[0-9a-f]*$' || true");
        let left = if at == "/restored" { "1" } else { "0" };
        assert_eq!(ok(&mut pod, ADMIN, &marks).await?, left, "{at}");
    }
    pod.stop().await?;
    for snapshot in [snapshot, collided] {
        node.csi.delete_snapshot(&snapshot).await?;
    }
    end(&mut node, &all).await
}

const POOLS: &str = "busybox ls /proc/spl/kstat/zfs | busybox grep ^zpod- || true";

/// Removes the container; gives the pools that are imported after that.
async fn remove(pod: &mut Sandbox) -> Result<String> {
    let begun = Instant::now();
    pod.remove("admin").await?;
    let taken = begun.elapsed();
    println!("removed in {taken:?}");
    // Releasing may take 20 s before it is left to itself.
    ensure!(taken < Duration::from_secs(40), "RemoveContainer and unplugging took {taken:?}");
    pod.sh("tools", POOLS).await
}

#[tokio::test]
async fn a_pool_that_its_tenant_keeps_busy_is_let_go_in_time_and_loses_nothing() -> Result<()> {
    let mut node = Node::start_with(&[ALLOW]).await?;
    let volume = publish(&mut node, "pvc-kept-busy", &ASKING).await?;
    let app = || admin(vec![volume.mount("/data")]);
    let mut pod = Sandbox::start(&node, Runtime::Go).await?;
    pod.run(Container::debug("tools")).await?;
    pod.run(app()).await?;
    let make =
        "e2e fill /data/blob 20000000; sha256sum /data/blob > /data/sum; sync; zfs snapshot $D@s && zfs hold keep $D@s";
    ok(&mut pod, ADMIN, &volume.named(make)).await?;

    // By processes of its own, which end with the container: a stream that nobody reads, a scrub, a directory, a lock.
    let busy =
        "cd /data; zpool scrub $P; zfs send $D@s | sleep 100000 & tail -f /data/blob >/dev/null & echo begun; wait";
    let command = format!("PATH=/opt/zpod/bin:$PATH; {}", volume.named(busy));
    let running = pod.spawn("admin", User::ROOT, &["/bin/sh", "-c", &command]).await?;
    ensure!(running.read().await.unwrap_or_default().starts_with(b"begun"), "it does not begin");
    assert_eq!(remove(&mut pod).await?, "", "what ended with its container held the pool");
    pod.run(app()).await?;
    let sound = "cd /data && sha256sum -c sum && zfs holds -H $D@s | wc -l";
    assert_eq!(ok(&mut pod, ADMIN, &volume.named(sound)).await?, "/data/blob: OK\n1");

    // By a process of another container, which goes on.
    let send = format!(
        "/zpod/lib/ld-linux-x86-64.so.2 --library-path /zpod/lib /zpod/bin/zfs send {}@s | busybox sleep 100000",
        volume.dataset()
    );
    let sender = pod.spawn("tools", User::ROOT, &["/bin/sh", "-c", &send]).await?;
    let waits = "busybox grep -l zfssend /guest/proc/[0-9]*/cmdline 2>/dev/null | busybox wc -l";
    let end_of_wait = Instant::now() + PATIENCE;
    while pod.sh("tools", &waits.replace("zfssend", "send")).await? == "0" {
        ensure!(Instant::now() < end_of_wait, "no stream is sent");
        sleep(Duration::from_millis(200)).await;
    }
    ok(&mut pod, ADMIN, "echo last > /data/last").await?;
    let left = remove(&mut pod).await?;
    println!("imported after that: {left:?}");
    pod.run(app()).await?;
    assert_eq!(ok(&mut pod, ADMIN, "cat /data/last").await?, "last");
    sender.signal(9).await?;
    pod.remove("tools").await?;
    pod.stop().await?;
    end(&mut node, &[volume]).await
}
