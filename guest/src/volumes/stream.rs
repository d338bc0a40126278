//! A volume's contents as a ZFS stream: written out, and read in.
//!
//! # Design
//! What is sent is a ZFS snapshot, a *send point*, which stays: the next stream can hold what has changed since. Sender
//! and receiver have it under the same name and GUID.
//!
//! What is received takes the place of the volume's contents all at once, at the end of the stream: until then ZFS keeps
//! it apart (`%recv`), and what came before a break is kept (`receive -s`). So at each instant the volume has either its
//! old contents or the new ones, and a file system may even be mounted meanwhile: the kernel holds up what is going on in
//! it and goes on with the new contents. Files that were open are lost to those who had them.
//!
//! All of an encrypted volume ZFS can't replace that way: [`swap`] does.
//!
//! Neither holds the volume's gate, so that containers come and go meanwhile. When the pool is to be exported, streams
//! are cut off.

use std::time::Duration;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::sync::watch;
use tokio_stream::{Stream, StreamExt as _};
use zpod_volume::{VolumeId, VolumeSpec};

use super::bounds::Bounds;
use super::{Active, Volume, Volumes};
use crate::error::VolumeError;
use crate::machine::streams::{Inward, Outward, SendPoint, What};
use crate::machine::{Fault, Machine, Step};

mod header;
mod swap;

use header::Header;

/// Bytes of a stream that are handed on at once.
pub const CHUNK: usize = 256 << 10;

const POINT: &str = "zpod-send-";
const POINT_NAME: usize = 64;
const POINT_NAMES: &str = "zpod-send- and up to 64 of a-z, 0-9, -";
/// How long a receive waits for what else goes on with its volume.
pub(super) const RECEIVING: Duration = Duration::from_secs(5);
/// Far longer than any token.
const TOKEN: usize = 16 << 10;

/// Whether a snapshot is one that a send or a receive left.
pub(super) fn is_point(name: &str) -> bool {
    let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
    name.strip_prefix(POINT).is_some_and(|rest| (1..=POINT_NAME).contains(&rest.len()) && rest.bytes().all(plain))
}

/// The send points among a dataset's snapshots, for a person.
fn listed(snapshots: Vec<String>) -> String {
    let points: Vec<_> = snapshots.into_iter().filter(|name| is_point(name)).take(16).collect();
    if points.is_empty() { "there is none".to_owned() } else { points.join(", ") }
}

/// Reads what a caller wants sent.
///
/// # Errors
/// When a name or the token could not be one.
pub fn what(id: VolumeId, snapshot: &str, from: &str, token: &str) -> Result<What, VolumeError> {
    let invalid = |name: &str, allowed: &str| {
        Err(VolumeError::Invalid { id, reason: format!("{name} is not one; allowed is: {allowed}") })
    };
    if !token.is_empty() {
        let hex = |byte: u8| byte.is_ascii_hexdigit() || byte == b'-';
        if token.len() > TOKEN || token.starts_with('-') || !token.bytes().all(hex) {
            return invalid("resume_token", "what SendPoints gives");
        }
        return Ok(What::Rest(token.to_owned()));
    }
    for (name, value) in [("snapshot", snapshot), ("from", from)] {
        let left_out = name == "from" && value.is_empty();
        if !left_out && !is_point(value) {
            return invalid(name, POINT_NAMES);
        }
    }
    Ok(What::Snapshot { snapshot: snapshot.to_owned(), from: Some(from.to_owned()).filter(|from| !from.is_empty()) })
}

/// A stream on its way out. Dropping it ends it.
pub struct Sending {
    id: VolumeId,
    flow: Outward,
    stopped: watch::Receiver<()>,
    /// What is to come, in bytes, by ZFS's estimate.
    pub estimated: u64,
}

impl Sending {
    /// The next part of the stream; `None` once it has ended well.
    ///
    /// # Errors
    /// When ZFS fails, or the volume is released.
    pub async fn next(&mut self) -> Result<Option<Vec<u8>>, VolumeError> {
        let failed = |fault| VolumeError::failed(self.id, "sending it", fault);
        let mut chunk = Vec::with_capacity(CHUNK);
        let read = async {
            while chunk.len() < CHUNK {
                let room = CHUNK - chunk.len();
                let mut part = (&mut self.flow.data).take(room as u64);
                if part.read_buf(&mut chunk).await? == 0 {
                    break;
                }
            }
            Ok::<_, std::io::Error>(())
        };
        tokio::select! {
            read = read => read.map_err(|error| failed(Fault::new(error.to_string())))?,
            _ = self.stopped.changed() => return Err(failed(Fault::new(STOPPED))),
        }
        if chunk.is_empty() {
            return Outward::finish(&mut self.flow.end).await.map(|()| None).map_err(failed);
        }
        Ok(Some(chunk))
    }
}

const STOPPED: &str = "the volume's last container is gone, and its pool is exported";

/// What was received.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Received {
    /// The snapshot that is there now.
    pub snapshot: String,
    /// Bytes that were read.
    pub bytes: u64,
}

impl<M: Machine> Volumes<M> {
    /// The send points of a volume, oldest first, and the token of a receive that broke off.
    ///
    /// # Errors
    /// When it is not here, or can't be asked.
    pub async fn send_points(&self, id: VolumeId) -> Result<(Vec<SendPoint>, Option<String>), VolumeError> {
        let (_, active) = self.known(id)?;
        let failed = |fault| VolumeError::failed(id, "listing its send points", fault);
        let dataset = active.request.spec.dataset();
        let mut points = self.machine.send_points(&dataset).await.map_err(failed)?;
        points.retain(|point| is_point(&point.name));
        let token = self.machine.resume_token(&dataset).await.map_err(failed)?;
        match token {
            None if self.has_new(&active).await.map_err(failed)? => {
                Ok((points, self.machine.resume_token(&swap::new_dataset(&active)).await.map_err(failed)?))
            }
            token => Ok((points, token)),
        }
    }

    /// Destroys a send point. A stream of it, or one that is to go on from it, keeps it.
    ///
    /// # Errors
    /// When the volume is not here or read-only, the name is none, it is not there, or ZFS refuses.
    pub async fn remove_send_point(&self, id: VolumeId, name: &str) -> Result<(), VolumeError> {
        if !is_point(name) {
            return Err(VolumeError::Invalid { id, reason: format!("snapshot is not one; allowed is: {POINT_NAMES}") });
        }
        let (volume, _) = self.known(id)?;
        let _gate = volume.gate.lock().await;
        let (_, active) = self.known(id)?;
        active.must_be_writable(id)?;
        let dataset = active.request.spec.dataset();
        let there = self.machine.snapshots(&dataset).await;
        let there = there.map_err(|fault| VolumeError::failed(id, "listing its send points", fault))?;
        if !there.iter().any(|point| point == name) {
            let reason = format!("it has no send point {name}: {}", listed(there));
            return Err(VolumeError::Refused { id, reason });
        }
        self.machine.destroy_snapshot(&dataset, name).await.map_err(|fault| match fault.busy {
            true => {
                let reason = format!("send point {name} is in use: wait until the stream that is sent has ended");
                VolumeError::Refused { id, reason }
            }
            false => VolumeError::failed(id, "removing a send point", fault),
        })
    }

    /// Begins to send a volume. The snapshot is taken unless it is there.
    ///
    /// # Errors
    /// When the volume is not here, `from` is not there, or ZFS refuses.
    pub async fn send(&self, id: VolumeId, what: &What) -> Result<Sending, VolumeError> {
        let (volume, active) = self.known(id)?;
        let failed = |step: &'static str| move |fault| VolumeError::failed(id, step, fault);
        let stopped = volume.transfers.subscribe();
        let dataset = active.request.spec.dataset();
        if let What::Snapshot { snapshot, from } = what {
            let _gate = volume.gate.lock().await;
            self.known(id)?;
            let there = self.machine.snapshots(&dataset).await.map_err(failed("listing its send points"))?;
            if let Some(from) = from.as_ref().filter(|from| !there.contains(from)) {
                let points = listed(there);
                let reason = format!("it has no send point {from}, so that nothing can be sent from it on: {points}");
                return Err(VolumeError::Refused { id, reason });
            }
            if !there.contains(snapshot) {
                active.must_be_writable(id)?;
                if active.is_block() {
                    self.machine.flush_volume(&dataset).await.map_err(failed("writing out its block device"))?;
                }
                let taken = self.take_point(&active, snapshot).await;
                taken.map_err(failed("taking the snapshot to be sent"))?;
            }
        }
        // A guess, which must not keep anybody from sending.
        let estimated = self.machine.estimate(&dataset, what).await.unwrap_or_else(|fault| {
            tracing::warn!(volume = %id, "the size of the stream is not known: {fault}");
            0
        });
        let flow = self.machine.send(&dataset, what).await.map_err(failed("sending it"))?;
        tracing::info!(volume = %id, "sending {what:?}, about {estimated} bytes");
        Ok(Sending { id, flow, stopped, estimated })
    }

    /// Takes a snapshot to be sent. One of a volume that space is kept for needs as much free space as it has filled
    /// (`dsl_dataset_snapshot_reserve_space`), which a pool hardly larger than the volume doesn't have: what is kept is
    /// given up for it, and taken again where there is room beside the snapshot.
    async fn take_point(&self, active: &Active, snapshot: &str) -> Result<(), Fault> {
        let (spec, dataset) = (&active.request.spec, active.request.spec.dataset());
        if spec.reservation.is_none() {
            return self.machine.snapshot(&dataset, snapshot).await;
        }
        self.machine.set_dataset(&dataset, &[Bounds::nothing_kept()]).await?;
        let taken = self.machine.snapshot(&dataset, snapshot).await;
        self.keep(spec).await?;
        taken
    }

    /// Keeps for a volume what is to be kept for it, where there is room for that.
    async fn keep(&self, spec: &VolumeSpec) -> Result<(), Fault> {
        let dataset = spec.dataset();
        let now = self.machine.dataset(&dataset).await?.unwrap_or_default();
        if let Some(kept) = Bounds::of(spec).changes(&now).then
            && let Err(fault) = self.machine.set_dataset(&dataset, &[kept]).await
        {
            tracing::warn!(volume = %spec.id, "the space that is to be kept for it is not there: {fault}");
        }
        Ok(())
    }

    /// Receives a stream into a volume.
    ///
    /// # Errors
    /// When the volume is not here or receives already, the stream is not one for it, breaks off, or ZFS refuses. What
    /// came before a break is kept.
    pub async fn receive(
        &self,
        id: VolumeId,
        mut chunks: impl Stream<Item = Result<Vec<u8>, String>> + Send + Unpin,
    ) -> Result<Received, VolumeError> {
        let (volume, active) = self.known(id)?;
        active.must_be_writable(id)?;
        let refused = |reason: String| VolumeError::Refused { id, reason };
        // A turn of its schedule has it for a moment.
        let one = tokio::time::timeout(RECEIVING, volume.receiving.lock()).await;
        let _one = one.map_err(|_| refused("another stream is being received into it".into()))?;
        let mut stopped = volume.transfers.subscribe();
        let failed = |fault| VolumeError::failed(id, "receiving into it", fault);

        let mut begun = Vec::new();
        while begun.len() < header::BYTES {
            match chunks.next().await {
                Some(Ok(chunk)) => begun.extend(chunk),
                Some(Err(reason)) => return Err(failed(Fault::new(format!("the stream broke off: {reason}")))),
                None => return Err(refused("the stream is shorter than the beginning of one".into())),
            }
        }
        let header = Header::decode(&begun).map_err(|error| refused(error.to_string()))?;
        self.fits(id, &active, &header).await?;
        let apart = header.full && header.encrypted;
        let dataset = if apart { swap::new_dataset(&active) } else { active.request.spec.dataset() };
        let flow = self.machine.receive(&dataset, apart).await.map_err(failed)?;
        let bytes = pump(flow, begun, &mut chunks, &mut stopped).await.map_err(failed)?;
        match apart {
            true => self.swap(&volume).await?,
            false => self.received(&volume).await?,
        }
        tracing::info!(volume = %id, "received {}: {bytes} bytes", header.snapshot);
        Ok(Received { snapshot: header.snapshot, bytes })
    }

    /// Whether a stream can be received, before anything is changed.
    async fn fits(&self, id: VolumeId, active: &Active, header: &Header) -> Result<(), VolumeError> {
        let refused = |reason: String| Err(VolumeError::Refused { id, reason });
        let failed = |fault| VolumeError::failed(id, "receiving into it", fault);
        let kind = |block| if block { "a block device" } else { "a file system" };
        if header.block != active.is_block() {
            let (stream, volume) = (kind(header.block), kind(active.is_block()));
            return refused(format!("the stream is that of {stream}, the volume is {volume}"));
        }
        let wanted = active.request.spec.encryption.is_some();
        if header.encrypted != wanted {
            let called = |encrypted| if encrypted { "encrypted" } else { "not encrypted" };
            return refused(format!("the stream is {}, the volume is {}", called(header.encrypted), called(wanted)));
        }
        if header.full && header.encrypted {
            return self.fits_apart(id, active, header).await;
        }
        let dataset = active.request.spec.dataset();
        let token = self.machine.resume_token(&dataset).await.map_err(failed)?;
        if header.resuming && token.is_none() {
            return refused("the stream goes on with one that broke off, and none is waiting for more here".into());
        }
        if header.full && !header.resuming {
            let there = self.machine.snapshots(&dataset).await.map_err(failed)?;
            if !there.is_empty() {
                let some: Vec<_> = there.into_iter().take(16).collect();
                let some = some.join(", ");
                return refused(format!(
                    "a stream with everything needs a volume without ZFS snapshots, and it has {some}; send from the \
                     last one that both sides have, or receive into a new volume"
                ));
            }
        }
        if !header.resuming && token.is_some() {
            tracing::warn!(volume = %id, "another stream broke off before; what came of it is dropped");
            self.machine.forget_receive(&dataset).await.map_err(failed)?;
        }
        Ok(())
    }

    /// Makes the volume what it is meant to be, whatever was received.
    async fn received(&self, volume: &Volume) -> Result<(), VolumeError> {
        let failed = |fault| VolumeError::failed(volume.id, "settling what was received", fault);
        let _gate = volume.gate.lock().await;
        let (_, active) = self.known(volume.id)?;
        let spec = &active.request.spec;
        let now = self.machine.dataset(&spec.dataset()).await.map_err(failed)?.unwrap_or_default();
        // The size of a block device is part of what was sent.
        let size = now.get("volsize").and_then(|size| size.parse::<u64>().ok()).unwrap_or(0);
        let wanted = active.quota.max(spec.capacity.0);
        if active.is_block() && size < wanted {
            let change = [("volsize".to_owned(), wanted.to_string())];
            self.machine.set_dataset(&spec.dataset(), &change).await.map_err(failed)?;
        }
        if let Some(group) = active.request.fs_group.filter(|_| !active.is_block()) {
            let step = self.machine.own(&active.base, group).await.map_err(failed)?;
            tracing::info!(volume = %volume.id, changed = step == Step::Changed, "what was received is the group's");
        }
        self.machine.sync(&spec.pool).await.map_err(failed)?;
        volume.state().details = None;
        Ok(())
    }
}

/// Feeds a program to its end.
async fn pump(
    flow: Inward,
    begun: Vec<u8>,
    chunks: &mut (impl Stream<Item = Result<Vec<u8>, String>> + Send + Unpin),
    stopped: &mut watch::Receiver<()>,
) -> Result<u64, Fault> {
    let Inward { mut data, mut end } = flow;
    let mut bytes = begun.len() as u64;
    let feed = async {
        let mut chunk = begun;
        loop {
            // A program that reads no more has ended, and says why.
            if data.write_all(&chunk).await.is_err() {
                return Ok(());
            }
            chunk = match chunks.next().await {
                Some(Ok(chunk)) => chunk,
                Some(Err(reason)) => return Err(reason),
                None => return data.shutdown().await.map_err(|error| error.to_string()),
            };
            bytes += chunk.len() as u64;
        }
    };
    let fed = tokio::select! {
        fed = feed => fed,
        _ = stopped.changed() => {
            end.shutdown().await;
            return Err(Fault::new(STOPPED));
        }
    };
    drop(data);
    let ended = tokio::select! {
        ended = Inward::finish(&mut end) => ended,
        _ = stopped.changed() => {
            end.shutdown().await;
            return Err(Fault::new(STOPPED));
        }
    };
    match (fed, ended) {
        (Ok(()), Ok(())) => Ok(bytes),
        (Ok(()), Err(fault)) => Err(fault),
        // What it says then is that the stream is incomplete.
        (Err(reason), _) => Err(Fault::new(format!(
            "the stream broke off after {bytes} bytes: {reason}; what came is kept, SendPoints has the token to go on with"
        ))),
    }
}

/// Cuts off the streams of a volume, and waits for their programs to be gone.
pub(super) async fn cut_off(volume: &Volume) {
    volume.transfers.send_replace(());
    let _ = tokio::time::timeout(std::time::Duration::from_secs(2), volume.transfers.closed()).await;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_sends_may_name_is_sent() {
        let id = VolumeId::from_name("a");
        let long = format!("zpod-send-{}", "a".repeat(65));
        for (snapshot, from, token) in [
            ("", "", ""),
            ("daily", "", ""),
            ("zpod-send-", "", ""),
            ("zpod-send-a/b", "", ""),
            (long.as_str(), "", ""),
            ("zpod-send-a", "-i", ""),
            ("zpod-send-a", "zpod-mark-1", ""),
            ("", "", "-t"),
            ("", "", "1-ab;"),
        ] {
            assert!(what(id, snapshot, from, token).is_err(), "{snapshot} {from} {token}");
        }
        let whole = what(id, "zpod-send-a", "", "").unwrap();
        assert_eq!(whole, What::Snapshot { snapshot: "zpod-send-a".into(), from: None });
        assert_eq!(what(id, "", "", "1-ab-c0").unwrap(), What::Rest("1-ab-c0".into()));
    }
}
