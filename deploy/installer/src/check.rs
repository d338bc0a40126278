//! Says what is on the node.

use std::fmt::Write as _;

use crate::error::{Error, Result};
use crate::guest::Guest;
use crate::install::{self, Places, Reason};
use crate::install_dir::{Depth, InstallDir, LINK};
use crate::kata::KataInitrd;
use crate::root::HostRoot;
use crate::stamp::Stamp;

/// What was found.
#[derive(Debug)]
pub struct Finding {
    /// For a person.
    pub text: String,
    /// For a program: see the table in README.md.
    pub exit_code: u8,
}

/// Looks at Kata, at the guest of this container (if it has one), and at what is installed.
///
/// # Errors
/// The node can't be looked at.
pub fn check(places: &Places) -> Result<Finding> {
    let root = HostRoot::open(&places.host_root)?;
    let kata = places.search().find(&root);
    let guest = places.guest_dir.exists().then(|| Guest::open(&places.guest_dir)).transpose();
    let mut text = String::new();
    // Writing to a String can't fail.
    let _ = writeln!(text, "kata:      {}", describe_kata(&kata));
    let _ = writeln!(text, "guest:     {}", describe_guest(places, &guest));
    let found = match InstallDir::open(&root, &places.install_dir, places.lock_wait)? {
        None => Err(Reason::Absent),
        Some(dir) => {
            if let Ok(Some(stamp)) = dir.current().map(|id| id.and_then(|id| dir.stamp(&id).ok())) {
                text.push_str(&describe_installed(places, &stamp));
            }
            let guest = guest.as_ref().ok().and_then(Option::as_ref);
            install::assess(&dir, guest, kata.as_ref().ok(), Depth::Hash)?
        }
    };
    let (state, exit_code) = match &found {
        Err(reason @ Reason::Absent) => (reason.to_string(), 10),
        Err(reason @ (Reason::KataChanged | Reason::GuestChanged)) => (format!("out of date: {reason}"), 11),
        Err(reason @ Reason::Damaged(_)) => (reason.to_string(), 12),
        Ok(_) => ("up to date".to_owned(), 0),
    };
    let _ = writeln!(text, "state:     {state}");
    // What keeps an installation from succeeding goes first.
    let exit_code = match (kata.err().or(guest.err()), exit_code) {
        (Some(error), _) => {
            let _ = writeln!(text, "but:       {error}\nremedy:    {}", error.remedy());
            error.exit_code()
        }
        (None, 0) => 0,
        (None, code) => {
            let _ =
                writeln!(text, "remedy:    run `zpod-installer install`, as the node plugin's pod does at its start");
            code
        }
    };
    Ok(Finding { text, exit_code })
}

fn describe_kata(kata: &Result<KataInitrd>) -> String {
    match kata {
        Ok(kata) => {
            let identity = &kata.identity;
            let version = kata.version.as_deref().map(|version| format!(", version {version}")).unwrap_or_default();
            format!("{} ({}){version}", identity.real_path.display(), mib(identity.bytes))
        }
        Err(error) => error.to_string(),
    }
}

fn describe_guest(places: &Places, guest: &Result<Option<Guest>, Error>) -> String {
    match guest {
        Ok(Some(guest)) => {
            let release =
                guest.kernel_release.as_deref().map(|release| format!(", Linux {release}")).unwrap_or_default();
            let (kernel, overlay) = (mib(guest.kernel.bytes), mib(guest.overlay.bytes));
            format!("{}: kernel {kernel}, overlay {overlay}{release}", places.guest_dir.display())
        }
        Ok(None) => {
            format!("{} is not there, so what is installed is not compared with it", places.guest_dir.display())
        }
        Err(error) => error.to_string(),
    }
}

fn describe_installed(places: &Places, stamp: &Stamp) -> String {
    let link = places.install_dir.join(LINK);
    let version = stamp.kata_version.as_deref().unwrap_or("of unknown version");
    let release = stamp.kernel_release.as_deref().map(|release| format!(", Linux {release}")).unwrap_or_default();
    let (id, by) = (stamp.id(), &stamp.installer);
    let mut text = format!("installed: {id} by zpod-installer {by}, with Kata {version}{release}\n");
    for (name, file) in &stamp.files {
        let path = link.join(name);
        let _ = writeln!(text, "           {} {:>10}  sha256 {}", path.display(), mib(file.bytes), file.sha256);
    }
    text
}

fn mib(bytes: u64) -> String {
    // Sizes here are far below the 2^52 at which a double loses bytes.
    #[allow(clippy::cast_precision_loss)]
    let mib = bytes as f64 / (1024.0 * 1024.0);
    format!("{mib:.1} MiB")
}
