//! The pods' network: a bridge that is there already, a veth pair for each pod, addresses from the node's subnet.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::str::FromStr;
use std::sync::{Mutex, PoisonError};

use anyhow::{Context as _, Result, bail};
use tokio::process::Command;

/// An IPv4 address and the length of its network's prefix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Subnet {
    /// An address in the subnet.
    pub address: Ipv4Addr,
    /// The length of the prefix.
    pub prefix: u8,
}

impl FromStr for Subnet {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let (address, prefix) = text.split_once('/').with_context(|| format!("{text:?} is not ADDRESS/PREFIX"))?;
        let prefix = prefix.parse().with_context(|| format!("prefix of {text:?}"))?;
        if prefix > 30 {
            bail!("{text}: no room for pods");
        }
        Ok(Self { address: address.parse().with_context(|| format!("address of {text:?}"))?, prefix })
    }
}

impl std::fmt::Display for Subnet {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix)
    }
}

/// The network of a node.
#[derive(Debug)]
pub(super) struct Network {
    bridge: String,
    gateway: Subnet,
    pods: Subnet,
    taken: Mutex<BTreeSet<u32>>,
}

impl Network {
    pub(super) fn new(bridge: String, gateway: Subnet, pods: Subnet) -> Self {
        Self { bridge, gateway, pods, taken: Mutex::default() }
    }

    /// An address that no other pod of the node has.
    pub(super) fn take(&self) -> Result<Ipv4Addr> {
        let size = 1_u32 << (32 - self.pods.prefix);
        let first = self.pods.address.to_bits() & !(size - 1);
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        // Neither the network's address, nor the one a gateway usually has, nor the broadcast address.
        let free = (first + 2..first + size - 1).find(|address| !taken.contains(address));
        let free = free.with_context(|| format!("all addresses of {} are taken", self.pods))?;
        taken.insert(free);
        Ok(Ipv4Addr::from_bits(free))
    }

    pub(super) fn give_back(&self, address: Ipv4Addr) {
        self.taken.lock().unwrap_or_else(PoisonError::into_inner).remove(&address.to_bits());
    }

    /// Gives the network namespace of a process an interface with this address. It goes away with the namespace.
    pub(super) async fn attach(&self, process: u32, address: Ipv4Addr) -> Result<()> {
        let (pid, link) = (process.to_string(), format!("veth{process}"));
        ip(&[], &["link", "add", &link, "type", "veth", "peer", "name", "eth0", "netns", &pid]).await?;
        ip(&[], &["link", "set", &link, "master", &self.bridge, "up"]).await?;
        let inside = ["nsenter", "--net", "--target", &pid, "--"];
        let (own, gateway) = (format!("{address}/{}", self.gateway.prefix), self.gateway.address.to_string());
        ip(&inside, &["link", "set", "lo", "up"]).await?;
        ip(&inside, &["addr", "add", &own, "dev", "eth0"]).await?;
        ip(&inside, &["link", "set", "eth0", "up"]).await?;
        ip(&inside, &["route", "add", "default", "via", &gateway]).await
    }
}

async fn ip(before: &[&str], arguments: &[&str]) -> Result<()> {
    let words = [before, &["ip"], arguments].concat();
    let Some((program, rest)) = words.split_first() else { return Ok(()) };
    let output = Command::new(program).args(rest).output().await.with_context(|| format!("run {program}"))?;
    if !output.status.success() {
        bail!("{}: {}", words.join(" "), String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_taken_once_until_they_are_given_back_or_used_up() {
        let network = Network::new("cni0".into(), "10.88.0.1/16".parse().unwrap(), "10.88.1.0/29".parse().unwrap());
        let all: Vec<_> = (0..5).map(|_| network.take().unwrap().to_string()).collect();
        assert_eq!(all, ["10.88.1.2", "10.88.1.3", "10.88.1.4", "10.88.1.5", "10.88.1.6"]);
        assert!(network.take().unwrap_err().to_string().contains("10.88.1.0/29"));
        network.give_back("10.88.1.4".parse().unwrap());
        assert_eq!(network.take().unwrap().to_string(), "10.88.1.4");
    }

    #[test]
    fn a_subnet_needs_a_prefix_that_leaves_room() {
        for text in ["10.88.1.0", "10.88.1.0/31", "10.88.1/24", "10.88.1.0/x"] {
            assert!(text.parse::<Subnet>().is_err(), "{text}");
        }
    }
}
