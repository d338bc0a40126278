//! A volume whose disk is two halves. The disk is one file here: what a guest sees of device-mapper is one disk as well.

use std::fs::{self, File};
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use tokio::time::{Instant, sleep};
use uuid::Uuid;
use zpod_e2e::workdir::Workdir;
use zpod_e2e::{Container, Mount, PATIENCE, Sandbox, direct_volume};
use zpod_proto::guest::{GrowRequest, Health, VolumeStatus};
use zpod_volume::{Bytes, Create, DiskLayout, Half, Headroom, Mirror, VolumeId, VolumeSpec, gpt};

use crate::disk::pod;

const SIZE: Bytes = Bytes::mib(256);
const LARGER: Bytes = Bytes::mib(400);

struct Volume {
    spec: VolumeSpec,
    file: PathBuf,
    target: PathBuf,
    entry: PathBuf,
    /// Of each half.
    layout: DiskLayout,
}

impl Volume {
    fn new(dir: &Workdir, name: &str) -> Result<Self> {
        let id = VolumeId::from_name(name);
        let mut spec = VolumeSpec::new(id, Uuid::new_v4(), Create::Fresh, SIZE);
        spec.pool_creation_properties = [("ashift".into(), "12".into())].into();
        spec.mirror = Some(Mirror::default());
        let target = dir.subdirectory(&format!("pods/{id}"))?;
        let entry = direct_volume::entry(&dir.subdirectory("direct-volumes")?, &target);
        let layout = DiskLayout::new(SIZE, "2x".parse::<Headroom>()?);
        let volume = Self { spec, file: dir.path().join(name), target, entry, layout };
        File::create_new(&volume.file)?.set_len(2 * layout.disk.0)?;
        for half in Half::BOTH {
            volume.lay_out(half)?;
        }
        volume.publish()?;
        Ok(volume)
    }

    fn write(&self, half: Half, at: u64, bytes: &[u8]) -> Result<()> {
        let file = File::options().write(true).open(&self.file)?;
        Ok(file.write_all_at(bytes, half.index() as u64 * self.layout.disk.0 + at)?)
    }

    /// The tables, as a node writes them.
    fn lay_out(&self, half: Half) -> Result<()> {
        let partition = DiskLayout::partition_for(self.spec.capacity);
        let table = gpt::encode(self.spec.id, partition, self.layout.disk);
        self.write(half, 0, &table.primary)?;
        self.write(half, table.backup_offset, &table.backup)
    }

    /// Nobody can use it as it is. What else it holds stays.
    fn lose(&self, half: Half) -> Result<()> {
        self.write(half, 0, &vec![0; gpt::PRIMARY_BYTES])
    }

    /// A new image in its place.
    fn replace(&self, half: Half) -> Result<()> {
        let zeros = vec![0; 4 << 20];
        for at in (0..self.layout.disk.0).step_by(zeros.len()) {
            let length = zeros.len().min(usize::try_from(self.layout.disk.0 - at)?);
            self.write(half, at, &zeros[..length])?;
        }
        self.lay_out(half)
    }

    /// What the journal of a half says: `guest/src/journal.rs`.
    fn journal(&self, half: Half) -> Result<u8> {
        let mut block = [0; 16];
        let at = half.index() as u64 * self.layout.disk.0 + DiskLayout::JOURNAL_OFFSET;
        File::open(&self.file)?.read_exact_at(&mut block, at)?;
        Ok(block[12])
    }

    fn publish(&self) -> Result<()> {
        fs::create_dir_all(&self.entry)?;
        let info = serde_json::json!({
            "volume-type": "directvol", "device": self.file, "fstype": "zfs", "options": [self.spec.to_option()],
        });
        fs::write(self.entry.join("mountInfo.json"), info.to_string()).context("write mountInfo.json")
    }

    /// For the next pod.
    fn publish_again(&mut self, behind: Option<Half>) -> Result<()> {
        self.spec.token = Uuid::new_v4();
        (self.spec.create, self.spec.mirror) = (Create::Never, Some(Mirror { behind }));
        self.publish()
    }

    fn container(&self) -> Container {
        Container::new("app", [Mount::new(&self.target, "/data")])
    }
}

async fn told(pod: &mut Sandbox, what: &str, is: impl Fn(&VolumeStatus) -> bool) -> Result<VolumeStatus> {
    let begun = Instant::now();
    loop {
        let status = pod.volume_status().await?;
        if is(&status) {
            println!("{what} after {:?}: {:?} {:?}", begun.elapsed(), status.health(), status.message);
            return Ok(status);
        }
        ensure!(begun.elapsed() < PATIENCE, "not {what}: {status:?}");
        sleep(Duration::from_millis(500)).await;
    }
}

async fn whole(pod: &mut Sandbox) -> Result<()> {
    told(pod, "whole", |status| status.behind == 0 && status.health() == Health::Online).await.map(drop)
}

async fn lacking(pod: &mut Sandbox, half: Half) -> Result<()> {
    let number = half.index() as u32 + 1;
    let lacks = |status: &VolumeStatus| status.behind == number && status.health() == Health::Degraded;
    let status = told(pod, "degraded", lacks).await?;
    ensure!(status.message.contains(&half.to_string()), "{status:?}");
    Ok(())
}

#[tokio::test]
async fn a_mirror_outlives_either_half_and_heals_and_never_goes_back_in_time() -> Result<()> {
    let dir = Workdir::new()?;
    let mut volume = Volume::new(&dir, "pvc-mirror")?;
    let (pool, second) = (volume.spec.pool.clone(), format!("/zpod/disks/{}-2", volume.spec.id));
    let mut pod = pod(&dir).await?;
    pod.run(Container::debug("tools")).await?;
    pod.run(volume.container()).await?;
    let status = pod.zfs_tool("tools", &format!("zpool status -P {pool}")).await?;
    ensure!(status.contains("mirror-0") && status.contains(&second), "{status}");
    pod.sh("app", "cd /data; head -c 20000000 /dev/urandom > blob; sha256sum blob > sum; echo one > file; sync")
        .await?;
    whole(&mut pod).await?;
    assert_eq!([volume.journal(Half::First)?, volume.journal(Half::Second)?], [2, 2]);

    // It grows on both halves.
    let (volume_id, partition) = (volume.spec.id.to_string(), DiskLayout::partition_for(LARGER));
    let size = format!("zpool get -H -p -o value size {pool}");
    let before: u64 = pod.zfs_tool("tools", &size).await?.parse()?;
    let request = GrowRequest { volume_id, capacity_bytes: LARGER.0, partition_bytes: partition.0 };
    pod.control().await?.grow(request).await?;
    let after: u64 = pod.zfs_tool("tools", &size).await?.parse()?;
    ensure!(after > before + (100 << 20), "{before} to {after}");
    (volume.spec.capacity, volume.spec.partition) = (LARGER, partition);

    // ZFS gives one up while the volume is in use.
    pod.zfs_tool("tools", &format!("zpool offline -t -f {pool} {second}")).await?;
    lacking(&mut pod, Half::Second).await?;
    pod.sh("app", "echo two > /data/file; sync").await?;
    let refused = pod.control().await?;
    let request = GrowRequest {
        volume_id: volume.spec.id.to_string(),
        capacity_bytes: Bytes::mib(500).0,
        partition_bytes: DiskLayout::partition_for(Bytes::mib(500)).0,
    };
    let error = { refused }.grow(request).await.expect_err("a mirror grows when it is whole");
    ensure!(error.message().contains("both halves"), "{error}");
    pod.zfs_tool("tools", &format!("zpool clear {pool} {second}")).await?;
    whole(&mut pod).await?;
    pod.remove("app").await?;

    // The next pod has the first half only.
    volume.lose(Half::Second)?;
    volume.publish_again(Some(Half::Second))?;
    pod.run(volume.container()).await?;
    lacking(&mut pod, Half::Second).await?;
    assert_eq!(pod.sh("app", "cat /data/file").await?, "two");
    pod.sh("app", "cd /data && sha256sum -c sum && echo three > file; sync").await?;
    pod.remove("app").await?;

    // The lost one comes back, and is all there is: what was written would seem never to have been.
    volume.lay_out(Half::Second)?;
    volume.lose(Half::First)?;
    let error = format!("{:#}", pod.run(volume.container()).await.expect_err("the lost half has old data"));
    ensure!(error.contains("seem never to have been"), "{error}");

    // Beside the other one it is given what it lacks.
    volume.lay_out(Half::First)?;
    pod.run(volume.container()).await?;
    assert_eq!(volume.journal(Half::Second)?, 3, "it says that it lacks something");
    assert_eq!(pod.sh("app", "cat /data/file").await?, "three");
    whole(&mut pod).await?;
    assert_eq!(volume.journal(Half::Second)?, 2);
    pod.remove("app").await?;

    // Now it is enough. The other one is replaced.
    volume.lose(Half::First)?;
    volume.publish_again(None)?;
    pod.run(volume.container()).await?;
    lacking(&mut pod, Half::First).await?;
    assert_eq!(pod.sh("app", "cat /data/file; cd /data && sha256sum -c sum").await?, "three\nblob: OK");
    pod.sh("app", "echo four > /data/file; sync").await?;
    pod.remove("app").await?;
    volume.replace(Half::First)?;
    volume.publish_again(Some(Half::First))?;
    pod.run(volume.container()).await?;
    assert_eq!(volume.journal(Half::First)?, 4, "it is being rebuilt");
    whole(&mut pod).await?;
    assert_eq!([volume.journal(Half::First)?, volume.journal(Half::Second)?], [2, 2]);
    let status = pod.zfs_tool("tools", &format!("zpool status -P {pool}")).await?;
    println!("{status}");
    ensure!(status.contains("mirror-0") && status.contains("resilvered") && !status.contains("OFFLINE"), "{status}");
    pod.remove("app").await?;

    // The new half has everything.
    volume.lose(Half::Second)?;
    volume.publish_again(None)?;
    pod.run(volume.container()).await?;
    lacking(&mut pod, Half::Second).await?;
    assert_eq!(pod.sh("app", "cat /data/file; cd /data && sha256sum -c sum").await?, "four\nblob: OK");
    pod.zfs_tool("tools", &format!("zpool scrub -w {pool}")).await?;
    let status = pod.zfs_tool("tools", &format!("zpool status -P {pool}")).await?;
    ensure!(status.contains("errors: No known data errors"), "{status}");
    pod.stop().await
}
