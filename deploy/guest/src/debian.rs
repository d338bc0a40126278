//! What the machine's own apt says: which mirror, which versions.
//!
//! The guest is built from the mirror the machine already uses, at the
//! versions its package lists name, so a build asks no server that the
//! machine's owner has not chosen, and a cached one asks none at all.

use std::{collections::BTreeMap, fs, path::Path, process::Command, time::Duration};

use crate::{Error, Result, command};

/// The Debian release the image is made of.
pub const RELEASE: &str = "bookworm";
/// Where its newer kernel and OpenZFS come from.
pub const BACKPORTS: &str = "bookworm-backports";
/// Installed from backports, at the version apt names.
pub const BACKPORTED: [&str; 4] =
    ["linux-image-cloud-amd64", "linux-headers-cloud-amd64", "zfs-dkms", "zfsutils-linux"];
/// From the release itself: not asked for by version, but part of the key,
/// since the image carries their files.
const CARRIED: [&str; 3] = ["libc6", "libssl3", "libtirpc3"];

const APT_DEADLINE: Duration = Duration::from_secs(60);

/// The versions that decide what a build chroot contains.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Versions(BTreeMap<String, String>);

impl Versions {
    /// Asks the machine's package lists, without the network.
    ///
    /// # Errors
    /// [`Error::NoPackage`] when backports isn't enabled or its lists are missing.
    pub fn resolve() -> Result<Self> {
        let wanted =
            BACKPORTED.map(|package| (package, BACKPORTS)).into_iter().chain(CARRIED.map(|package| (package, RELEASE)));
        wanted
            .map(|(package, suite)| {
                let mut madison = Command::new(command::find("apt-cache")?);
                let lines = command::text(command::output(madison.args(["madison", package]), APT_DEADLINE)?);
                let version = newest(&lines, suite)
                    .ok_or_else(|| Error::NoPackage { package: package.to_owned(), suite: suite.to_owned() })?;
                Ok((package.to_owned(), version))
            })
            .collect::<Result<_>>()
            .map(Self)
    }

    /// `package=version` of each, sorted.
    pub fn pairs(&self) -> impl Iterator<Item = String> {
        self.0.iter().map(|(package, version)| format!("{package}={version}"))
    }

    /// The exact packages to install by name.
    #[must_use]
    pub fn to_install(&self) -> String {
        let pairs = BACKPORTED.iter().filter_map(|package| Some(format!("{package}={}", self.0.get(*package)?)));
        pairs.collect::<Vec<_>>().join(",")
    }
}

/// From `apt-cache madison`, which lists the newest first:
/// `zfs-dkms | 2.3.2-2~bpo12+2 | http://... bookworm-backports/contrib amd64 Packages`.
fn newest(madison: &str, suite: &str) -> Option<String> {
    madison.lines().find_map(|line| {
        let mut columns = line.split('|').map(str::trim);
        let (_, version, origin) = (columns.next()?, columns.next()?, columns.next()?);
        let from = origin.split(' ').nth(1)?.split('/').next()?;
        // The release comes with its -security and -updates, backports alone.
        let matches = from == suite || (suite == RELEASE && from.starts_with(RELEASE) && from != BACKPORTS);
        matches.then(|| version.to_owned())
    })
}

/// The apt source lines for the build chroot, from the machine's own.
///
/// # Errors
/// [`Error::NoMirror`] when /etc/apt names none for [`RELEASE`].
pub fn sources() -> Result<Vec<String>> {
    let etc = Path::new("/etc/apt");
    let mut found = BTreeMap::new();
    let parts = fs::read_dir(etc.join("sources.list.d")).into_iter().flatten().flatten().map(|entry| entry.path());
    for path in parts.chain([etc.join("sources.list")]) {
        let Ok(text) = fs::read_to_string(&path) else { continue };
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("list") => found.extend(one_line(&text)),
            Some("sources") => found.extend(deb822(&text)),
            _ => {}
        }
    }
    chroot_sources(&found)
}

fn chroot_sources(found: &BTreeMap<String, String>) -> Result<Vec<String>> {
    let mirror = found.get(RELEASE).ok_or(Error::NoMirror)?;
    let extra = ["-updates", "-security"].iter().filter_map(|suffix| {
        let suite = format!("{RELEASE}{suffix}");
        found.get(&suite).map(|uri| format!("deb {uri} {suite} main"))
    });
    let backports = found.get(BACKPORTS).unwrap_or(mirror);
    Ok([format!("deb {mirror} {RELEASE} main")]
        .into_iter()
        .chain(extra)
        .chain([format!("deb {backports} {BACKPORTS} main contrib")])
        .collect())
}

/// Suite and URI of each `deb [options] URI SUITE COMPONENT...` line.
fn one_line(text: &str) -> Vec<(String, String)> {
    text.lines()
        .filter_map(|line| {
            let rest = line.trim().strip_prefix("deb ")?.trim_start();
            let rest =
                rest.strip_prefix('[').map_or(rest, |options| options.split_once(']').map_or("", |(_, rest)| rest));
            let mut words = rest.split_whitespace();
            let (uri, suite) = (words.next()?, words.next()?);
            Some((suite.to_owned(), uri.to_owned()))
        })
        .collect()
}

/// Suites and URI of each enabled `Types: deb` stanza.
fn deb822(text: &str) -> Vec<(String, String)> {
    let mut found = Vec::new();
    let mut stanza = BTreeMap::new();
    for line in text.lines().chain([""]) {
        if line.starts_with('#') {
            continue;
        }
        if let Some((name, value)) = line.split_once(':') {
            stanza.insert(name.trim().to_lowercase(), value.trim().to_owned());
        } else if line.trim().is_empty() {
            let field = |name: &str| stanza.get(name).map_or("", String::as_str);
            let enabled = !field("enabled").eq_ignore_ascii_case("no")
                && field("types").split_whitespace().any(|kind| kind == "deb");
            if let Some(uri) = field("uris").split_whitespace().next().filter(|_| enabled) {
                found.extend(field("suites").split_whitespace().map(|suite| (suite.to_owned(), uri.to_owned())));
            }
            stanza.clear();
        }
    }
    found
}

/// The HTTP proxy apt uses on this machine, for the chroot's apt.
///
/// # Errors
/// apt-config is missing or fails.
pub fn proxy() -> Result<Option<String>> {
    let mut config = Command::new(command::find("apt-config")?);
    let dump = command::text(command::output(config.args(["dump", "Acquire::http::Proxy"]), APT_DEADLINE)?);
    let line = dump.lines().find(|line| line.starts_with("Acquire::http::Proxy ") && !line.contains("\"\""));
    Ok(line.map(|line| line.trim_end_matches(';').to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_version_is_taken_from_the_suite_asked_for() {
        let lines = " linux-image-cloud-amd64 | 6.12.95-1~bpo12+1 | http://m/debian bookworm-backports/main amd64 Packages\n\
                     linux-image-cloud-amd64 | 6.1.192-2 | http://m/debian-security bookworm-security/main amd64 Packages\n";
        assert_eq!(newest(lines, BACKPORTS).unwrap(), "6.12.95-1~bpo12+1");
        assert_eq!(newest(lines, RELEASE).unwrap(), "6.1.192-2");
        assert_eq!(newest("", RELEASE), None);
    }

    #[test]
    fn both_formats_of_apt_sources_give_the_same_mirrors() {
        let lines = "# deb http://old bookworm main\ndeb [signed-by=/k arch=amd64] http://m/debian bookworm main\n\
                     deb-src http://m/src bookworm main\ndeb http://m/security bookworm-security main\n";
        let stanzas = "# comment\nTypes: deb\nURIs: http://m/debian\nSuites: bookworm\nComponents: main\n\n\
                       Types: deb-src\nURIs: http://m/src\nSuites: bookworm\n\n\
                       Enabled: no\nTypes: deb\nURIs: http://off\nSuites: bookworm\n\n\
                       Types: deb deb-src\nURIs: http://m/security\nSuites: bookworm-security\n";
        assert_eq!(one_line(lines), deb822(stanzas));
        let sources = chroot_sources(&deb822(stanzas).into_iter().collect()).unwrap();
        assert_eq!(
            sources,
            [
                "deb http://m/debian bookworm main",
                "deb http://m/security bookworm-security main",
                "deb http://m/debian bookworm-backports main contrib"
            ]
        );
    }

    #[test]
    fn a_machine_without_a_bookworm_mirror_is_told_so() {
        assert!(matches!(chroot_sources(&BTreeMap::new()), Err(Error::NoMirror)));
    }
}
