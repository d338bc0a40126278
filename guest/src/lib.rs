//! zpod-guest.
pub mod disk;
pub mod error;
pub mod journal;
pub mod machine;
pub mod proxy;
pub mod request;
pub mod ttrpc;
pub mod volumes;
pub mod wire;
