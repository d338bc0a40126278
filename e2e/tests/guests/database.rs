//! A database that nobody here wrote, and what its owner counts on.

use std::time::Instant;

use anyhow::{Context as _, Result, ensure};
use tokio::time::{sleep, timeout};
use zpod_e2e::csi::Publish;
use zpod_e2e::postgresql::PROGRAMS;
use zpod_e2e::shim::{Running, User};
use zpod_e2e::{Boot, Container, Mount, Node, PATIENCE, Runtime, Sandbox};
use zpod_proto::csi::Volume;
use zpod_volume::{Bytes, PoolName, VolumeId};

const OWNER: User = User { uid: 70, group: Some(70) };
/// As docs/databases.md has it.
const CLASS: [(&str, &str); 5] = [
    ("recordsize", "8K"),
    ("compression", "lz4"),
    ("headroom", "4x"),
    ("zfsAccess", "volume"),
    ("snapshotSchedule", "hourly=2"),
];
const ZFS: &str = "/opt/zpod/bin/zfs";
const SETTINGS: &str = "-c full_page_writes=off -c wal_init_zero=off -c wal_recycle=off";

/// A server in a container: its data and its socket are on the volume that is mounted there.
struct Server {
    at: &'static str,
}

impl Server {
    fn command(&self, program: &str, arguments: &str) -> String {
        format!("{PROGRAMS}/{program} -h {at} -U postgres {arguments}", at = self.at)
    }

    async fn program(&self, pod: &mut Sandbox, program: &str, arguments: &str) -> Result<String> {
        pod.sh_as("database", OWNER, &self.command(program, arguments)).await
    }

    async fn make(&self, pod: &mut Sandbox) -> Result<()> {
        let make = format!("{PROGRAMS}/initdb -D {}/pg -U postgres -A trust -E UTF8 --locale=C", self.at);
        pod.sh_as("database", OWNER, &make).await.map(drop)
    }

    /// Starts it; after a crash it recovers first.
    async fn start(&self, pod: &mut Sandbox) -> Result<()> {
        let (at, begun) = (self.at, Instant::now());
        let start = format!(
            "rm -f {at}/pg/postmaster.pid {at}/.s.PGSQL.*; {PROGRAMS}/pg_ctl -D {at}/pg -l {at}/log -w -t 280 \
             -o '-k {at} -c listen_addresses= {SETTINGS}' start || {{ tail -n 30 {at}/log; exit 1; }}"
        );
        pod.sh_as("database", OWNER, &start).await?;
        println!("{at}: the server answers after {:?}", begun.elapsed());
        Ok(())
    }

    async fn stop(&self, pod: &mut Sandbox) -> Result<()> {
        let stop = format!("{PROGRAMS}/pg_ctl -D {}/pg -w -t 280 -m fast stop", self.at);
        pod.sh_as("database", OWNER, &stop).await.map(drop)
    }

    async fn query(&self, pod: &mut Sandbox, sql: &str) -> Result<String> {
        self.program(pod, "psql", &format!("-qAt -v ON_ERROR_STOP=1 -c '{sql}'")).await
    }

    /// Reads every page of every table and index.
    async fn check(&self, pod: &mut Sandbox) -> Result<()> {
        let checks = "--all --install-missing --heapallindexed --parent-check";
        self.program(pod, "pg_amcheck", checks).await.context("pg_amcheck").map(drop)
    }

    /// That each of the first so many that were acknowledged is there.
    async fn has(&self, pod: &mut Sandbox, acknowledged: u64) -> Result<()> {
        let found = self.query(pod, &format!("select count(*) from told where id <= {acknowledged}")).await?;
        println!("{}: {acknowledged} were acknowledged, {found} of them are there", self.at);
        ensure!(found == acknowledged.to_string(), "of {acknowledged} that were acknowledged {found} are there");
        Ok(())
    }
}

/// One transaction after the other, each of which is told of when it is committed.
struct Writer {
    running: Running,
    printed: String,
}

impl Writer {
    async fn begin(pod: &mut Sandbox, server: &Server) -> Result<Self> {
        let psql = server.command("psql", "-qAt -v ON_ERROR_STOP=1");
        let script =
            format!("i=0; while :; do i=$((i+1)); echo \"insert into told values ($i) returning id;\"; done | {psql}");
        let running = pod.spawn("database", OWNER, &["/bin/sh", "-c", &script]).await?;
        Ok(Self { running, printed: String::new() })
    }

    /// Waits for so many more; gives the last one.
    async fn acknowledged(&mut self, more: u64) -> Result<u64> {
        let last = |printed: &str| {
            let whole = printed.rsplit_once('\n').map_or("", |(whole, _)| whole);
            whole.lines().last().map_or(Ok(0), str::parse::<u64>)
        };
        let wanted = last(&self.printed)? + more;
        while last(&self.printed)? < wanted {
            let read = timeout(PATIENCE, self.running.read()).await.context("the writer is stuck")?;
            self.printed.push_str(&String::from_utf8(read.context("the writer has ended")?)?);
        }
        Ok(last(&self.printed)?)
    }
}

/// It may mount, and who the programs run as has a name.
async fn container(pod: &mut Sandbox, mounts: impl IntoIterator<Item = Mount>) -> Result<()> {
    let capabilities = vec!["CAP_SYS_ADMIN"];
    pod.run(Container { capabilities, ..Container::new("database", mounts) }).await?;
    pod.sh("database", "echo postgres:x:70:70::/:/bin/sh >> /etc/passwd").await.map(drop)
}

/// What the database's owner does inside the pod: a thin clone with a second server on it, and the way back to before a
/// mistake. Nobody outside is asked.
async fn clone_and_roll_back(pod: &mut Sandbox, server: &Server, volume: &Volume, acknowledged: u64) -> Result<()> {
    let dataset = format!("{}/data", PoolName::for_volume(volume.volume_id.parse::<VolumeId>()?));
    let scheduled = pod.sh("database", &format!("{ZFS} list -Hro name -t snapshot {dataset}")).await?;
    ensure!(scheduled.contains("@zpod-auto-hourly-"), "the schedule's snapshots: {scheduled}");

    let begun = Instant::now();
    let clone = format!(
        "{ZFS} snapshot {dataset}@before && {ZFS} clone -o mountpoint=legacy {dataset}@before {dataset}/thin && \
         mkdir -p /thin && mount -t zfs {dataset}/thin /thin"
    );
    pod.sh("database", &clone).await?;
    println!("a thin clone in the pod took {:?}", begun.elapsed());
    let thin = Server { at: "/thin" };
    thin.start(pod).await?;
    thin.has(pod, acknowledged).await?;
    thin.check(pod).await?;
    thin.query(pod, "drop table told").await?;
    thin.stop(pod).await?;
    server.has(pod, acknowledged).await.context("beside its clone")?;
    pod.sh("database", &format!("umount /thin && {ZFS} destroy {dataset}/thin")).await?;

    server.query(pod, "drop table told").await?;
    server.stop(pod).await?;
    pod.sh("database", &format!("{ZFS} rollback -r {dataset}@before")).await?;
    server.start(pod).await?;
    server.has(pod, acknowledged).await.context("after the way back")?;
    server.check(pod).await
}

#[tokio::test]
async fn postgresql_loses_nothing_it_has_acknowledged_when_its_machine_is_killed_and_a_snapshot_of_it_recovers()
-> Result<()> {
    let how = Publish { fs_group: Some(70), ..Publish::default() };
    let mut node = Node::start_on_xfs_with(&["--allow-zfs-access"]).await?;
    let volume = node.csi.create("pvc-database", Bytes::mib(768), &CLASS).await?;
    let target = node.target("one", "pv")?;
    node.csi.publish(&volume, &target, &how).await?;
    let mut pod = Sandbox::start_with(&node, Runtime::Go, Boot::PostgreSql).await?;
    container(&mut pod, [Mount::new(&target, "/data")]).await?;
    let server = Server { at: "/data" };
    server.make(&mut pod).await?;
    server.start(&mut pod).await?;
    server.program(&mut pod, "pgbench", "-i -q -s 1 postgres").await?;
    server.query(&mut pod, "create table told (id bigint primary key)").await?;

    // Two loads: what is told, and what is busy beside it.
    let busy = server.command("pgbench", "-n -c 2 -T 100000 postgres");
    let _busy = pod.spawn("database", OWNER, &["/bin/sh", "-c", &busy]).await?;
    let mut writer = Writer::begin(&mut pod, &server).await?;
    let before = writer.acknowledged(50).await?;
    let begun = Instant::now();
    let snapshot = node.csi.snapshot(&volume, "while-it-runs").await?;
    println!("snapshot in {:?}", begun.elapsed());
    let cloned_after = writer.acknowledged(50).await?;
    let begun = Instant::now();
    let copy = node.csi.clone_volume("pvc-copy", Bytes::gib(1), &CLASS, &volume).await?;
    println!("clone in {:?}", begun.elapsed());

    let grown = Bytes::gib(2);
    node.csi.controller_expand(&volume, grown).await?;
    assert_eq!(node.csi.node_expand(&volume, &target, grown).await?, grown);
    assert_eq!(pod.sh("database", "df -P -B1 /data | awk 'NR==2{print $2}'").await?, grown.0.to_string());
    let acknowledged = writer.acknowledged(50).await?;
    pod.kill();

    node.csi.unpublish(&volume, &target).await?;
    let clone = node.csi.restore("pvc-clone", Bytes::gib(1), &CLASS, &snapshot).await?;
    let mut targets = Vec::new();
    for one in [&volume, &clone, &copy] {
        let target = node.target("two", &one.volume_id)?;
        // The machine is on its way out.
        let end = Instant::now() + PATIENCE;
        while let Err(error) = node.csi.publish(one, &target, &how).await {
            ensure!(Instant::now() < end, "{error}");
            sleep(std::time::Duration::from_millis(100)).await;
        }
        targets.push(target);
    }
    let mut pod = Sandbox::start_with(&node, Runtime::Go, Boot::PostgreSql).await?;
    container(&mut pod, targets.iter().zip(["/data", "/clone", "/copy"]).map(|(target, at)| Mount::new(target, at)))
        .await?;
    server.start(&mut pod).await?;
    server.has(&mut pod, acknowledged).await?;
    server.check(&mut pod).await?;
    clone_and_roll_back(&mut pod, &server, &volume, acknowledged).await?;

    // As it was when the snapshot was taken, and with the table.
    let clone_server = Server { at: "/clone" };
    clone_server.start(&mut pod).await?;
    clone_server.has(&mut pod, before).await?;
    clone_server.check(&mut pod).await?;
    clone_server.stop(&mut pod).await?;
    // What was made from the volume itself while it ran.
    let copy_server = Server { at: "/copy" };
    copy_server.start(&mut pod).await?;
    copy_server.has(&mut pod, cloned_after).await?;
    copy_server.check(&mut pod).await?;
    pod.stop().await?;
    for (volume, target) in [&volume, &clone, &copy].into_iter().zip(&targets) {
        node.csi.unpublish(volume, target).await?;
        node.csi.delete(volume).await?;
    }
    node.csi.delete_snapshot(&snapshot).await?;
    node.must_be_empty()
}
