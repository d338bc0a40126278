//! Generated code only: the protocols zpod speaks.
//!
//! * [`csi`]: the Container Storage Interface 1.12.0, from the official `csi.proto`.
//! * [`guest`]: zpod's own control channel, host to guest, over vsock.
//! * [`agent`]: the messages of Kata's agent protocol that zpod and its test harness touch.
//! * [`ttrpc`]: the envelope in which agent messages travel.
//!
//! See `proto/README.md` for where each file comes from.

#![allow(missing_docs, unreachable_pub, rust_2018_idioms, clippy::all)]

pub mod bounded;

/// Container Storage Interface 1.12.0.
pub mod csi {
    tonic::include_proto!("csi.v1");
}

/// The control channel between the node plugin and zpod-guest.
pub mod guest {
    tonic::include_proto!("zpod.guest.v1");

    /// The vsock port on which zpod-guest serves this protocol. Kata uses 1024 to 1027.
    pub const PORT: u32 = 10240;

    impl std::fmt::Debug for ProvideKeyRequest {
        fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.debug_struct("ProvideKeyRequest").field("volume_id", &self.volume_id).finish_non_exhaustive()
        }
    }
}

/// The part of Kata's agent protocol that zpod touches (package `grpc` on the wire).
pub mod agent {
    tonic::include_proto!("grpc");

    /// ttrpc service name of the agent.
    pub const SERVICE: &str = "grpc.AgentService";
    /// ttrpc service name of the agent's health check.
    pub const HEALTH_SERVICE: &str = "grpc.Health";
    /// The vsock port on which the shim expects the agent.
    pub const PORT: u32 = 1024;
}

/// The ttrpc envelope.
pub mod ttrpc {
    tonic::include_proto!("ttrpc");
}
