//! Puts the guest on the node, if it isn't there already.

use std::fmt;
use std::fs::File;
use std::io::{self, BufReader, Read, Seek as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use zpod_image::initrd;
use zpod_image::manifest::Output;

use crate::digest::{self, Hashing};
use crate::error::{Error, Result};
use crate::guest::Guest;
use crate::inspect::{self, Contents};
use crate::install_dir::{Depth, INITRD, InstallDir, KERNEL, LINK, Staging};
use crate::kata::{self, KataInitrd, Search};
use crate::report::say;
use crate::root::HostRoot;
use crate::stamp::Stamp;
use crate::version::Version;

/// The first whose kata-deploy has `customRuntimes`, which our runtime is one of. What we need of Kata's runtimes and
/// agent is older: `agent.server_addr=unix://` 2.1, direct volumes in runtime-rs 3.2, `create_container_timeout` in
/// runtime-rs 3.19.
pub const OLDEST_KATA: Version = Version::new(3, 26, 0);

/// Directory entries and a manifest.
const SLACK: u64 = 1 << 20;
/// How long a Kata that is being installed is waited for.
const SETTLE_DEADLINE: Duration = Duration::from_secs(30);

/// Where everything is.
#[derive(Debug, Clone)]
pub struct Places {
    /// The node's root, as this process sees it.
    pub host_root: PathBuf,
    /// The directory with our kernel and overlay, as this process sees it.
    pub guest_dir: PathBuf,
    /// Kata's directory on the node.
    pub kata_dir: PathBuf,
    /// Our directory on the node.
    pub install_dir: PathBuf,
    /// Kata's initrd on the node, if it isn't to be looked for.
    pub kata_initrd: Option<PathBuf>,
    /// An initrd that was written to more recently than this is still being written to.
    pub settle: Duration,
    /// How long to wait for another installer.
    pub lock_wait: Duration,
}

impl Places {
    /// Where to look for Kata.
    #[must_use]
    pub fn search(&self) -> Search<'_> {
        Search { kata_dir: &self.kata_dir, install_dir: &self.install_dir, initrd: self.kata_initrd.as_deref() }
    }
}

/// What an installation came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// All was there.
    UpToDate(Box<Stamp>),
    /// Made now.
    Installed {
        /// What it is.
        stamp: Box<Stamp>,
        /// Why.
        because: Reason,
    },
}

impl Outcome {
    /// What is there now.
    #[must_use]
    pub fn stamp(&self) -> &Stamp {
        match self {
            Self::UpToDate(stamp) => stamp,
            Self::Installed { stamp, .. } => stamp,
        }
    }
}

/// Why what is there won't do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reason {
    /// There is nothing.
    Absent,
    /// It was made from another Kata initrd.
    KataChanged,
    /// It has another kernel or overlay than this installer.
    GuestChanged,
    /// Its files are not what they were.
    Damaged(String),
}

impl fmt::Display for Reason {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Absent => formatter.write_str("nothing was installed"),
            Self::KataChanged => formatter.write_str("Kata's initrd has changed"),
            Self::GuestChanged => formatter.write_str("zpod's kernel or overlay has changed"),
            Self::Damaged(what) => write!(formatter, "what was installed is damaged: {what}"),
        }
    }
}

/// Compares what is installed with what should be.
///
/// # Errors
/// Something that is not ours is in the way.
pub fn assess(
    dir: &InstallDir,
    guest: Option<&Guest>,
    kata: Option<&KataInitrd>,
    depth: Depth,
) -> Result<Result<Stamp, Reason>> {
    let Some(id) = dir.current()? else { return Ok(Err(Reason::Absent)) };
    let stamp = match dir.stamp(&id) {
        Ok(stamp) => stamp,
        Err(what) => return Ok(Err(Reason::Damaged(what))),
    };
    if guest.is_some_and(|guest| !stamp.is_of(guest)) {
        return Ok(Err(Reason::GuestChanged));
    }
    if kata.is_some_and(|kata| stamp.kata != kata.identity) {
        return Ok(Err(Reason::KataChanged));
    }
    Ok(dir.verify(&id, &stamp, depth).map_err(Reason::Damaged).map(|()| stamp))
}

/// Installs what is missing or out of date, and nothing else.
///
/// # Errors
/// What is installed stays as it is, then.
pub fn install(places: &Places) -> Result<Outcome> {
    let root = HostRoot::open(&places.host_root)?;
    let guest = Guest::open(&places.guest_dir)?;
    install_guest(places, &root, &guest)
}

/// As [`install`], with a guest that was read before.
///
/// # Errors
/// As [`install`].
pub fn install_guest(places: &Places, root: &HostRoot, guest: &Guest) -> Result<Outcome> {
    let kata = settled(places, root)?;
    let dir = InstallDir::create(root, &places.install_dir, places.lock_wait)?;
    dir.clear_leftovers()?;
    let because = match assess(&dir, Some(guest), Some(&kata), Depth::Hash)? {
        Ok(stamp) => {
            dir.prune(&stamp.id())?;
            return Ok(Outcome::UpToDate(Box::new(stamp)));
        }
        Err(because) => because,
    };
    if because == Reason::KataChanged
        && let Some(stamp) = same_bytes(&dir, &kata)?
    {
        dir.stage()?.finish(&stamp)?;
        return Ok(Outcome::UpToDate(Box::new(stamp)));
    }
    check_room(&dir, guest, &kata)?;
    say(format_args!("{because}: making an initrd from {}", kata.identity.real_path.display()));
    let mut staging = dir.stage()?;
    let stamp = match fill(&mut staging, root, guest, kata) {
        Ok(stamp) => stamp,
        Err(error) => {
            staging.abandon();
            return Err(error);
        }
    };
    staging.finish(&stamp)?;
    dir.switch_to(&stamp.id())?;
    Ok(Outcome::Installed { stamp: Box::new(stamp), because })
}

/// Kata's initrd, once nobody has written to it for a while: tar and cp put files under their final names at once.
fn settled(places: &Places, root: &HostRoot) -> Result<KataInitrd> {
    let mut waited = Duration::ZERO;
    loop {
        let kata = places.search().find(root)?;
        let (seconds, nanos) = kata.identity.modified.max(kata.identity.changed);
        let written = Duration::new(seconds.try_into().unwrap_or(0), nanos.try_into().unwrap_or(0));
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        // One from the future won't get older by waiting.
        let age = now.checked_sub(written).unwrap_or(places.settle);
        let Some(wait) = places.settle.checked_sub(age).filter(|wait| !wait.is_zero()) else { return Ok(kata) };
        if waited > SETTLE_DEADLINE {
            let reason = format!("it has been written to for {} s", waited.as_secs());
            return Err(Error::Unfinished { path: kata.identity.path, reason });
        }
        std::thread::sleep(wait);
        waited += wait;
    }
}

/// The stamp for a Kata initrd that was touched or moved, but holds what it held.
fn same_bytes(dir: &InstallDir, kata: &KataInitrd) -> Result<Option<Stamp>> {
    let path = &kata.identity.path;
    let Some(id) = dir.current()? else { return Ok(None) };
    let Ok(stamp) = dir.stamp(&id) else { return Ok(None) };
    let now = digest::of(&kata.file).map_err(Error::at("read", path))?;
    (&kata.file).rewind().map_err(Error::at("read", path))?;
    let same = now == stamp.kata_initrd && dir.verify(&id, &stamp, Depth::Hash).is_ok();
    Ok(same.then(|| Stamp { kata: kata.identity.clone(), ..stamp }))
}

fn check_room(dir: &InstallDir, guest: &Guest, kata: &KataInitrd) -> Result<()> {
    let needed = guest.kernel.bytes + guest.overlay.bytes + kata.identity.bytes + SLACK;
    let free = dir.free()?;
    if free >= needed {
        return Ok(());
    }
    let reason = format!("{} MiB are needed, {} MiB are free", needed.div_ceil(1 << 20), free >> 20);
    Err(Error::DiskFull { path: dir.path().to_owned(), reason })
}

fn fill(staging: &mut Staging, root: &HostRoot, guest: &Guest, kata: KataInitrd) -> Result<Stamp> {
    let path = kata.identity.path.clone();
    let (base, contents) = staging.add(INITRD, |file, path| write_initrd(file, path, guest, &kata))?;
    staging.add(KERNEL, |file, path| {
        let mut out = Hashing::new(file);
        io::copy(&mut guest.open_kernel()?, &mut out).map_err(Error::at("write", path))?;
        Ok(((), out.output()))
    })?;
    if base.bytes != kata.identity.bytes || !kata.is_unchanged(root) {
        return Err(Error::Unfinished { path, reason: "it was replaced while it was read".to_owned() });
    }
    let version = check_contents(&path, &contents, kata.version)?;
    let files = staging.files.clone();
    let stamp = Stamp::new(guest, kata.identity, base, version, files);
    if stamp.files.get(KERNEL) != Some(&stamp.kernel) {
        return Err(Error::BadGuest { path: KERNEL.into(), reason: "it changed while it was copied".to_owned() });
    }
    Ok(stamp)
}

/// Writes the initrd, then reads Kata's part of it again: what is checked is what is there.
fn write_initrd(
    file: &mut File,
    path: &Path,
    guest: &Guest,
    kata: &KataInitrd,
) -> Result<((Output, Contents), Output)> {
    let mut base = Hashing::new(&kata.file);
    let mut overlay = Hashing::new(guest.open_overlay()?);
    let mut out = Hashing::new(&mut *file);
    initrd::concatenate(&mut base, &mut overlay, &mut out).map_err(Error::at("write", path))?;
    let (base, overlay, whole) = (base.output(), overlay.output(), out.output());
    if overlay != guest.overlay {
        return Err(Error::BadGuest { path: "overlay".into(), reason: "it changed while it was copied".to_owned() });
    }
    if base.bytes == 0 {
        return Err(Error::Unfinished { path: kata.identity.path.clone(), reason: "it is empty".to_owned() });
    }
    file.rewind().map_err(Error::at("read", path))?;
    let written = Read::take(&*file, base.bytes);
    let contents = inspect::inspect(&mut BufReader::with_capacity(128 << 10, written)).map_err(|error| {
        let path = kata.identity.path.clone();
        match error.kind() {
            io::ErrorKind::UnexpectedEof => Error::Unfinished { path, reason: "it ends too early".to_owned() },
            _ => Error::BadInitrd { path, reason: error.to_string() },
        }
    })?;
    Ok(((base, contents), whole))
}

/// What Kata's version is, and whether this initrd will do.
fn check_contents(path: &Path, contents: &Contents, version_file: Option<String>) -> Result<Option<String>> {
    let bad = |reason: &str| Error::BadInitrd { path: path.to_owned(), reason: reason.to_owned() };
    if contents.ours {
        return Err(bad("it has zpod's overlay in it already"));
    }
    if !contents.init && contents.opaque.is_none() {
        return Err(bad("it has no /init and no /sbin/init"));
    }
    if let Some(format) = contents.opaque {
        say(format_args!("{} has a part compressed by {format}: it is used without a look into it", path.display()));
    }
    if let Some(architecture) = &contents.architecture {
        kata::check_architecture(path, architecture)?;
    }
    let version = contents.version.clone().or(version_file);
    match version.as_deref().map(str::parse::<Version>) {
        Some(Ok(found)) if found < OLDEST_KATA => {
            Err(Error::TooOld { found: found.to_string(), minimum: OLDEST_KATA.to_string() })
        }
        Some(Ok(_)) => Ok(version),
        Some(Err(_)) | None => {
            say(format_args!("Kata's version can't be found out; {OLDEST_KATA} or later is needed"));
            Ok(version)
        }
    }
}

/// Where Kata's drop-in finds a file.
#[must_use]
pub fn installed_path(places: &Places, name: &str) -> PathBuf {
    places.install_dir.join(LINK).join(name)
}
