//! zpod-guest.
pub mod request;
pub mod ttrpc;
pub mod wire;
