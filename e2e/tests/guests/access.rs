//! ZFS itself in containers: `zfsAccess: volume`. docs/pod-zfs.md has the table that is tested here.

use std::path::PathBuf;

use anyhow::{Context as _, Result, ensure};
use tonic::Code;
use zpod_e2e::csi::Publish;
use zpod_e2e::shim::{Device, Output, Running, User};
use zpod_e2e::slot::Pair;
use zpod_e2e::workdir::Workdir;
use zpod_e2e::{Container, Mount, Node, PATIENCE, Runtime, Sandbox, node};
use zpod_proto::csi::{NodeGetVolumeStatsResponse, Volume};
use zpod_volume::{Bytes, DiskLayout, PoolName, VolumeId};

use crate::disk::{DEVICE, Disk};

pub(crate) const SIZE: Bytes = Bytes::mib(256);
pub(crate) const GROUP: u32 = 2000;
pub(crate) const ALLOW: &str = "--allow-zfs-access";
pub(crate) const ASKING: [(&str, &str); 1] = [("zfsAccess", "volume")];

/// The users of the table in docs/pod-zfs.md, in its order.
const ROOT: (&str, User) = ("app", User::ROOT);
const MEMBER: (&str, User) = ("app", User { uid: 1000, group: Some(GROUP) });
const STRANGER: (&str, User) = ("app", User { uid: 1001, group: None });
pub(crate) const ADMIN: (&str, User) = ("admin", User::ROOT);

/// Who can do something: all of them; all but a stranger; none but root with CAP_SYS_ADMIN; nobody.
#[derive(Clone, Copy, PartialEq)]
enum Who {
    All,
    Delegates,
    Admin,
    Nobody,
}
use Who::{Admin, All, Delegates, Nobody};

/// In an order in which each finds what it needs and the last ones clear away. `$D` is the volume's dataset, `$P` its pool.
const RIGHTS: [(Who, &str); 51] = [
    (All, "zfs version"),
    (All, "zpool list $P"),
    (All, "zpool status $P"),
    (All, "zpool iostat $P"),
    (All, "zpool get all $P"),
    (All, "zfs list -t all $D"),
    (All, "zfs get all $D"),
    (Admin, "zpool history $P"),
    (Admin, "zpool events"),
    (Delegates, "zfs snapshot $D@one"),
    (Delegates, "zfs snapshot $D@two"),
    (Delegates, "zfs hold keep $D@one"),
    (Nobody, "zfs destroy $D@one"),
    (Delegates, "zfs release keep $D@one"),
    (Delegates, "zfs bookmark $D@one $D#mark"),
    (Delegates, "zfs diff $D@one $D@two"),
    (Delegates, "zfs diff $D@one"),
    (Delegates, "zfs send $D@one >/dev/null"),
    (Delegates, "zfs send -i $D#mark $D@two >/dev/null"),
    (Delegates, "zfs rollback -r $D@one"),
    (Delegates, "zfs create -u $D/child"),
    (Delegates, "zfs create -V 8M $D/device"),
    (Delegates, "zfs clone -o canmount=noauto $D@one $D/clone"),
    (Delegates, "zfs promote $D/clone"),
    (Delegates, "zfs promote $D"),
    (Delegates, "zfs snapshot -r $D/child@one"),
    (Delegates, "zfs send $D/child@one | zfs receive $D/received"),
    (Delegates, "zfs rename $D/child $D/renamed"),
    (Delegates, "zfs set compression=zstd $D/renamed"),
    (Delegates, "zfs set quota=100M $D/renamed"),
    (Delegates, "zfs set tenant:note=mine $D/renamed"),
    (Delegates, "zfs set volsize=16M $D/device"),
    (Admin, "zfs create -o mountpoint=/mnt/own $D/own"),
    (Admin, "zfs unmount $D/own"),
    (Admin, "zfs mount $D/own"),
    (Admin, "mount -t zfs $D/renamed /tmp && umount /tmp"),
    (Admin, "zfs allow -u 1234 snapshot $D/renamed"),
    (Admin, "zfs set setuid=off $D/renamed"),
    (Delegates, "zfs destroy -r $D/renamed"),
    (Delegates, "zfs destroy -r $D/received"),
    (Delegates, "zfs destroy $D/device"),
    (Delegates, "zfs destroy $D/clone"),
    (Delegates, "zfs destroy $D@one"),
    (Delegates, "zfs destroy $D#mark"),
    (Admin, "zpool scrub $P"),
    (Admin, "zpool trim $P"),
    (Admin, "zpool set comment=mine $P"),
    (Admin, "zfs create $P/beside"),
    (Admin, "zfs destroy $P/beside"),
    (Nobody, "zfs destroy -r $D"),
    (Nobody, "zpool export $P"),
];

/// A volume, and where it is published.
pub(crate) struct Published {
    pub(crate) volume: Volume,
    pub(crate) target: PathBuf,
    pub(crate) pool: PoolName,
}

impl Published {
    pub(crate) fn mount(&self, at: &str) -> Mount {
        Mount::new(&self.target, at)
    }

    pub(crate) fn dataset(&self) -> String {
        format!("{}/data", self.pool)
    }

    /// A command with its names in it.
    pub(crate) fn named(&self, command: &str) -> String {
        command.replace("$D", &self.dataset()).replace("$P", self.pool.as_str())
    }
}

pub(crate) async fn publish(node: &mut Node, name: &str, parameters: &[(&str, &str)]) -> Result<Published> {
    let volume = node.csi.create(name, SIZE, parameters).await?;
    let target = node.target("pod", name)?;
    node.csi.publish(&volume, &target, &Publish { fs_group: Some(GROUP), ..Publish::default() }).await?;
    let pool = PoolName::for_volume(volume.volume_id.parse::<VolumeId>()?);
    Ok(Published { volume, target, pool })
}

pub(crate) async fn end(node: &mut Node, published: &[Published]) -> Result<()> {
    for Published { volume, target, .. } in published {
        node.csi.unpublish(volume, target).await?;
        node.csi.delete(volume).await?;
    }
    node.must_be_empty()
}

/// With the tools of ZFS in its PATH.
async fn run(pod: &mut Sandbox, (container, user): (&str, User), command: &str) -> Result<Output> {
    let script = format!("PATH=/opt/zpod/bin:$PATH; {command}");
    pod.spawn(container, user, &["/bin/sh", "-c", &script]).await?.finish().await
}

pub(crate) async fn ok(pod: &mut Sandbox, who: (&str, User), command: &str) -> Result<String> {
    run(pod, who, command).await?.ok().with_context(|| command.to_owned())
}

pub(crate) fn admin(volumes: Vec<Mount>) -> Container {
    Container { capabilities: vec!["CAP_SYS_ADMIN"], ..Container::new("admin", volumes) }
}

#[tokio::test]
async fn only_who_asks_and_is_allowed_has_zfs_in_its_containers() -> Result<()> {
    let mut node = Node::start().await?;
    let refused = node.csi.create("pvc-forbidden", SIZE, &ASKING).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    for word in ["pvc-forbidden", "zfsAccess: \"volume\"", "allowed is: none", "zfsAccess.allowed"] {
        assert!(refused.message().contains(word), "{refused}");
    }
    node.must_be_empty()?;
    node.arguments = vec![ALLOW.to_owned()];
    node.restart_zpod().await?;
    let with = publish(&mut node, "pvc-with", &ASKING).await?;
    let without = publish(&mut node, "pvc-without", &[]).await?;

    let mut pod = Sandbox::start(&node, Runtime::Rs).await?;
    // The root file systems of these containers are one: the empty directory may be there.
    let nothing = "ls /dev/zfs /opt/zpod/bin 2>&1; true";
    pod.run(Container::new("plain", [without.mount("/data")])).await?;
    let seen = pod.sh("plain", nothing).await?;
    assert!(seen.matches("No such file or directory").count() == 2, "{seen}");
    pod.run(Container { read_only_root: true, ..Container::new("app", [with.mount("/data")]) }).await?;
    assert_eq!(pod.sh("plain", nothing).await?, seen, "another container of the pod has nothing of it");
    assert_eq!(pod.sh("app", "stat -c %A /dev/zfs").await?, "crw-rw-rw-");
    // Its kernel has the pools of all its pod's volumes, and no others.
    let pools = ok(&mut pod, ROOT, "zpool list -H -o name").await?;
    let mut wanted = [with.pool.as_str(), without.pool.as_str()];
    wanted.sort_unstable();
    assert_eq!(pools.lines().collect::<Vec<_>>(), wanted);
    let error = run(&mut pod, ROOT, "rm /opt/zpod/bin/zfs").await?.ok().unwrap_err().to_string();
    assert!(error.contains("Read-only file system"), "{error}");
    // Rights are over what asked for them.
    let denied = run(&mut pod, ROOT, &without.named("zfs snapshot $D@one")).await?;
    assert!(denied.code != 0 && denied.stderr.contains("permission denied"), "{denied:?}");
    pod.stop().await?;

    // It was allowed, and is no more: the next pod does not get the volume, and is told why.
    node.csi.unpublish(&with.volume, &with.target).await?;
    node.arguments.clear();
    node.restart_zpod().await?;
    let refused = node.csi.publish(&with.volume, &with.target, &Publish::default()).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    assert!(refused.message().contains(&with.volume.volume_id) && refused.message().contains("zfsAccess"), "{refused}");
    node.must_be_unpublished(&with.target)?;
    end(&mut node, &[with, without]).await
}

#[tokio::test]
async fn the_tools_run_in_any_image_and_do_what_the_table_says() -> Result<()> {
    let mut node = Node::start_with(&[ALLOW]).await?;
    let volume = publish(&mut node, "pvc-tools", &ASKING).await?;
    let mut pod = Sandbox::start(&node, Runtime::Go).await?;
    pod.run(Container::new("app", [volume.mount("/data")])).await?;
    pod.run(admin(vec![volume.mount("/data")])).await?;
    let mut wrong = Vec::new();
    for (who, user) in [ROOT, MEMBER, STRANGER, ADMIN].into_iter().enumerate() {
        for (needed, command) in RIGHTS {
            let can = match needed {
                All => true,
                Delegates => who != 2,
                Admin => who == 3,
                Nobody => false,
            };
            let output = run(&mut pod, user, &volume.named(command)).await?;
            if (output.code == 0) != can {
                wrong.push(format!("{user:?} {command}: {output:?}"));
            }
        }
    }
    ensure!(wrong.is_empty(), "{}", wrong.join("\n"));

    // Nothing else in the image: no C library, no shell. And as the first process of its own.
    let bare = "mkdir -p /mnt/bare/opt/zpod /mnt/bare/dev /mnt/bare/proc /mnt/bare/sys && cd /mnt/bare && \
                for dir in opt/zpod dev proc sys; do mount --rbind /$dir $dir; done";
    pod.sh("admin", bare).await?;
    let name = "/opt/zpod/bin/zpool list -H -o name";
    for first in ["", "unshare -p -f "] {
        assert_eq!(pod.sh("admin", &format!("{first}chroot /mnt/bare {name}")).await?, volume.pool.as_str());
    }
    let preloaded = pod.sh("app", &format!("LD_PRELOAD=/lib/none.so {name} 2>&1")).await?;
    assert_eq!(preloaded, volume.pool.as_str());
    pod.stop().await?;
    end(&mut node, &[volume]).await
}

/// What a tenant makes below the volume's dataset.
const CHILDREN: &str = "zfs create -u $D/one && zfs create -u $D/one/two && zfs create -u -o canmount=noauto $D/left && \
                        zfs create -u -o encryption=on -o keyformat=passphrase -o keylocation=file:///tmp/key $D/locked";

#[tokio::test]
async fn datasets_that_a_tenant_makes_are_there_in_every_later_container() -> Result<()> {
    let mut node = Node::start_with(&[ALLOW]).await?;
    let volume = publish(&mut node, "pvc-children", &ASKING).await?;
    let mut first = Sandbox::start(&node, Runtime::Rs).await?;
    first.run(admin(vec![volume.mount("/data")])).await?;
    let made = format!("echo 'a long passphrase' > /tmp/key; {CHILDREN}");
    ok(&mut first, ADMIN, &volume.named(&made)).await?;
    // Whoever has files there may lead the way elsewhere: it is not followed.
    ok(&mut first, ADMIN, &volume.named("zfs create -u $D/astray && ln -s /run /data/astray")).await?;
    // Of the same pod, a container that comes later.
    first.run(Container::new("app", [volume.mount("/data")])).await?;
    let mounted = "awk '$3 == \"zfs\" { print $1 \" \" $2 }' /proc/mounts | sort";
    // The key of the third one is known to the kernel that it was made in.
    let wanted = volume.named("$D /data\n$D/one /data/one\n$D/one/two /data/one/two");
    let with_key = volume.named("$D /data\n$D/locked /data/locked\n$D/one /data/one\n$D/one/two /data/one/two");
    assert_eq!(first.sh("app", mounted).await?, with_key);
    first.sh("app", "echo one > /data/one/file; echo two > /data/one/two/file; echo mine > /data/file").await?;
    let condition = |stats: &NodeGetVolumeStatsResponse| stats.volume_condition.clone().unwrap_or_default();
    let told = node.csi.stats_when(&volume.volume, &volume.target, |stats| condition(stats).abnormal).await?;
    let message = condition(&told).message;
    assert!(message.contains("1 of the datasets") && message.contains("/data/astray: "), "{message}");
    // One container goes, and what was mounted for it goes with it; the other keeps its own.
    first.remove("app").await?;
    ok(&mut first, ADMIN, &volume.named("zfs destroy $D/astray && rm /data/astray")).await?;
    first.stop().await?;

    node.csi.unpublish(&volume.volume, &volume.target).await?;
    node.csi.publish(&volume.volume, &volume.target, &Publish { fs_group: Some(GROUP), ..Publish::default() }).await?;
    let mut second = Sandbox::start(&node, Runtime::Go).await?;
    for container in ["app", "other"] {
        second.run(Container::new(container, [volume.mount("/data")])).await?;
        assert_eq!(second.sh(container, mounted).await?, wanted, "{container}");
        assert_eq!(second.sh(container, "cat /data/file /data/one/file /data/one/two/file").await?, "mine\none\ntwo");
    }
    let locked = volume.named("$D/locked: ");
    let told = |stats: &NodeGetVolumeStatsResponse| condition(stats).message.contains(&locked);
    node.csi.stats_when(&volume.volume, &volume.target, told).await?;
    // Mounted, it can't be destroyed; its `canmount` is how a tenant has it let go, at the next start of a container.
    let busy = run(&mut second, ROOT, &volume.named("zfs destroy $D/one/two")).await?;
    assert!(busy.code != 0, "{busy:?}");
    ok(&mut second, ROOT, &volume.named("zfs set canmount=noauto $D/one/two && zfs destroy $D/locked")).await?;
    for container in ["app", "other"] {
        second.remove(container).await?;
    }
    second.run(Container::new("app", [volume.mount("/data")])).await?;
    assert_eq!(second.sh("app", mounted).await?, volume.named("$D /data\n$D/one /data/one"));
    node.csi.stats_when(&volume.volume, &volume.target, |stats| !condition(stats).abnormal).await?;
    ok(&mut second, ROOT, &volume.named("zfs destroy $D/one/two")).await?;
    second.stop().await?;
    end(&mut node, &[volume]).await
}

/// So much can be written at most beside what is there: the writer stops at the first error.
const FILL: &str = "e2e fill /data/full 900000000";

#[tokio::test]
async fn a_tenant_with_the_tools_takes_no_more_than_its_partition_and_loses_nothing_to_a_new_pool() -> Result<()> {
    let mut node = Node::start_with(&[ALLOW]).await?;
    let volume = publish(&mut node, "pvc-greedy", &ASKING).await?;
    let disk = node.device(&volume.target)?;
    let most = DiskLayout::disk_for(DiskLayout::partition_for(SIZE)).0;
    let mut pod = Sandbox::start(&node, Runtime::Go).await?;
    pod.run(admin(vec![volume.mount("/data")])).await?;
    // Its own quota is the tenant's to lift, its pool is not to grow. What it can't have fails.
    for greedy in [
        "zfs set quota=none refquota=none $D",
        "! zfs set reservation=10G $D",
        "! zfs create -V 10G $D/thick",
        "zfs create -s -V 10G $D/sparse",
        "zfs snapshot $D@kept",
        // Whether the tool finds the disk from in here or not: it has no more room to give.
        "zpool online -e $P \"$(zpool list -vHPo name $P | awk 'NR == 2 { print $1 }')\" || true",
    ] {
        ok(&mut pod, ADMIN, &volume.named(greedy)).await?;
    }
    let written: u64 = ok(&mut pod, ADMIN, FILL).await?.parse()?;
    let allocated = node::allocated(&disk)?;
    println!("{written} bytes were written, {allocated} are allocated of {most}");
    assert!(written < DiskLayout::partition_for(SIZE).0 && allocated <= most, "{written}, {allocated} of {most}");
    ok(&mut pod, ADMIN, &volume.named("rm /data/full && zfs destroy $D@kept && zfs destroy $D/sparse")).await?;
    ok(&mut pod, ADMIN, "echo precious > /data/file && sync").await?;

    // No text of the tenant's is in the way of the next start. That brings the quota of the class back.
    let latin = "zfs set tenant:note=$(printf '\\351') storage.zpod:delegated=$(printf '\\351') $D";
    ok(&mut pod, ADMIN, &volume.named(latin)).await?;
    let mounted = ok(&mut pod, ADMIN, "grep ' /data ' /proc/mounts").await?;
    ensure!(mounted.contains("nosuid") && mounted.contains("nodev"), "{mounted}");
    pod.remove("admin").await?;
    pod.run(admin(vec![volume.mount("/data")])).await?;
    let quota = ok(&mut pod, ADMIN, &volume.named("zfs get -Hpo value refquota $D")).await?;
    assert_eq!(quota, SIZE.0.to_string());
    // A volume whose dataset was renamed away is refused, nothing is made in its place, and it can be named back.
    ok(&mut pod, ADMIN, &volume.named("zfs rename $D $P/elsewhere")).await?;
    pod.remove("admin").await?;
    let error = format!("{:#}", pod.run(admin(vec![volume.mount("/data")])).await.expect_err("it must not start"));
    println!("{error}");
    assert!(error.contains(&volume.dataset()) && error.contains(&volume.volume.volume_id), "{error}");
    pod.stop().await?;
    node.csi.unpublish(&volume.volume, &volume.target).await?;
    node.csi.delete(&volume.volume).await?;
    node.must_be_empty()
}

/// What is said of a pool that another kernel has: nothing.
async fn sees_its_own_alone(pod: &mut Sandbox, volume: &Published) -> Result<()> {
    assert_eq!(ok(pod, ADMIN, "zpool list -Ho name").await?, volume.pool.as_str());
    assert_eq!(ok(pod, ADMIN, "ls /proc/spl/kstat/zfs | grep ^zpod-").await?, volume.pool.as_str());
    let none = run(pod, ADMIN, "zpool import; zpool import mine").await?;
    ensure!(none.code != 0 && none.stdout.is_empty(), "{none:?}");
    Ok(())
}

#[tokio::test]
async fn pods_with_zfs_on_one_node_see_and_break_their_own_alone_and_one_without_has_none() -> Result<()> {
    let mut node = Node::start_with(&[ALLOW]).await?;
    let [left_volume, right_volume] =
        [publish(&mut node, "pvc-left", &ASKING).await?, publish(&mut node, "pvc-right", &ASKING).await?];
    let plain_volume = publish(&mut node, "pvc-plain", &[]).await?;
    let dir = Workdir::new()?;
    let block = Disk::new(dir.path(), "pvc-block-of-left", SIZE)?;
    let _pair = Pair::take().await?;
    let (mut left, mut right) =
        tokio::try_join!(Sandbox::start(&node, Runtime::Go), Sandbox::start(&node, Runtime::Rs))?;
    for (pod, volume) in [(&mut left, &left_volume), (&mut right, &right_volume)] {
        pod.run(admin(vec![volume.mount("/data")])).await?;
        sees_its_own_alone(pod, volume).await?;
    }
    let writer = right.spawn("admin", User::ROOT, &["/bin/e2e", "append", "/data/records"]).await?;
    let mut before = records(&writer, 3).await?;

    // A pool that one makes is its own. Its kernel looks for the file in the guest's own tree.
    let devices = vec![Device::new(&block.file, DEVICE)];
    left.run(Container { id: "block".to_owned(), devices, ..admin(vec![left_volume.mount("/data")]) }).await?;
    let place = format!("/zpod/volumes/{}", left_volume.volume.volume_id);
    let on_file = format!(
        "mkdir -p {place} && mount --bind /data {place} && truncate -s 80M {place}/file && \
         zpool create -o cachefile=none -O mountpoint=none mine {place}/file"
    );
    ok(&mut left, ("block", User::ROOT), &on_file).await?;
    // On a block volume it is not to be had: the tool wants a partition table there, which this kernel does not read.
    let node_of = "mknod /dev/zd0 b $(printf '%d %d' $(stat -c '0x%t 0x%T' /dev/xvda))";
    let on_block = format!("{node_of} && zpool create -f -O mountpoint=none own /dev/zd0");
    let refused = run(&mut left, ("block", User::ROOT), &on_block).await?;
    ensure!(refused.code != 0 && refused.stderr.contains("cannot label 'zd0'"), "{refused:?}");
    assert_eq!(ok(&mut left, ADMIN, "zpool list -Ho name mine").await?, "mine");
    sees_its_own_alone(&mut right, &right_volume).await?;
    for name in [left_volume.pool.as_str(), right_volume.pool.as_str(), "mine"] {
        ensure!(!std::path::Path::new("/proc/spl/kstat/zfs").join(name).exists(), "the node has pool {name}");
    }
    ok(&mut left, ADMIN, "zpool destroy mine").await?;

    // Root of one's guest writes over its own disk, behind ZFS's back; then its kernel panics. The other goes on writing.
    left.run(Container::debug("raw")).await?;
    let scribble = "dd if=/dev/urandom of=/dev/vda1 bs=1M seek=2 count=120 conv=notrunc,fsync 2>&1";
    left.sh("raw", scribble).await?;
    let panic = "mount -t proc proc /mnt && echo c > /mnt/sysrq-trigger";
    let _crash = left.spawn("admin", User::ROOT, &["/bin/sh", "-c", panic]).await?;
    left.guest().shows("Kernel panic - not syncing: sysrq triggered crash", PATIENCE).await?;
    drop(left);

    // A third one, whose class does not ask.
    let mut plain = Sandbox::start(&node, Runtime::Go).await?;
    plain.run(Container::new("plain", [plain_volume.mount("/data")])).await?;
    let nothing = plain.sh("plain", "ls -d /dev/zfs /opt/zpod 2>&1; true").await?;
    ensure!(nothing.matches("No such file or directory").count() == 2, "{nothing}");
    let pools = plain.sh("plain", "ls /proc/spl/kstat/zfs | grep ^zpod-").await?;
    assert_eq!(pools, plain_volume.pool.as_str());
    for _ in 0..2 {
        let after = records(&writer, 3).await?;
        println!("the other had written {before} records before, and {after} now");
        ensure!(after > before, "{after}");
        before = after;
    }
    let whole: u64 = right.sh("admin", "e2e check /data/records").await?.parse()?;
    ensure!(whole >= before, "{whole} of {before}");
    plain.stop().await?;
    right.stop().await?;
    end(&mut node, &[left_volume, right_volume, plain_volume]).await
}

/// Reads so many more lines of what a writer prints, which are numbers; gives the last one.
async fn records(writer: &Running, count: usize) -> Result<u64> {
    let mut printed = Vec::new();
    while printed.iter().filter(|byte| **byte == b'\n').count() < count {
        let read = tokio::time::timeout(PATIENCE, writer.read()).await.context("the writer is stuck")?;
        printed.extend(read.context("the writer has ended")?);
    }
    let text = String::from_utf8(printed)?;
    let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
    Ok(whole.lines().last().context("nothing was written")?.parse()?)
}
