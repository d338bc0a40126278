//! The cluster scenarios.

fn main() {}
