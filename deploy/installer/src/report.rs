//! What a person and Kubernetes get to see.

use std::fmt::Display;
use std::fs::File;
use std::io::Write as _;
use std::path::Path;

use serde::Serialize;

use crate::error::Error;
use crate::install::{Outcome, Places, installed_path};
use crate::install_dir::{INITRD, KERNEL};
use crate::uninstall::Removal;

/// What Kubernetes keeps of a termination message.
const LONGEST: usize = 4096;

/// A line of the log.
pub fn say(line: impl Display) {
    // A log that can't be written to is no reason to fail.
    let _ = writeln!(std::io::stderr().lock(), "zpod-installer: {line}");
}

/// The last word of a command, in `kubectl describe pod` and `.status..terminated.message`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Message {
    /// What was to be done.
    pub command: &'static str,
    /// One word for a program: `UpToDate`, `Installed`, `Removed`, `Stopped`, or the name of an error.
    pub reason: &'static str,
    /// What happened.
    pub message: String,
    /// What to do about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub remedy: Option<String>,
    /// The node, from the environment.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
}

impl Message {
    /// Something went as it should.
    #[must_use]
    pub fn new(command: &'static str, reason: &'static str, message: String) -> Self {
        Self { command, reason, message, remedy: None, node: std::env::var("NODE_NAME").ok() }
    }

    /// Something didn't.
    #[must_use]
    pub fn of(command: &'static str, error: &Error) -> Self {
        let remedy = Some(error.remedy());
        Self { remedy, ..Self::new(command, error.name(), error.to_string()) }
    }

    /// Says it in the log, and to Kubernetes if `termination_log` is there.
    pub fn publish(&self, termination_log: &Path) {
        let node = self.node.as_deref().map(|node| format!("node {node}: ")).unwrap_or_default();
        say(format_args!("{node}{}", self.message));
        if let Some(remedy) = &self.remedy {
            say(format_args!("remedy: {remedy}"));
        }
        // The kubelet makes it; elsewhere there is none.
        if let Ok(mut file) = File::options().write(true).truncate(true).open(termination_log) {
            let _ = file.write_all(self.json().as_bytes());
        }
    }

    /// Valid JSON however long the message is.
    fn json(&self) -> String {
        let mut short = self.clone();
        loop {
            let text = serde_json::to_string(&short).unwrap_or_default();
            if text.len() <= LONGEST || short.message.is_empty() {
                return text;
            }
            let kept = short.message.chars().count() / 2;
            short.message = short.message.chars().take(kept).collect();
        }
    }
}

/// What an installation came to, in one line.
#[must_use]
pub fn outcome(places: &Places, outcome: &Outcome) -> String {
    let stamp = outcome.stamp();
    let version = stamp.kata_version.as_deref().unwrap_or("of unknown version");
    let (kernel, initrd) = (installed_path(places, KERNEL), installed_path(places, INITRD));
    let what = format!("{} and {} (version {}, Kata {version})", kernel.display(), initrd.display(), stamp.id());
    match outcome {
        Outcome::UpToDate(_) => format!("up to date: {what}"),
        Outcome::Installed { because, .. } => format!("installed {what}: {because}"),
    }
}

/// What an uninstallation came to, in one line.
#[must_use]
pub fn removal(places: &Places, removal: &Removal) -> String {
    let dir = places.install_dir.display();
    let mut text = match removal.versions.len() {
        0 => format!("nothing of zpod was in {dir}"),
        count => format!("removed {count} version(s) from {dir}"),
    };
    if !removal.left.is_empty() {
        let left: Vec<_> = removal.left.iter().map(|path| path.display().to_string()).collect();
        text.push_str(&format!("; left there, not being zpod's: {}", left.join(", ")));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_too_long_for_kubernetes_is_still_json() {
        let message = Message::new("install", "KataMissing", "\"ä".repeat(5000));
        let text = message.json();
        assert!(text.len() <= LONGEST);
        let parsed: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(parsed["reason"], "KataMissing");
        assert!(parsed["message"].as_str().unwrap().starts_with("\"ä"));
    }
}
