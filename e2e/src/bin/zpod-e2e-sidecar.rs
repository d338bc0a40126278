//! Stand-ins of node-driver-registrar and livenessprobe.

fn main() {}
