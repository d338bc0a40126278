//! ZFS itself in containers: `zfsAccess: volume`. docs/pod-zfs.md has the table that is tested here.

use std::path::PathBuf;

use anyhow::{Context as _, Result, ensure};
use tonic::Code;
use zpod_e2e::csi::Publish;
use zpod_e2e::shim::{Output, User};
use zpod_e2e::{Container, Mount, Node, Runtime, Sandbox};
use zpod_proto::csi::Volume;
use zpod_volume::{Bytes, PoolName, VolumeId};

const SIZE: Bytes = Bytes::mib(256);
const GROUP: u32 = 2000;
const ALLOW: &str = "--allow-zfs-access";
const ASKING: [(&str, &str); 1] = [("zfsAccess", "volume")];

/// The users of the table in docs/pod-zfs.md, in its order.
const ROOT: (&str, User) = ("app", User::ROOT);
const MEMBER: (&str, User) = ("app", User { uid: 1000, group: Some(GROUP) });
const STRANGER: (&str, User) = ("app", User { uid: 1001, group: None });
const ADMIN: (&str, User) = ("admin", User::ROOT);

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
struct Published {
    volume: Volume,
    target: PathBuf,
    pool: PoolName,
}

impl Published {
    fn mount(&self, at: &str) -> Mount {
        Mount::new(&self.target, at)
    }

    fn dataset(&self) -> String {
        format!("{}/data", self.pool)
    }

    /// A command with its names in it.
    fn named(&self, command: &str) -> String {
        command.replace("$D", &self.dataset()).replace("$P", self.pool.as_str())
    }
}

async fn publish(node: &mut Node, name: &str, parameters: &[(&str, &str)]) -> Result<Published> {
    let volume = node.csi.create(name, SIZE, parameters).await?;
    let target = node.target("pod", name)?;
    node.csi.publish(&volume, &target, &Publish { fs_group: Some(GROUP), ..Publish::default() }).await?;
    let pool = PoolName::for_volume(volume.volume_id.parse::<VolumeId>()?);
    Ok(Published { volume, target, pool })
}

async fn end(node: &mut Node, published: &[Published]) -> Result<()> {
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

async fn ok(pod: &mut Sandbox, who: (&str, User), command: &str) -> Result<String> {
    run(pod, who, command).await?.ok().with_context(|| command.to_owned())
}

fn admin(volumes: Vec<Mount>) -> Container {
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
