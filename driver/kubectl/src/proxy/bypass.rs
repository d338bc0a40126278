use std::net::IpAddr;

use hyper::Uri;

/// Whether a server is reached without a proxy, by the rules of Go's `net/http`: this machine always, and what the list
/// in `NO_PROXY` names. What can't be understood in it names nothing.
pub(super) fn contains(list: &str, server: &Uri) -> bool {
    let host = server.host().unwrap_or_default().trim_start_matches('[').trim_end_matches(']').to_ascii_lowercase();
    let host = host.trim_end_matches('.');
    let port = server.port_u16().unwrap_or(443);
    let address = host.parse::<IpAddr>().ok().map(|address| address.to_canonical());
    if host == "localhost" || address.is_some_and(|address| address.is_loopback()) {
        return true;
    }
    list.split(',').map(|entry| entry.trim().to_ascii_lowercase()).any(|entry| names(&entry, host, address, port))
}

fn names(entry: &str, host: &str, address: Option<IpAddr>, port: u16) -> bool {
    if entry == "*" {
        return true;
    }
    if let Some((network, length)) = entry.split_once('/') {
        let network = network.parse::<IpAddr>().ok().zip(length.parse::<u32>().ok());
        return address.zip(network).is_some_and(|(address, (network, length))| within(address, network, length));
    }
    let (name, of_port) = without_port(entry);
    if of_port.is_some_and(|of_port| of_port != port) {
        return false;
    }
    if let Ok(named) = name.parse::<IpAddr>() {
        return address == Some(named.to_canonical());
    }
    let name = name.strip_prefix('*').filter(|rest| rest.starts_with('.')).unwrap_or(name);
    let (below, itself) = match name.strip_prefix('.') {
        Some(domain) => (domain, false),
        None => (name, true),
    };
    if below.is_empty() {
        return false;
    }
    match host.strip_suffix(below) {
        Some("") => itself,
        Some(rest) => rest.ends_with('.'),
        None => false,
    }
}

/// An entry's host and its port, if it has one: `host`, `host:1`, `::1`, `[::1]`, `[::1]:1`.
fn without_port(entry: &str) -> (&str, Option<u16>) {
    if let Some(rest) = entry.strip_prefix('[') {
        let (host, port) = rest.split_once(']').unwrap_or((rest, ""));
        return (host, port.strip_prefix(':').and_then(|port| port.parse().ok()));
    }
    match entry.split_once(':') {
        Some((host, port)) if !port.contains(':') => match port.parse() {
            Ok(port) => (host, Some(port)),
            Err(_) => (entry, None),
        },
        _ => (entry, None),
    }
}

fn within(address: IpAddr, network: IpAddr, length: u32) -> bool {
    match (address, network) {
        (IpAddr::V4(address), IpAddr::V4(network)) if length <= 32 => {
            let mask = u32::MAX.checked_shl(32 - length).unwrap_or(0);
            address.to_bits() & mask == network.to_bits() & mask
        }
        (IpAddr::V6(address), IpAddr::V6(network)) if length <= 128 => {
            let mask = u128::MAX.checked_shl(128 - length).unwrap_or(0);
            address.to_bits() & mask == network.to_bits() & mask
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_reached_without_a_proxy_is_what_go_says() {
        for (list, server, without) in [
            ("", "https://api.example.com:6443", false),
            ("", "https://localhost:6443", true),
            ("", "https://127.3.0.1:6443", true),
            ("", "https://[::1]:6443", true),
            ("*", "https://api.example.com", true),
            ("example.com", "https://example.com:6443", true),
            ("example.com", "https://api.Example.com:6443", true),
            ("example.com", "https://notexample.com:6443", false),
            (".example.com", "https://api.example.com:6443", true),
            (".example.com", "https://example.com:6443", false),
            ("*.example.com", "https://a.b.example.com", true),
            ("*.example.com", "https://example.com", false),
            ("example.com:6443", "https://example.com:6443", true),
            ("example.com:6443", "https://example.com", false),
            ("example.com:443", "https://example.com", true),
            (" a.example , b.example,", "https://b.example:6443", true),
            ("10.0.0.0/8", "https://10.1.2.3:6443", true),
            ("10.0.0.0/8", "https://11.1.2.3:6443", false),
            ("10.0.0.0/8", "https://10.example.com:6443", false),
            ("0.0.0.0/0", "https://11.1.2.3:6443", true),
            ("10.0.0.0/33", "https://10.0.0.1", false),
            ("10.1.2.3", "https://10.1.2.3:6443", true),
            ("10.1.2.3:443", "https://10.1.2.3:6443", false),
            ("fd00::/8", "https://[fd12::1]:6443", true),
            ("fd00::/8", "https://[fe80::1]:6443", false),
            ("fd12::1", "https://[fd12::1]:6443", true),
            ("[fd12::1]:6443", "https://[fd12::1]:6443", true),
            ("no/host,,.,*.", "https://api.example.com", false),
        ] {
            assert_eq!(contains(list, &server.parse().unwrap()), without, "{server} with NO_PROXY={list}");
        }
    }
}
