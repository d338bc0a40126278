//! The host side of zpod: Kata's contract and the control channel to the guests.

pub mod guest;
pub mod kata;
