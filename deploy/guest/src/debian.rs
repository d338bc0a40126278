//! What the machine's own apt says: which mirror, which versions.
//!
//! The guest is built from the mirror the machine already uses, at the
//! versions its package lists name, so a build asks no server that the
//! machine's owner has not chosen, and a cached one asks none at all.

use std::{collections::BTreeMap, process::Command, time::Duration};

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
        let wanted = || BACKPORTED.map(|name| (name, BACKPORTS)).into_iter().chain(CARRIED.map(|name| (name, RELEASE)));
        let mut madison = Command::new(command::find("apt-cache")?);
        madison.arg("madison").args(wanted().map(|(package, _)| package));
        let listing = command::text(command::output(&mut madison, APT_DEADLINE)?);
        wanted()
            .map(|(package, suite)| {
                let version = newest(&listing, package, suite)
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
fn newest(madison: &str, package: &str, suite: &str) -> Option<String> {
    madison.lines().find_map(|line| {
        let mut columns = line.split('|').map(str::trim);
        let (name, version, origin) = (columns.next()?, columns.next()?, columns.next()?);
        let from = origin.split(' ').nth(1)?.split('/').next()?;
        // The release comes with its -security and -updates, backports alone.
        let matches = from == suite || (suite == RELEASE && from.starts_with(RELEASE) && from != BACKPORTS);
        (matches && name == package).then(|| version.to_owned())
    })
}

/// The apt source lines for the build chroot: the machine's own mirrors, as
/// apt itself understands its configuration.
///
/// # Errors
/// [`Error::NoMirror`] when apt has no source for [`RELEASE`].
pub fn sources() -> Result<Vec<String>> {
    let mut apt = Command::new(command::find("apt-get")?);
    apt.args(["indextargets", "--format", "$(RELEASE) $(REPO_URI) $(COMPONENT)", "Created-By: Packages"]);
    chroot_sources(&command::text(command::output(&mut apt, APT_DEADLINE)?))
}

/// From lines `SUITE URI COMPONENT`.
fn chroot_sources(targets: &str) -> Result<Vec<String>> {
    let mirror = |suite: &str, component: &str| {
        targets.lines().find_map(|line| {
            let words: Vec<&str> = line.split(' ').collect();
            matches!(words.as_slice(), [of, _, part] if *of == suite && *part == component)
                .then(|| format!("deb {} {suite} {component}", words[1]))
        })
    };
    let wanted = [
        (RELEASE, "main"),
        ("bookworm-updates", "main"),
        ("bookworm-security", "main"),
        (BACKPORTS, "main"),
        (BACKPORTS, "contrib"),
    ];
    let found: Vec<String> = wanted.into_iter().filter_map(|(suite, component)| mirror(suite, component)).collect();
    // Updates and security may be absent: a frozen mirror has all in one.
    if mirror(RELEASE, "main").is_some() { Ok(found) } else { Err(Error::NoMirror) }
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
        let linux = "linux-image-cloud-amd64";
        assert_eq!(newest(lines, linux, BACKPORTS).unwrap(), "6.12.95-1~bpo12+1");
        assert_eq!(newest(lines, linux, RELEASE).unwrap(), "6.1.192-2");
        assert_eq!(newest(lines, "zfs-dkms", BACKPORTS), None);
    }

    #[test]
    fn the_chroot_uses_the_mirrors_of_the_machine_and_no_other_components() {
        let targets = "bookworm http://m/debian/ main\nbookworm http://m/debian/ non-free\n\
                       bookworm-security http://m/security/ main\n\
                       bookworm-backports http://b/debian/ main\nbookworm-backports http://b/debian/ contrib\n\
                       stable http://elsewhere/ main\n";
        assert_eq!(
            chroot_sources(targets).unwrap(),
            [
                "deb http://m/debian/ bookworm main",
                "deb http://m/security/ bookworm-security main",
                "deb http://b/debian/ bookworm-backports main",
                "deb http://b/debian/ bookworm-backports contrib"
            ]
        );
    }

    #[test]
    fn a_machine_without_a_bookworm_mirror_is_told_so() {
        assert!(matches!(chroot_sources("trixie http://m/debian/ main\n"), Err(Error::NoMirror)));
    }
}
