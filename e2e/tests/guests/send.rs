//! Volumes sent as ZFS streams from one guest to another.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt as _};
use tonic::Code;
use zpod_e2e::slot::Pair;
use zpod_e2e::workdir::Workdir;
use zpod_e2e::{Container, Sandbox};
use zpod_proto::guest::{
    DestroySnapshotRequest, MarkRequest, ProvideKeyRequest, ReceiveRequest, ReceiveResponse, RemoveSendPointRequest,
    SendPointsRequest, SendPointsResponse, SendRequest, SnapshotsRequest, TakeSnapshotRequest, UnmarkRequest,
};
use zpod_volume::{Bytes, Encryption, Mark, SnapshotId, VolumeId};

use crate::disk::{Disk, pod};

const SIZE: Bytes = Bytes::mib(256);
const FILES: &str = "cat /data/*.txt; e2e check /data/records; sha256sum < /data/blob";

/// What a stream of a guest brought, in the parts in which it came.
struct Sent {
    parts: Vec<Vec<u8>>,
    estimated: u64,
}

impl Sent {
    fn bytes(&self) -> usize {
        self.parts.iter().map(Vec::len).sum()
    }
}

async fn send(pod: &Sandbox, id: VolumeId, snapshot: &str, from: &str, token: &str) -> Result<Sent> {
    let request = SendRequest {
        volume_id: id.to_string(),
        snapshot: snapshot.into(),
        from: from.into(),
        resume_token: token.into(),
    };
    let mut stream = pod.control().await?.send(request).await?.into_inner();
    let mut sent = Sent { parts: Vec::new(), estimated: 0 };
    while let Some(message) = stream.message().await? {
        sent.estimated += message.estimated_bytes;
        assert!(message.data.len() <= 256 << 10, "{} bytes at once", message.data.len());
        sent.parts.push(message.data);
    }
    Ok(sent)
}

async fn receive(
    pod: &Sandbox,
    id: VolumeId,
    parts: impl Stream<Item = Vec<u8>> + Send + 'static,
) -> Result<ReceiveResponse, tonic::Status> {
    let first = ReceiveRequest { volume_id: id.to_string(), data: Vec::new() };
    let rest = parts.map(|data| ReceiveRequest { volume_id: String::new(), data });
    let mut control = pod.control().await.map_err(|error| tonic::Status::unavailable(error.to_string()))?;
    Ok(control.receive(tokio_stream::once(first).chain(rest)).await?.into_inner())
}

async fn points(pod: &Sandbox, id: VolumeId) -> Result<SendPointsResponse> {
    let request = SendPointsRequest { volume_id: id.to_string() };
    Ok(pod.control().await?.send_points(request).await?.into_inner())
}

fn file_system(dir: &Workdir, name: &str) -> Result<Disk> {
    let mut disk = Disk::new(dir.path(), name, SIZE)?;
    disk.spec.mode = zpod_volume::VolumeMode::Filesystem;
    Ok(disk)
}

#[tokio::test]
async fn a_volume_is_sent_to_another_guest_in_full_and_then_what_has_changed_also_after_a_break() -> Result<()> {
    let dir = Workdir::new()?;
    let (from, to) = (file_system(&dir, "pvc-from")?, file_system(&dir, "pvc-to")?);
    let (source, target) = (from.spec.id, to.spec.id);
    let _pair = Pair::take().await?;
    let mut sender = pod(&dir).await?;
    sender.run(Container::new("app", [from.mount(&dir, "/data")?])).await?;
    let mut receiver = pod(&dir).await?;
    receiver.run(Container::new("app", [to.mount(&dir, "/data")?])).await?;
    sender.sh("app", "echo one > /data/one.txt; e2e fill /data/blob 33554432; : > /data/records").await?;
    let before = sender.guest().resident_kib().context("no such process")?;

    let full = send(&sender, source, "zpod-send-1", "", "").await?;
    println!("{} bytes in {} parts, {} were estimated", full.bytes(), full.parts.len(), full.estimated);
    assert!(full.bytes() > 32 << 20 && full.estimated > 30 << 20, "{}", full.estimated);

    // It breaks off in the middle; what came is kept.
    let (feed, parts) = mpsc::channel(1);
    let half: Vec<_> = full.parts[..full.parts.len() / 2].to_vec();
    let broken = async {
        for part in half {
            feed.send(part).await?;
        }
        // What was sent is on its way still.
        tokio::time::sleep(Duration::from_secs(2)).await;
        drop(feed);
        anyhow::Ok(())
    };
    let (received, fed) = tokio::join!(receive(&receiver, target, ReceiverStream::new(parts)), broken);
    fed?;
    println!("a stream that ends too early: {}", received.expect_err("it was not whole"));
    assert!(receiver.sh("app", "ls /data").await?.is_empty(), "half a stream must not be seen");
    let broken = points(&receiver, target).await?;
    ensure!(!broken.resume_token.is_empty() && broken.points.is_empty(), "{broken:?}");

    let rest = send(&sender, source, "", "", &broken.resume_token).await?;
    println!("{} bytes were left", rest.bytes());
    assert!(rest.bytes() < full.bytes() * 3 / 4 && rest.bytes() > full.bytes() / 4, "{}", rest.bytes());
    let received = receive(&receiver, target, tokio_stream::iter(rest.parts)).await?;
    assert_eq!(received.snapshot, "zpod-send-1");
    // The container that has it mounted sees it, and so does one that starts now.
    assert_eq!(receiver.sh("app", FILES).await?, sender.sh("app", FILES).await?);
    receiver.run(Container::new("next", [to.mount(&dir, "/data")?])).await?;
    assert_eq!(receiver.sh("next", FILES).await?, sender.sh("app", FILES).await?);
    assert_eq!(receiver.sh("next", "df -P -B1 /data | awk 'NR==2{print $2}'").await?, SIZE.0.to_string());

    // All of it once more is refused, for it is there.
    let again = receive(&receiver, target, tokio_stream::iter(full.parts)).await.expect_err("it has a snapshot");
    assert_eq!(again.code(), Code::FailedPrecondition, "{again}");
    assert!(again.message().contains("zpod-send-1") && again.message().contains(&target.to_string()), "{again}");

    // What has changed since, over what the receiver has written meanwhile.
    sender.sh("app", "echo two > /data/two.txt; rm /data/one.txt").await?;
    receiver.sh("app", "echo mine > /data/mine.txt; sync").await?;
    let change = send(&sender, source, "zpod-send-2", "zpod-send-1", "").await?;
    println!("{} bytes of changes", change.bytes());
    assert!(change.bytes() < 4 << 20, "{}", change.bytes());
    receive(&receiver, target, tokio_stream::iter(change.parts)).await?;
    assert_eq!(receiver.sh("next", FILES).await?, sender.sh("app", FILES).await?);
    assert_eq!(receiver.sh("next", "cat /data/*.txt").await?, "two");
    let (here, there) = (points(&sender, source).await?.points, points(&receiver, target).await?.points);
    let names: Vec<_> = here.iter().map(|point| point.name.as_str()).collect();
    assert_eq!(names, ["zpod-send-1", "zpod-send-2"]);
    assert!(here.iter().zip(&there).all(|(a, b)| (&a.name, a.guid) == (&b.name, b.guid)), "{here:?} {there:?}");

    remove_send_points(&sender, source).await?;
    take_and_destroy_snapshots(&mut sender, source).await?;

    // One that nobody reads to its end takes nothing but its place; and a name that is none is none.
    drop(sender.control().await?.send(SendRequest {
        volume_id: source.to_string(),
        snapshot: "zpod-send-2".into(),
        ..SendRequest::default()
    }));
    let none = send(&sender, source, "zpod-send-3", "zpod-send-0", "").await.err().context("there is no such point")?;
    println!("{none:#}");
    let grown = sender.guest().resident_kib().context("no such process")?.saturating_sub(before);
    println!("sending took {} MiB of the machine's memory, cache included", grown / 1024);
    receiver.remove("app").await?;
    receiver.remove("next").await?;
    assert!(
        receiver.control().await?.status(zpod_proto::guest::StatusRequest {}).await?.into_inner().volumes.is_empty()
    );
    receiver.run(Container::new("last", [to.mount(&dir, "/data")?])).await?;
    assert_eq!(receiver.sh("last", FILES).await?, sender.sh("app", FILES).await?);
    receiver.stop().await?;
    sender.stop().await
}

/// What was sent is destroyed by name: not while it is being sent, and nothing that is no send point.
async fn remove_send_points(pod: &Sandbox, id: VolumeId) -> Result<()> {
    let remove = async |snapshot: &str| {
        let request = RemoveSendPointRequest { volume_id: id.to_string(), snapshot: snapshot.into() };
        let mut control = pod.control().await.map_err(|error| tonic::Status::unavailable(error.to_string()))?;
        control.remove_send_point(request).await
    };
    // Nobody reads on: ZFS waits in the middle of it.
    let snapshot = "zpod-send-2".to_owned();
    let request = SendRequest { volume_id: id.to_string(), snapshot, ..SendRequest::default() };
    let mut stream = pod.control().await?.send(request).await?.into_inner();
    stream.message().await?;
    let busy = remove("zpod-send-2").await.err().context("it is being sent")?;
    assert!(busy.code() == Code::FailedPrecondition && busy.message().contains("is in use"), "{busy}");
    drop(stream);
    remove("zpod-send-1").await?;
    let gone = remove("zpod-send-1").await.err().context("it is gone")?;
    assert!(gone.code() == Code::FailedPrecondition && gone.message().contains(": zpod-send-2"), "{gone}");
    for name in ["zpod-mark-0", "zpod-send-", "zpod-send-2,zpod-send-1", "zpod-send-1%zpod-send-2", ""] {
        assert_eq!(remove(name).await.err().context(name)?.code(), Code::InvalidArgument, "{name}");
    }
    let names: Vec<_> = points(pod, id).await?.points.into_iter().map(|point| point.name).collect();
    ensure!(names == ["zpod-send-2"], "{names:?}");
    Ok(())
}

/// Snapshots by hand: each name once, none of zpod's own taken, and what the node marks neither shown nor destroyed.
async fn take_and_destroy_snapshots(pod: &mut Sandbox, id: VolumeId) -> Result<()> {
    let volume_id = id.to_string();
    let take = async |snapshot: &str| {
        let request = TakeSnapshotRequest { volume_id: volume_id.clone(), snapshot: snapshot.into() };
        let mut control = pod.control().await.map_err(|error| tonic::Status::unavailable(error.to_string()))?;
        control.take_snapshot(request).await
    };
    let destroy = async |snapshot: &str| {
        let request = DestroySnapshotRequest { volume_id: volume_id.clone(), snapshot: snapshot.into() };
        let mut control = pod.control().await.map_err(|error| tonic::Status::unavailable(error.to_string()))?;
        control.destroy_snapshot(request).await
    };
    let mark = Mark::for_snapshot(SnapshotId::from_name("s")).to_string();
    let request = MarkRequest { volume_id: volume_id.clone(), mark: mark.clone() };
    pod.control().await?.mark(request).await?;
    take("Before_1.2:3").await?;
    let twice = take("Before_1.2:3").await.err().context("it is there")?;
    assert!(twice.code() == Code::FailedPrecondition && twice.message().contains("already"), "{twice}");
    for name in ["", "zpod-auto-hourly-20261130T120000Z", "zpod-send-2", "a@b", "a%b", "a,b", "a b"] {
        assert_eq!(take(name).await.err().context(name.to_owned())?.code(), Code::InvalidArgument, "{name}");
    }
    for name in [mark.as_str(), "", "a,b", "zpod-send-2%Before_1.2:3"] {
        assert_eq!(destroy(name).await.err().context(name.to_owned())?.code(), Code::InvalidArgument, "{name}");
    }
    let unknown = destroy("unknown").await.err().context("it is not there")?;
    assert!(unknown.code() == Code::FailedPrecondition && unknown.message().contains("no snapshot"), "{unknown}");
    let request = SnapshotsRequest { volume_id: volume_id.clone() };
    let listed = pod.control().await?.snapshots(request).await?.into_inner();
    let names: Vec<_> = listed.snapshots.iter().map(|snapshot| snapshot.name.as_str()).collect();
    assert_eq!((names, listed.left_out), (vec!["zpod-send-2", "Before_1.2:3"], 0));
    destroy("Before_1.2:3").await?;
    let request = UnmarkRequest { volume_id, mark };
    pod.control().await?.unmark(request).await?;
    Ok(())
}

#[tokio::test]
async fn a_block_device_is_sent_and_what_does_not_fit_is_refused_before_anything_changes() -> Result<()> {
    let dir = Workdir::new()?;
    let (from, to) = (Disk::new(dir.path(), "block-from", SIZE)?, Disk::new(dir.path(), "block-to", Bytes::mib(300))?);
    let files = file_system(&dir, "files")?;
    let mut pod = pod(&dir).await?;
    pod.run(from.container("from")).await?;
    pod.run(to.container("to")).await?;
    pod.run(Container::new("files", [files.mount(&dir, "/data")?])).await?;
    let sum = "dd if=/dev/xvda bs=1M count=16 2>/dev/null | sha256sum";
    // Not flushed by the writer: that is the sender's to do.
    pod.sh("from", "dd if=/dev/urandom of=/dev/xvda bs=1M count=16 2>/dev/null").await?;
    let sent = send(&pod, from.spec.id, "zpod-send-1", "", "").await?;

    let wrong = receive(&pod, files.spec.id, tokio_stream::iter(sent.parts.clone())).await.expect_err("a zvol's");
    assert!(wrong.code() == Code::FailedPrecondition && wrong.message().contains("block device"), "{wrong}");
    let junk = receive(&pod, to.spec.id, tokio_stream::iter([vec![7; 4096]])).await.expect_err("it is no stream");
    assert!(junk.message().contains("not a ZFS stream"), "{junk}");

    receive(&pod, to.spec.id, tokio_stream::iter(sent.parts)).await?;
    assert_eq!(pod.sh("to", sum).await?, pod.sh("from", sum).await?);
    assert_eq!(pod.sh("to", "blockdev --getsize64 /dev/xvda").await?, Bytes::mib(300).0.to_string());
    pod.stop().await
}

#[tokio::test]
async fn an_encrypted_volume_is_sent_as_it_is_on_the_disk_and_opens_with_its_own_key_only() -> Result<()> {
    let dir = Workdir::new()?;
    let mut disks =
        [file_system(&dir, "secret-from")?, file_system(&dir, "secret-to")?, file_system(&dir, "secret-other")?];
    let mut pod = pod(&dir).await?;
    let mut control = pod.control().await?;
    let containers = ["from", "to", "other"];
    for ((disk, container), byte) in disks.iter_mut().zip(containers).zip([7, 7, 8]) {
        disk.spec.encryption = Some(Encryption::Aes256Gcm);
        let (volume_id, token) = (disk.spec.id.to_string(), disk.spec.token.to_string());
        let key = ProvideKeyRequest { volume_id, token, key: vec![byte; 32], previous_key: Vec::new() };
        control.provide_key(key).await?;
        pod.run(Container::new(container, [disk.mount(&dir, "/data")?])).await?;
    }
    let [from, to, other] = &disks;
    pod.sh("from", "echo one > /data/one.txt; e2e fill /data/blob 8388608; : > /data/records").await?;
    pod.sh("to", "echo old > /data/old.txt").await?;
    let sent = send(&pod, from.spec.id, "zpod-send-1", "", "").await?;
    let half = sent.parts[..sent.parts.len() / 2].to_vec();
    receive(&pod, to.spec.id, tokio_stream::iter(half)).await.expect_err("it was not whole");
    let token = points(&pod, to.spec.id).await?.resume_token;
    ensure!(!token.is_empty(), "nothing was kept");
    let rest = send(&pod, from.spec.id, "", "", &token).await?;
    receive(&pod, to.spec.id, tokio_stream::iter(rest.parts)).await?;
    // Who has it mounted goes on with the old contents until the container ends.
    assert_eq!(pod.sh("to", "cat /data/*.txt").await?, "old");
    pod.run(Container::new("next", [to.mount(&dir, "/data")?])).await?;
    assert_eq!(pod.sh("next", FILES).await?, pod.sh("from", FILES).await?);
    assert_eq!(pod.sh("next", "df -P -B1 /data | awk 'NR==2{print $2}'").await?, SIZE.0.to_string());

    let wrong = receive(&pod, other.spec.id, tokio_stream::iter(sent.parts)).await.expect_err("it has another key");
    println!("{wrong}");
    assert!(wrong.code() == Code::FailedPrecondition && wrong.message().contains("encryptionKey"), "{wrong}");
    pod.sh("other", "echo fine > /data/still.txt").await?;

    pod.sh("from", "echo two > /data/two.txt").await?;
    let change = send(&pod, from.spec.id, "zpod-send-2", "zpod-send-1", "").await?;
    receive(&pod, to.spec.id, tokio_stream::iter(change.parts)).await?;
    assert_eq!(pod.sh("next", FILES).await?, pod.sh("from", FILES).await?);
    // Imported anew it has the received contents alone.
    pod.remove("to").await?;
    pod.remove("next").await?;
    pod.run(Container::new("last", [to.mount(&dir, "/data")?])).await?;
    assert_eq!(pod.sh("last", FILES).await?, pod.sh("from", FILES).await?);
    pod.stop().await
}
