//! x
/// x
#[derive(Debug)]
pub struct LinuxMachine;
