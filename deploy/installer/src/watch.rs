//! Keeps the guest in step with Kata while the node runs.
//!
//! # Design
//! An init container runs when its pod starts, and Kata may be upgraded at any time. So a small container beside the
//! node plugin looks, every few seconds, whether Kata's initrd is still the file that ours was made from: a few
//! open(2) and fstat(2), nothing is read. Until it has looked, new pods get the agent of before.
//!
//! What another release of zpod has installed is left alone: during a rolling update both run, and each would undo the
//! other's work. What is missing is made, whoever removed it: a node whose watch runs is to have a guest. An uninstallation
//! comes in the place of the watch (the chart's `guest.uninstall`), not beside it.

use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::Duration;

use crate::error::{Error, Result};
use crate::guest::Guest;
use crate::install::{self, Outcome, Places, Reason};
use crate::install_dir::{Depth, InstallDir};
use crate::report::{self, say};
use crate::root::HostRoot;

/// What one look came to.
#[derive(Debug, PartialEq, Eq)]
pub enum Look {
    /// Nothing has changed.
    Same,
    /// It was made anew.
    Renewed(Outcome),
    /// Another release has installed its own.
    Superseded,
    /// Another installer is at work.
    Busy,
}

/// Looks, and renews what has to be.
#[derive(Debug)]
pub struct Watch<'a> {
    places: &'a Places,
    guest: Guest,
    superseded: bool,
}

impl<'a> Watch<'a> {
    /// Reads the guest, once: a container's image doesn't change.
    ///
    /// # Errors
    /// The guest is not as it should be.
    pub fn new(places: &'a Places) -> Result<Self> {
        Ok(Self { places, guest: Guest::open(&places.guest_dir)?, superseded: false })
    }

    /// Looks once.
    ///
    /// # Errors
    /// What is installed stays as it is, then.
    pub fn look(&mut self) -> Result<Look> {
        let root = HostRoot::open(&self.places.host_root)?;
        let found = match InstallDir::open(&root, &self.places.install_dir, Duration::ZERO) {
            Err(Error::Busy { .. }) => return Ok(Look::Busy),
            Err(error) => return Err(error),
            Ok(None) => Err(Reason::Absent),
            // The lock ends with this arm: an installation takes it again.
            Ok(Some(dir)) => match install::assess(&dir, Some(&self.guest), None, Depth::Size)? {
                Ok(_) => {
                    self.superseded = false;
                    let kata = self.places.search().find(&root)?;
                    install::assess(&dir, Some(&self.guest), Some(&kata), Depth::Size)?
                }
                // Without the link but with versions, somebody lost only the link.
                Err(Reason::Absent) if !dir.versions()?.is_empty() => {
                    Err(Reason::Damaged("the link is gone".to_owned()))
                }
                other => other,
            },
        };
        match found {
            Ok(_) => Ok(Look::Same),
            Err(Reason::GuestChanged) => {
                self.superseded = true;
                Ok(Look::Superseded)
            }
            // That release has a watch of its own.
            Err(Reason::Absent) if self.superseded => Ok(Look::Superseded),
            Err(_) => {
                let outcome = install::install_guest(self.places, &root, &self.guest)?;
                self.superseded = false;
                Ok(Look::Renewed(outcome))
            }
        }
    }

    /// Looks every `interval` until told to stop. Says what is new, once.
    pub fn run(&mut self, interval: Duration, stop: &Receiver<()>) {
        let mut said = String::new();
        loop {
            let line = match self.look() {
                Ok(Look::Same | Look::Busy) => String::new(),
                Ok(Look::Renewed(outcome)) => report::outcome(self.places, &outcome),
                Ok(Look::Superseded) => {
                    "another release of zpod has installed its guest: leaving that alone".to_owned()
                }
                Err(error) => format!("{error}; what is installed stays; remedy: {}", error.remedy()),
            };
            if line != said && !line.is_empty() {
                say(&line);
            }
            said = line;
            match stop.recv_timeout(interval) {
                Err(RecvTimeoutError::Timeout) => {}
                Ok(()) | Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    }
}
