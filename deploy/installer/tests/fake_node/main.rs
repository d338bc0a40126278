//! The installer on nodes that look as Kata's own installation leaves them.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod crashes;
mod installs;
mod node;
mod program;
