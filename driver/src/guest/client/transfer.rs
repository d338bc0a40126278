use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use futures_util::Stream;
use tonic::Streaming;
use zpod_admin::{
    NewSnapshotName, PoolSnapshots, Properties, Received, SendName, SendPoint, SendPoints, SendQuery, SnapshotName,
};
use zpod_proto::bounded::CHUNK;
use zpod_proto::guest::{
    DestroySnapshotRequest, DestroySnapshotResponse, PropertiesRequest, PropertiesResponse, ReceiveRequest,
    ReceiveResponse, RemoveSendPointRequest, RemoveSendPointResponse, SendPointsRequest, SendPointsResponse,
    SendRequest, SendResponse, SnapshotsRequest, SnapshotsResponse, TakeSnapshotRequest, TakeSnapshotResponse,
};
use zpod_volume::VolumeId;

use super::{CALL_DEADLINE, GuestClient, GuestError, clean};

/// Taking a snapshot and estimating its size, or destroying one: it waits for a transaction group, and reads metadata.
const BEGIN_DEADLINE: Duration = Duration::from_secs(120);
/// More properties than ZFS has.
const MAX_PROPERTIES: usize = 256;
const MAX_POINTS: usize = 1024;
/// Each message's part of a stream: what the protocol allows.
pub const MAX_CHUNK: usize = CHUNK;

impl GuestClient {
    /// A connection of its own to the same guest. A stream that stands still, for nobody reads it, must not take the room
    /// that reports need: flow control counts for a connection, too.
    ///
    /// # Errors
    /// [`GuestError::Unreachable`].
    pub async fn apart(&self) -> Result<Self, GuestError> {
        Self::connect(&self.sandbox, &self.url).await
    }

    /// Properties of a running volume.
    ///
    /// # Errors
    /// When it does not answer in time, or refuses.
    pub async fn properties(&self, id: VolumeId) -> Result<Properties, GuestError> {
        let mut stub = self.stub::<PropertiesResponse>();
        let request = PropertiesRequest { volume_id: id.to_string() };
        let answer = self.call("Properties", CALL_DEADLINE, stub.properties(request)).await?;
        Ok(Properties { dataset: properties(answer.dataset), pool: properties(answer.pool) })
    }

    /// What sends and receives left in a volume.
    ///
    /// # Errors
    /// When it does not answer in time, or refuses.
    pub async fn send_points(&self, id: VolumeId) -> Result<SendPoints, GuestError> {
        let mut stub = self.stub::<SendPointsResponse>();
        let request = SendPointsRequest { volume_id: id.to_string() };
        let answer = self.call("SendPoints", CALL_DEADLINE, stub.send_points(request)).await?;
        let points = answer.points.into_iter().take(MAX_POINTS).map(snapshot);
        // A token that is none is none: it would be shown to people, and copied.
        let token = Some(answer.resume_token).filter(|token| token.parse::<zpod_admin::ResumeToken>().is_ok());
        Ok(SendPoints { points: points.collect(), resume_token: token })
    }

    /// Destroys what a send or receive left in a volume.
    ///
    /// # Errors
    /// When it does not answer in time, or refuses.
    pub async fn remove_send_point(&self, id: VolumeId, point: &SendName) -> Result<(), GuestError> {
        let mut stub = self.stub::<RemoveSendPointResponse>();
        let request = RemoveSendPointRequest { volume_id: id.to_string(), snapshot: point.to_string() };
        self.call("RemoveSendPoint", BEGIN_DEADLINE, stub.remove_send_point(request)).await.map(drop)
    }

    /// The snapshots in a volume's pool.
    ///
    /// # Errors
    /// When it does not answer in time, or refuses.
    pub async fn snapshots(&self, id: VolumeId) -> Result<PoolSnapshots, GuestError> {
        let mut stub = self.stub::<SnapshotsResponse>();
        let request = SnapshotsRequest { volume_id: id.to_string() };
        let answer = self.call("Snapshots", CALL_DEADLINE, stub.snapshots(request)).await?;
        let snapshots = answer.snapshots.into_iter().map(snapshot).collect();
        Ok(PoolSnapshots { snapshots, left_out: answer.left_out })
    }

    /// Takes a snapshot in a volume's pool.
    ///
    /// # Errors
    /// When it does not answer in time, or refuses.
    pub async fn take_snapshot(&self, id: VolumeId, name: &NewSnapshotName) -> Result<(), GuestError> {
        let mut stub = self.stub::<TakeSnapshotResponse>();
        let request = TakeSnapshotRequest { volume_id: id.to_string(), snapshot: name.to_string() };
        self.call("TakeSnapshot", BEGIN_DEADLINE, stub.take_snapshot(request)).await.map(drop)
    }

    /// Destroys a snapshot in a volume's pool.
    ///
    /// # Errors
    /// When it does not answer in time, or refuses.
    pub async fn destroy_snapshot(&self, id: VolumeId, name: &SnapshotName) -> Result<(), GuestError> {
        let mut stub = self.stub::<DestroySnapshotResponse>();
        let request = DestroySnapshotRequest { volume_id: id.to_string(), snapshot: name.to_string() };
        self.call("DestroySnapshot", BEGIN_DEADLINE, stub.destroy_snapshot(request)).await.map(drop)
    }

    /// Begins to write a volume out. Gives the stream once its first message is there, so that a refusal is one.
    ///
    /// # Errors
    /// When it does not begin in time, or the guest refuses.
    pub async fn send(&self, id: VolumeId, query: &SendQuery) -> Result<Sending, GuestError> {
        let mut request = SendRequest { volume_id: id.to_string(), ..SendRequest::default() };
        match query {
            SendQuery::Snapshot { snapshot, from } => {
                request.snapshot = snapshot.to_string();
                request.from = from.as_ref().map(ToString::to_string).unwrap_or_default();
            }
            SendQuery::Resume(token) => request.resume_token = token.to_string(),
        }
        let mut stub = self.stub::<SendResponse>();
        let stream = self.call("Send", BEGIN_DEADLINE, stub.send(request)).await?;
        let mut sending = Sending { client: self.clone(), stream, first: None, estimated: 0 };
        if let Some(message) = sending.message(BEGIN_DEADLINE).await? {
            sending.estimated = message.estimated_bytes;
            sending.first = Some(message.data);
        }
        Ok(sending)
    }

    /// Has a volume read a stream. What was read stays when it breaks off. The caller bounds the time: what it takes is
    /// the stream's own affair.
    ///
    /// # Errors
    /// When the guest refuses it.
    pub async fn receive(
        &self,
        id: VolumeId,
        chunks: impl Stream<Item = ReceiveRequest> + Send + 'static,
    ) -> Result<Received, GuestError> {
        let mut stub = self.stub::<ReceiveResponse>();
        let answer = stub.receive(chunks).await.map_err(|status| self.failed("Receive", &status))?.into_inner();
        tracing::debug!(volume = %id, bytes = answer.bytes, "received");
        Ok(Received { snapshot: clean(&answer.snapshot, 128), bytes: answer.bytes })
    }
}

/// What a guest writes out.
#[derive(Debug)]
pub struct Sending {
    client: GuestClient,
    stream: Streaming<SendResponse>,
    first: Option<Vec<u8>>,
    /// What is about to come, in bytes, by ZFS's estimate and the guest's word. Zero where it is not known.
    pub estimated: u64,
}

impl Sending {
    /// The next part of the stream; `None` at its end.
    ///
    /// # Errors
    /// When it breaks, or nothing comes for longer than `patience`.
    pub async fn next(&mut self, patience: Duration) -> Result<Option<Vec<u8>>, GuestError> {
        if let Some(first) = self.first.take() {
            return Ok(Some(first));
        }
        Ok(self.message(patience).await?.map(|message| message.data))
    }

    async fn message(&mut self, patience: Duration) -> Result<Option<SendResponse>, GuestError> {
        match tokio::time::timeout(patience, self.stream.message()).await {
            Ok(answer) => answer.map_err(|status| self.client.failed("Send", &status)),
            Err(_) => {
                let sandbox = self.client.sandbox.clone();
                Err(GuestError::Timeout { sandbox, call: "Send", deadline: patience })
            }
        }
    }
}

/// What a guest says of one, as it may be shown.
fn snapshot(told: zpod_proto::guest::SendPoint) -> SendPoint {
    SendPoint {
        name: clean(&told.name, 256),
        guid: told.guid.to_string(),
        created: told.created,
        referenced_bytes: told.referenced_bytes,
        used_bytes: told.used_bytes,
    }
}

/// Names as ZFS has them, and values that fit a line.
fn properties(map: HashMap<String, String>) -> BTreeMap<String, String> {
    let name = |key: &str| {
        let sound = |c: u8| c.is_ascii_alphanumeric() || b"_-:.@#".contains(&c);
        (1..=256).contains(&key.len()) && key.bytes().all(sound)
    };
    let known = map.into_iter().filter(|(key, _)| name(key)).take(MAX_PROPERTIES);
    known.map(|(key, value)| (key, clean(&value, 1024))).collect()
}
