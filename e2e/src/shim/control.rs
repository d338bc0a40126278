//! zpod's control channel, as the node uses it: for what the tests ask of a guest without a node between them.

use std::io;
use std::time::Duration;

use anyhow::{Context as _, Result};
use hyper_util::rt::TokioIo;
use tonic::transport::{Channel, Endpoint};
use zpod_proto::guest::guest_client::GuestClient;
use zpod_proto::guest::{PORT, StatusRequest, VolumeStatus};

use super::Sandbox;
use crate::vsock;

const DIAL: Duration = Duration::from_secs(10);

impl Sandbox {
    /// A client of zpod-guest.
    ///
    /// # Errors
    /// When it doesn't answer.
    pub async fn control(&self) -> Result<GuestClient<Channel>> {
        let socket = self.guest.vsock();
        let connect = tower::service_fn(move |_| {
            let socket = socket.clone();
            async move { vsock::connect(&socket, PORT, DIAL).await.map(TokioIo::new).map_err(io::Error::other) }
        });
        let channel = Endpoint::from_static("http://guest").connect_with_connector(connect).await;
        Ok(GuestClient::new(channel.context("connect to zpod-guest")?))
    }

    /// What the guest tells of its only volume.
    ///
    /// # Errors
    /// When it tells of none.
    pub async fn volume_status(&self) -> Result<VolumeStatus> {
        let answer = self.control().await?.status(StatusRequest {}).await?.into_inner();
        answer.volumes.into_iter().next().context("the guest tells of no volume")
    }
}
